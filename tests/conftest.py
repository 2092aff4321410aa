"""Small images and random weights, made here. No test needs a network, and none finds one."""

import os
import socket
import sys
import time
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: tests that share the cores get one thread each
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data as data_module  # noqa: E402

COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}


def draw(path: Path, color: tuple[int, int, int], seed: int, size: tuple[int, int] = (24, 24)) -> None:
    noise = np.random.default_rng(seed).normal(0, 40, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """photos/{train,test}/{blue,green,red}/*.png, 20 and 6 of each."""
    for part, count in (("train", 20), ("test", 6)):
        for label, (name, color) in enumerate(COLORS.items()):
            for i in range(count):
                draw(
                    tmp_path / "photos" / part / name / f"{i}.png",
                    color,
                    seed=1000 * label + i + 100 * (part == "test"),
                )
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A TORCH_HOME with random weights, BatchNorm statistics included, for all backbones but VGG16."""
    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    for name in ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "efficientnet_b0"):
        torch.manual_seed(1)
        model = randomize_statistics(torchvision.models.get_model(name))
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        torch.save(model.state_dict(), home / "hub" / "checkpoints" / Path(url).name)
    return home


def randomize_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Gives BatchNorm statistics, scales and shifts that folding has to respect."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connect_here(self, address):
        if address[0] != "127.0.0.1":
            raise OSError("no network")
        return connect(self, address)

    def look_up_here(host, *args, **kwargs):
        if host != "127.0.0.1":
            raise OSError("no network")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)


@pytest.fixture
def run(tmp_path, weights, monkeypatch, capsys):
    """Runs a script's main as the command line does, in an empty folder. Returns exit code, stdout and stderr.

    Training writes into that folder, unless the arguments say otherwise.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(weights))
    # what measures the speed of a model, for a second
    monkeypatch.setattr("train_utils.run_images_here", lambda *args, **kwargs: [time.sleep(0.01)])

    def command(script, *args):
        if script.__name__ == "main_train" and "--output" not in args:
            args = ("--output", ".", *args)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            data_module.run_script(lambda: script.main([str(arg) for arg in args]))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return left.value.code, out, err

    return command
