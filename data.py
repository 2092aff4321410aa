"""Where images and labels come from, and how they are split.

data = load_data("cifar10", root=Path("data"))      # or a folder with train/<class>/ and test/<class>/
data.train.items[0], data.train.labels[0]
"""

import hashlib
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from engine.console import count_of, first_line, printable
from engine.files import locked
from engine.images import is_image_file

CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_SIZE = 160  # its 32x32 images enlarged to 224 take twice the time, and most backbones are less accurate
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
EXPECTED_TREE = """
    {root}/<class>/*.jpg          one folder for each class; the folder's name is the label
or
    {root}/train/<class>/*.jpg    training images
    {root}/test/<class>/*.jpg     test images of the same classes; if missing, 20 % of train/ is held out
    {root}/val/<class>/*.jpg      validation images; if missing, 20 % of the other training images are held out"""
SYSTEM_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}


@dataclass
class Images:
    """N images, as files or as one uint8 array (N, H, W, 3), and their labels, int64 (N,)."""

    items: list[Path] | np.ndarray
    labels: Tensor
    names: list[str]  # the path below the data set's folder, or the part and the number: "test 17"

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, indices: Tensor) -> "Images":
        chosen = indices.numpy()
        items = self.items[chosen] if isinstance(self.items, np.ndarray) else [self.items[i] for i in chosen]
        return Images(items, self.labels[indices], [self.names[i] for i in chosen])

    def paths(self) -> list[str]:
        """For each image the path of its file, or its name."""
        return self.names if isinstance(self.items, np.ndarray) else [str(item) for item in self.items]

    def ids(self) -> list[str]:
        """For each image a hash of its pixels, or of its file's path, size and times. It changes if the image does."""
        return [hashlib.blake2b(_identity(item), digest_size=16).hexdigest() for item in self.items]


def _identity(item: Path | np.ndarray) -> bytes | np.ndarray:
    if isinstance(item, np.ndarray):
        return np.ascontiguousarray(item)
    identity = os.fsencode(item.absolute())
    with suppress(OSError):  # the file is gone; reading it will raise an ImageError
        file = item.stat()
        identity += f"\0{file.st_size}\0{file.st_mtime_ns}\0{file.st_ctime_ns}".encode()
    return identity


@dataclass
class Data:
    """A data set in three parts. A label is an index into `classes`."""

    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    content: str  # a hash: the same for every copy of the data set
    notes: tuple[str, ...]  # what the user should know, a line each

    @property
    def parts(self) -> dict[str, Images]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def identity(self) -> dict:
        """What identifies the data set in a row of results.json. "split" is a hash of which image is in which part."""
        names = "\0\0".join("\0".join(images.names) for images in self.parts.values())
        split = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]
        return {"content": self.content, "split": split, "classes": list(self.classes)}


def load_data(source: str, root: Path = Path("data"), limit: int | None = None, seed: int = 0) -> Data:
    """Loads CIFAR-10 ("cifar10", kept in `root`), drawn shapes ("demo"), or a folder of images (its path).

    If test or validation images are missing, holds out 20 % of the training images of each class, chosen by `seed`.
    `limit` keeps that many training images, and that share of the others, balanced over the classes.
    Raises OSError if the images cannot be read or downloaded, ValueError if they are not a usable data set.
    """
    notes = []
    if source == "cifar10":
        classes, parts = CIFAR10_CLASSES, _cifar10(root)
    elif source == "demo":
        classes, parts = _demo()
        notes.append("drawn shapes and random backbones: this tests the installation, not the models")
    else:
        classes, parts, skipped = _folder(Path(source))
        notes += [not_used(skipped)] if skipped.total() else []
    content = _content(classes, parts)
    if "test" not in parts:
        parts["train"], parts["test"] = _hold_out(parts["train"], seed, at_least=3)
        notes.append("no test images: 20 % of each class, chosen at random, are held out for testing")
    if limit is not None:
        share = limit / max(1, len(parts["train"]))
        for part, images in parts.items():
            count = limit if part == "train" else max(len(classes), round(share * len(images)))
            balanced = _ranks(images.labels, seed).argsort(stable=True)[:count]
            parts[part] = images.subset(balanced.sort().values)
    if empty := without_images(classes, parts["train"]):
        raise ValueError("; ".join([f"no training image of {empty} in {source}: add some, or raise --limit", *notes]))
    if "val" not in parts:
        parts["train"], parts["val"] = _hold_out(parts["train"], seed, at_least=2)
    for part, name in (("test", "test"), ("val", "validation")):
        if empty := without_images(classes, parts[part]):
            notes.append(f"no {name} image of {empty}")
    if len(parts["train"]) < 2 or not len(parts["val"]) or not len(parts["test"]):
        needed = "training needs two, validation and test need one each"
        raise ValueError(f"too few images in {source}: {needed}; add some, or raise --limit")
    return Data(classes, parts["train"], parts["val"], parts["test"], content, tuple(notes))


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


def without_images(classes: tuple[str, ...], images: Images) -> str:
    """The names of the classes without an image, "" if there are none."""
    counts = images.labels.bincount(minlength=len(classes))
    names = [repr(name) for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more classes" if len(names) > 5 else "")


def _hold_out(images: Images, seed: int, at_least: int) -> tuple[Images, Images]:
    """The images without 20 % of each class, and these: at least one, but none of a class smaller than `at_least`."""
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


def _folder(source: Path) -> tuple[tuple[str, ...], dict[str, Images], Counter[str]]:
    """The classes of an image folder, its parts, and how many files are not used, by reason."""
    root, expected = source, f"a data set looks like this:{EXPECTED_TREE.format(root=source)}"
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; {expected}")
    names, skipped = class_folders(root)
    if len(names) == 1 and not _part_folders(root, names) and class_folders(root / names[0])[0]:  # an unpacked archive
        root /= names[0]
        names, more = class_folders(root)
        skipped += more
    folders = _part_folders(root, names)
    if not folders:
        classes, folders = tuple(names), {"train": root}
    elif "train" not in folders:
        raise ValueError(f"no train/ in {root}; {expected}")
    else:
        for name in names:
            if root / name not in folders.values():
                skipped[f"in {printable(name)}/"] += _count_files(root / name)
        names, more = class_folders(folders["train"])
        classes, skipped = tuple(names), skipped + more
    if not classes:
        raise ValueError(f"no class folders in {folders['train']}; {expected}")
    if len(classes) == 1:
        raise ValueError(f"{folders['train']} has one class only, {classes[0]!r}: a classifier needs two or more")
    parts = {}
    for part, folder in folders.items():
        if part != "train":
            names, more = class_folders(folder)
            skipped += more
            if unknown := ", ".join(sorted(set(names) - set(classes))):
                lacking = f"{folder} has a class that the training images lack: {unknown}"
                raise ValueError(f"{lacking}; rename it, or add it to the training images")
        parts[part], more = labelled_images(folder, classes, source)
        skipped += more
    return classes, parts, skipped


def _part_folders(root: Path, names: list[str]) -> dict[str, Path]:
    """The folders that hold a part of the data set: train, val, test."""
    folders = {}
    for part, spellings in SPLITS.items():
        found = [name for name in names if name.lower() in spellings]
        if len(found) > 1:
            raise ValueError(f"{root} has both {found[0]}/ and {found[1]}/: keep one of them")
        if found:
            folders[part] = root / found[0]
    return folders


def class_folders(folder: Path) -> tuple[list[str], Counter[str]]:
    """The sorted names of the visible folders in `folder`, and the numbers of files beside them, by reason."""
    names, skipped = [], Counter()
    for entry in os.scandir(folder):
        is_folder = os.path.isdir(entry.path)  # or a link to one
        if is_folder and not _is_hidden(entry.name):
            names.append(entry.name)
        else:
            skipped["in hidden folders" if is_folder else "beside the class folders"] += _count_files(entry.path)
    return sorted(names), skipped


def labelled_images(folder: Path, classes: tuple[str, ...], source: Path) -> tuple[Images, Counter[str]]:
    """The images in the class folders of `folder`, named by their paths below `source`, and numbers of unused files."""
    items, labels, skipped = [], [], Counter()
    for label, name in enumerate(classes):
        if (folder / name).is_dir():  # a class may be missing
            found, more = find_images(folder / name)
            items += found
            labels += [label] * len(found)
            skipped += more
    names = [str(item).removeprefix(f"{source}{os.sep}") for item in items]
    return Images(items, torch.tensor(labels, dtype=torch.int64), names), skipped


def find_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images below `folder`, sorted, and the numbers of files that are not used, by reason."""
    images, skipped = [], Counter()
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return [], Counter({"folders that cannot be opened": 1})
    for entry in entries:
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.is_symlink() and not os.path.exists(entry.path):
            skipped["links to nothing"] += 1
        elif entry.is_symlink() and os.path.isdir(entry.path):
            skipped["linked folders"] += 1
        elif entry.is_dir(follow_symlinks=False) and _is_hidden(entry.name):
            skipped["in hidden folders"] += _count_files(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            found, more = find_images(Path(entry.path))
            images += found
            skipped += more
        elif entry.name.startswith("."):
            skipped["hidden"] += 1
        elif is_image_file(entry.path, extension):
            images.append(Path(entry.path))
        else:
            hint = f" (pip install {PLUGINS[extension]})" if extension in PLUGINS else ""
            skipped[(printable(extension) or "without extension") + hint] += 1
    return images, skipped


def not_used(skipped: Counter[str]) -> str:
    """A line about the files that are not used."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common() if count)
    return f"{count_of(skipped.total(), 'file')} not used: {reasons}"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _count_files(path: str | Path) -> int:
    return sum(len(names) for *_, names in os.walk(path)) if os.path.isdir(path) else 1
