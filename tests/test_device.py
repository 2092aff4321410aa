"""Devices, cores and threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.device import available_cpus, full_precision, pick_device, threads


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


def test_a_thread_that_starts_during_a_limit_does_not_keep_it():
    """Else all threads after it would start with the limit, too."""
    before = torch.get_num_threads()

    def limited() -> int:
        with threads(1):
            return torch.get_num_threads()

    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as pool:
            with threads(2):
                assert pool.submit(torch.get_num_threads).result() == 2
            assert pool.submit(limited).result() == 1
            assert pool.submit(torch.get_num_threads).result() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("chosen", [False, True])
def test_overlapping_calls_in_full_precision_leave_the_setting_as_it_was(chosen):
    """Also if the program has chosen "ieee", after which torch refuses to read the old name of the setting."""
    cudnn = torch.backends.cudnn
    if chosen and not hasattr(cudnn, "conv"):
        pytest.skip("torch has no other setting")
    setting = (cudnn.conv, "fp32_precision") if chosen else (cudnn, "allow_tf32")
    default = getattr(*setting)
    setattr(*setting, before := "ieee" if chosen else True)
    try:
        first, second = full_precision(), full_precision()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert getattr(*setting) == ("ieee" if chosen else False)
        if not chosen:  # which torch itself reads, in any thread
            torch.export.export(torch.nn.ReLU(), (torch.ones(1),))
        second.__exit__(None, None, None)
        assert getattr(*setting) == before
    finally:
        setattr(*setting, default)


def test_a_gpu_that_does_not_compute_is_left_out(monkeypatch, capsys):
    """As an old one, for which this build of torch has no code: torch says that it is available."""

    def ones(count, device):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nfor debugging consider ...")
        return torch.full((count,), 1.0, device=device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "ones", ones)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    assert "no kernel image is available\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--device auto"):
        pick_device("cuda")
