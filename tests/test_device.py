"""Cores and threads."""

import torch

from engine.device import available_cpus, full_precision, threads


def test_available_cpus_respects_the_quota_of_a_container(tmp_path):
    cpus = available_cpus(tmp_path / "none")
    for quota, expected in (("max 100000", cpus), ("100000 100000", 1), ("150000 100000", min(2, cpus)), ("?", cpus)):
        (tmp_path / "cpu.max").write_text(quota)
        assert available_cpus(tmp_path / "cpu.max") == expected


def test_limits_of_threads_are_nested_and_lifted():
    before = torch.get_num_threads()
    with threads(3):
        with threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_overlapping_calls_in_full_precision_leave_the_setting_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    first, second = full_precision(), full_precision()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32
