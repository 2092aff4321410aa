"""Small images, random weights, and the scripts as a user runs them. No test needs a network, and none finds one.

Training takes a second or more. A test that needs a trained model, not a training, takes `trained` or `compared`: a
copy of what one training has left, which all tests of a session share.
"""

import contextlib
import io
import json
import os
import re
import shutil
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
from filelock import FileLock
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import inference  # noqa: E402
import main_train  # noqa: E402
import train_utils  # noqa: E402
from engine.console import run_script  # noqa: E402
from models import TransferModel, load_checkpoint, save_checkpoint  # noqa: E402

CPU = torch.device("cpu")
COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
QUICK = ("--image-size", 32, "--epochs", 3)
SMALL = ("--models", "mobilenet_v3_small")
THREE = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")

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
    return draw_photos(tmp_path / "photos")


def draw_photos(folder: Path) -> Path:
    for part, count, first in (("train", 20, 0), ("test", 6, 100)):
        for label, (name, color) in enumerate(COLORS.items()):
            for i in range(count):
                draw(folder / part / name / f"{i}.png", color, seed=1000 * label + first + i)
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder of that name once, for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        with FileLock(folder / f"{name}.lock"):
            if not (folder / f"{name}.done").exists():
                shutil.rmtree(folder / name, ignore_errors=True)  # a worker that failed left it
                fill(folder / name)
                (folder / f"{name}.done").touch()
        return folder / name

    return make


@pytest.fixture(scope="session")
def weights(once) -> Path:
    """A TORCH_HOME with random weights, BatchNorm statistics included, for all backbones but VGG16."""

    def save(home: Path) -> None:
        (home / "hub" / "checkpoints").mkdir(parents=True)
        for name in (*THREE, "efficientnet_b0"):
            torch.manual_seed(1)
            model = randomize_statistics(torchvision.models.get_model(name))
            url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
            torch.save(model.state_dict(), home / "hub" / "checkpoints" / Path(url).name)

    return once("torch_home", save)


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


@pytest.fixture
def run(tmp_path, weights, monkeypatch, capsys):
    """Runs a script's main as the command line does, in an empty folder. Returns exit code, stdout and stderr.

    Training writes into that folder, unless the arguments say otherwise.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(weights))

    def command(script, *args):
        if script is main_train and "--output" not in args:
            args = ("--output", ".", *args)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_script(lambda: script.main([str(arg) for arg in args]))
        out, err = capsys.readouterr()
        return left.value.code, out, without_progress(err)

    return command


@pytest.fixture
def train(run):
    """Runs main_train.py on a data set: a small model and few epochs, unless more arguments say otherwise."""
    return lambda data, *args: run(main_train, "--data", data, *SMALL, *QUICK, *args)


@pytest.fixture(scope="session")
def train_once(once, weights) -> Callable[..., Path]:
    """Trains once in a session. Leaves photos/, data/ (the cache), my runs [v2]/ (the output), cwd/ (empty).

    `code`, `out` and `err` are files of what it has said. It is for reading only.
    """

    def train(folder: Path, *args: object) -> None:
        (folder / "cwd").mkdir(parents=True)
        args = ["--data", draw_photos(folder / "photos"), *QUICK, *args]
        args += ["--output", folder / "my runs [v2]", "--cache", folder / "data"]
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(folder / "cwd")
            patch.setenv("TORCH_HOME", str(weights))
            code = main_train.main([str(arg) for arg in args])
        for name, text in (("code", str(code)), ("out", out.getvalue()), ("err", without_progress(err.getvalue()))):
            (folder / name).write_text(text)

    return lambda name, *args: once(name, lambda folder: train(folder, *args))


@pytest.fixture(scope="session")
def training(train_once) -> Path:
    """What one training of three models leaves."""
    return train_once("training", "--models", *THREE, "--seeds", 2)


@pytest.fixture
def known(training, tmp_path) -> Path:
    """The test's folder, with a copy of the cache: the features of all `photos` are known."""
    shutil.copytree(training / "data", tmp_path / "data")
    return tmp_path


@pytest.fixture
def compared(training, known) -> Path:
    """`known` with a copy of the three trained models and their plots."""
    return shutil.copytree(training / "my runs [v2]", known, dirs_exist_ok=True)


@pytest.fixture
def trained(compared) -> Path:
    """`compared` with the checkpoint of MobileNetV3-Small alone."""
    for name in THREE[:2]:
        (compared / "checkpoints" / f"{name}.pt").unlink()
    return compared


def move_data(file: Path, photos: Path) -> None:
    """Makes a checkpoint of the shared training one of a training on `photos`."""
    model = load_checkpoint(file)
    save_checkpoint(file, model, {**model.origin, "data": str(photos)})


@pytest.fixture
def fine_tuning_helps(monkeypatch):
    """Makes the frozen model's answers on validation so bad that every epoch of fine-tuning is better."""
    whole = train_utils.fit_classifier

    def worse(*args):
        history, logits = whole(*args)
        return history, -10 * logits

    monkeypatch.setattr(train_utils, "fit_classifier", worse)


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """The texts in the figure that was saved last."""
    found, savefig = [], Figure.savefig

    def save(figure, *args, **kwargs):
        found[:] = [text.get_text() for text in figure.findobj(Text) if text.get_text()]
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return found


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
    lines = r"^(.* images, .* elapsed(, .* left)?|Matplotlib is building the font cache.*)\n"
    return re.sub(lines, "", err, flags=re.MULTILINE)


@contextlib.contextmanager
def limited_files(size: int):
    """No file can grow beyond that many bytes, as on a full disk."""
    import resource  # Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
