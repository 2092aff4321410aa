"""Which features are known already, and where are they kept?

Each image goes through the frozen backbone once. Its features are appended to a file, which later runs map into memory.
"""

import hashlib
import json
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.console import Progress
from engine.device import batch_size_for
from engine.distributed import barrier, gather, is_first, rank, share, world_size
from engine.fast import fast_copy
from engine.files import content_hash, explain_write_error, locked
from engine.images import ImageError, Item
from engine.openvino import openvino_copy, openvino_version
from engine.run import Batch, run_images

HALF_PRECISION_ABOVE = 200_000  # images; features of more are kept as float16: the same accuracy (benchmarks/scale.md)


@dataclass
class Features:
    """The features of N images. They stay in their files, mapped into memory; `features[indices]` reads some."""

    tables: Sequence[Tensor]  # of each file, (rows, width)
    places: Tensor  # (N, 2): for each image the number of its table and its row there

    def __len__(self) -> int:
        return len(self.places)

    @property
    def width(self) -> int:
        return self.tables[0].shape[1]

    def __getitem__(self, images: Tensor) -> Tensor:
        """The features (B, width) of B images, as they are kept: float32 or float16."""
        tables, rows = self.places[images].T
        if len(self.tables) == 1:
            return self.tables[0][rows]
        found = self.tables[0].new_empty(len(rows), self.width)
        for number, table in enumerate(self.tables):
            here = tables == number
            found[here] = table[rows[here]]
        return found

    def blocks(self) -> Iterator[Tensor]:
        """All features in order, float32, 1024 images at a time."""
        return (self[images].float() for images in torch.arange(len(self)).split(1024))

    @classmethod
    def in_memory(cls, table: Tensor) -> "Features":
        return cls([table], F.pad(torch.arange(len(table))[:, None], (1, 0)))


@dataclass
class Extraction:
    """The features of the images that could be read, and what it took."""

    features: Features
    readable: Tensor  # (M,) the indices of these images
    seconds: float  # time to compute the features, in this run and in earlier runs
    computed: int  # number of images whose features were computed in this run
    errors: list[ImageError]  # one for each image that cannot be read


class _FeatureFiles:
    """The files of one model's features, one for each process that has computed some.

    Their name holds a hash of everything that determines the features, except the image. A record holds the image's id,
    the seconds spent on it, its features and their checksum, so stale or damaged features are never used.
    """

    def __init__(self, folder: Path, model: nn.Module, device: torch.device, half: bool):
        key = {name: getattr(model, name) for name in ("backbone", "width", "preprocessing", "precision", "views")}
        key |= {"weights": content_hash(model.features.state_dict()), "device": device.type, "torch": torch.__version__}
        key["pillow"] = PIL.__version__  # versions of the decoder differ in a few files
        key |= {"kept": "float16"} if half else {}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.name, self.model, self.device = folder, f"{model.name}-{digest}", model, device
        self.program: Path | None = None  # OpenVINO's, if that computes the features
        kept = "<f2" if half or model.precision == "bf16" else "<f4"  # float16 holds more digits than bf16
        features = ("features", kept, (model.width,))
        self.layout = np.dtype([("image", "S32"), ("seconds", "<f4"), ("checksum", "<u4"), features])

    def switch_to_openvino(self, images: int, all_processes: bool) -> None:
        """From here on these are the files of features that OpenVINO computes, if it is worth that for so many."""
        program = self.folder / f"{self.name}.openvino"
        version = openvino_version(self.device, self.model.precision, images, program)
        if version := gather(version)[0] if all_processes else version:
            self.program, self.name = program, f"{self.name}-openvino-{version}"

    def read(self, ids: Sequence[bytes]) -> tuple[list[np.ndarray], dict[bytes, tuple[int, int]], int]:
        """The tables of all files, each image's table and row there, and how many images have only damaged records."""
        tables, places, wanted, damaged = [], {}, set(ids), set()
        for file in sorted(self.folder.glob(f"{self.name}.*.features")):
            if count := file.stat().st_size // self.layout.itemsize:
                table = np.asarray(np.memmap(file, self.layout, mode="c", shape=count))  # torch wants it writable
                rows = {image: row for row, image in enumerate(table["image"].tolist()) if image in wanted}
                for image, row in rows.items():
                    if zlib.crc32(table["features"][row]) == table["checksum"][row]:
                        places[image] = len(tables), row
                    else:
                        damaged.add(image)
                tables.append(table)
        return tables or [np.zeros(0, self.layout)], places, len(damaged - places.keys())

    def compute_missing(self, items: Sequence[Item], ids: Sequence[bytes]) -> tuple[int, list[ImageError]]:
        """Computes this process's share of the missing features. Returns the total and the errors of all processes."""
        _, places, damaged = self.read(ids)  # under the lock
        barrier()  # before any process writes
        missing = [i for i, image in enumerate(ids) if image not in places]
        done = len(ids) - len(missing)
        if damaged:
            print(f"{self.name}: {damaged} images' features are damaged: computing them again", file=sys.stderr)
        if missing and done:
            print(f"{self.model.backbone}: {done:,} of {len(ids):,} images have their features")
        own, errors = [missing[i] for i in share(len(missing), batch_size_for(self.device))], []
        fast, forward = self.fast_copy(), type(self.model).forward_features
        with Progress(len(ids), f"{self.model.backbone} features", done) as bar:
            for batch in self.append([ids[i] for i in own], run_images([fast], (items[i] for i in own), forward)):
                errors += batch.errors.values()
                bar.update(len(batch.items) * world_size())
        errors = [error for part in gather(errors) for error in part]  # waits until every process has written its file
        return len(missing) - len(errors), errors

    def fast_copy(self) -> nn.Module:
        """The copy of the model that computes the features. The first process keeps OpenVINO's program for all."""
        if not self.program:
            return fast_copy(self.model, self.device)
        first = openvino_copy(self.model, self.program) if is_first() else None
        barrier()
        return first or openvino_copy(self.model, self.program)

    def append(self, ids: Sequence[bytes], batches: Iterator[Batch]) -> Iterator[Batch]:
        """Appends each batch's records to this process's file. Yields the batch when it is written."""
        file, ids, before = self.folder / f"{self.name}.{rank()}.features", iter(ids), time.perf_counter()
        with explain_write_error(file), file.open("ab") as stream:
            stream.truncate(stream.tell() // self.layout.itemsize * self.layout.itemsize)  # a killed run's last record
            for batch in batches:
                good = {i: image for i, image in enumerate(islice(ids, len(batch.items))) if i not in batch.errors}
                records = np.zeros(len(good), self.layout)
                records["image"] = list(good.values())
                with np.errstate(over="ignore"):  # see below
                    records["features"] = batch.outputs[0][list(good)].numpy()
                rows = records["features"]
                if not np.isfinite(rows).all():
                    raise FloatingPointError(
                        f"features of {self.model.backbone} overflow in {rows.dtype} ({self.model.precision})"
                    )
                records["checksum"] = [zlib.crc32(row) for row in rows]
                now = time.perf_counter()
                records["seconds"] = (now - before) / max(1, len(good)) / world_size()
                stream.write(records.tobytes())
                stream.flush()
                before = now
                yield batch


def extract_features(
    model: nn.Module, items: Sequence[Item], ids: list[str], folder: Path, device: torch.device, compute: bool = True
) -> Extraction:
    """Returns the features of images, whose `ids` change if the image does. Computes those that `folder` lacks.

    If `compute` is False, images without features count as unreadable. An interrupted run resumes; the next run tries
    unreadable images again. Under torchrun each process computes a share, and then reads the files of all.
    Raises OSError if a file cannot be written, FloatingPointError if features overflow.
    """
    files = _FeatureFiles(folder, model, device, half=len(items) > HALF_PRECISION_ABOVE)
    ids, computed, errors = [image.encode() for image in ids], 0, []
    tables, places, _ = files.read(ids)
    if not (gather(len(places))[0] if compute else places):  # a run that resumes goes on as it began
        files.switch_to_openvino(len(ids), all_processes=compute)
        tables, places, _ = files.read(ids)
    if compute and not all(gather(all(image in places for image in ids))):
        # one lock for all processes; another run may be computing the same features
        with locked(folder / f".{files.name}.lock", wait=True) if is_first() else nullcontext():
            barrier()
            computed, errors = files.compute_missing(items, ids)
            tables, places, _ = files.read(ids)
            barrier()  # every process has read the files
    found = {i: places[image] for i, image in enumerate(ids) if image in places}
    if compute and len(found) + len(errors) < len(ids):
        raise OSError(f"features of other processes are not in {folder}: is it on shared storage?")
    seconds = sum(float(tables[number]["seconds"][row]) for number, row in found.values())
    located = torch.tensor(list(found.values()), dtype=torch.int64).reshape(-1, 2)
    features = Features([torch.from_numpy(table["features"]) for table in tables], located)
    return Extraction(features, torch.tensor(list(found), dtype=torch.int64), seconds, computed, errors)


@torch.inference_mode()
def most_similar(model: nn.Module, queries: Tensor, features: Features, count: int) -> list[list[tuple[int, float]]]:
    """For each of Q images, features (Q, width), the images whose features are most similar, and the cosines."""
    scale = getattr(model.classifier, "standardize", nn.Identity())
    queries = F.normalize(scale(queries))
    cosines = torch.cat([F.normalize(scale(block)) @ queries.T for block in features.blocks()])  # (N, Q)
    cosines, images = cosines.T.topk(min(count, len(features)))
    return [list(zip(*pair, strict=True)) for pair in zip(images.tolist(), cosines.tolist(), strict=True)]
