"""Which features are known already, and where are they kept?

Each image goes through the frozen backbone once. Its features are appended to a file, which later runs map into memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import openvino
from engine.device import batch_size_for
from engine.distributed import barrier, is_first, of_first
from engine.fast import fast_copy
from engine.files import content_hash
from engine.images import ImageError, Images, Item
from engine.records import Features, Records
from engine.run import Output, run_images

HALF_PRECISION_ABOVE = 200_000  # images; features of more are kept as float16: the same accuracy (benchmarks/scale.md)
SINGLE, HALF = {".features": "<f4"}, {".half.features": "<f2"}


@dataclass
class Extraction:
    """The features of N images, and what it took."""

    features: Features
    seconds: float  # time to compute the features, in this run and in earlier runs
    computed: int  # number of images whose features were computed in this run
    openvino: str  # its version, or "" if it did not compute them


def extract_features(
    model: nn.Module, parts: dict[str, Images], folder: Path, device: torch.device
) -> dict[str, Extraction]:
    """Returns the features of the images of each part. Computes those that `folder` lacks.

    For int8, first makes the model's program, from images of the first part. Raises ValueError if that fails,
    ImageError if an image cannot be read, OSError if a file cannot be written, FloatingPointError if features
    overflow.
    """
    preparing = 0.0
    if model.precision == "int8" and not model.program:
        sample = next(iter(parts.values()))
        made = openvino.quantize(model, sample.items, sample.ids, folder) if is_first() else None
        model.program, preparing = of_first(made)
    ids = [identity for images in parts.values() for identity in images.ids]
    records, program = _records(model, ids, folder, device, everywhere=True)
    fast, found = cache(partial(_fast_copy, model, device, program)), {}
    for part, images in parts.items():
        compute = partial(_compute, fast, images.items, type(model).forward_features)
        title = f"{model.backbone} features"
        features, _, seconds, computed, errors = records.complete(images.ids, compute, title, batch_size_for(device))
        for error in errors.values():  # the survey of the data has left out those that never could be read
            raise error
        found[part] = features, seconds + preparing, computed
        preparing = 0.0  # it counts once
    in_openvino = model.precision == "int8" or openvino.holds_program(program)
    version = openvino.package_version("openvino") if in_openvino else ""
    return {part: Extraction(*each, version) for part, each in found.items()}


def _compute(
    fast: Callable[[], nn.Module], items: Sequence[Item], forward: Output, images: list[int]
) -> Iterator[tuple[np.ndarray, dict[int, ImageError]]]:
    """Yields the rows of images and the errors of those that cannot be read, batch by batch."""
    for batch in run_images([fast()], (items[i] for i in images), forward):
        yield batch.outputs[0].numpy(), batch.errors


def known_features(model: nn.Module, ids: list[str], folder: Path, device: torch.device) -> tuple[Features, Tensor]:
    """The features that `folder` has, and the indices (M,) of their images."""
    records, _ = _records(model, ids, folder, device, everywhere=False)
    return records.known(ids)[:2]


def _records(
    model: nn.Module, ids: list[str], folder: Path, device: torch.device, everywhere: bool
) -> tuple[Records, Path | None]:
    """Where the features of a model are kept, and the file of OpenVINO's program, if that computes them.

    The records' name holds a hash of all that determines the features, except the image. OpenVINO has records of its
    own. They are used if they know more of the images than the others; if there are many images, also where the others
    know less than a tenth, as after a quick look. `everywhere`: all processes call this, and do as the first one.
    """
    key = {name: getattr(model, name) for name in ("backbone", "width", "preprocessing", "precision", "views")}
    key |= {"weights": content_hash(model.features.state_dict()), "device": device.type, "torch": torch.__version__}
    key["pillow"] = PIL.__version__  # versions of the decoder differ in a few files
    if model.precision == "int8":
        key |= {"program": content_hash(model.program), "openvino": openvino.package_version("openvino")}
    kinds = {**HALF, **SINGLE} if len(ids) > HALF_PRECISION_ABOVE else {**SINGLE, **HALF}
    if model.precision == "bf16":
        kinds = {".features": "<f2"}  # float16 holds more digits than bf16

    name = model.name.removesuffix("_finetuned")  # fine-tuning may have kept the frozen backbone

    def records(infix: str = "", **more: str) -> Records:
        digest = hashlib.sha256(json.dumps({**key, **more}, sort_keys=True).encode()).hexdigest()
        return Records(folder, f"{name}-{infix}{digest[:16]}", kinds, model.width)

    version = openvino.usable_version(device, model.precision)
    plain, converted, convert = records(), records("openvino-", openvino=version), False
    if version:
        different = sorted(set(ids))
        known, known_converted = (len(each.read(different, check=False)[1]) for each in (plain, converted))
        convert = known_converted > known or (openvino.worth_converting(len(different)) and 10 * known < len(different))
    if of_first(convert) if everywhere else convert:
        return converted, folder / f"{converted.name}.program"
    return plain, None


def _fast_copy(model: nn.Module, device: torch.device, program: Path | None) -> nn.Module:
    """The copy of the model that computes the features. The first process keeps OpenVINO's program for all."""
    if not program:
        return openvino.fastest_copy(model, device)
    first = openvino.openvino_copy(model, program) if is_first() else None
    barrier()
    return first or (openvino.openvino_copy(model, program) if program.exists() else fast_copy(model, device))


@torch.inference_mode()
def most_similar(model: nn.Module, queries: Tensor, features: Features, count: int) -> list[list[tuple[int, float]]]:
    """For each of Q images, features (Q, width), the images whose features are most similar, and the cosines."""
    scale = getattr(model.classifier, "standardize", nn.Identity())
    queries = F.normalize(scale(queries))
    cosines = torch.cat([F.normalize(scale(block)) @ queries.T for block in features.blocks()])  # (N, Q)
    cosines, images = cosines.T.topk(min(count, len(features)))
    return [list(zip(*pair, strict=True)) for pair in zip(images.tolist(), cosines.tolist(), strict=True)]
