"""How does a file become pixels, and how do pixels become a batch? Decoding, preprocessing, augmentation.

An image that cannot be read raises ImageError. Training leaves it out beforehand (engine/survey.py) and names it at the
end; inference answers with an error in its place. The exit code is 1 then, or 2 if too little is left.
"""

import hashlib
import io
import math
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from engine.console import first_line, say_once
from engine.depth import to_8_bits
from engine.device import available_cpus, layout_for
from engine.distributed import shared_map
from engine.formats import NOT_AN_IMAGE, image_formats, is_tiff_or_raw, room, what_it_is
from engine.readers import bytes_per_pixel, layout_of, pixels_of, read_values, upright

SRGB_GAMMA = 1 / 2.2
MAX_BYTES = 200_000_000  # size of a file, which is read as a whole
_one_at_a_time = threading.Lock()

# a path, a uint8 array (H, W, 3), a uint8 tensor (3, H, W), a Pillow image, a file's content, or a file opened to read
Item = Path | str | np.ndarray | Tensor | Image.Image | bytes | bytearray | memoryview | BinaryIO
EXPECTED = (
    "an image is a path, a file's bytes or an open file, a Pillow image, a uint8 array (H, W), (H, W, 1), (H, W, 3) or "
    "(H, W, 4), or a uint8 tensor (C, H, W)"
)


def is_image(images: object) -> bool:
    """Whether this is one image, not several."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4 and not _of_paths(images)
    return isinstance(images, Path | str | Image.Image | bytes | bytearray | memoryview) or hasattr(images, "read")


def images_of(images: object) -> Iterable[Item]:
    """The images of what `is_image` calls one or several. Raises TypeError if it is neither."""
    if is_image(images):
        return [images]
    if not isinstance(images, Iterable) or isinstance(images, Mapping) or type(images).__name__ == "DataFrame":
        raise TypeError(f"not images: {type(images).__name__}; {EXPECTED}")
    return images.ravel() if _of_paths(images) else images


def _of_paths(images: object) -> bool:
    """Whether this is an array of texts or objects, such as a column of a table."""
    return isinstance(images, np.ndarray) and images.dtype.kind in "OUT"


@dataclass
class Images:
    """N images, as files or as one uint8 array (N, H, W, 3), and their labels, int64 (N,)."""

    items: list[Path] | np.ndarray
    labels: Tensor
    names: list[str]  # the path below the data set's folder, or the part and the number: "test 17"
    groups: list[str] | None = None  # the name of each image's group (patient, film), if the data set has groups

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, indices: Tensor) -> "Images":
        chosen = indices.numpy()
        items = self.items[chosen] if isinstance(self.items, np.ndarray) else [self.items[i] for i in chosen]
        groups = self.groups and [self.groups[i] for i in chosen]
        part = Images(items, self.labels[indices], [self.names[i] for i in chosen], groups)
        if "ids" in vars(self):  # they have been computed
            part.ids = [self.ids[i] for i in chosen]
        return part

    @classmethod
    def joined(cls, parts: Iterable["Images"]) -> "Images":
        parts = list(parts)
        items = [item for part in parts for item in part.items]
        names, grouped = [name for part in parts for name in part.names], all(part.groups is not None for part in parts)
        groups = [group for part in parts for group in part.groups] if grouped else None
        return cls(items, torch.cat([part.labels for part in parts]), names, groups)

    def paths(self) -> list[str]:
        """For each image the path of its file, or its name."""
        return [
            str(item) if isinstance(item, Path) else name for item, name in zip(self.items, self.names, strict=True)
        ]

    @cached_property
    def ids(self) -> list[str]:
        """For each image a hash of its pixels, or of its file. Under torchrun each process reads a share of them."""
        with ThreadPoolExecutor(available_cpus()) as pool:
            hashes = shared_map(lambda own: pool.map(_identity, (self.items[i] for i in own)), range(len(self)), 256)
            return [*hashes]


def _identity(item: Path | np.ndarray) -> str:
    if isinstance(item, np.ndarray):
        return hashlib.blake2b(np.ascontiguousarray(item), digest_size=16).hexdigest()
    with suppress(OSError):  # the file is gone; reading it will raise an ImageError
        if item.is_file():  # opening a pipe would block
            digest = hashlib.blake2b(digest_size=16)
            with item.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
                digest.update(str(file.tell()).encode())  # as in the features that earlier versions have computed
            return digest.hexdigest()
    return hashlib.blake2b(os.fsencode(item), digest_size=16).hexdigest()


class ImageError(OSError):
    """An image that cannot be read. The message names it."""


def reading_arguments(preprocessing: dict) -> list:
    """The arguments of `read_image` after the item."""
    return [preprocessing.get(key) for key in ("image_size", "crop", "interpolation", "reading")]


def read_image(
    item: Item, max_size: int = 224, crop: bool = True, interpolation: str = "bilinear", reading: dict | None = None
) -> Tensor:
    """Reads one image as uint8 (3, H, W): RGB in sRGB, upright by its EXIF orientation, transparency on white.

    Crops it to the square in the middle, unless `crop` is False. Resizes an image larger than `max_size` to (3,
    max_size, max_size), so that a batch of photographs takes little memory; `preprocess` resizes smaller ones, on the
    device. `reading` says how values of more than 8 bits become 8, see engine/depth.py.
    Raises ImageError if the image cannot be read for any reason.
    """
    name = item if isinstance(item, Path | str) else "image"
    try:
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3:
            if 0 < item.shape[0] == item.shape[1] <= max_size:  # nothing to decode or to resize
                return torch.from_numpy(np.array(item)).permute(2, 0, 1)  # a copy, because the array may be read-only
        if not isinstance(item, np.ndarray | Tensor | Image.Image):
            content = _content(item)
            if values := read_values(content, max_size):
                for key in values.notes.keys() - (reading or {}).keys():
                    say_once(key, f"{name}: {values.notes[key]}")
                return _finish(to_8_bits(values, reading), max_size, crop, interpolation)
            with Image.open(io.BytesIO(content), formats=image_formats()) as image:
                return _decode(image, max_size, crop, interpolation, reading)
        return _decode(_pillow_image(item), max_size, crop, interpolation, reading)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: {what_it_is(content)}") from error
    except Exception as error:  # damaged files make Pillow raise nearly any exception
        raise ImageError(f"{name}: {getattr(error, 'strerror', None) or first_line(error)}") from error


def _content(item: Item) -> bytes:
    """The content of a file, of which this is the path, the content, or the open file."""
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if isinstance(item, Path | str):
        return _read_file(item)
    if not hasattr(item, "read"):
        raise TypeError(f"not an image: {type(item).__name__}; {EXPECTED}")
    with _one_at_a_time:  # it may be in several batches
        with suppress(OSError, AttributeError):  # it may have been read before; a socket cannot be read again
            item.seek(0)
        content = item.read()
    if isinstance(content, str):
        raise TypeError("the file is open as text: open it with mode 'rb'")
    return content


def _read_file(path: Path | str, count: int = -1) -> bytes:
    """The first `count` bytes of a file, or all: Pillow itself would issue about 40 small reads."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
        raise OSError("not a file")
    if count < 0 and status.st_size > MAX_BYTES:
        raise ValueError(f"{status.st_size:,} bytes are more than {MAX_BYTES:,}")
    with open(path, "rb", buffering=0) as file:
        return file.read(count)


def peculiarity(item: Item) -> dict | None:
    """What `depth.agree` needs to know of an image file: None if it is as most are, or cannot be read."""
    if isinstance(item, np.ndarray | Tensor | Image.Image):
        return None
    with suppress(Exception):  # read_image will raise it
        values = read_values(_content(item))
        return values.record() if values else None


def _pillow_image(item: np.ndarray | Tensor | Image.Image) -> Image.Image:
    if isinstance(item, Image.Image):
        with _one_at_a_time:  # the image may be in several batches, and Pillow reads its file now
            try:
                return item.copy()
            except Exception as error:  # the second time, Pillow would give black pixels without an error
                item.load = partial(_fail, first_line(error))
                raise
    if isinstance(item, Tensor) and item.ndim == 3:
        item = item.permute(1, 2, 0).cpu().numpy()
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.size:
        if item.ndim == 2 or item.shape[2:] in ((1,), (3,), (4,)):
            return Image.fromarray(item[..., 0] if item.shape[2:] == (1,) else item)
    raise TypeError(f"not an image: {type(item).__name__} {tuple(item.shape)} of {item.dtype}; {EXPECTED}")


def _fail(message: str) -> None:
    raise OSError(message)


def read_for_plot(
    described: Iterable[tuple[Item, object]], reading: dict | None, size: int = 224
) -> Iterator[tuple[np.ndarray, object]]:
    """Yields the images that can be read, (H, W, 3), at most `size` large, with what describes them."""
    for item, description in described:
        with suppress(ImageError):  # the file may have been deleted
            yield read_image(item, size, reading=reading).permute(1, 2, 0).numpy(), description


def is_image_file(path: str, extension: str) -> bool:
    """Whether a file is an image: by its extension, or by its first bytes if its format has a signature."""
    if is_image_extension(extension):
        return True
    with suppress(Exception):  # not an image, or not readable
        if not is_tiff_or_raw(_read_file(path, 12)):
            Image.open(path, formats=[name for name in image_formats() if Image.OPEN[name][1]]).close()
        return True
    return False


def has_few_colors(path: Path, most: int | None = None) -> bool:
    """Whether an image has no or few colors, as masks have: at most `most` shades, or any shades of grey.

    Photographs of masks and of labels have many.
    """
    with suppress(Exception):  # damaged: it will be named
        with Image.open(path, formats=image_formats()) as image:
            grey = not most and image.mode in ("1", "L", "P", "I", "I;16", "LA")
            return grey or image.getcolors(most or 256) is not None
    return False


def is_image_extension(extension: str) -> bool:
    formats = image_formats()  # first, because it registers the extensions
    return Image.EXTENSION.get(extension.lower()) in formats


def unread_format(path: str) -> str:
    """What a file is that is not read as an image, in brackets; "" if it is no kind of picture."""
    with suppress(OSError):
        kind = what_it_is(_read_file(path, 400))
        return f" ({kind})" if kind != NOT_AN_IMAGE else ""
    return ""


def _decode(image: Image.Image, max_size: int, crop: bool, interpolation: str, reading: dict | None) -> Tensor:
    # a progressive JPEG keeps all of its coefficients in memory
    coefficients = 6 * image.width * image.height if "progressive" in image.info else 0
    image.draft(None, (2 * max_size, 2 * max_size))  # decodes a large JPEG at 1/2, 1/4 or 1/8 of its size
    with room(*image.size, bytes_per_pixel(image), coefficients):
        if image.format == "PNG" and "transparency" in image.info:
            # Pillow scales grey values of 2 and 4 bits to 8, but not the one that is transparent
            image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(layout_of(image), 1)
        upright(image)
        if image.mode[0] in "IF":
            image = to_8_bits(pixels_of(image), reading)
        elif image.has_transparency_data and image.mode != "RGBA":
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        elif image.mode in ("1", "P"):
            image = image.convert("RGB")
        return _finish(image, max_size, crop, interpolation)


def _finish(image: Image.Image, max_size: int, crop: bool, interpolation: str) -> Tensor:
    """Crops and resizes an upright image in 8 bits, and turns it into sRGB, transparency on white: uint8 (3, H, W)."""
    if crop and image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if max(image.size) > max_size:
        image = image.resize((max_size, max_size), Image.Resampling[interpolation.upper()], reducing_gap=3.0)
    return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma", SRGB_GAMMA)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile:
        with suppress(ImageCms.PyCMSError, OSError):  # a damaged profile, or one of another kind of image
            return ImageCms.applyTransform(image, _to_srgb(profile, image.mode))
    image = image.convert("RGB")
    if "srgb" in image.info or abs(gamma / SRGB_GAMMA - 1) < 0.05 or gamma <= 0:
        return image
    return image.point([round(255 * (value / 255) ** (SRGB_GAMMA / gamma)) for value in range(256)] * 3)


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def preprocess(
    images: Tensor | list[Tensor],
    preprocessing: dict,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turns B images, uint8 (3, H, W), into one normalised batch (B, 3, S, S) on the device, in `layout_for`.

    `preprocessing` is the attribute of a TransferModel: image_size S, mean, std and interpolation. Images of one size
    are resized together. Normalising comes first, while the images are small.
    """
    S, resized = preprocessing["image_size"], []
    mean, std = (_on_device(tuple(preprocessing[name]), device) for name in ("mean", "std"))
    batches = [images]
    if not isinstance(images, Tensor):
        batches = [torch.stack(list(group)) for _, group in groupby(images, lambda image: image.shape)]
    for batch in batches:
        x = batch.to(device, non_blocking=batch.is_pinned())  # (b, 3, H, W)
        x = (x / 255 - mean) / std
        if x.shape[2:] != (S, S):
            x = _resize(x, S, preprocessing["interpolation"])
        resized.append(x.to(dtype))
    return torch.cat(resized).contiguous(memory_format=layout_for(resized[0].device, dtype))


def read_and_preprocess(item: Item, preprocessing: dict, device: torch.device | str = "cpu") -> Tensor:
    """One image as a batch (1, 3, S, S) for a model with this preprocessing."""
    return preprocess([read_image(item, *reading_arguments(preprocessing))], preprocessing, device)


def _resize(images: Tensor, size: int, mode: str) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size), channels_last. As F.interpolate with antialias=True, in half of the time.

    Resizing is linear: each row of the output is the same weighted sum of rows of the input, and so are the columns.
    """
    rows, columns = (_resizing_weights(length, size, mode, images.device) for length in images.shape[2:])
    x = (images @ columns.T).permute(0, 2, 3, 1)  # (B, H, size, 3)
    return (rows @ x.flatten(2)).view(len(images), size, size, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _resizing_weights(length: int, size: int, mode: str, device: torch.device) -> Tensor:
    """(size, length): what the rows of the identity matrix become."""
    identity = torch.eye(length, device=device)[None, None]
    return F.interpolate(identity, (size, length), mode=mode, antialias=True)[0, 0]


@lru_cache
def _on_device(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]


def augment(image: Tensor, draws: Tensor, mean: tuple[float, ...]) -> Tensor:
    """Moves an image, uint8 (3, H, W), mirrors it, and blanks a square of it, for training.

    `draws` are five random numbers from 0 to 1: for the vertical shift, the horizontal shift, the mirroring, and the
    row and column around which a square is filled with the mean colour (Cutout: DeVries and Taylor 2017, arXiv
    1708.04552).
    """
    _, H, W = image.shape
    down, right, mirror, row, column = draws.tolist()
    rows, columns = _shifted(H, down), _shifted(W, right)
    if mirror < 0.5:
        columns = columns.flip(0)
    blank = _near(H, row)[:, None] & _near(W, column)
    color = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)[:, None, None]
    return torch.where(blank, color, image[:, rows[:, None], columns])


def _shifted(size: int, draw: float) -> Tensor:
    """Pixel indices (size,), moved by up to an eighth of the size, reflected at the border."""
    reach = size // 8
    indices = torch.arange(size) + math.floor((2 * reach + 1) * draw) - reach
    return size - 1 - (size - 1 - indices.abs()).abs()


def _near(size: int, draw: float) -> Tensor:
    """Which pixels (size,) are within an eighth of the size of a place."""
    return (torch.arange(size) + 0.5 - draw * size).abs() < size / 8
