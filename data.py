"""Images and labels: where they come from, the split, the decoder and the preprocessing.

    data = load_data("cifar10", root=Path("data"))      # or a folder with train/<class>/ and test/<class>/
    image = read_image(data.test.items[0])              # uint8 (3, H, W)

Training, evaluation and inference all read images here, so they all see the same pixels. What every script needs to
deal with files and errors is at the end.
"""

import argparse
import errno
import hashlib
import io
import os
import shutil
import signal
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import CIFAR10

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EXPECTED_TREE = """
    {root}/
        train/<class>/*.jpg    one folder per class, the folder's name is the label
        test/<class>/*.jpg     the same classes
        val/<class>/*.jpg      optional; without it 20 % of train/ is held out"""
MAX_PIXELS, MAX_BYTES = 25_000_000, 200_000_000  # keeps the memory for one image below 250 MB
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

    def fingerprint(self) -> str:
        """A hash of the pixels, or of every file's path, size and times. It changes whenever an image changes."""
        digest = hashlib.sha256()
        if isinstance(self.items, np.ndarray):
            digest.update(np.ascontiguousarray(self.items))
        else:
            for path in self.items:
                file = path.stat()
                identity = f"\0{file.st_size}\0{file.st_mtime_ns}\0{file.st_ctime_ns}\0"
                digest.update(os.fsencode(path.absolute()) + identity.encode())
        return digest.hexdigest()


@dataclass
class Data:
    """A data set in three parts. A label is an index into `classes`."""

    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images


def load_data(source: str, root: Path = Path("data"), limit: int | None = None, seed: int = 0) -> Data:
    """Loads CIFAR-10 ("cifar10", kept in `root`), drawn shapes ("demo"), or a folder of images (its path).

    Holds out 20 % of each class for validation, chosen by `seed`, unless the folder brings its own validation images.
    `limit` keeps that many training images, and as large a share of the others, balanced over the classes.
    Raises OSError or ValueError if the images cannot be had or are not a data set. The message says what to do.
    """
    if source == "cifar10":
        classes, train, val, test = CIFAR10_CLASSES, *_cifar10(root)
    elif source == "demo":
        classes, train, val, test = _demo()
    else:
        classes, train, val, test = _folder(Path(source))
    if limit is not None:
        share = limit / max(1, len(train))
        train, test = _limit(train, limit, seed), _limit(test, max(len(classes), round(share * len(test))), seed)
        val = None if val is None else _limit(val, max(len(classes), round(share * len(val))), seed)
    for label, name in enumerate(classes):
        if label not in train.labels:
            raise ValueError(f"no training image of class {name!r} in {source}: add some, or raise --limit")
    if val is None:
        counts = train.labels.bincount()
        held_out = torch.where(counts < 2, 0, (0.2 * counts).round().clamp(min=1))
        is_val = _ranks(train.labels, seed) < held_out[train.labels]
        train, val = train.subset((~is_val).nonzero().flatten()), train.subset(is_val.nonzero().flatten())
    if len(train) < 2 or not len(val) or not len(test):
        raise ValueError(f"too few images in {source}: training needs two, validation and test need one each")
    return Data(classes, train, val, test)


def _ranks(labels: Tensor, seed: int) -> Tensor:
    """The place of each image in a random order of its class: 0, 1, 2..."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    ranks = torch.empty_like(labels)
    for label in labels.unique():
        members = order[labels[order] == label]
        ranks[members] = torch.arange(len(members))
    return ranks


def _limit(images: Images, limit: int, seed: int) -> Images:
    """At most `limit` images, balanced over the classes."""
    return images.subset(_ranks(images.labels, seed).argsort(stable=True)[:limit].sort().values)


# ---------------------------------------------------------------------------------------------- sources


def _cifar10(root: Path) -> tuple[Images, None, Images]:
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


def _folder(root: Path) -> tuple[tuple[str, ...], Images, Images | None, Images]:
    for folder in (root, root / "train", root / "test"):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; --data expects{EXPECTED_TREE.format(root=root)}")
    classes = _class_folders(root / "train")
    if not classes:
        raise ValueError(f"no class folders in {root / 'train'}; --data expects{EXPECTED_TREE.format(root=root)}")
    val = _labelled(root / "val", classes) if (root / "val").is_dir() else None
    return classes, _labelled(root / "train", classes), val, _labelled(root / "test", classes)


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return tuple(sorted(name for name in names if not name.startswith((".", "__"))))  # not .ipynb_checkpoints


def _labelled(folder: Path, classes: tuple[str, ...]) -> Images:
    """The images below `folder`, labelled by the name of their class folder. A class may be missing, not added."""
    unknown = sorted(set(_class_folders(folder)) - set(classes))
    if unknown:
        raise ValueError(
            f"{folder} has a class that train/ lacks: {', '.join(unknown)}; rename it, or add it to train/"
        )
    items, labels = [], []
    for label, name in enumerate(classes):
        found = list(find_images(folder / name))
        items += found
        labels += [label] * len(found)
    return Images(items, torch.tensor(labels, dtype=torch.int64))


def find_images(folder: Path) -> Iterator[Path]:
    """Yields the files below `folder` with the extension of an image, sorted. Skips hidden files and linked folders."""
    formats = _formats()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Image.EXTENSION.get(os.path.splitext(name)[1].lower()) in formats:
                yield Path(parent, name)


def _demo(train: int = 600, test: int = 200) -> tuple[tuple[str, ...], Images, None, Images]:
    """Small drawings of shapes in random colours. Every call draws the same ones."""
    sides = {"circle": 30, "square": 4, "triangle": 3}
    random = np.random.default_rng(0)
    labels = torch.arange(train + test) % len(sides)
    images = random.normal(0, 12, (train + test, 32, 32, 3))
    for image, label in zip(images, labels, strict=True):
        ground, ink = random.integers(0, 110, 3).tolist(), random.integers(145, 256, 3).tolist()
        canvas = Image.new("RGB", (32, 32), tuple(ground))
        x, y, r = *random.integers(12, 20, 2).tolist(), int(random.integers(6, 11))
        ImageDraw.Draw(canvas).regular_polygon((x, y, r), list(sides.values())[label], fill=tuple(ink))
        image += canvas
    images = images.clip(0, 255).astype(np.uint8)
    return tuple(sides), Images(images[:train], labels[:train]), None, Images(images[train:], labels[train:])


# ---------------------------------------------------------------------------- the decoder and preprocessing


def read_image(item: Item, max_size: int = 224) -> Tensor:
    """Reads one image as uint8 (3, H, W): RGB, upright by its EXIF orientation, transparency on white.

    An image larger than `max_size` is resized to (3, max_size, max_size), so that a batch of photographs takes no more
    memory than a batch of thumbnails. `preprocess` resizes smaller ones, on the device.
    Raises ImageError, which names the file, whatever is wrong with it.
    """
    if isinstance(item, np.ndarray) and max(item.shape[:2]) <= max_size:
        return torch.from_numpy(item).permute(2, 0, 1)
    try:
        if not isinstance(item, Path):
            return _decode(item.copy() if isinstance(item, Image.Image) else Image.fromarray(item), max_size)
        status = item.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            raise OSError("not a file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size:,} bytes are more than {MAX_BYTES:,}")
        with Image.open(io.BytesIO(item.read_bytes()), formats=_formats()) as image:  # one read; Pillow makes forty
            return _decode(image, max_size)
    except UnidentifiedImageError as error:
        raise ImageError(f"{item}: not an image") from error
    except Exception as error:  # damaged files make Pillow raise nearly any exception
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{item}: {reason}") from error


@lru_cache
def _formats() -> tuple[str, ...]:
    """Pillow's formats but those that are no images, or for which it starts another program (Ghostscript)."""
    Image.preinit()  # the common formats first: Pillow tries them in this order
    Image.init()
    return tuple(name for name in Image.ID if name not in ("EPS", "PDF", "MPEG", "WMF", "HDF5", "GRIB", "BUFR"))


def _decode(image: Image.Image, max_size: int) -> Tensor:
    image.draft(None, (2 * max_size, 2 * max_size))  # decodes a large JPEG at 1/2, 1/4 or 1/8 of its size
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
    with _one_large_image if max(image.size) > 2048 else nullcontext():
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image)
        if max(rgb.size) > max_size:
            rgb = rgb.resize((max_size, max_size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel, which Pillow would clip at 255
        values = np.array(image, dtype=np.float32)
        values *= 255 / (65535 if image.mode.startswith("I;16") or values.max() > 255 else 255)
        return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    rgb = Image.new("RGB", image.size, "white")
    rgb.paste(rgba, mask=rgba)
    return rgb


def preprocess(
    images: list[Tensor],
    image_size: int,
    mean: list[float],
    std: list[float],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    augment: torch.Generator | None = None,
) -> Tensor:
    """Turns B images, uint8 (3, H, W), into one normalised batch (B, 3, image_size, image_size) on the device.

    The batch is channels_last. With `augment` each image is mirrored and moved a little at random.

    A resize is linear, so it is one matrix product along each side. That is fast on every device: on the CPU it takes
    a fraction of the time of `F.interpolate`. Normalising comes first, while the images are small.
    """
    if len({image.shape for image in images}) > 1:
        each = (preprocess([image], image_size, mean, std, device, dtype, augment) for image in images)
        return torch.cat(list(each))
    batch = torch.stack(images)
    if torch.device(device).type == "cuda":
        batch = batch.pin_memory()  # without it the copy would wait for the batch before
    x = batch.to(device, non_blocking=True).permute(0, 2, 3, 1)  # (B, H, W, 3)
    B, H, W, _ = x.shape
    if augment is not None:
        rows, columns = _moved(H, B, augment), _moved(W, B, augment)
        mirrored = torch.rand(B, 1, generator=augment) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        rows, columns, which = (index.to(device) for index in (rows, columns, torch.arange(B)))
        x = x[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    shift, scale = _on_device(tuple(mean), device), _on_device(tuple(std), device)
    x = ((x / 255 - shift) / scale).to(dtype)
    if W != image_size:
        columns = _resize_matrix(W, image_size, 3, device, dtype)  # (3 W, 3 S)
        x = x.reshape(B * H, W * 3) @ columns
    if H != image_size:
        rows = _resize_matrix(H, image_size, 1, device, dtype).T  # (S, H)
        x = rows @ x.reshape(B, H, image_size * 3)
    return x.reshape(B, image_size, image_size, 3).permute(0, 3, 1, 2)


def _moved(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Pixel indices (count, size), each row moved by up to an eighth of the size and reflected at the edges."""
    reach = size // 8
    indices = torch.arange(size) + torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    return size - 1 - (size - 1 - indices.abs()).abs()


@lru_cache
def _on_device(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    return torch.tensor(values, device=device)


@lru_cache(maxsize=64)
def _resize_matrix(old: int, new: int, channels: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Torch's antialiased resize of a row of pixels as a matrix (old * channels, new * channels)."""
    matrix = F.interpolate(torch.eye(old)[None, None], (new, old), mode="bilinear", antialias=True)[0, 0]
    return torch.kron(matrix, torch.eye(channels)).T.contiguous().to(device, dtype)


# ---------------------------------------------------------------------------------------- files and scripts


def run_script(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and exits with its code. An error that the user can mend is one line on stderr, not a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    socket.setdefaulttimeout(30)  # a server that sends nothing for so long is gone
    warnings.filterwarnings("ignore", module="PIL")
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # as in `inference.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def positive(text: str) -> int:
    """An argparse type for whole numbers above zero."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


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
    """Holds the lock file `path`. The system releases it when the process ends, however it ends.

    If another process holds it: waits, or raises OSError.
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
