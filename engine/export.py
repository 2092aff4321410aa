"""How does a model leave the project? As a program for torch.export.load (.pt2), or for ONNX (.onnx)."""

import importlib
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.console import first_line
from engine.device import DTYPES
from engine.fast import fast_copy
from engine.files import atomic_write


class _Probabilities(nn.Module):
    """Images, uint8 (B, 3, S, S), RGB -> probabilities (B, classes)"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(model.preprocessing["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(model.preprocessing["std"])[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        images = ((images / 255 - self.mean) / self.std).to(DTYPES[self.model.precision])
        return (self.model(images) / self.model.temperature).softmax(dim=1)


def export(model: nn.Module, path: Path) -> None:
    """Writes a TransferModel for use without this project: uint8 RGB images (B, 3, S, S) -> probabilities (B, classes)

    "classes" and "preprocessing" are stored as JSON: extra files (.pt2) or metadata (.onnx). Before it is written, its
    answers for 16 images of noise are compared with those of the fast copy; for ONNX only if onnxruntime is installed.
    Raises OSError if the file cannot be written, ValueError if the model cannot be exported.
    """
    if model.precision == "int8":
        raise ValueError(f"{path} is not written: {model.name} was trained in int8, and exports are in fp32 or bf16")
    size, noise = model.preprocessing["image_size"], torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8, generator=noise)
    program = _Probabilities(fast_copy(model, torch.device("cpu"), packed=False)).eval()
    expected = _Probabilities(fast_copy(model, torch.device("cpu")))
    exporters, suffix = {".pt2": _torch_export, ".onnx": _onnx_export}, path.suffix.lower()
    reading = {key: model.preprocessing[key] for key in ("image_size", "crop", "interpolation")}
    notes = {"classes": model.classes, "preprocessing": {**reading, "advice": advice(model)}}
    try:
        if suffix not in exporters:
            raise ValueError("its name must end in .pt2 or .onnx")
        if suffix == ".onnx" and model.precision != "fp32":
            raise ValueError(f"ONNX keeps fp32 only, and the model was trained in {model.precision}: export to .pt2")
        content, exported = exporters[suffix](program, images, {key: json.dumps(note) for key, note in notes.items()})
        if exported:
            with torch.inference_mode():
                answers, tolerance = expected(images), 1e-4 if model.precision == "fp32" else 0.03
            if not torch.allclose(torch.cat([exported(images[:1]), exported(images[1:])]), answers, atol=tolerance):
                raise ValueError("its answers differ from those of the checkpoint")
    except ImportError as error:
        raise ValueError(f"{path} needs packages: pip install onnx onnxscript ({first_line(error)})") from error
    except Exception as error:  # whatever an exporter raises for a network that it cannot trace
        raise ValueError(f"{path} is not written: {first_line(error)}") from error
    with atomic_write(path) as file:
        file.write(content)


def advice(model: nn.Module) -> str:
    """How to prepare an image for an exported model."""
    size, interpolation = model.preprocessing["image_size"], model.preprocessing["interpolation"]
    part = "its square in the middle" if model.preprocessing["crop"] else "squeezed into a square"
    return f"each image upright, {part}, resized to {size}x{size} ({interpolation}, with antialiasing)"


def _torch_export(program: nn.Module, images: Tensor, notes: dict[str, str]) -> tuple[bytes, Callable]:
    """The content of the file, and the function from images to probabilities that it holds."""
    exported = torch.export.export(program, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    buffer = io.BytesIO()
    torch.export.save(exported, buffer, extra_files=notes)
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _onnx_export(program: nn.Module, images: Tensor, notes: dict[str, str]) -> tuple[bytes, Callable | None]:
    """The content of the file, and the function from images to probabilities, or None without onnxruntime."""
    for parameter in program.parameters():  # channels_last weights would add a Gather, which not every reader knows
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    options = {"dynamic_shapes": {"images": {0: torch.export.Dim("batch")}}, "dynamo": True, "verbose": False}
    exported = torch.onnx.export(program, (images,), input_names=["images"], output_names=["probabilities"], **options)
    exported.model.metadata_props.update(notes)
    content = exported.model_proto.SerializeToString()
    with suppress(ImportError):
        session = importlib.import_module("onnxruntime").InferenceSession(content)
        return content, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    return content, None
