"""Where images and labels come from, and how they are split.

    data = load_data("cifar10", root=Path("data"))      # or a folder of class folders
    data.train.items[0], data.train.labels[0]

How a folder is read is in engine/folders.py.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from engine.console import first_line
from engine.files import atomic_write, locked
from engine.folders import SPLITS, Images, not_used, read_folder

CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_SIZE = 160  # its 32x32 images enlarged to 224 take twice the time, and most backbones are less accurate


@dataclass
class Data:
    """A data set in three parts. A label is an index into `classes`."""

    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    content: str  # a hash: the same for every copy of the data set
    notes: tuple[str, ...]  # what the user should know, a line each
    reading: dict = field(default_factory=dict)  # how unusual images are read, see engine/depth.py

    @property
    def parts(self) -> dict[str, Images]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def identity(self) -> dict:
        """What identifies the data set in a row of results.json. "split" is a hash of which image is in which part."""
        names = "\0\0".join("\0".join(images.names) for images in self.parts.values())
        split = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]
        return {"content": self.content, "split": split, "classes": list(self.classes)}

    def save_split(self, file: Path) -> None:
        """Saves which image is in which part, by name and hash."""
        split = {part: dict(zip(images.names, images.ids, strict=True)) for part, images in self.parts.items()}
        with atomic_write(file) as stream:
            stream.write(json.dumps(split).encode())


def load_data(
    source: str, root: Path = Path("data"), limit: int | None = None, seed: int = 0, test_split: str = "test"
) -> Data:
    """Loads CIFAR-10 ("cifar10", kept in `root`), drawn shapes ("demo"), or a folder of images (its path).

    If test or validation images are missing, holds out 20% of the training images of each class, chosen by `seed`.
    `limit` keeps that many training images, and that share of the others, balanced over the classes. With `test_split`
    "val", the validation images of the source become the test images.
    Raises OSError if the images cannot be read or downloaded, ValueError if they are not a usable data set.
    """
    classes, parts, notes = _read_source(source, root)
    content = _content(classes, parts)
    if test_split == "val":
        if "val" not in parts or "test" in parts:
            raise ValueError(f"--test-split val is for data with validation images and without test images: {source}")
        parts["test"] = parts.pop("val")
    if "test" not in parts:
        parts["train"], parts["test"] = _hold_out(parts["train"], seed, at_least=3)
        given = " (--test-split val tests on val/ instead)" if "val" in parts else ""
        notes.append(f"no test images: 20% of the training images of each class are held out at random{given}")
    if limit is not None:
        share = limit / max(1, len(parts["train"]))
        for part, images in parts.items():
            count = limit if part == "train" else max(len(classes), round(share * len(images)))
            balanced = _ranks(images.labels, seed).argsort(stable=True)[:count]
            parts[part] = images.subset(balanced.sort().values)
    if empty := classes_without_images(classes, parts["train"]):
        raise ValueError("; ".join([f"no training image of {empty} in {source}: add some, or raise --limit", *notes]))
    if "val" not in parts:
        parts["train"], parts["val"] = _hold_out(parts["train"], seed, at_least=2)
    for part, name in (("test", "test"), ("val", "validation")):
        if empty := classes_without_images(classes, parts[part]):
            notes.append(f"no {name} image of {empty}")
    if len(parts["train"]) < 2 or not len(parts["val"]) or not len(parts["test"]):
        needed = "training needs two, validation and test need one each"
        raise ValueError("; ".join([f"too few images in {source}: {needed}; add some, or raise --limit", *notes]))
    return Data(classes, parts["train"], parts["val"], parts["test"], content, tuple(notes))


def load_split(source: str, root: Path, file: Path) -> Data:
    """Loads the data of an earlier run, each image in the part in which it was in that run (`Data.save_split`).

    Its notes tell how many images are gone or have changed. Raises OSError or ValueError if nothing can be loaded.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: it says which images the model was trained on")
    classes, parts, _ = _read_source(source, root)
    everything, split, notes = Images.joined(parts.values()), {}, []
    places = {name: i for i, name in enumerate(everything.names)}
    for part, ids in json.loads(file.read_text()).items():
        found = [places[name] for name in ids if name in places]
        split[part] = everything.subset(torch.tensor(found, dtype=torch.int64))
        changed = sum(a != b for a, b in zip(split[part].ids, (ids[n] for n in split[part].names), strict=True))
        if gone := len(ids) - len(found):
            notes.append(f"{gone} of {len(ids)} {part} images of the run are gone")
        if changed:
            notes.append(f"{changed} of {len(ids)} {part} images have changed since the run")
    return Data(classes, **split, content="", notes=tuple(notes))


def _read_source(source: str, root: Path) -> tuple[tuple[str, ...], dict[str, Images], list[str]]:
    """The classes, the parts that the source has, and notes for the user."""
    if source == "cifar10":
        return CIFAR10_CLASSES, _cifar10(root), []
    if source == "demo":
        return *_demo(), ["drawn shapes and random backbones: this tests the installation, not the models"]
    classes, parts, skipped = read_folder(Path(source))
    return classes, parts, [not_used(skipped)] if skipped.total() else []


def _content(classes: tuple[str, ...], parts: dict[str, Images]) -> str:
    """The same for every copy of a data set: a hash of its classes and pixels, or of its files' names and sizes."""
    digest = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape"))
    for part in SPLITS:
        images = parts.get(part)
        for item, name in zip(images.items, images.names, strict=True) if images else ():
            if isinstance(item, np.ndarray):
                digest.update(np.ascontiguousarray(item))
            else:
                size = os.path.getsize(item) if os.path.exists(item) else 0
                digest.update(os.fsencode(f"/{name}\0{size}\0"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def classes_without_images(classes: tuple[str, ...], images: Images) -> str:
    """The names of the classes without an image, "" if there are none."""
    counts = images.labels.bincount(minlength=len(classes))
    names = [repr(name) for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more classes" if len(names) > 5 else "")


def _hold_out(images: Images, seed: int, at_least: int) -> tuple[Images, Images]:
    """Holds out 20% of each class, at least one image, but none of a class smaller than `at_least`. Returns both."""
    counts = images.labels.bincount()
    held_out = torch.where(counts < at_least, 0, (0.2 * counts).round().clamp(min=1))
    chosen = _ranks(images.labels, seed) < held_out[images.labels]
    return images.subset((~chosen).nonzero().flatten()), images.subset(chosen.nonzero().flatten())


def _ranks(labels: Tensor, seed: int) -> Tensor:
    """The rank of each image in a random permutation of its class: 0, 1, 2..."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    ranks, shuffled = torch.empty_like(labels), labels[order]
    for label in labels.unique():
        members = order[shuffled == label]
        ranks[members] = torch.arange(len(members))
    return ranks


# ---------------------------------------------------------------------------------------------- sources


def _cifar10(root: Path) -> dict[str, Images]:
    from torchvision.datasets import CIFAR10

    try:
        parts = {"train": CIFAR10(root), "test": CIFAR10(root, train=False)}  # checks every md5 before it opens a file
    except RuntimeError:  # missing or incomplete
        with locked(root / ".lock", wait=True):
            try:
                parts = {"train": CIFAR10(root, download=True), "test": CIFAR10(root, train=False)}
            except (OSError, RuntimeError) as error:
                archive = root / CIFAR10.filename
                refused = f"{archive} is not the right file, and " if archive.exists() else ""
                raise OSError(
                    f"{refused}CIFAR-10 cannot be downloaded ({first_line(error)}): put {archive.name} (md5 "
                    f"{CIFAR10.tgz_md5}) into {root}/, or use --data FOLDER with your own images, or --demo"
                ) from error
    return {name: _arrays(name, part.data, torch.tensor(part.targets)) for name, part in parts.items()}


def _demo(train: int = 600, test: int = 200) -> tuple[tuple[str, ...], dict[str, Images]]:
    """Small drawings of light shapes on a dark ground. Every call draws the same ones."""
    sides = {"circle": 30, "square": 4, "triangle": 3}
    random = np.random.default_rng(0)
    labels = torch.arange(train + test) % len(sides)
    images = random.normal(0, 3, (train + test, 32, 32, 3))
    for image, label in zip(images, labels, strict=True):
        canvas = Image.new("L", (32, 32), int(random.integers(0, 60)))
        x, y, r = *random.integers(14, 19, 2).tolist(), int(random.integers(9, 13))
        ink = int(random.integers(180, 256))
        ImageDraw.Draw(canvas).regular_polygon((x, y, r), list(sides.values())[label], fill=ink)
        image += np.array(canvas)[:, :, None]
    images = images.clip(0, 255).astype(np.uint8)
    parts = {"train": slice(train), "test": slice(train, None)}
    return tuple(sides), {name: _arrays(name, images[part], labels[part]) for name, part in parts.items()}


def _arrays(part: str, images: np.ndarray, labels: Tensor) -> Images:
    return Images(images, labels, [f"{part} {i}" for i in range(len(images))])
