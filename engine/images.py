"""How does a file become pixels, and how do pixels become a batch? Decoding, preprocessing, augmentation.

An image that cannot be read raises ImageError. engine/run.py gives it an output of NaN; the scripts name it and leave
it out, and their exit code is 1.
"""

import importlib
import io
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from engine.console import first_line

MAX_MEMORY = 400_000_000  # bytes that decoding one image may take
MAX_BYTES = 200_000_000  # size of a file, which is read as a whole
ONE_AT_A_TIME = 32_000_000  # bytes of memory beyond which images are decoded one at a time
_one_large_image, _one_at_a_time = threading.Lock(), threading.Lock()

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
    a_table = isinstance(images, Mapping) or type(images).__name__ == "DataFrame"  # which would yield its columns
    if a_table or not isinstance(images, Iterable):
        raise TypeError(f"not images: {type(images).__name__}; {EXPECTED}")
    return images.ravel() if _of_paths(images) else images


def _of_paths(images: object) -> bool:
    """Whether this is an array of texts or objects, such as a column of a table."""
    return isinstance(images, np.ndarray) and images.dtype.kind in "OUT"


class ImageError(OSError):
    """An image that cannot be read. The message names it."""


READING = ("image_size", "crop", "interpolation")  # the keys of a preprocessing that are arguments of read_image


def read_image(item: Item, max_size: int = 224, crop: bool = True, interpolation: str = "bilinear") -> Tensor:
    """Reads one image as uint8 (3, H, W): RGB in sRGB, upright by its EXIF orientation, transparency on white.

    Crops it to the square in the middle, unless `crop` is False. Resizes an image larger than `max_size` to (3,
    max_size, max_size), so that a batch of photographs takes no more memory than a batch of thumbnails; `preprocess`
    resizes smaller images, on the device. Raises ImageError if the image cannot be read for any reason.
    """
    name = item if isinstance(item, Path | str) else "image"
    try:
        if isinstance(item, np.ndarray) and item.ndim == 3 and item.dtype == np.uint8:
            if item.shape[2] == 3 and 0 < item.shape[0] == item.shape[1] <= max_size:  # nothing to decode or to resize
                return torch.from_numpy(np.array(item)).permute(2, 0, 1)  # a copy, because the array may be read-only
        if not isinstance(item, np.ndarray | Tensor | Image.Image):
            content = _content(item)
            with Image.open(io.BytesIO(content), formats=image_formats()) as image:
                return _decode(image, max_size, crop, interpolation)
        return _decode(_pillow_image(item), max_size, crop, interpolation)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image") from error
    except Exception as error:  # damaged files make Pillow raise nearly any exception
        raise ImageError(f"{name}: {getattr(error, 'strerror', None) or first_line(error)}") from error


def _content(item: Item) -> bytes:
    """The content of a file, of which this is the path, the content, or the open file."""
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if hasattr(item, "read") and not isinstance(item, Path):
        with _one_at_a_time:  # it may be in several batches
            if hasattr(item, "seek"):  # it may have been read before; a socket cannot be read again
                with suppress(OSError):
                    item.seek(0)
            content = item.read()
        if isinstance(content, str):
            raise TypeError("the file is open as text: open it with mode 'rb'")
        return content
    if not isinstance(item, Path | str):
        raise TypeError(f"not an image: {type(item).__name__}; {EXPECTED}")
    return _read_file(Path(item))


def _pillow_image(item: np.ndarray | Tensor | Image.Image) -> Image.Image:
    if isinstance(item, Image.Image):
        with _one_at_a_time:  # the image may be in several batches, and Pillow reads its file now
            return item.copy()
    if isinstance(item, Tensor) and item.ndim == 3:
        item = item.permute(1, 2, 0).cpu().numpy()
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.size:
        if item.ndim == 2 or (item.ndim == 3 and item.shape[2] <= 4):
            return Image.fromarray(item[..., 0] if item.shape[2:] == (1,) else item)
    raise TypeError(f"not an image: {type(item).__name__} {tuple(item.shape)} of {item.dtype}; {EXPECTED}")


def _read_file(path: Path) -> bytes:
    """The file's content. Pillow itself would issue about 40 small reads."""
    size = path.stat().st_size
    if not path.is_file():  # opening a pipe would block
        raise OSError("not a file")
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
    return path.read_bytes()


def read_for_plot(captioned: Iterable[tuple[Item, str]], size: int = 224) -> Iterator[tuple[np.ndarray, str]]:
    """Yields the images that can be read, (H, W, 3), at most `size` large, with their captions."""
    for item, caption in captioned:
        with suppress(ImageError):  # the file may have been deleted
            yield read_image(item, size).permute(1, 2, 0).numpy(), caption


def is_image_file(path: str, extension: str) -> bool:
    """Whether a file is an image: by its extension, or by its first bytes if its format has a signature."""
    if is_image_extension(extension):
        return True
    with suppress(Exception):  # not an image, or not readable
        if Path(path).is_file():  # opening a pipe would block
            Image.open(path, formats=[name for name in image_formats() if Image.OPEN[name][1]]).close()
            return True
    return False


def is_image_extension(extension: str) -> bool:
    formats = image_formats()  # first, because it registers the extensions
    return Image.EXTENSION.get(extension.lower()) in formats


@lru_cache
def image_formats() -> tuple[str, ...]:
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


def _decode(image: Image.Image, max_size: int, crop: bool, interpolation: str) -> Tensor:
    # a progressive JPEG keeps all of its coefficients in memory
    coefficients = 6 * image.width * image.height if "progressive" in image.info else 0
    image.draft(None, (2 * max_size, 2 * max_size))  # decodes a large JPEG at 1/2, 1/4 or 1/8 of its size
    # bytes that a pixel takes at most: the decoder's buffers, Pillow's four bytes, and copies in other modes
    by_mode = 18 if image.mode[0] in "IF" else 12 if image.has_transparency_data else 8
    memory = {"JPEG2000": 25, "WEBP": 16}.get(image.format, by_mode) * image.width * image.height + coefficients
    if memory > MAX_MEMORY:
        raise ValueError(f"{image.width}x{image.height} pixels would take {memory / 1e6:,.0f} MB of memory")
    with _one_large_image if memory > ONE_AT_A_TIME else nullcontext():
        with suppress(Exception):  # ignore damaged EXIF; keep the image
            ImageOps.exif_transpose(image, in_place=True)
        image = _to_8_bits(image)
        if crop:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if max(image.size) > max_size:
            image = image.resize((max_size, max_size), Image.Resampling[interpolation.upper()], reducing_gap=3.0)
    return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """An image that can be resized. Pixels of more than 8 bits become 8, scaled by the image's own depth.

    The depth is the smallest of 8, 12 and 16 bits that holds the brightest pixel; fractions up to 1 are scaled by 1.
    Anything else, such as measurements below zero, is stretched from its smallest to its largest value.
    """
    if image.mode[0] in "IF":
        values = np.array(image, dtype=np.float32)
        finite = np.isfinite(values)
        low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
        if low >= 0 and high <= 65535:
            depths = ([1.0] if image.mode == "F" else []) + [255.0, 4095.0, 65535.0]
            low, high = 0.0, next(depth for depth in depths if high <= depth)
        values -= np.float32(low)
        values *= np.float32(255 / max(high - low, 1e-6))
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
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile:
        with suppress(ImageCms.PyCMSError, OSError):  # a damaged profile, or one of another kind of image
            return ImageCms.applyTransform(image, _to_srgb(profile, image.mode))
    return image.convert("RGB")


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """The transform from the colours of an ICC profile to sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


# -------------------------------------------------------------------------------------------------- batches


def preprocess(
    images: Tensor | list[Tensor],
    preprocessing: dict,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turns B images, uint8 (3, H, W), into one normalised batch (B, 3, S, S) on the device, channels_last.

    `preprocessing` is the attribute of a TransferModel: image_size S, mean, std and interpolation. Images of one size
    are resized together. Normalising comes first, while the images are small.
    """
    S = preprocessing["image_size"]
    mean, std = (_on_device(tuple(preprocessing[name]), device) for name in ("mean", "std"))
    batches, resized = [images], []
    if not isinstance(images, Tensor):
        batches = [torch.stack(list(group)) for _, group in groupby(images, lambda image: image.shape)]
    for batch in batches:
        x = batch.to(device, non_blocking=batch.is_pinned())  # (b, 3, H, W)
        x = (x / 255 - mean) / std
        if x.shape[2:] != (S, S):
            # in fp32: not implemented for bf16 on CPUs
            x = F.interpolate(x, (S, S), mode=preprocessing["interpolation"], antialias=True)
        resized.append(x.to(dtype))
    return torch.cat(resized).contiguous(memory_format=torch.channels_last)


def stack(images: list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """For CUDA and images of one size, a batch (B, 3, H, W) in pinned memory, which is copied asynchronously.

    Otherwise the images as they are.
    """
    if device.type == "cuda" and len({image.shape for image in images}) == 1:
        return torch.stack(images).pin_memory()
    return images


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
