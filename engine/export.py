"""How does a model leave the project? As a program for torch.export.load (.pt2), or for ONNX (.onnx)."""

import copy
import importlib
import io
import json
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.console import first_line
from engine.files import atomic_write


class _Probabilities(nn.Module):
    """Images, uint8 (B, 3, S, S), RGB -> probabilities (B, classes)"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(model.preprocessing["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(model.preprocessing["std"])[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (self.model((images / 255 - self.mean) / self.std) / self.model.temperature).softmax(dim=1)


def export(model: nn.Module, path: Path) -> None:
    """Writes a TransferModel in a form that works without this project.

    Input: uint8 RGB images (B, 3, S, S) of the model's size S. Output: calibrated fp32 probabilities (B, classes). The
    class names are stored as JSON under "classes": an extra file (.pt2) or metadata (.onnx). The exported model is
    compared with `model` on 16 images of noise before it is written; ONNX only if onnxruntime is installed.
    Raises OSError if the file cannot be written, ValueError if the model cannot be exported.
    """
    size = model.preprocessing["image_size"]
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8, generator=noise)
    program = _Probabilities(copy.deepcopy(model)).eval().requires_grad_(False)
    exporters = {".pt2": _torch_export, ".onnx": _onnx_export}
    try:
        if path.suffix not in exporters:
            raise ValueError("its name must end in .pt2 or .onnx")
        content, answers = exporters[path.suffix](program, images, json.dumps(model.classes))
        if answers is not None and not torch.allclose(answers, program(images), atol=1e-4):
            raise ValueError("its answers differ from those of the checkpoint")
    except ImportError as error:
        raise ValueError(f"{path} needs packages: pip install onnx onnxscript ({first_line(error)})") from error
    except Exception as error:  # whatever an exporter raises for a network that it cannot trace
        raise ValueError(f"{path} is not written: {first_line(error)}") from error
    with atomic_write(path) as file:
        file.write(content)


def _torch_export(program: nn.Module, images: Tensor, classes: str) -> tuple[bytes, Tensor]:
    """The file's content, and what it answers for the images, in batches of 1 and 15."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    buffer = io.BytesIO()
    exported = torch.export.export(program, (images,), dynamic_shapes=shapes)
    torch.export.save(exported, buffer, extra_files={"classes": classes})
    content = buffer.getvalue()
    parts = [torch.export.load(io.BytesIO(content)).module()(part) for part in (images[:1], images[1:])]
    return content, torch.cat(parts)


def _onnx_export(program: nn.Module, images: Tensor, classes: str) -> tuple[bytes, Tensor | None]:
    """As _torch_export. The answers are None without onnxruntime."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    names = {"input_names": ["images"], "output_names": ["probabilities"], "verbose": False}
    exported = torch.onnx.export(program, (images,), dynamo=True, dynamic_shapes=shapes, **names)
    exported.model.metadata_props["classes"] = classes
    content = exported.model_proto.SerializeToString()
    with suppress(ImportError):
        session = importlib.import_module("onnxruntime").InferenceSession(content)
        parts = [session.run(None, {"images": part.numpy()})[0] for part in (images[:1], images[1:])]
        return content, torch.cat([torch.from_numpy(part) for part in parts])
    return content, None
