"""Small images, random weights, and the scripts as a user runs them. No test needs a network, and none finds one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
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

import inference  # noqa: E402
import main_train  # noqa: E402
from engine.console import run_script  # noqa: E402
from engine.fast import fast_copy  # noqa: E402
from engine.files import content_hash  # noqa: E402
from models import TransferModel  # noqa: E402

CPU = torch.device("cpu")
COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
QUICK = ("--image-size", 32, "--epochs", 3)
SMALL = ("--models", "mobilenet_v3_small")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# a small member of every family of torchvision's classification models, and both ways of reading MobileNetV3-Large
FAMILIES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_large_levels", "mobilenet_v3_small",
    "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_32",
]  # fmt: skip
ONE_SIZE = {"maxvit_t": 224, "vit_b_32": 224}
LARGE = ("convnext_tiny", "efficientnet_v2_s", "maxvit_t", "vgg11_bn", "vit_b_32")
SMALL_FAMILIES = [name for name in FAMILIES if name not in LARGE]  # which have all kinds of layers


# ------------------------------------------------------------------------------------------- images and weights


def draw(path: Path, color: tuple[int, int, int], seed: int, size: tuple[int, int] = (24, 24)) -> None:
    noise = np.random.default_rng(seed).normal(0, 40, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """photos/{train,test}/{blue,green,red}/*.png, 20 and 6 of each."""
    for part, count, first in (("train", 20, 0), ("test", 6, 100)):
        for label, (name, color) in enumerate(COLORS.items()):
            for i in range(count):
                draw(tmp_path / "photos" / part / name / f"{i}.png", color, seed=1000 * label + first + i)
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


def random_model(name: str, image_size: int | None = None, classes=("zebra", "ant", "car")) -> TransferModel:
    torch.manual_seed(0)
    return randomize_statistics(TransferModel(name, classes, image_size, pretrained=False)).eval()


def noise(model: TransferModel, count: int = 2) -> torch.Tensor:
    size = model.preprocessing["image_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------- the scripts


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


def replace_everywhere(name: str, new: object, setattr: Callable = setattr) -> object:
    """Replaces what a name stands for, in every module of the project that has the name. Returns what it stood for."""
    folders = str(ROOT), str(ROOT / "engine")
    holders = [module for module in list(sys.modules.values()) if name in getattr(module, "__dict__", ())]
    holders = [module for module in holders if os.path.dirname(getattr(module, "__file__", None) or "") in folders]
    before = vars(holders[0])[name]
    for module in holders:
        setattr(module, name, new)
    return before


@pytest.fixture
def replace(monkeypatch):
    """`replace_everywhere`, until the end of the test."""
    return lambda name, new: replace_everywhere(name, new, monkeypatch.setattr)


@pytest.fixture
def fine_tuning_helps(replace):
    """Makes the frozen model's answers on validation so bad that every epoch of fine-tuning is better."""

    def worse(*args):
        history, logits = fit_classifier(*args)
        return history, -10 * logits

    fit_classifier = replace("fit_classifier", worse)


@pytest.fixture
def plots():
    """A test with this fixture draws a model's plots; otherwise `run` saves blank ones."""


@pytest.fixture
def run(tmp_path, weights, monkeypatch, capsys, replace, request):
    """Runs a script's main as the command line does, in an empty folder. Returns exit code, stdout and stderr.

    Training writes into that folder, unless the arguments say otherwise. Equal models share a fast copy.
    """
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_blank)
        replace("draw_model", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(weights))
    replace("fast_copy", shared_fast_copy)

    def command(script, *args):
        if script is main_train and "--output" not in args:
            args = ("--output", ".", *args)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_script(lambda: script.main([str(arg) for arg in args]))
        out, err = capsys.readouterr()
        return left.value.code, out, without_progress(err)

    return command


def save_blank(figure: object, file: object, **options: object) -> None:
    Image.new("RGB", (1, 1)).save(file, "png")


FAST_COPIES: dict[str, torch.nn.Module] = {}


def shared_fast_copy(
    model: TransferModel, device: torch.device, precision: str | None = None, packed: bool = True
) -> torch.nn.Module:
    values = [model.name, model.classes, model.preprocessing, model.temperature, model.views, model.precision]
    key = content_hash(model.state_dict(), [*values, str(device), precision, packed])
    if key not in FAST_COPIES:
        if len(FAST_COPIES) > 20:
            FAST_COPIES.clear()
        FAST_COPIES[key] = fast_copy(model, device, precision, packed)
    return FAST_COPIES[key]


@pytest.fixture
def answers(run):
    """Runs inference.py, which must succeed. Returns its records."""

    def records(*args) -> list[dict]:
        code, out, _ = run(inference, *args, "--format", "json")
        assert code == 0 and out
        return [json.loads(line) for line in out.splitlines()]

    return records


def start(*args: object, cwd: Path, **options) -> subprocess.Popen:
    """Starts Python with a script in a process of its own."""
    command = [sys.executable, *map(str, args)]
    # a process started in the background ignores SIGINT, and so would its children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for a process. Returns exit code, stdout and stderr."""
    out, err = process.communicate(timeout=500)
    return process.returncode, out, without_progress(err)


def without_progress(err: str) -> str:
    """What a script has written to stderr, without the lines that tell of its progress if the machine is slow."""
    assert "Traceback" not in err, err
    return re.sub(r"^.* of .* images, .* elapsed, .* left\n", "", err, flags=re.MULTILINE)


# ------------------------------------------------------------------------------------------ what they have written


def results(folder: Path) -> list[dict]:
    """The rows of results.json."""
    return json.loads((folder / "plots" / "results.json").read_text())["runs"]


def repeatable(folder: Path) -> dict[str, dict]:
    """The rows of results.json, by model, without what may differ from run to run, such as times."""
    rows, measured = results(folder), ("seconds", "features", "checkpoint_bytes")
    for row in rows:
        for key in (*measured, "date", "command", "commit", "versions"):  # timm counts if another test has imported it
            del row[key]
        for epoch in row["history"]:
            del epoch["seconds"]
    return {row["model"]: row for row in rows}


def checkpoints(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every checkpoint."""
    files = sorted((folder / "checkpoints").glob("*.pt"))
    return {file.name: torch.load(file, weights_only=True)["state_dict"] for file in files}


def same(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> bool:
    """Whether two results of `checkpoints` are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[m][key], b[m][key]) for m in a for key in a[m])


def share_right(records: list[dict]) -> float:
    """The accuracy of inference.py's records, whose images lie in folders named as their classes."""
    return float(np.mean([record["label"] == Path(record["path"]).parent.name for record in records]))
