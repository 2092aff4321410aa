"""Pictures and labels: where they come from, the split, the one decoder, the one preprocessing.

    data = load_data("cifar10", root=Path("data"))      # or a folder with train/<class>/ and test/<class>/
    image = read_image(data.test.items[0])              # uint8 (3, H, W)

Training, evaluation and inference all read their pictures here, so that a picture means the same to each of them.
"""

import argparse
import hashlib
import io
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
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
CPU_BATCH = 32  # pictures, on each core
MAX_PIXELS, MAX_BYTES = 25_000_000, 200_000_000  # so that no picture takes more than 250 MB to read
_one_large_picture = threading.Lock()


class ImageError(OSError):
    """A picture that can't be read. The message names it."""


@dataclass
class Images:
    """Pictures, as files or as one uint8 (N, H, W, 3) array, and their labels, an int64 (N,)."""

    items: list[Path] | np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, indices: Tensor) -> "Images":
        chosen = indices.numpy()
        items = self.items[chosen] if isinstance(self.items, np.ndarray) else [self.items[i] for i in chosen]
        return Images(items, self.labels[indices])

    def fingerprint(self) -> str:
        """Changes whenever a picture does: a hash of the pixels, or of every file's path, size and times."""
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
    """`images` holds training and validation pictures; `train` and `val` are int64 indices into it."""

    classes: tuple[str, ...]
    images: Images
    train: Tensor
    val: Tensor
    test: Images


def load_data(source: str, root: Path = Path("data"), limit: int | None = None, seed: int = 0) -> Data:
    """CIFAR-10 ("cifar10", kept in `root`), drawn shapes ("demo"), or the user's own folder.

    `limit` keeps that many training (and at most that many test) pictures, the same share of every class.
    Raises OSError or ValueError, with what to do about it, where the pictures can't be had or make no data set.
    """
    if source == "cifar10":
        classes, train, val, test = CIFAR10_CLASSES, *_cifar10(root)
    elif source == "demo":
        classes, train, val, test = _demo()
    else:
        classes, train, val, test = _folder(Path(source))
    if limit is not None:
        train, val, test = (part and _limit(part, limit, seed) for part in (train, val, test))
    for label, name in enumerate(classes):
        if label not in train.labels:
            raise ValueError(f"no training picture of class {name!r} in {source}: add some, or raise --limit")
    if val is None:  # 80 % / 20 %, the same for every model
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        held_out = round(0.2 * len(train))
        train_indices, val_indices, images = order[held_out:], order[:held_out], train
    else:
        train_indices, val_indices = torch.arange(len(train) + len(val)).split([len(train), len(val)])
        images = Images([*train.items, *val.items], torch.cat([train.labels, val.labels]))
    if len(train_indices) < 2 or not len(val_indices) or not len(test):
        raise ValueError(f"too few pictures in {source}: two to train on, one for validation and one to test at least")
    return Data(classes, images, train_indices, val_indices, test)


def _limit(images: Images, limit: int, seed: int) -> Images:
    """At most `limit` pictures, class by class in turn, so that the classes stay balanced."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        turn[labels == label] = torch.arange(int((labels == label).sum()))
    return images.subset(order[turn.argsort(stable=True)[:limit]].sort().values)


# ---------------------------------------------------------------------------------------------- sources


def _cifar10(root: Path) -> tuple[Images, None, Images]:
    try:
        parts = [CIFAR10(root, train) for train in (True, False)]  # checks every file's md5 before it opens one
    except RuntimeError:
        _download_cifar10(root)
        parts = [CIFAR10(root, train) for train in (True, False)]
    train, test = (Images(part.data, torch.tensor(part.targets)) for part in parts)
    return train, None, test


def _download_cifar10(root: Path) -> None:
    """Downloaded, checked and unpacked beside, then renamed: `root` never holds half a data set."""
    archive, unpacked = root / CIFAR10.filename, root / CIFAR10.base_folder
    with locked(root / ".lock", wait=True), tempfile.TemporaryDirectory(dir=root, prefix=".cifar10-") as folder:
        with suppress(RuntimeError):
            CIFAR10(root)  # another run was faster
            return
        try:
            if archive.exists():  # put there by hand
                shutil.copy(archive, folder)
            CIFAR10(folder, download=True)
        except (OSError, RuntimeError) as error:
            refused = f"{archive} is not the right file, and " if archive.exists() else ""
            raise OSError(
                f"{refused}CIFAR-10 can't be downloaded ({error}): put {CIFAR10.filename} (md5 {CIFAR10.tgz_md5}) "
                f"into {root}/, or use --data FOLDER with your own pictures, or --demo"
            ) from error
        shutil.rmtree(unpacked, ignore_errors=True)
        (Path(folder) / CIFAR10.base_folder).rename(unpacked)


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
    """Labels go by the folder's name, never by its position: a part may lack a class, and may not add one."""
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
    """Every file below `folder` named like a picture, in order; hidden ones and folders behind links left out."""
    Image.preinit()  # the common formats first: Pillow tries them in this order
    Image.init()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in Image.EXTENSION:
                yield Path(parent, name)


def _demo(train: int = 600, test: int = 200) -> tuple[tuple[str, ...], Images, None, Images]:
    """Small pictures drawn on the fly, the same ones every time: four shapes in any colour on any ground."""
    shapes = {
        "circle": lambda draw, x, y, r, ink: draw.ellipse((x - r, y - r, x + r, y + r), ink),
        "line": lambda draw, x, y, r, ink: draw.line((x - r, y, x + r, y), ink, width=4),
        "square": lambda draw, x, y, r, ink: draw.rectangle((x - r, y - r, x + r, y + r), ink),
        "triangle": lambda draw, x, y, r, ink: draw.polygon((x - r, y + r, x + r, y + r, x, y - r), ink),
    }
    random = np.random.default_rng(0)
    labels = torch.arange(train + test) % len(shapes)
    pictures = random.normal(0, 12, (train + test, 32, 32, 3))
    for picture, label in zip(pictures, labels, strict=True):
        ground, ink = random.integers(0, 110, 3).tolist(), random.integers(145, 256, 3).tolist()
        image = Image.new("RGB", (32, 32), tuple(ground))
        x, y, r = *random.integers(12, 20, 2).tolist(), int(random.integers(6, 11))
        list(shapes.values())[label](ImageDraw.Draw(image), x, y, r, tuple(ink))
        picture += image
    pictures = pictures.clip(0, 255).astype(np.uint8)
    return tuple(shapes), Images(pictures[:train], labels[:train]), None, Images(pictures[train:], labels[train:])


# --------------------------------------------------------------------------- the decoder and preprocessing


def read_image(item: Path | np.ndarray, max_size: int = 224) -> Tensor:
    """One picture as uint8 (3, H, W): upright by its EXIF orientation, RGB, transparency on white.

    A picture larger than `max_size` is resized to max_size x max_size here, antialiased, so that a batch of photographs
    takes no more memory than one of thumbnails; smaller ones are resized by the batch, on the device (`preprocess`).
    Raises ImageError, which names the file, whatever is wrong with it.
    """
    if isinstance(item, np.ndarray):
        return torch.from_numpy(item).permute(2, 0, 1)
    try:
        status = item.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise OSError("not a file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size:,} bytes are more than {MAX_BYTES:,}")
        with Image.open(io.BytesIO(item.read_bytes())) as image:  # one read instead of Pillow's forty
            image.draft(None, (2 * max_size, 2 * max_size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
            with _one_large_picture if max(image.size) > 2048 else nullcontext():
                ImageOps.exif_transpose(image, in_place=True)
                rgb = _to_rgb(image)
                if max(rgb.size) > max_size:
                    rgb = rgb.resize((max_size, max_size), Image.Resampling.BILINEAR, reducing_gap=3.0)
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    except UnidentifiedImageError as error:
        raise ImageError(f"{item}: not a picture") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{item}: {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel, which Pillow would cut off at 255
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
    images: Tensor | list[Tensor],
    image_size: int,
    mean: list[float],
    std: list[float],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    augment: torch.Generator | None = None,
) -> Tensor:
    """Pictures, uint8 (3, H, W) each -> normalised (B, 3, image_size, image_size), channels_last, on the device.

    With `augment`, which says at random how, each is mirrored or not and moved a little.

    Resizing is linear, so it is two matrix products, one along each side: fast on every device, and on the CPU a
    fraction of a resize in float. Normalising comes first, while the picture is small.
    """
    if isinstance(images, list):
        if len({image.shape for image in images}) > 1:
            each = (preprocess(image[None], image_size, mean, std, device, dtype, augment) for image in images)
            return torch.cat(list(each))
        images = torch.stack(images)
    if torch.device(device).type == "cuda":
        images = images.pin_memory()  # or the copy would wait for the batch before it
    x = images.to(device, non_blocking=True).permute(0, 2, 3, 1)  # (B, H, W, 3)
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
    """(count, size): indices of pixels, moved by up to an eighth of the size, reflected at the edges."""
    reach = size // 8
    indices = torch.arange(size) + torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    return size - 1 - (size - 1 - indices.abs()).abs()


@lru_cache
def _on_device(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    return torch.tensor(values, device=device)


@lru_cache(maxsize=64)
def _resize_matrix(old: int, new: int, channels: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """(old * channels, new * channels): torch's antialiased resize of a row of pixels, read off an identity."""
    matrix = F.interpolate(torch.eye(old)[None, None], (new, old), mode="bilinear", antialias=True)[0, 0]
    return torch.kron(matrix, torch.eye(channels)).T.contiguous().to(device, dtype)


@contextmanager
def one_thread(on_cpu: bool = True) -> Iterator[None]:
    """Torch's operators on the CPU use one thread each, so that map_batches can use the cores."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if on_cpu else threads)
        yield
    finally:
        torch.set_num_threads(threads)


def map_batches(
    function: Callable[[list[Tensor]], Tensor],
    items: Iterable[Path | np.ndarray],
    device: torch.device,
    batch_size: int | None = None,
    max_size: int = 224,
) -> Iterator[tuple[list[Path | np.ndarray], Tensor, dict[int, ImageError]]]:
    """Reads pictures and runs `function` on them, batch after batch, in order, in constant memory.

    Yields the batch's items, the outputs (float32, on the CPU) of those that could be read, and by their position in
    the batch the errors of the others.
    On the CPU every core works on batches of its own, from file to output: convolutions of one thread that stay in its
    cache run up to twice as fast as those that all cores share. A GPU gets large batches, read by threads, and
    one forward pass at a time, which bounds its memory; where that is not enough, of ever fewer pictures.
    """
    on_cpu = device.type == "cpu"
    workers = torch.get_num_threads() if on_cpu else min(16, os.cpu_count() or 1)
    batch_size = part = batch_size or (CPU_BATCH if on_cpu else 256)
    turn = nullcontext() if on_cpu else threading.Lock()

    def in_parts(images: list[Tensor]) -> Tensor:
        nonlocal part
        try:
            return torch.cat([function(images[i : i + part]) for i in range(0, len(images), part)])
        except torch.OutOfMemoryError:
            if part == 1:
                raise
        part //= 2  # not in the handler, where the failed attempt still holds its memory
        print(f"out of memory: going on with batches of {part}", file=sys.stderr)
        return in_parts(images)

    def run(batch: list[Path | np.ndarray]) -> tuple[list[Path | np.ndarray], Tensor, dict[int, ImageError]]:
        images, errors = [], {}
        for i, item in enumerate(batch):
            try:
                images.append(read_image(item, max_size))
            except ImageError as error:
                errors[i] = error
        with turn, torch.inference_mode():
            outputs = in_parts(images) if images else torch.empty(0)
        return batch, outputs.float().cpu(), errors

    items = iter(items)
    batches = iter(lambda: list(islice(items, batch_size)), [])
    pool = ThreadPoolExecutor(workers)
    pending = deque()
    with one_thread(on_cpu):
        try:
            for batch in batches:
                pending.append(pool.submit(run, batch))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------- what every script has to get right


def run_script(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and leaves with its exit code; an error that the user can mend is one line, never a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    socket.setdefaulttimeout(5)  # a network that doesn't answer is none
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
    """An argparse type."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


@contextmanager
def whole_or_absent(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that appears at `path` when it is complete, and not at all when anything goes wrong."""
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
    """Says which file an OSError is about, and how much room there is."""
    try:
        yield
    except OSError as error:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        room = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free there"
        raise OSError(f"{path} can't be written ({error.strerror or error}); {room}") from error


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Holds the lock file `path`, which the system frees when the process ends, however it ends.

    Where another process holds it: waits, or raises OSError.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise OSError(
                f"another run is at work in {path.parent}: wait for it, or choose another --output"
            ) from error
        yield
