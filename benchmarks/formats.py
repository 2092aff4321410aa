"""Which kinds of image files are read right?

    pip install tifffile imagecodecs rasterio astropy rawpy pillow-heif pillow-jxl-plugin opencv-python-headless
    python benchmarks/formats.py

Writes 77 kinds of files with the libraries that are installed, reads each as a data set of its own, and compares what
is read with what was written. Prints a line for each kind that is not read right, and the table of README.md here.
"""

import importlib
import io
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from common import arguments, print_header, print_row
from PIL import Image

from engine.console import run_script
from engine.depth import agree
from engine.formats import image_formats
from engine.images import ImageError, peculiarity, read_image

Y, X = np.mgrid[:96, :128]
RGB = np.stack([2 * X, 2.6 * Y, 255 - X - Y], axis=-1).clip(0, 255).astype(np.uint8)
RGB[:24, :32] = 255, 0, 0
GREY = RGB[..., 0]
WIDE, DEEP = RGB.astype(np.uint16), GREY.astype(np.uint16)
INFRARED = np.ascontiguousarray(GREY[:, ::-1])
BANDS = np.dstack([RGB, INFRARED])
LOSSY = 6  # mean difference of 8-bit values
REFUSED = "refused"  # expected of what is no picture

Kind = tuple[str, str, Callable[[], bytes], np.ndarray | str]  # the row of the table, the kind, a writer, the picture


def library(name: str) -> Callable:
    """A function that finds `name`, such as "tifffile.imwrite", when it is called."""

    def call(*args, **options) -> object:
        module, _, function = name.rpartition(".")
        return getattr(importlib.import_module(module), function)(*args, **options)

    return call


def pillow(kind: str, mode: str = "RGB", **options) -> Callable[[], bytes]:
    """A writer that saves the picture with Pillow."""

    def write() -> bytes:
        image_formats()
        image, file = Image.fromarray(RGB), io.BytesIO()
        image = image.quantize(256) if mode == "P" else image.convert(mode)
        image.save(file, kind, **options)
        return file.getvalue()

    return write


def tiff(array: np.ndarray, **options) -> Callable[[], bytes]:
    """A writer that saves an array with tifffile."""

    def write() -> bytes:
        library("tifffile.imwrite")(file := io.BytesIO(), array, **options)
        return file.getvalue()

    return write


def gdal(array: np.ndarray, driver: str = "GTiff", **options) -> Callable[[], bytes]:
    """A writer that saves an array (H, W, bands) with rasterio."""

    def write() -> bytes:
        array_ = np.moveaxis(np.atleast_3d(array), -1, 0)
        size = {"count": array_.shape[0], "height": array_.shape[1], "width": array_.shape[2], "dtype": array_.dtype}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has no place on earth
            with library("rasterio.open")(f"{folder}/x", "w", driver=driver, **size, **options) as file:
                file.write(array_)
            return Path(folder, "x").read_bytes()

    return write


def codec(name: str, array: np.ndarray, **options) -> Callable[[], bytes]:
    return lambda: bytes(library(f"imagecodecs.{name}_encode")(array, **options))


def opencv(extension: str, array: np.ndarray) -> Callable[[], bytes]:
    return lambda: library("cv2.imencode")(extension, array[..., ::-1] if array.ndim == 3 else array)[1].tobytes()


def fits(array: np.ndarray, compression: str | None = None, **header) -> Callable[[], bytes]:
    """A writer that saves an array (planes, H, W), whose first row is at the bottom, with astropy."""

    def write() -> bytes:
        array_ = array[..., ::-1, :]
        if compression:
            part = library("astropy.io.fits.CompImageHDU")(array_, compression_type=compression)
            part = library("astropy.io.fits.HDUList")([library("astropy.io.fits.PrimaryHDU")(), part])
        else:
            part = library("astropy.io.fits.PrimaryHDU")(array_)
            part.header.update(header)
        part.writeto(file := io.BytesIO())
        return file.getvalue()

    return write


def preview_first() -> bytes:
    with library("tifffile.TiffWriter")(file := io.BytesIO()) as writer:
        writer.write(np.ascontiguousarray(RGB[::4, ::4]), photometric="rgb", subfiletype=1, metadata=None)
        writer.write(RGB, photometric="rgb", metadata=None)
    return file.getvalue()


def camera_raw() -> bytes:
    """A DNG whose preview is black and whose sensor saw the picture, linear, through filters of the colours of sRGB."""
    linear = ((RGB / 255) ** 2.2 * 16383).astype(np.uint16)
    from_xyz = (32406, -15372, -4986, -9689, 18758, 415, 557, -2040, 10570)  # times 10,000
    matrix = tuple(value for one in from_xyz for value in (one, 10000))
    tags = [(50706, "B", 4, (1, 4, 0, 0), True), (50708, "s", 0, "Test", True), (50721, "2i", 9, matrix, True)]
    tags += [(50728, "2I", 3, (1,) * 6, True), (50778, "H", 1, 21, True)]
    sensor = [(50714, "H", 1, 0, True), (50717, "H", 1, 16383, True)]
    with library("tifffile.TiffWriter")(file := io.BytesIO()) as writer:
        black = np.zeros((24, 32, 3), np.uint8)
        writer.write(black, photometric="rgb", subifds=1, subfiletype=1, metadata=None, extratags=tags)
        writer.write(linear, photometric="linear_raw", subfiletype=0, metadata=None, extratags=sensor)
    return file.getvalue()


def kinds() -> Iterator[Kind]:
    """All kinds, in the order of the table."""
    grey, white, rgb = {"photometric": "minisblack"}, {"photometric": "miniswhite"}, {"photometric": "rgb"}
    for name in ("JPEG", "PNG", "WEBP", "BMP", "AVIF", "TGA", "PPM", "JPEG2000", "TIFF", "QOI", "GIF"):
        yield "ordinary", name, pillow(name), RGB
    yield "ordinary", "PNG, palette", pillow("PNG", "P"), RGB
    yield "ordinary", "JPEG, CMYK", pillow("JPEG", "CMYK"), RGB
    yield "ordinary", "PNG, grey with transparency", pillow("PNG", "LA"), np.array(Image.fromarray(RGB).convert("L"))
    for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd"):
        yield "ordinary", f"TIFF, {kind}", pillow("TIFF", compression=kind), RGB
    few = codec("jpeg2k", GREY // 16, level=0, bitspersample=4)
    yield "ordinary", "JPEG 2000, grey of 4 bits", few, GREY // 16 * 17
    yield "HEIC", "8 bits", pillow("HEIF", quality=90), RGB
    yield "JPEG XL", "8 bits", codec("jpegxl", RGB, lossless=True), RGB
    for bits in (10, 12, 16):
        factor = 257 if bits == 16 else 2 ** (bits - 8)
        yield "16 bits", f"PNG, RGB of {bits} bits", opencv(".png", WIDE * factor), RGB
        yield "16 bits", f"PNG, grey of {bits} bits", opencv(".png", DEEP * factor), GREY
        yield "16 bits", f"TIFF, RGB of {bits} bits", tiff(WIDE * factor, **rgb), RGB
        yield "16 bits", f"TIFF, grey of {bits} bits", tiff(DEEP * factor), GREY
    yield "16 bits", "PPM of 12 bits", opencv(".ppm", WIDE * 16), RGB
    yield "16 bits", "TIFF, reflectance times 10", gdal(WIDE * 10, photometric="RGB"), RGB
    yield "16 bits", "TIFF, white is 0", tiff(65535 - DEEP * 257, **white), GREY
    yield "16 bits", "TIFF, big-endian", tiff(WIDE * 257, byteorder=">", **rgb), RGB
    yield (
        "16 bits",
        "TIFF, deflate with predictor",
        gdal(WIDE * 16, photometric="RGB", compress="DEFLATE", predictor=2),
        RGB,
    )
    yield "other numbers", "TIFF, 8 bits with sign", tiff((GREY.astype(int) - 128).astype(np.int8)), GREY
    yield "other numbers", "TIFF, 16 bits with sign", gdal((DEEP * 10).astype(np.int16)), GREY
    yield "other numbers", "TIFF, 32 bits", tiff(GREY.astype(np.uint32) << 24), GREY
    yield "other numbers", "TIFF, 0 to 1", tiff((GREY / 255).astype(np.float32)), GREY
    yield "other numbers", "TIFF, 0 to 255", tiff(GREY.astype(np.float32)), GREY
    lacking = np.where(X < 20, -9999, GREY / 255).astype(np.float32)
    yield "other numbers", "TIFF, no data is -9999", gdal(lacking, nodata=-9999), np.where(X < 20, 0, GREY)
    lacking = np.where(X < 20, -32768, GREY * 10.0).astype(np.int16)
    yield "other numbers", "TIFF, no data is -32768", gdal(lacking, nodata=-32768), np.where(X < 20, 0, GREY)
    yield "tifffile", "64-bit fractions", tiff(GREY / 255), GREY
    yield "tifffile", "16-bit fractions", tiff((GREY / 255).astype(np.float16)), GREY
    yield "tifffile", "RGB of fractions", tiff((RGB / 255).astype(np.float32), **rgb), RGB
    yield "tifffile", "planes of 16 bits", tiff(np.moveaxis(WIDE * 257, -1, 0), **rgb), RGB
    yield "tifffile", "3 bands of grey", gdal(WIDE * 257), RGB
    yield "tifffile", "signs, big-endian, zlib", tiff(DEEP.astype("i2"), byteorder=">", compression="zlib"), GREY
    yield "tifffile", "white is 0, big-endian", tiff(65535 - DEEP * 257, byteorder=">", **white), GREY
    few = tiff(GREY // 16, bitspersample=4, bigtiff=True, byteorder=">", **grey)
    yield "tifffile", "4 bits, big-endian BigTIFF", few, GREY // 16 * 17
    for compression in ("LERC", "WEBP"):
        yield "tifffile", compression, gdal(RGB, compress=compression, photometric="RGB"), RGB
    yield "bands", "TIFF, near infrared as transparency", gdal(BANDS), RGB
    yield "bands", "TIFF, near infrared, unspecified", gdal(BANDS, photometric="RGB", ALPHA="NO"), RGB
    yield "bands", "TIFF, near infrared, 16 bits", tiff(BANDS.astype(np.uint16) * 16, **rgb), RGB
    yield "bands", "TIFF, RGB and two more", gdal(np.dstack([BANDS, INFRARED]), photometric="RGB"), RGB
    yield "bands", "JPEG 2000, near infrared", codec("jpeg2k", BANDS, level=0, codecformat="jp2"), RGB
    yield "pages", "TIFF, a preview first", preview_first, RGB
    yield "pages", "TIFF, a stack", tiff(np.stack([RGB, 255 - RGB]), **rgb), RGB
    yield "pages", "TIFF, a stack of ImageJ", tiff(np.stack([DEEP * 257, DEEP]), imagej=True, **grey), GREY
    yield "JPEG 2000", "RGB of 12 bits in 16", codec("jpeg2k", WIDE * 16, level=0, codecformat="jp2"), RGB
    yield "JPEG 2000", "grey of 12 bits", codec("jpeg2k", DEEP * 16, level=0, codecformat="jp2", bitspersample=12), GREY
    yield "FITS", "16 bits", fits((DEEP * 10).astype(np.int16)), GREY
    yield "FITS", "fractions", fits((GREY / 255).astype(np.float32)), GREY
    yield "FITS", "BZERO", fits(DEEP * 257), GREY
    yield "FITS", "compressed tiles", fits((DEEP * 10).astype(np.int16), "RICE_1"), GREY
    yield "FITS", "a cube of colours", fits(np.moveaxis(RGB, -1, 0)), RGB
    yield "raw", "DNG with a preview", camera_raw, RGB
    yield "refused", "TIFF, 13 bands", gdal(np.dstack([WIDE] * 4 + [DEEP])), REFUSED
    yield "refused", "TIFF, an array (H, W, 5)", tiff(np.dstack([WIDE, DEEP, DEEP])), REFUSED
    yield "refused", "DICOM", lambda: bytes(128) + b"DICM" + bytes(99), REFUSED
    yield "refused", "OpenEXR", lambda: b"v/1\x01" + bytes(99), REFUSED
    yield "unknown", "TIFF, RGB of 12 bits", tiff(WIDE * 16, **rgb), REFUSED
    yield "unknown", "TIFF, numbers with sign", gdal(DEEP.astype(np.int16)), REFUSED


ROWS = {
    "ordinary": ("JPEG, PNG, WebP, GIF, BMP, AVIF, 8-bit TIFF and JPEG 2000, and what else Pillow reads", "Pillow"),
    "HEIC": ("HEIC", "`pillow-heif`"),
    "JPEG XL": ("JPEG XL", "`pillow-jxl-plugin`"),
    "16 bits": ("PNG, PPM, TIFF of 10 to 16 bits: one scale for a data set, printed, kept in the checkpoint", "Pillow"),
    "other numbers": ("TIFF of 32 bits, with signs, of fractions: likewise; black where GDAL has no data", "Pillow"),
    "tifffile": ("TIFF of other numbers, planes or compressions: likewise", "`tifffile` (`imagecodecs`)"),
    "JPEG 2000": ("JPEG 2000 of 10 to 16 bits: likewise", "Pillow, RGB by `imagecodecs`"),
    "FITS": ("FITS, compressed, other scales and cubes of three colours by `astropy`: likewise", "Pillow, `astropy`"),
    "bands": ("TIFF, JPEG 2000 with near infrared: the first three bands", "Pillow"),
    "pages": ("TIFF with previews or several pages: the first that is no preview", "Pillow"),
    "raw": ("raw files of cameras: the sensor's picture", "`rawpy`"),
    "refused": ("DICOM, NIfTI, OpenEXR, HDR, arrays; 5 and more bands, unless three are marked as RGB", "no, by name"),
    "unknown": ("numbers unlike those of training, unless they are fractions or fill 16 bits", "no, by name"),
}


def verdict(content: bytes, expected: np.ndarray | str) -> str:
    """ "right", or what is wrong. A picture is read as one of a data set, what is refused on its own."""
    record = None if isinstance(expected, str) else peculiarity(content)
    reading, _ = agree([record] if record else [])
    try:
        pixels = read_image(content, 1000, crop=False, reading=reading).permute(1, 2, 0).numpy().astype(float)
    except ImageError as error:
        return "right" if isinstance(expected, str) else f"refused: {error}"
    if isinstance(expected, str):
        return "read, but it is no picture"
    expected = np.atleast_3d(expected)
    difference = np.abs(pixels - expected).mean() if pixels.shape[:2] == expected.shape[:2] else 255
    return "right" if difference < LOSSY else f"wrong by {difference:.0f}"


def main() -> int:
    arguments(__doc__)
    found = defaultdict(list)
    for row, kind, write, expected in kinds():
        try:
            content = write()
        except ImportError as error:
            print(f"{row}: {kind}: not tried: {error}")
            continue
        found[row].append(verdict(content, expected))
        if found[row][-1] != "right":
            print(f"{row}: {kind}: {found[row][-1]}")
    print()
    print_header("files", "read by", "kinds right", texts=2)
    for row, (files, package) in ROWS.items():
        print_row(files, package, f"{found[row].count('right')} of {len(found[row])}")
    return int(any(each != "right" for row in found.values() for each in row))


if __name__ == "__main__":
    run_script(main)
