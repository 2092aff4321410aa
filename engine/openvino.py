"""How does a network run in OpenVINO, if that is installed (pip install openvino)? In fp32, and in int8.

On a CPU in fp32 most networks are faster there than in the fast copy (benchmarks/README.md). Converting a network takes
some seconds, so few images do without, and a program is kept beside its features. In int8, which NNCF prepares (pip
install openvino nncf), weights and activations have 8 bits: the program belongs to the model, and to its checkpoint.
"""

import copy
import importlib
import io
import logging
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.console import first_line
from engine.distributed import world_size
from engine.fast import fast_copy
from engine.files import content_hash, load_tensors, locked, save_tensors
from engine.images import Item, read_and_preprocess
from engine.run import run_images

WORTH_CONVERTING = 2048  # images a core, from which on the conversion takes less time than it saves
LEAST_SIMILAR = 0.8  # the cosine of features in fp32 and int8; pretrained networks have 0.9 or more
CALIBRATION, CHECKED = 200, 64  # images, from which NNCF takes the ranges of activations, and that test the program


def usable_version(device: torch.device, precision: str) -> str:
    """The version of OpenVINO if it is installed and may take the place of the fast copy, else ""."""
    return package_version("openvino") if device.type == "cpu" and precision == "fp32" else ""


def package_version(package: str) -> str:
    """The version of an installed package, or "". Does not import it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def worth_converting(images: int) -> bool:
    """Whether OpenVINO saves more time with so many images than its conversion takes."""
    return images >= WORTH_CONVERTING * torch.get_num_threads() * world_size()


def fastest_copy(model: nn.Module, device: torch.device, images: int = 1, precision: str | None = None) -> nn.Module:
    """The copy of a TransferModel that is the fastest for so many images. Raises ValueError if int8 is impossible."""
    precision = precision or model.precision
    if precision == "int8":
        return _int8_copy(model, device)
    if worth_converting(images) and usable_version(device, precision):
        return openvino_copy(model)
    return fast_copy(model, device, precision)


def openvino_copy(model: nn.Module, file: Path | None = None) -> nn.Module:
    """The fast copy of a TransferModel in fp32 on the CPU, of which `features` run in OpenVINO if that is faster.

    `file` keeps the program, or that the fast copy is faster. A network that cannot be converted keeps its fast copy.
    """
    fast = fast_copy(model, torch.device("cpu"), "fp32")
    try:
        openvino = _import()
    except Exception as error:  # whatever a broken or an old installation raises
        print(f"OpenVINO is not used: {first_line(error)}", file=sys.stderr)
        return fast
    with suppress(Exception):  # a network with operators that OpenVINO lacks; a disk that is full
        program = _load(file)
        if program is None:
            converted = as_bytes(openvino, convert(openvino, model))
            program = converted if _is_better(fast, Program(openvino, converted)) else {}
            if file:
                _keep(file, program)
        if program:
            fast.features = Program(openvino, program)
    return fast


def _is_better(fast: nn.Module, program: nn.Module) -> bool:
    """Whether the fast copy's features are the same in OpenVINO, in less time. On all cores, as in extraction."""
    plain, seconds, outputs = fast.features, {}, {}
    shape, generator = (3, *fast.example().shape[2:]), torch.Generator().manual_seed(0)
    images = torch.randint(256, (8 * torch.get_num_threads(), *shape), generator=generator, dtype=torch.uint8)
    try:
        for features in (program, plain) * 5:  # the first calls warm up
            fast.features = features
            start = time.perf_counter()
            batches = list(run_images([fast], images, type(fast).forward_view, batch_size=8))
            seconds.setdefault(features, []).append(time.perf_counter() - start)
            outputs[features] = torch.cat([batch.outputs[0] for batch in batches])
    finally:
        fast.features = plain
    expected = outputs[plain]
    same = (outputs[program] - expected).abs().max() < 1e-3 * expected.abs().max()
    return bool(same) and min(seconds[program]) < min(seconds[plain])


def _import() -> ModuleType:
    sys.modules.setdefault("openvino_telemetry", None)  # or the import is reported to Google Analytics
    openvino = importlib.import_module("openvino")
    for name in ("Core", "convert_model", "save_model"):
        getattr(openvino, name)  # raises AttributeError for an old version
    return openvino


def _load(file: Path | None) -> dict | None:
    with suppress(Exception):  # no file yet, or a damaged one
        return load_tensors(file)
    return None


def holds_program(file: Path | None) -> bool:
    """Whether what openvino_copy has kept is a program, not that the fast copy is faster."""
    return bool(_load(file))


def _keep(file: Path, content: dict) -> None:
    for leftover in file.parent.glob(f".{file.name}.*.part"):  # a killed run left it
        leftover.unlink()
    save_tensors(file, content)


class _View(nn.Module):
    """Images in channels_last (B, H, W, 3), as run_images has them in memory -> features (B, width)"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_view(images.permute(0, 3, 1, 2))


def convert(openvino: ModuleType, model: nn.Module) -> object:
    """OpenVINO's network for one view of one image."""
    with _quiet(), torch.no_grad():
        image = model.example().permute(0, 2, 3, 1).contiguous()
        network = openvino.convert_model(torch.export.export(_View(model).eval(), (image,)))
        network.reshape(list(image.shape))  # its shape would not be fixed, which takes up to 1.2 times as long
        return network


def as_bytes(openvino: ModuleType, network: object) -> dict[str, Tensor]:
    """A network's graph and weights: the program, as a file or a checkpoint keeps it."""
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(network, Path(folder, "x.xml"), compress_to_fp16=False)
        files = {"graph": Path(folder, "x.xml"), "weights": Path(folder, "x.bin")}
        return {name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for name, file in files.items()}


class Program(nn.Module):
    """A program of OpenVINO in place of a model's `features`: images (B, 3, H, W) -> features (B, width).

    Each core has its own requests, of one image each, which is faster than a batch.
    """

    def __init__(self, openvino: ModuleType, program: dict[str, Tensor]):
        super().__init__()
        self.like = nn.Parameter(torch.zeros(0), requires_grad=False)  # tells the device and the type of images
        core, (graph, weights) = openvino.Core(), (program[name].numpy().tobytes() for name in ("graph", "weights"))
        network, cores = core.read_model(io.BytesIO(graph), io.BytesIO(weights)), torch.get_num_threads()

        def compiled(streams: int) -> object:
            options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams}
            options["ENABLE_CPU_PINNING"] = False  # other processes may run on the same cores
            return core.compile_model(network, "CPU", options)

        image = np.random.default_rng(0).standard_normal(network.inputs[0].shape, np.float32)
        self.compiled = compiled(1)
        expected = self.compiled(image)[0]
        for _ in range(5 if cores > 1 else 0):  # what is compiled for several streams may be wrong, which is chance
            fast = compiled(cores)
            if abs(fast(image)[0] - expected).max() <= 1e-3 * abs(expected).max():
                self.compiled = fast
                break
        self.of_thread = threading.local()

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self.of_thread, "request"):
            self.of_thread.request = self.compiled.create_infer_request()
        arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
        outputs = [self.of_thread.request.infer(array[None], share_inputs=True)[0] for array in arrays]
        return torch.cat([torch.from_numpy(output) for output in outputs])


# -------------------------------------------------------------------------------------------------------- int8


def check_int8(device: torch.device) -> None:
    """Raises ValueError if models cannot be trained in int8 here."""
    if device.type != "cpu":
        raise ValueError(f"int8 runs on the CPU only, not on {device.type}: use --device cpu")
    try:
        with _quiet():
            _import(), importlib.import_module("nncf")
    except Exception as error:  # whatever a broken or an old installation raises
        needed = f"int8 needs OpenVINO and NNCF ({first_line(error)}): pip install --upgrade openvino nncf"
        raise ValueError(needed) from error


def check_answers(model: nn.Module, precision: str | None = None) -> None:
    """Raises ValueError if a TransferModel cannot answer in this precision (default: its own)."""
    if (precision or model.precision) != "int8":
        return
    if not model.program:
        raise ValueError(f"{model.name} was not trained in int8: main_train.py --precision int8 does that")
    try:
        _import()
    except Exception as error:
        needed = f"{model.name} answers in int8, which needs OpenVINO ({first_line(error)})"
        raise ValueError(f"{needed}: pip install --upgrade openvino, or use --precision fp32") from error


def _int8_copy(model: nn.Module, device: torch.device) -> nn.Module:
    check_answers(model, "int8")
    if device.type != "cpu":
        raise ValueError(f"{model.name} answers in int8, on the CPU only: use --device cpu, or --precision fp32")
    try:
        features = Program(_import(), model.program)
    except Exception as error:  # whatever a version that cannot read it raises
        raise ValueError(f"{model.name} does not run in this version of OpenVINO: {first_line(error)}") from error
    # without copies of what the program replaces
    return copy.deepcopy(model, {id(model.features): features, id(model.program): {}}).requires_grad_(False).eval()


def quantize(model: nn.Module, items: Sequence[Item], ids: Sequence[str], folder: Path) -> tuple[dict, float]:
    """OpenVINO's program of a TransferModel's features in int8, its graph and its weights as bytes, and the seconds.

    The ranges of activations are those of a sample of the images, chosen by their hashes. `folder` keeps the program.
    It is used again as long as half of that sample are among the images, because features of another program are
    others. Raises ValueError if NNCF cannot quantise the network, OSError if a file cannot be written.
    """
    images = dict(zip(ids, items, strict=True))  # once each
    ordered = sorted(images)
    sample, checked = ordered[:CALIBRATION], ordered[-CHECKED:]  # without a common image, if there are enough
    key = [model.backbone, model.width, model.preprocessing, *map(package_version, ("openvino", "nncf"))]
    name = f"{model.name}-{content_hash(model.features.state_dict(), key)[:16]}"
    file = folder / f"{name}-{content_hash({}, sample)[:8]}.int8"
    with locked(folder / f".{name}.lock", wait=True):
        for candidate in [file, *sorted(folder.glob(f"{name}-*.int8"))]:
            kept = _load(candidate)
            if kept and 2 * sum(image in images for image in kept["sample"]) >= max(len(kept["sample"]), len(sample)):
                return kept["program"], kept["seconds"]
        print(f"{model.backbone}: preparing int8 with {len(sample)} training images")
        start = time.perf_counter()
        try:
            program = _quantized(model, *([images[image] for image in some] for some in (sample, checked)))
        except OSError:  # also an image that cannot be read
            raise
        except Exception as error:  # whatever a network with other operators makes them raise
            raise ValueError(f"{model.backbone} cannot run in int8: {first_line(error)}") from error
        kept = {"program": program, "seconds": time.perf_counter() - start, "sample": sample}
        _keep(file, kept)
        return program, kept["seconds"]


def _quantized(model: nn.Module, items: Sequence[Item], checked: Sequence[Item]) -> dict[str, Tensor]:
    """The program, with ranges of activations from images. Raises ValueError if the features of others change much."""
    images = (read_and_preprocess(item, model.preprocessing) for item in items)
    arrays = [image.permute(0, 2, 3, 1).contiguous().numpy() for image in images]
    with _quiet():
        openvino, nncf = _import(), importlib.import_module("nncf")
        mixed = nncf.QuantizationPreset.MIXED  # ranges of activations need not be symmetric
        network = nncf.quantize(convert(openvino, model), nncf.Dataset(arrays), preset=mixed, subset_size=len(arrays))
    program = as_bytes(openvino, network)
    cosine = _similarity(model, Program(openvino, program), checked)
    if not cosine >= LEAST_SIMILAR:  # also if it is not a number
        raise ValueError(f"its features become others (cosine {cosine:.2f})")
    return program


@torch.inference_mode()
def _similarity(model: nn.Module, program: nn.Module, items: Sequence[Item]) -> float:
    """The mean cosine of an image's features in fp32 and in int8, both without the features' means."""
    images = torch.cat([read_and_preprocess(item, model.preprocessing) for item in items])
    fast = fast_copy(model, images.device, "fp32")
    rows, others = (torch.cat([run(part) for part in images.split(8)]) for run in (fast.forward_view, program))
    return F.cosine_similarity(rows - rows.mean(dim=0), others - others.mean(dim=0)).mean().item()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps other packages' notes and progress bars from the screen."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
