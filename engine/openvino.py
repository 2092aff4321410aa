"""How does a frozen network run in OpenVINO, if that is installed (pip install openvino)?

On a CPU in fp32 most networks are a little faster there than in the fast copy (benchmarks/README.md). Converting a
network takes some seconds, so the program is kept beside the features, and few images do without.
"""

import io
import sys
import tempfile
import threading
import time
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from engine.console import first_line
from engine.device import threads
from engine.fast import fast_copy
from engine.files import load_tensors, save_tensors

MANY = 4096  # images, from which on the conversion takes less time than it saves


def openvino_version(device: torch.device, precision: str, images: int, file: Path | None = None) -> str:
    """The version of OpenVINO if it is worth its conversion, else "". `file` may hold a converted program."""
    if device.type == "cpu" and precision == "fp32" and (images >= MANY or (file and file.exists())):
        with suppress(PackageNotFoundError):
            return version("openvino")
    return ""


def fastest_copy(model: nn.Module, device: torch.device, images: int, precision: str | None = None) -> nn.Module:
    """The copy of a TransferModel that takes the least time for so many images."""
    if openvino_version(device, precision or model.precision, images):
        return openvino_copy(model)
    return fast_copy(model, device, precision)


def openvino_copy(model: nn.Module, file: Path | None = None) -> nn.Module:
    """The fast copy of a TransferModel in fp32 on the CPU, of which `features` run in OpenVINO if that is faster.

    `file` keeps the program, or that there is none. A network that cannot be converted keeps its fast copy.
    """
    fast, kept = fast_copy(model, torch.device("cpu"), "fp32"), _load(file)
    try:
        openvino = _import()
    except Exception as error:  # whatever a broken or an old installation raises
        print(f"OpenVINO is not used: {first_line(error)}", file=sys.stderr)
        return fast
    plain = fast.features
    with suppress(Exception):  # a network with operators that it lacks
        program = convert(openvino, model) if kept is None else kept
        if program:
            fast.features = Program(openvino, program)
        if kept is None:
            kept = program if _is_better(fast, plain) else {}
    if file and not file.exists():
        save_tensors(file, kept or {})
    if not kept:
        fast.features = plain
    return fast


@torch.inference_mode()
def _is_better(fast: nn.Module, plain: nn.Module) -> bool:
    """Whether `fast` has the same outputs as with plain `features`, in less time."""
    ours, seconds, outputs = fast.features, {}, {}
    images = torch.randn(8, *fast.example().shape[1:], generator=torch.Generator().manual_seed(0))
    with threads(1):  # as in run_images
        for features in (ours, plain) * 3:  # the first calls warm up
            fast.features = features
            start = time.perf_counter()
            outputs[features] = fast.forward_view(images)
            seconds.setdefault(features, []).append(time.perf_counter() - start)
    fast.features, expected = ours, outputs[plain]
    same = (outputs[ours] - expected).abs().max() < 1e-3 * expected.abs().max()
    return bool(same) and min(seconds[ours]) < min(seconds[plain])


def _import() -> ModuleType:
    blocked = sys.modules.setdefault("openvino_telemetry", None)  # or the import is reported to Google Analytics
    try:
        import openvino

        for name in ("Core", "convert_model", "save_model"):
            getattr(openvino, name)
    except Exception:
        if blocked is None:
            del sys.modules["openvino_telemetry"]
        raise
    return openvino


def _load(file: Path | None) -> dict[str, Tensor] | None:
    with suppress(Exception):  # no file yet, or a damaged one
        return load_tensors(file)
    return None


class _View(nn.Module):
    """Images in channels_last (B, H, W, 3), as run_images has them in memory -> features (B, width)"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_view(images.permute(0, 3, 1, 2))


def convert(openvino: ModuleType, model: nn.Module) -> dict[str, Tensor]:
    """OpenVINO's program for one view of one image: its graph and its weights, as bytes."""
    with warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of other packages' code
        image = model.example().permute(0, 2, 3, 1).contiguous()
        network = openvino.convert_model(torch.export.export(_View(model).eval(), (image,)))
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
        cores = torch.get_num_threads()
        options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": cores, "INFERENCE_NUM_THREADS": cores}
        options["ENABLE_CPU_PINNING"] = False  # other processes may run on the same cores
        self.compiled = core.compile_model(core.read_model(io.BytesIO(graph), io.BytesIO(weights)), "CPU", options)
        self.of_thread = threading.local()

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self.of_thread, "request"):
            self.of_thread.request = self.compiled.create_infer_request()
        arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
        outputs = [self.of_thread.request.infer(array[None], share_inputs=True)[0] for array in arrays]
        return torch.cat([torch.from_numpy(output) for output in outputs])
