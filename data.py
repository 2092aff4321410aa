"""Images and labels: where they come from, the split, the decoder and the preprocessing.

    data = load_data("cifar10", root=Path("data"))      # or a folder with train/<class>/ and test/<class>/
    image = read_image(data.test.items[0])              # uint8 (3, H, W)

Training, evaluation and inference all read images here, so they all see the same pixels. What every script needs to
deal with files and errors is at the end.
"""

import argparse
import errno
import hashlib
import importlib
import io
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

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

MAX_MEMORY = 400_000_000  # bytes that decoding one image may take
MAX_BYTES = 200_000_000  # of a file, which is read as a whole
_one_large_image = threading.Lock()  # only one thread at a time decodes a large image

Item = Path | np.ndarray | Image.Image  # an image file, a uint8 array (H, W, 3), or an image that Pillow has opened


class ImageError(OSError):
    """An image that cannot be read. The message names it."""


@dataclass
class Images:
    """N images, as files or as one uint8 array (N, H, W, 3), and their labels, int64 (N,)."""

    items: list[Path] | np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, indices: Tensor) -> "Images":
        chosen = indices.numpy()
        items = self.items[chosen] if isinstance(self.items, np.ndarray) else [self.items[i] for i in chosen]
        return Images(items, self.labels[indices])

    def ids(self) -> list[str]:
        """For each image a hash of its pixels, or of its file's path, size and times. It changes if the image does."""
        return [hashlib.blake2b(_identity(item), digest_size=16).hexdigest() for item in self.items]


def _identity(item: Path | np.ndarray) -> bytes | np.ndarray:
    if isinstance(item, np.ndarray):
        return np.ascontiguousarray(item)
    try:
        file = item.stat()
        return os.fsencode(item.absolute()) + f"\0{file.st_size}\0{file.st_mtime_ns}\0{file.st_ctime_ns}".encode()
    except OSError:  # the file is gone: whoever reads it will say so
        return os.fsencode(item.absolute())


@dataclass
class Data:
    """A data set in three parts. A label is an index into `classes`."""

    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    content: str  # a hash: the same for every copy of the data set
    notes: tuple[str, ...]  # what its user should know, a line each


def load_data(source: str, root: Path = Path("data"), limit: int | None = None, seed: int = 0) -> Data:
    """Loads CIFAR-10 ("cifar10", kept in `root`), drawn shapes ("demo"), or a folder of images (its path).

    If test or validation images are missing, holds out 20 % of the training images of each class, chosen by `seed`.
    `limit` keeps that many training images and the same share of the test and validation images, balanced over the
    classes.
    Raises OSError if the images cannot be read or downloaded, ValueError if they are not a usable data set.
    """
    unused: Counter[str] = Counter()
    notes = []
    if source == "cifar10":
        classes, train, val, test = CIFAR10_CLASSES, *_cifar10(root)
    elif source == "demo":
        classes, train, val, test = _demo()
        notes.append("drawn shapes and random backbones: this tests the installation, not the models")
    else:
        classes, train, val, test = _folder(Path(source), unused)
    content = _content(source, classes, train, val, test)
    if unused.total():
        notes.append(not_used(unused))
    if test is None:
        train, test = _hold_out(train, seed, at_least=3)
        notes.append("no test images: 20 % of each class, chosen at random, are held out for testing")
    if limit is not None:
        share = limit / max(1, len(train))
        train, test = _limit(train, limit, seed), _limit(test, max(len(classes), round(share * len(test))), seed)
        val = None if val is None else _limit(val, max(len(classes), round(share * len(val))), seed)
    if empty := without_images(classes, train):
        raise ValueError("; ".join([f"no training image of {empty} in {source}: add some, or raise --limit", *notes]))
    if val is None:
        train, val = _hold_out(train, seed, at_least=2)
    for part, images in (("test", test), ("validation", val)):
        if empty := without_images(classes, images):
            notes.append(f"no {part} image of {empty}")
    if len(train) < 2 or not len(val) or not len(test):
        raise ValueError(
            f"too few images in {source}: training needs two, validation and test need one each; "
            "add some, or raise --limit"
        )
    return Data(classes, train, val, test, content, tuple(notes))


def _content(source: str, classes: tuple[str, ...], *parts: Images | None) -> str:
    """The same for every copy of a data set: a hash of its classes and pixels, or of its files' names and sizes."""
    digest = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape"))
    for images in parts:
        for item in images.items if images else ():
            if isinstance(item, np.ndarray):
                digest.update(np.ascontiguousarray(item))
            else:
                size = os.path.getsize(item) if os.path.exists(item) else 0
                digest.update(os.fsencode(str(item).removeprefix(source)) + f"\0{size}\0".encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def without_images(classes: tuple[str, ...], images: Images) -> str:
    """The names of the classes without an image, "" if there are none."""
    counts = images.labels.bincount(minlength=len(classes))
    names = [repr(name) for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more classes" if len(names) > 5 else "")


def _hold_out(images: Images, seed: int, at_least: int) -> tuple[Images, Images]:
    """Holds out 20 % of each class. Returns the remaining images and the held-out images.

    A class of `at_least` or more images gives at least one image; a smaller class gives none.
    """
    counts = images.labels.bincount()
    held_out = torch.where(counts < at_least, 0, (0.2 * counts).round().clamp(min=1))
    chosen = _ranks(images.labels, seed) < held_out[images.labels]
    return images.subset((~chosen).nonzero().flatten()), images.subset(chosen.nonzero().flatten())


def _ranks(labels: Tensor, seed: int) -> Tensor:
    """The place of each image in a random order of its class: 0, 1, 2..."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    ranks, shuffled = torch.empty_like(labels), labels[order]
    for label in labels.unique():
        members = order[shuffled == label]
        ranks[members] = torch.arange(len(members))
    return ranks


def _limit(images: Images, limit: int, seed: int) -> Images:
    """At most `limit` images, balanced over the classes."""
    return images.subset(_ranks(images.labels, seed).argsort(stable=True)[:limit].sort().values)


# ---------------------------------------------------------------------------------------------- sources


def _cifar10(root: Path) -> tuple[Images, None, Images]:
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(root, train) for train in (True, False)]  # checks every file's md5 before it opens one
    except RuntimeError:  # not there, or not complete
        with locked(root / ".lock", wait=True):
            try:
                parts = [CIFAR10(root, train, download=True) for train in (True, False)]
            except (OSError, RuntimeError) as error:
                archive = root / CIFAR10.filename
                refused = f"{archive} is not the right file, and " if archive.exists() else ""
                raise OSError(
                    f"{refused}CIFAR-10 cannot be downloaded ({first_line(error)}): put {archive.name} (md5 "
                    f"{CIFAR10.tgz_md5}) into {root}/, or use --data FOLDER with your own images, or --demo"
                ) from error
    train, test = (Images(part.data, torch.tensor(part.targets)) for part in parts)
    return train, None, test


def _folder(root: Path, unused: Counter[str]) -> tuple[tuple[str, ...], Images, Images | None, Images | None]:
    expected = f"a data set looks like this:{EXPECTED_TREE.format(root=root)}"
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; {expected}")
    names = class_folders(root, unused)
    if len(names) == 1 and not _split(names[0]) and class_folders(root / names[0], Counter()):  # an unpacked archive
        root /= names[0]
        names = class_folders(root, unused)
    parts = {}
    for name in names:
        split = _split(name)
        if split in parts:
            raise ValueError(f"{root} has both {parts[split].name}/ and {name}/: keep one of them")
        if split:
            parts[split] = root / name
    if not parts:
        classes, parts = tuple(names), {"train": root}
    elif "train" not in parts:
        raise ValueError(f"no train/ in {root}; {expected}")
    else:
        for name in set(names) - {folder.name for folder in parts.values()}:
            unused[f"in {printable(name)}/"] += _count_files(root / name)
        classes = tuple(class_folders(parts["train"], unused))
    if not classes:
        raise ValueError(f"no class folders in {parts['train']}; {expected}")
    if len(classes) == 1:
        raise ValueError(f"{parts['train']} has one class only, {classes[0]!r}: a classifier needs two or more")
    for split in parts.keys() - {"train"}:
        if unknown := ", ".join(sorted(set(class_folders(parts[split], unused)) - set(classes))):
            raise ValueError(
                f"{parts[split]} has a class that the training images lack: {unknown}; rename it, or add it there"
            )
    train, val, test = (labelled(parts[split], classes, unused) if split in parts else None for split in SPLITS)
    return classes, train, val, test


def _split(name: str) -> str | None:
    """The part of the data set that a folder of this name holds: train, val, test or none."""
    return next((split for split, spellings in SPLITS.items() if name.lower() in spellings), None)


def class_folders(folder: Path, unused: Counter[str]) -> list[str]:
    """The sorted names of the visible folders in `folder`. Counts all other files in `unused`, by reason."""
    names = []
    for entry in os.scandir(folder):
        is_folder = os.path.isdir(entry.path)  # or a link to one
        if is_folder and not _is_hidden(entry.name):
            names.append(entry.name)
        else:
            unused["in hidden folders" if is_folder else "beside the class folders"] += _count_files(entry.path)
    return sorted(names)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _count_files(path: str | Path) -> int:
    return sum(len(names) for *_, names in os.walk(path)) if os.path.isdir(path) else 1


def labelled(folder: Path, classes: tuple[str, ...], unused: Counter[str]) -> Images:
    """The images below `folder`, labelled by the name of their class folder. A class may be missing."""
    items, labels = [], []
    for label, name in enumerate(classes):
        found = list(find_images(folder / name, unused)) if (folder / name).is_dir() else []
        items += found
        labels += [label] * len(found)
    return Images(items, torch.tensor(labels, dtype=torch.int64))


def find_images(folder: Path, unused: Counter[str]) -> Iterator[Path]:
    """Yields the images below `folder`, sorted. Counts in `unused`, by reason, the files that it leaves out."""
    formats = _formats()
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError:
        unused["folders that cannot be opened"] += 1
        return
    for entry in entries:
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.is_symlink() and not os.path.exists(entry.path):
            unused["links to nothing"] += 1
        elif entry.is_symlink() and os.path.isdir(entry.path):
            unused["linked folders"] += 1
        elif entry.is_dir(follow_symlinks=False):
            if _is_hidden(entry.name):
                unused["in hidden folders"] += _count_files(entry.path)
            else:
                yield from find_images(Path(entry.path), unused)
        elif entry.name.startswith("."):
            unused["hidden"] += 1
        elif Image.EXTENSION.get(extension) in formats or (entry.is_file() and _begins_as_image(entry.path)):
            yield Path(entry.path)
        else:
            hint = f" (pip install {PLUGINS[extension]})" if extension in PLUGINS else ""
            unused[(printable(extension) or "without extension") + hint] += 1


def not_used(unused: Counter[str]) -> str:
    """A line about the files that find_images left out."""
    reasons = ", ".join(f"{count} {why}" for why, count in unused.most_common() if count)
    return f"{unused.total()} file{'s' * (unused.total() > 1)} not used: {reasons}"


def _begins_as_image(path: str) -> bool:
    """Whether a file whose name does not say so is an image, of a format that has a signature."""
    try:
        with Image.open(path, formats=[name for name in _formats() if Image.OPEN[name][1]]):
            return True
    except Exception:  # it is something else, or cannot be opened
        return False


def _demo(train: int = 600, test: int = 200) -> tuple[tuple[str, ...], Images, None, Images]:
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
    return tuple(sides), Images(images[:train], labels[:train]), None, Images(images[train:], labels[train:])


# ---------------------------------------------------------------------------- the decoder and preprocessing


def read_image(item: Item, max_size: int = 224, crop: bool = True) -> Tensor:
    """Reads one image as uint8 (3, H, W): RGB in sRGB, upright by its EXIF orientation, transparency on white.

    A wide or tall image is cropped to the square in the middle, unless `crop` is False. An image larger than
    `max_size` is resized to (3, max_size, max_size), so that a batch of photographs takes no more memory than a batch
    of thumbnails. `preprocess` resizes smaller images, on the device.
    Raises ImageError, which names the file, if the image cannot be read for any reason.
    """
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.shape == (len(item), len(item), 3):
        if len(item) <= max_size:  # nothing to decode or to resize
            return torch.from_numpy(np.ascontiguousarray(item)).permute(2, 0, 1)
    name = item if isinstance(item, Path) else "image"
    try:
        if not isinstance(item, Path):
            return _decode(item.copy() if isinstance(item, Image.Image) else Image.fromarray(item), max_size, crop)
        size = item.stat().st_size
        if not item.is_file():  # opening a pipe would block
            raise OSError("not a file")
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
        with Image.open(io.BytesIO(item.read_bytes()), formats=_formats()) as image:  # one read; Pillow makes forty
            return _decode(image, max_size, crop)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image") from error
    except Exception as error:  # damaged files make Pillow raise nearly any exception
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ImageError(f"{name}: {reason}") from error


def read_shown(
    captioned: Iterable[tuple[Item, str]], limit: int, size: int = 224
) -> tuple[list[np.ndarray], list[str]]:
    """The first images that can be read, (H, W, 3), at most `size` large, and their captions, for a plot."""
    images, captions = [], []
    for item, caption in captioned:
        if len(images) == limit:
            break
        with suppress(ImageError):  # a file may have vanished
            images.append(read_image(item, size).permute(1, 2, 0).numpy())
            captions.append(caption)
    return images, captions


@lru_cache
def _formats() -> tuple[str, ...]:
    """The names of the image formats that Pillow may open.

    Excluded are formats that are not images, formats that make Pillow start another program (Ghostscript), and BLP
    (game textures), because its reader allocates as much memory as a damaged header asks for.
    """
    Image.preinit()  # the common formats first: Pillow tries them in this order
    Image.init()
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        importlib.import_module("pillow_jxl")
    Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses twice as many; _decode refuses by the memory they take
    return tuple(name for name in Image.ID if name not in ("EPS", "PDF", "MPEG", "WMF", "HDF5", "GRIB", "BUFR", "BLP"))


def _decode(image: Image.Image, max_size: int, crop: bool) -> Tensor:
    coefficients = 6 * image.width * image.height if "progressive" in image.info else 0  # such a JPEG keeps them all
    image.draft(None, (2 * max_size, 2 * max_size))  # decodes a large JPEG at 1/2, 1/4 or 1/8 of its size
    memory = _bytes_a_pixel(image) * image.width * image.height + coefficients
    if memory > MAX_MEMORY:
        raise ValueError(f"{image.width}x{image.height} pixels would take {memory / 1e6:,.0f} MB of memory")
    with _one_large_image if memory > 32_000_000 else nullcontext():
        with suppress(Exception):  # damaged metadata cost the metadata
            ImageOps.exif_transpose(image, in_place=True)
        image = _to_8_bits(image)
        if crop:
            width, height = image.size
            left, top, side = max(0, width - height) // 2, max(0, height - width) // 2, min(width, height)
            image = image.crop((left, top, left + side, top + side))
        if max(image.size) > max_size:
            image = image.resize((max_size, max_size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)


def _bytes_a_pixel(image: Image.Image) -> int:
    """What decoding takes at most: the decoder's buffers, Pillow's four bytes, and copies in other modes."""
    by_mode = 18 if image.mode[0] in "IF" else 12 if image.has_transparency_data else 8
    return {"JPEG2000": 25, "WEBP": 16}.get(image.format, by_mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """An image that can be resized. Pixels of more than 8 bits become 8, scaled by the image's own depth.

    The depth is the smallest of 8, 12 and 16 bits that holds the brightest pixel; fractions up to 1 are scaled by 1.
    Anything else, such as measurements below zero, is stretched from its smallest to its largest value.
    """
    if image.mode[0] in "IF":
        values = np.array(image, dtype=np.float32)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        del finite
        depths = [1.0] * (image.mode == "F") + [255.0, 4095.0, 65535.0]
        full = next((depth for depth in depths if low >= 0 and high <= depth), None)
        low, full = (0.0, full) if full else (low, max(high - low, 1e-6))
        values -= np.float32(low)
        values *= np.float32(255 / full)
        np.nan_to_num(values, copy=False)
        return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))
    if image.has_transparency_data and image.mode != "RGBA":
        return image.convert("RGBA")
    if image.mode in ("1", "P"):
        return image.convert("RGB")
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB in sRGB, transparency on white."""
    profile = image.info.get("icc_profile")
    if image.mode == "RGBA":
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image, mask=image)
        image = rgb
    if profile:
        with suppress(ImageCms.PyCMSError, OSError):  # a damaged profile, or one of another kind of image
            return ImageCms.applyTransform(image, _from_profile(profile, image.mode))
    return image.convert("RGB")


@lru_cache(maxsize=16)
def _from_profile(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """From the colours of an ICC profile to sRGB."""
    return ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
    )


def preprocess(
    images: list[Tensor],
    preprocessing: dict,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    draws: Tensor | None = None,
) -> Tensor:
    """Turns B images, uint8 (3, H, W), into one normalised batch (B, 3, S, S) on the device, channels_last.

    `preprocessing` is the attribute of a TransferModel: image_size S, mean and std. `draws` (B, 5) augment the images
    for training: random numbers from 0 to 1 for the vertical shift, the horizontal shift, the mirroring, and the row
    and column around which a square is blanked (Cutout: DeVries and Taylor 2017, arXiv 1708.04552).

    A resize is linear, so it is one matrix product along each side. That is fast on every device: on the CPU it takes
    a fraction of the time of `F.interpolate`. Normalising comes first, while the images are small.
    """
    if len({image.shape for image in images}) > 1:
        draws = [None] * len(images) if draws is None else draws[:, None]
        pairs = zip(images, draws, strict=True)
        return torch.cat([preprocess([image], preprocessing, device, dtype, draw) for image, draw in pairs])
    batch = torch.stack(images)
    if torch.device(device).type == "cuda":
        batch = batch.pin_memory()  # without it the copy would wait for the batch before
    x = batch.to(device, non_blocking=batch.is_pinned()).permute(0, 2, 3, 1)  # (B, H, W, 3)
    B, H, W, _ = x.shape
    S = preprocessing["image_size"]
    shift, scale = (_on_device(tuple(preprocessing[name]), device) for name in ("mean", "std"))
    x = ((x / 255 - shift) / scale).to(dtype)
    if draws is not None:
        x = _augment(x, draws)
    if W != S:
        x = x.reshape(B * H, W * 3) @ _resize_matrix(W, S, 3, device, dtype)
    if H != S:
        x = _resize_matrix(H, S, 1, device, dtype).T @ x.reshape(B, H, S * 3)
    return x.reshape(B, S, S, 3).permute(0, 3, 1, 2)


def _augment(x: Tensor, draws: Tensor) -> Tensor:
    """Moves and mirrors normalised images (B, H, W, 3) and blanks a square, as draws (B, 5) say."""
    B, H, W, _ = x.shape
    down, right, mirror, row, column = draws.split(1, dim=1)
    rows, columns = _moved(H, down), _moved(W, right)
    columns = torch.where(mirror < 0.5, columns.flip(1), columns)
    blank = _near(H, row)[:, :, None] & _near(W, column)[:, None, :]
    which, rows, columns, blank = (tensor.to(x.device) for tensor in (torch.arange(B), rows, columns, blank))
    x = x[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return x.masked_fill(blank[..., None], 0)  # 0 is the mean


def _moved(size: int, draws: Tensor) -> Tensor:
    """Pixel indices (B, size), each row moved by up to an eighth of the size, as draws (B, 1) say, and reflected."""
    reach = size // 8
    indices = torch.arange(size) + ((2 * reach + 1) * draws).long() - reach
    return size - 1 - (size - 1 - indices.abs()).abs()


def _near(size: int, draws: Tensor) -> Tensor:
    """Which pixels (B, size) are within an eighth of the size of a place, which draws (B, 1) say."""
    return (torch.arange(size) + 0.5 - draws * size).abs() < size / 8


@lru_cache
def _on_device(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    return torch.tensor(values, device=device)


@lru_cache(maxsize=64)
def _resize_matrix(old: int, new: int, channels: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Torch's antialiased resize of a row of pixels as a matrix (old * channels, new * channels)."""
    matrix = F.interpolate(torch.eye(old)[None, None], (new, old), mode="bilinear", antialias=True)[0, 0]
    return torch.kron(matrix, torch.eye(channels)).T.contiguous().to(device, dtype)


# ---------------------------------------------------------------------------------------- files and scripts


def run_script(main: Callable[[], int], when_interrupted: str = "interrupted") -> NoReturn:
    """Runs `main` and exits with its code. An error that the user can mend is one line on stderr, not a traceback."""
    with suppress(ValueError):  # a thread of a notebook takes no signals
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    socket.setdefaulttimeout(30)  # a server that sends nothing for so long is gone
    warnings.filterwarnings("ignore", module="PIL")
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    torch.backends.cudnn.allow_tf32 = False  # or fp32 would mean ten bits on some GPUs
    if hasattr(sys.stdin, "reconfigure"):  # not in a notebook
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files may be no text
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        code = 130
    except BrokenPipeError:  # as in `inference.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    if "TORCHELASTIC_RUN_ID" in os.environ:  # under torchrun, gloo may hang while it closes its connections
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def available_cpus(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use: fewer than the machine has if its affinity or its container says so."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no container, or "max"
        time_allowed, period = map(int, quota.read_text().split())
        cpus = min(cpus, math.ceil(time_allowed / period))
    return cpus


class Progress(tqdm):
    """A bar of images and time left: in a terminal as tqdm draws it, in a log as a plain line every 30 seconds."""

    LINE = "{desc}: {n_fmt} of {total_fmt} images, {elapsed} passed, {remaining} left"

    def __init__(self, total: int | None, title: str, done: int = 0, disable: bool = False):
        self.in_terminal, self.due = sys.stderr.isatty(), time.monotonic() + 5  # the first line comes sooner
        style = {"smoothing": 0}  # validation is faster than training, and the time left follows from both
        if not self.in_terminal:
            style |= {"file": io.StringIO(), "mininterval": 1, "bar_format": self.LINE, "leave": False}
        super().__init__(total=total, desc=title, initial=done, unit="img", disable=disable, **style)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.in_terminal:
            super().display(msg, pos)
        elif msg is None and time.monotonic() >= self.due:
            print(self, file=sys.stderr)
            self.due = time.monotonic() + 30


def positive(kind: type = int, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type for positive numbers of one kind, int or float, below a bound."""

    def number(text: str) -> float:
        if not 0 < (value := kind(text)) < below:
            bound = f" below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a positive number{bound}")
        return value

    return number


def seed_number(text: str) -> int:
    """An argparse type for seeds, those that every generator takes."""
    if not 0 <= (number := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a seed: take one from 0 to {2**32 - 1}")
    return number


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    """The text with escape sequences and bytes that are no characters spelled out. Safe for terminals and plots."""
    return text if text.isprintable() else repr(text)[1:-1]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears at `path` once it is complete. If anything fails it does not appear."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Adds to an OSError which file could not be written and how much space is free."""
    try:
        yield
    except OSError as error:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        room = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free there"
        raise OSError(f"{path} cannot be written ({error.strerror or error}); {room}") from error


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Locks the file `path`. The system releases the lock when the process ends, even after a crash.

    If another process holds the lock, waits for it if `wait`, else raises OSError.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        while True:
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # as on some network file systems
                    print(f"{path.parent} cannot be locked ({error.strerror}): run one at a time", file=sys.stderr)
                    break
                if not wait:
                    raise OSError(
                        f"another run is at work in {path.parent}: wait for it, or choose another --output"
                    ) from error
            time.sleep(0.1)
        yield


class _Later(ModuleType):
    """A module that is imported when one of its functions is called."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments: getattr(importlib.import_module(self.__name__), name)(*arguments)


# torchvision imports torch's compiler for an operator that nothing here uses. That is half of the time that a script
# takes to start, and 150 MB. While torchvision is imported, a stand-in takes the compiler's place.
_compiler = _Later("torch._dynamo.utils")
if sys.modules.setdefault(_compiler.__name__, _compiler) is _compiler:
    importlib.import_module("torchvision")
    del sys.modules[_compiler.__name__]
