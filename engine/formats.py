"""Which files are images, how much memory may they take, and which package reads what Pillow cannot?"""

import importlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from types import ModuleType

from PIL import Image, PngImagePlugin

MAX_MEMORY = 400_000_000  # bytes that decoding one image may take
ONE_AT_A_TIME = 32_000_000  # bytes of memory beyond which images are decoded one at a time
_one_large_image = threading.Lock()

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
RAW = (b"IIU\0", b"IIRO", b"IIRS", b"MMOR", b"FUJI", b"FOVb", b"\0MRM")
NOT_AN_IMAGE = "not an image"
OTHERS = {  # how files begin that Pillow cannot read, what they are, and what helps
    rb"\xff\x0a|\0\0\0\x0cJXL ": "a JPEG XL image: pip install pillow-jxl-plugin",
    rb".{4}ftyp(hei|hev|mif|msf)": "a HEIF image: pip install pillow-heif",
    rb".{128}DICM": "a DICOM file: save its picture as PNG, for example with pydicom",
    rb".{344}n[i+]1\0": "a NIfTI file: save its slices as PNG, for example with nibabel",
    rb"v/1\x01": "an OpenEXR image: save it as PNG, for example with OpenEXR",
    rb"#\?R": "a Radiance HDR image: save it as PNG, for example with imageio",
    rb"P7\s|PF\s": "a PAM or colour PFM image: save it as PNG, for example with FFmpeg",
    rb"II\xbc\x01|\xff\xd8\xff\xf7": "a JPEG XR or JPEG-LS image: save it as PNG, for example with imagecodecs",
    rb"8BPS": "a Photoshop file of a kind that Pillow cannot read: save it as PNG",
    rb"\x93NUMPY": "an array of NumPy: save it as PNG",
    rb"\x89HDF": "an HDF5 file: save its pictures as PNG, for example with h5py",
    b"|".join(map(re.escape, TIFF)): "a TIFF file that is damaged, or of a kind that Pillow cannot read",
}


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
    Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses twice as many; `room` refuses by the memory they take
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB: generators store their workflow
    return tuple(name for name in Image.ID if name not in ("EPS", "PDF", "MPEG", "WMF", "HDF5", "GRIB", "BUFR", "BLP"))


@contextmanager
def room(width: int, height: int, bytes_per_pixel: float, more: int = 0) -> Iterator[None]:
    """Decodes large images one at a time. Raises ValueError if decoding would take more memory than MAX_MEMORY."""
    memory = bytes_per_pixel * width * height + more
    if memory > MAX_MEMORY:
        raise ValueError(f"{width}x{height} pixels would take {memory / 1e6:,.0f} MB of memory")
    with _one_large_image if memory > ONE_AT_A_TIME else nullcontext():
        yield


def is_tiff_or_raw(start: bytes) -> bool:
    """Whether a file that begins so is a TIFF or a camera's raw file."""
    return start.startswith(TIFF + RAW) or start[4:11] == b"ftypcrx"


def what_it_is(content: bytes) -> str:
    """What to say of a file that Pillow does not know."""
    return next((text for start, text in OTHERS.items() if re.match(start, content, re.DOTALL)), NOT_AN_IMAGE)


def library(name: str, what: str) -> ModuleType:
    """An optional package. Raises ValueError, which names it, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(f"{what} needs {package}, which is missing: pip install {package}") from error
