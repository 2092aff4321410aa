"""Who reads a file's values right? Pillow, or a library that is asked only where Pillow would be wrong.

Pillow keeps 8 bits of each colour, reads the first page, and takes a 4th band for transparency. `read_values` returns
what more a file holds. What is done depends on a file's content, never on its name.
"""

import io
import math
import re
import struct
from contextlib import suppress
from itertools import takewhile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from engine.depth import Values
from engine.formats import TIFF, image_formats, is_tiff_or_raw, library, room
from engine.tiff import RGB, Page, read_pages

EIGHT_BITS = (b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM")  # how files begin that Pillow reads right
CODESTREAM = b"\xff\x4f\xff\x51"  # how the picture in a JPEG 2000 file begins


def read_values(content: bytes, size: int = 224) -> Values | None:
    """What a file holds that 8 bits, three bands and one page do not. None if Pillow's image object holds it all.

    A camera's raw file may be read at half its size, but not smaller than twice `size`.
    """
    start = content[:4]
    if start.startswith(EIGHT_BITS):
        return None
    if start == b"\x89PNG":
        return _png(content)
    if start in TIFF:
        return _tiff(content, size)
    if is_tiff_or_raw(content[:12]):
        return _camera_raw(content, size)
    if start == b"SIMP":
        return _fits(content)
    if start[:2] == b"\x01\xda" and start[3:] == b"\2":
        return _sgi(content)
    if start == CODESTREAM or (start == b"\0\0\0\x0c" and CODESTREAM in content):
        return _jpeg_2000(content)
    if start[:2] in (b"P5", b"P6") and (values := _portable_pixmap(content)):
        return values
    scale = re.match(rb"Pf\s+\d+\s+\d+\s+([-+.\deE]+)", content)
    if scale and abs(float(scale[1])) != 1:
        raise ValueError("a PFM image with a scale, which programs understand differently: save it with scale 1")
    with Image.open(io.BytesIO(content), formats=image_formats()) as image:
        return _pillow(content) if image.mode[0] in "IF" else None


def upright(image: Image.Image) -> None:
    """Loads an image, and turns it as its EXIF orientation says. Raises nearly any exception if it is damaged."""
    image.load()  # first, because inside exif_transpose its errors would be ignored, and its pixels black
    with suppress(Exception):  # ignore damaged EXIF; keep the image
        ImageOps.exif_transpose(image, in_place=True)


def bytes_per_pixel(image: Image.Image) -> int:
    """What a pixel takes at most: the decoder's buffers, Pillow's four bytes, and copies in other modes."""
    by_mode = 18 if image.mode[0] in "IF" else 12 if image.has_transparency_data else 8
    return {"JPEG2000": 25, "WEBP": 16}.get(image.format, by_mode)


def layout_of(image: Image.Image) -> str:
    """How a file that is not loaded yet stores a pixel, such as "RGB;16B"."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def pixels_of(image: Image.Image, dtype: str | None = None) -> Values:
    """The values of an image of Pillow, as `dtype`: Pillow has signed types for some unsigned ones."""
    if image.mode[0] in "IF":
        array = np.asarray(image)
        unsigned = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
        dtype = dtype or ("uint16" if unsigned else array.dtype.name)
        # one value a pixel is rather a measurement than a colour: its profile is left alone
        return Values(array.astype(dtype), info={} if "icc_profile" in image.info else image.info)
    if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.mode not in ("L", "RGB", "LA", "RGBA"):
        image = image.convert("RGB")
    return _bands(np.asarray(image).view("int8" if dtype == "int8" else "uint8"), image.info)


def _bands(array: np.ndarray, info: dict | None = None) -> Values:
    """The first one or three bands of an array (H, W) or (H, W, bands), and a 2nd or 4th one as transparency."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        return Values(array, info=info or {})
    bands = array.shape[2]
    colors, alpha = array[..., 0] if bands < 3 else array[..., :3], array[..., -1] if bands in (2, 4) else None
    return Values(colors, alpha, info=info or {})


def _up_to_255(array: np.ndarray, largest: int) -> np.ndarray:
    """Values from 0 to `largest` as uint8."""
    return (array * np.float32(255 / largest)).round().astype(np.uint8)


def _pillow(content: bytes, dtype: str | None = None, page: int = 0) -> Values:
    """Reads a file with Pillow: 16-bit colours, of which Pillow keeps the first bytes, a second time for the others."""
    image, layout = _load(content, page)
    if image.mode not in ("RGB", "RGBA") or ";16" not in layout:
        values = pixels_of(image, dtype)
    elif layout == "LA;16B":  # the four bytes of such a pixel are those of an RGBA pixel
        pairs = np.asarray(_load(content, page, "RGBA")[0]).astype("uint16")
        values = _bands(pairs[..., ::2] << 8 | pairs[..., 1::2], image.info)
    else:
        array, info = np.asarray(image).astype("uint16"), image.info
        image = _load(content, page, layout[:-1] + ("B" if layout[-1] in "LN" else "L"))[0]
        array <<= 8  # in place, because such images are large
        array |= np.asarray(image)
        values = _bands(array, info)
    if values.kind == "uint16" and "transparency" in image.info:  # one grey value or colour of a PNG
        same = values.colors.reshape(*values.colors.shape[:2], -1) == np.array(image.info["transparency"])
        values.alpha = np.where(same.all(axis=2), 0, 65535).astype("uint16")
    return values


def _load(content: bytes, page: int, layout: str | None = None) -> tuple[Image.Image, str]:
    """A page, upright, and how its pixels are laid out in the file. Another `layout` reads other bytes."""
    with Image.open(io.BytesIO(content), formats=image_formats()) as image:
        image.seek(page)
        own = layout_of(image)
        for i, tile in enumerate(image.tile if layout else ()):
            args = layout if isinstance(tile[3], str) else (layout, *tile[3][1:])
            image.tile[i] = tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)  # Pillow < 11
        with room(*image.size, 16 if ";16" in own else bytes_per_pixel(image)):
            upright(image)
        return image, own


def _png(content: bytes) -> Values | None:
    """PNG of 16 bits, or with colours that Pillow does not convert."""
    dtype = "uint16" if content[24:25] == b"\x10" else None
    marked = content.find(b"cICP", 0, content.find(b"IDAT"))
    converted = marked < 1 or content[marked + 4 : marked + 6] in (b"\1\1", b"\1\r")  # BT.709 or sRGB
    if converted and not dtype:
        return None
    values = _pillow(content, dtype)
    if not converted:
        values.notes = {"colors": "colours of its own (cICP, as in HDR and Display P3 pictures) are read as sRGB"}
    return values


def _portable_pixmap(content: bytes) -> Values | None:
    """PPM and PGM of more than 8 bits, scaled to 16 by the largest value that the header allows."""
    header = re.match(rb"P[56]" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"\s", content)
    width, height, top = map(int, header.groups()) if header else (0, 0, 0)
    if top < 256:
        return None
    bands = 3 if content[1:2] == b"6" else 1
    with room(width, height, 16):
        array = np.frombuffer(content, ">u2", width * height * bands, header.end()).reshape(height, width, bands)
        return _bands((array * np.float32(65535 / top) + 0.5).astype("uint16"))


def _sgi(content: bytes) -> Values:
    """SGI of 16 bits, of which Pillow keeps 8."""
    if content[2]:
        raise ValueError("a compressed SGI image of 16 bits: save it as PNG")
    dimensions, width, height, bands = struct.unpack_from(">4H", content, 4)
    shape = (bands if dimensions > 2 else 1, height if dimensions > 1 else 1, width)
    with room(width, height, 12 * shape[0]):
        array = np.frombuffer(content, ">u2", math.prod(shape), 512).reshape(shape)[:, ::-1]
    return _bands(np.moveaxis(array, 0, -1))


def _jpeg_2000(content: bytes) -> Values | None:
    """JPEG 2000. Values of more than 8 bits are scaled to 16 by the file's depth; negative ones are moved up."""
    at = content.find(CODESTREAM)
    right, bottom, left, top = struct.unpack_from(">4I", content, at + 8)
    [bands] = struct.unpack_from(">H", content, at + 40)
    depth, signed = (content[at + 42] & 127) + 1, content[at + 42] > 127
    if bands > 4:
        raise ValueError(f"{bands} bands: save three of them as RGB")
    if (depth == 8 and bands < 4) or (depth < 8 and b"pclr" in content[:at]):
        return None
    if depth <= 8 or bands == 1:
        values = _pillow(content, None if depth <= 8 else "uint16")
        if depth < 8:
            values.colors = _up_to_255(values.colors, (1 << 8) - (1 << 8 - depth))  # Pillow fills up with zeros
    else:
        imagecodecs = library("imagecodecs", f"a JPEG 2000 image with {bands} bands of {depth} bits")
        with room(right - left, bottom - top, 12 * bands):
            array = imagecodecs.jpeg2k_decode(content).astype(np.int32) + (1 << depth - 1 if signed else 0)
            values = _bands((array << 16 - depth).astype("uint16"))
    values.alpha_is_certain = False  # the band that is marked as transparency may be any other
    return values


def _camera_raw(content: bytes, size: int) -> Values:
    """A camera's raw file: the sensor's picture, not the preview in it. Its brightness is as exposed."""
    rawpy = library("rawpy", "a camera's raw file")
    try:
        with rawpy.imread(io.BytesIO(content)) as raw:
            half = min(raw.sizes.width, raw.sizes.height) >= 4 * size
            with room(raw.sizes.width, raw.sizes.height, 6 if half else 16):
                # the curve of sRGB; a brightness of its own for each image would hide what differs between images
                options = {"use_camera_wb": True, "no_auto_bright": True, "gamma": (2.4, 12.92)}
                return Values(raw.postprocess(**options, half_size=half))
    except rawpy.LibRawError as error:
        raise ValueError(f"a preview, or a camera's raw file that rawpy cannot read ({error})") from error


def _fits(content: bytes) -> Values:
    """FITS: the first picture, or a cube of three colours. Pillow is right of a plain picture at the start."""
    cards = takewhile(lambda card: card[:8] != b"END     ", (content[i : i + 80] for i in range(0, len(content), 80)))
    header = {card[:8].strip(): card[10:].partition(b"/")[0].strip() for card in cards}
    kinds = {b"8": "uint8", b"16": "int16", b"32": "int32", b"-32": "float32", b"-64": "float32"}
    kind = kinds.get(header.get(b"BITPIX"))
    if kind and header.get(b"NAXIS") == b"2" and not header.keys() & {b"BZERO", b"BSCALE", b"BLANK"}:
        return _pillow(content, kind)
    fits = library("astropy.io.fits", "this kind of FITS file")
    with fits.open(io.BytesIO(content), memmap=False) as file:
        part = next((part for part in file if getattr(part, "is_image", False) and len(part.shape) > 1), None)
        if part is None or sum(part.fileinfo()[key] for key in ("datLoc", "datSpan")) > len(content) + 2879:
            raise ValueError("a FITS file without a picture, or a part of one")
        planes = math.prod(part.shape[:-2])
        with room(part.shape[-1], part.shape[-2], planes * (8 + 3 * abs(part.header["BITPIX"]) // 8)):
            array = part.data.reshape(planes, *part.shape[-2:])[:, ::-1]  # FITS begins at the bottom
    values = _bands(np.moveaxis(array, 0, -1) if planes == 3 else array[0])
    values.notes = {"pages": f"the first of {planes} planes is read"} if planes not in (1, 3) else {}
    return values


def _tiff(content: bytes, size: int) -> Values | None:
    """TIFF: the first page that is not a preview. Five or more bands are refused unless three are marked as RGB."""
    pages, raw = read_pages(content)
    full = [page for page in pages if not page.is_preview]
    if raw or (pages and not full):
        return _camera_raw(content, size)
    if not full:
        return None
    page = full[0]
    count = page.images or sum(other.size == page.size for other in full)
    if page.is_plain and page.number == 0 and count == 1 and content[:4] != b"MM\0+":  # which Pillow does not know
        return None
    if min(page.size) <= 16 < max(page.size) and count > 16:
        raise ValueError(f"{count} pages of {page.size[0]}x{page.size[1]} pixels seem to be bands: save three as RGB")
    if page.bands > 4 and page.photometric < RGB:
        raise ValueError(f"{page.bands} bands: save the three that are to be seen as RGB")
    values = None
    # Pillow swaps the bytes of what it decompresses once more than needed, but for uint16
    swapped = content[:2] == b"MM" and page.compression > 1 and page.dtype not in ("uint8", "int8", "uint16")
    if page.is_pillows and not swapped:
        with suppress(UnidentifiedImageError):
            values = _pillow(content, page.dtype, page.number)
            values.inverted = page.is_inverted and values.kind != "uint8"
    values = values or _tifffile(content, page)
    values.alpha_is_certain, values.alpha = False, values.alpha if page.has_alpha else None
    values.missing = page.missing if values.kind != "uint8" else None
    values.notes = page.notes | ({"pages": f"the first of {count} pages is read"} if count > 1 else {})
    return values


def _tifffile(content: bytes, page: Page) -> Values:
    tifffile = library("tifffile", f"this TIFF file ({page})")
    if not page.is_whole(len(content)):
        raise ValueError("a part of the file is missing")
    if page.photometric > RGB:
        raise ValueError(f"this kind of TIFF file cannot be read ({page})")
    memory = page.bands * (2 * np.dtype(page.dtype).itemsize + 8)
    with room(*page.size, memory), tifffile.TiffFile(io.BytesIO(content)) as file:
        array = file.pages[page.number].asarray(maxworkers=1)
    array = np.moveaxis(array, 0, -1) if page.is_planar and page.bands > 1 else array
    array = _up_to_255(array, 2 ** max(page.bits) - 1) if array.dtype in (bool, np.uint8) else array
    if array.dtype.kind not in "uif":
        raise ValueError(f"{array.dtype} values cannot be seen")
    if array.ndim == 3:
        array = array[..., : page.bands if page.bands < 4 else 4 if page.has_alpha else 3]
    values = _bands(array, {"icc_profile": page.profile} if page.profile else None)
    if page.is_premultiplied and values.alpha is not None:
        largest = np.iinfo(values.kind).max if values.kind[0] == "u" else 1
        alpha = values.alpha if values.colors.ndim == 2 else values.alpha[..., None]
        colors = values.colors / np.maximum(alpha / np.float32(largest), 1e-6)
        values.colors = colors.clip(max=largest).astype(values.kind)
    values.orientation, values.inverted = page.orientation, page.is_inverted
    return values
