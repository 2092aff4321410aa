"""The user's environment stays outside: settings of matplotlib, streams, variables of other programs, hardware."""

import os

import pytest
import torch
from conftest import ROOT, draw, finish, random_model, start
from PIL import Image

import main_train
from engine.distributed import with_process_group
from models import save_checkpoint


@pytest.fixture
def classify(tmp_path):
    """A command that draws an image with its label into plot.png."""
    save_checkpoint(tmp_path / "x.pt", random_model("mobilenet_v3_small", 64), {})
    draw(tmp_path / "image.png", (40, 90, 200), seed=0)
    return ROOT / "inference.py", "image.png", "--checkpoint", "x.pt", "--plot", "plot.png"


def test_settings_of_matplotlib_and_variables_of_other_programs(classify, tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: nowhere\n")
    environment = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # as notebooks export it
        "MATPLOTLIBRC": str(tmp_path),
        "WORLD_SIZE": "4",  # as batch systems export it
        "RANK": "",
    }
    code, out, err = finish(start(*classify, cwd=tmp_path, env=environment))
    assert code == 0 and "image.png" in out and err.count("\n") == 1, err
    assert Image.open(tmp_path / "plot.png").size


def test_a_program_without_streams(classify, tmp_path):
    command = ["-c", "import os, sys; os.closerange(0, 3); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"]
    assert start(*command, *classify, cwd=tmp_path).wait(200) == 0
    assert Image.open(tmp_path / "plot.png").size  # nothing else was written into it


def test_bf16_without_the_hardware_is_named(run, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    code, _, err = run(main_train, "--data", "nowhere", "--precision", "bf16", "--device", "cpu")
    assert code == 2 and "no bf16 instructions" in err.splitlines()[0]


def test_two_processes_on_one_gpu_are_refused(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc_per_node=1"):
        with_process_group(lambda: 0)()
