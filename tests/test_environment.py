"""The user's environment stays outside: settings of matplotlib, streams, variables of other programs, hardware."""

import os

import torch
from conftest import QUICK, ROOT, SMALL, finish, results, start

import main_train


def test_settings_of_matplotlib_and_variables_of_other_programs(photos, weights, tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: nowhere\n")
    environment = os.environ | {
        "TORCH_HOME": str(weights),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # as notebooks export it
        "MATPLOTLIBRC": str(tmp_path),
        "WORLD_SIZE": "4",  # as batch systems export it
        "RANK": "",
    }
    command = (ROOT / "main_train.py", "--data", photos, *SMALL, *QUICK, "--output", "out")
    assert finish(start(*command, cwd=photos, env=environment))[::2] == (0, "")
    assert (photos / "out" / "plots" / "comparison.png").exists()


def test_a_program_without_streams(photos, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    command = ["-c", "import os, sys; os.closerange(0, 3); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"]
    script = (ROOT / "main_train.py", "--data", photos, *SMALL, *QUICK, "--output", "out")
    assert start(*command, *script, cwd=tmp_path).wait(200) == 0
    assert results(tmp_path / "out")[0]["test_accuracy"] >= 0


def test_bf16_without_the_hardware_is_named(run, photos, replace):
    replace("computes_in_bf16", lambda device: False)
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK, "--precision", "bf16", "--device", "cpu")
    assert code == 0 and "no bf16 instructions" in err and err.count("\n") == 1


def test_two_processes_on_one_gpu_are_refused(monkeypatch, capsys):
    from engine.distributed import spmd

    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    try:
        spmd(lambda: 0)()
    except ValueError as error:
        assert "--nproc_per_node=1" in str(error)
    else:
        raise AssertionError("not refused")
