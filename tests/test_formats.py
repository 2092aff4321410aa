"""What files of all kinds hold is what is read: depths, bands, pages, damage. The files are written here."""

import builtins
import importlib
import io
import struct
import zlib
from base64 import b64decode

import numpy as np
import pytest
import torch
from conftest import draw, share_right
from PIL import Image

import inference
from engine.depth import agree
from engine.images import ImageError, image_formats, peculiarity, read_image
from models import load_checkpoint

Y, X = np.mgrid[:48, :64]
RGB = np.stack([4 * X, 5 * Y, 255 - 2 * X - 2 * Y], axis=-1).clip(0, 255).astype(np.uint8)  # from 0 to 252
GREY = RGB[..., 0]
INFRARED = RGB[:, ::-1, :1]


def tiff(*pages: tuple[np.ndarray, dict]) -> bytes:
    """An uncompressed TIFF of arrays (H, W) or (H, W, bands) and more tags for each."""
    out = b"II*\0" + struct.pack("<I", 8)
    for number, (array, more) in enumerate(pages):
        array = array[..., None] if array.ndim == 2 else array
        (height, width, bands), data = array.shape, array.tobytes()
        kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
        tags = {256: width, 257: height, 258: [8 * array.itemsize] * bands, 259: 1, 262: 1 + (bands > 2), 277: bands}
        tags |= {273: 0, 278: height, 279: len(data), 284: 1, 339: [kind] * bands} | more
        at = len(out) + 2 + 12 * len(tags) + 4
        entries, tail = b"", b""
        for tag, value in sorted(tags.items()):
            text, values = isinstance(value, bytes), value if isinstance(value, list | bytes) else [value]
            packed = value if text else struct.pack(f"<{len(values)}I", *values)
            if tag == 273:
                place = len(entries)
            inline = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", at + len(tail))
            tail += b"" if len(packed) <= 4 else packed + b"\0" * (len(packed) % 2)
            entries += struct.pack("<HHI", tag, 2 if text else 4, len(values)) + inline
        entries = entries[: place + 8] + struct.pack("<I", at + len(tail)) + entries[place + 12 :]
        following = at + len(tail) + len(data) if number + 1 < len(pages) else 0
        out += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following) + tail + data
    return out


def png(array: np.ndarray, color: int, bits: int = 16, **chunks: bytes) -> bytes:
    """A PNG of values of that many bits, (H, W * bands), and chunks before the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = array.shape[:2]
    rows = array.reshape(height, -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        lines = [
            np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in rows
        ]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
    return b"\x89PNG\r\n\x1a\n" + head + extra + pixels + chunk(b"IEND", b"")


def read(content: bytes, reading: dict | None = None) -> np.ndarray:
    """(H, W, 3)"""
    return read_image(content, 1000, crop=False, reading=reading).permute(1, 2, 0).numpy().astype(int)


def agreed(*contents: bytes) -> dict:
    """The reading of a data set of these images."""
    return agree([record for record in map(peculiarity, contents) if record])[0]


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1).astype(int)


LEFT = X < 9
GREY_AND_ALPHA = np.dstack([GREY, np.where(LEFT, 0, 255)]).astype(int) * 257
STRETCHED = GREY / 252 * 255
FRACTIONS, WITHOUT_9999 = GREY / 255, np.where(LEFT, -9999, GREY / 252).astype("<f4")
WITHOUT_32768 = np.where(LEFT, -32768, GREY.astype(int) * 16).astype("<i2")
DEEP = {  # files of values of more than 8 bits, and the picture that they hold
    "TIFF, RGB, 12 bits": (tiff((RGB.astype("<u2") * 16, {})), RGB),
    "TIFF, RGB, 10 bits": (tiff((RGB.astype("<u2") * 4, {})), RGB),
    "TIFF, RGB, 16 bits": (tiff((RGB.astype("<u2") * 257, {})), RGB),
    "TIFF, grey, 12 bits": (tiff((GREY.astype("<u2") * 16, {})), grey(GREY)),
    "TIFF, grey, white is 0": (tiff((65535 - GREY.astype("<u2") * 257, {262: 0})), grey(GREY)),
    "TIFF, signed 8 bits": (tiff(((GREY.astype(int) - 128).astype(np.int8), {})), grey(GREY)),
    "TIFF, signed 16 bits": (tiff((GREY.astype("<i2") * 16, {})), grey(GREY)),
    "TIFF, 32 bits": (tiff((GREY.astype("<u4") << 24, {})), grey(GREY)),
    "TIFF, fractions": (tiff((FRACTIONS.astype("<f4"), {})), grey(GREY)),
    "TIFF, floats to 252": (tiff((GREY.astype("<f4"), {})), grey(GREY)),
    "TIFF, floats from -1 to 1": (
        tiff((np.where(Y < 9, np.nan, STRETCHED / 127.5 - 1).astype("<f4"), {})),
        grey(np.where(Y < 9, 0, STRETCHED)),
    ),
    "TIFF, Hounsfield units": (tiff((GREY.astype("<i4") * 16 - 1000, {})), grey(STRETCHED)),
    "TIFF, 0 to 201,600": (tiff((GREY.astype("<i4") * 800, {})), grey(STRETCHED)),
    "TIFF, no data is -9999": (tiff((WITHOUT_9999, {42113: b"-9999\0"})), grey(np.where(LEFT, 0, GREY / 252 * 255))),
    "TIFF, no data is -32768": (tiff((WITHOUT_32768, {42113: b"-32768\0"})), grey(np.where(LEFT, 0, GREY))),
    "PNG, RGB, 12 bits": (png(RGB.astype(int) * 16, 2), RGB),
    "PNG, RGB and transparency": (png(np.dstack([RGB, X * 0 + 255]).astype(int) * 257, 6), RGB),
    "PNG, grey and transparency": (png(GREY_AND_ALPHA, 4), grey(np.where(LEFT, 255, GREY))),
    "PNG, a transparent grey": (png(GREY.astype(int) * 257, 0, tRNS=b"\4\4"), grey(np.where(X == 1, 255, GREY))),
    "PPM, 12 bits": (b"P6 64 48 # wide\n65535\n" + (RGB.astype(int) * 16).astype(">u2").tobytes(), RGB),
    "PFM": (b"Pf\n64 48\n-1.0\n" + FRACTIONS[::-1].astype("<f4").tobytes(), grey(GREY)),
    "SGI, 12 bits": (
        struct.pack(">hBBHHHH500x", 474, 0, 2, 3, 64, 48, 3)
        + np.moveaxis(RGB[::-1].astype(int) * 16, -1, 0).astype(">u2").tobytes(),
        RGB,
    ),
    "PGM, 12 bits": (b"P5\n64 48\n4095\n" + (GREY.astype(int) * 16).astype(">u2").tobytes(), grey(GREY)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_values_are_read_whole(kind):
    content, expected = DEEP[kind]
    reading = agreed(content)
    assert np.abs(read(content, reading) - expected).max() <= 2


@pytest.mark.parametrize(("brightest", "other"), [(4090, 4100), (250, 260)])
def test_one_scale_for_a_data_set(brightest, other):
    scene = GREY / GREY.max()
    pair = [tiff(((scene * top).round().astype("<u2"), {})) for top in (brightest, other)]
    a, b = (read(content, agreed(*pair)).mean() for content in pair)
    assert 0.9 < a / b < 1.001
    brighter = (scene * brightest * 1.3).astype("<u2")  # than any before, but mostly not
    assert read(tiff((brighter, {})), agreed(*pair)).max() == 255
    with pytest.raises(ImageError, match="trained on values from"):
        read(tiff((GREY.astype("<u2") * 257, {})), agreed(*pair))


def test_values_without_a_known_scale_are_refused():
    for values in (GREY.astype("<i2") * 10 - 300, GREY.astype("<u4"), GREY.astype("<f4"), GREY.astype("<u2") * 16):
        with pytest.raises(ImageError, match="values from"):
            read(tiff((values, {})))
    assert np.abs(read(tiff((GREY.astype("<u2") * 257, {}))) - grey(GREY)).max() == 0  # all of the range is used
    assert np.abs(read(tiff(((GREY / 255).astype("<f4"), {}))) - grey(GREY)).max() == 0


def test_a_scale_travels_with_the_checkpoint(run, train, answers, photos, tmp_path):
    """Colour of 12 bits in files of 16 is trained on, plotted, compared and answered as the same colour in 8 bits."""
    for file in sorted(photos.rglob("*.png")):
        file.write_bytes(png(np.array(Image.open(file)).astype(int) * 16, 2))
    code, out, err = train(photos)
    assert (code, err) == (0, "") and "4,095" in out
    checkpoint = tmp_path / "checkpoints" / "mobilenet_v3_small.pt"
    preprocessing = load_checkpoint(checkpoint).preprocessing
    assert preprocessing["reading"] == {"uint16": [0, 4095]}
    draw(tmp_path / "8_bits.png", (40, 60, 200), seed=0)
    eight = Image.open(tmp_path / "8_bits.png")
    (tmp_path / "16_bits.png").write_bytes(png(np.array(eight).astype(int) * 16, 2))
    a, b = answers(tmp_path / "8_bits.png", tmp_path / "16_bits.png")
    assert a["label"] == b["label"] and a["probability"] == pytest.approx(b["probability"], abs=0.05)
    assert share_right(answers(photos / "test")) > 0.6
    assert run(inference, photos / "test", "--plot", "seen.png")[0] == 0 and (tmp_path / "seen.png").exists()


def test_a_fourth_band_that_is_not_transparency():
    bands = np.dstack([RGB, INFRARED])
    for extra in (0, 1, 2):  # unspecified, or marked as transparency
        content = tiff((bands, {338: extra}))
        expected = RGB if extra != 1 else None  # Pillow takes associated transparency out of the colours
        assert expected is None or np.abs(read(content, agreed(content)) - expected).max() == 0
    assert agreed(tiff((bands, {338: 2}))) == {"alpha": False}
    half = np.dstack([RGB, np.where(X < 9, 0, 255).astype(np.uint8)])
    reading = agreed(tiff((half, {338: 2})))
    assert reading == {"alpha": True}
    assert np.abs(read(tiff((half, {338: 2})), reading) - np.where(X[..., None] < 9, 255, RGB)).max() == 0
    assert np.abs(read(tiff((np.dstack([bands, INFRARED]), {338: [0, 0]}))) - RGB).max() == 0  # three are marked as RGB
    with pytest.raises(ImageError, match="5 bands"):
        read(tiff((np.dstack([bands, INFRARED]), {262: 1, 338: [0, 0, 0, 0]})))


def test_pages(capsys):
    small = np.ascontiguousarray(RGB[::4, ::4])
    for full in (RGB, RGB.astype("<u2") * 257):
        assert np.abs(read(tiff((small, {254: 1}), (full, {}))) - RGB).max() == 0  # the first page is a preview
    with pytest.raises(ImageError, match="raw"):
        read(tiff((small, {254: 1})))  # nothing but a preview
    stack = tiff((RGB, {}), (255 - RGB, {}), (RGB, {}))
    capsys.readouterr()
    assert np.abs(read(stack) - RGB).max() == 0 and np.abs(read(stack) - RGB).max() == 0
    assert capsys.readouterr().err.count("the first of 3 pages") <= 1
    assert agree([peculiarity(stack)]) == ({"pages": True}, ["1 image: the first of 3 pages is read"])
    with pytest.raises(ImageError, match="bands"):
        read(tiff(*[(row[:, :3].copy(), {}) for row in np.zeros((64, 48, 5), np.uint8)]))


def test_what_pillow_cannot_read_names_the_package_that_can(monkeypatch):
    importing = builtins.__import__

    def missing(name, *args):
        if name.partition(".")[0] in ("tifffile", "rawpy", "astropy", "imagecodecs"):
            raise ImportError(name)
        return importing(name, *args)

    monkeypatch.setattr(importlib, "import_module", lambda name: missing(name))
    monkeypatch.setattr(builtins, "__import__", missing)
    fits = b"".join(card.ljust(80) for card in (b"SIMPLE  =                    T", b"BITPIX  =                   16",
        b"NAXIS   =                    2", b"NAXIS1  =                    2", b"NAXIS2  =                    2",
        b"BZERO   =                32768", b"END")).ljust(2880) + bytes(2880)  # fmt: skip
    for content, package in {
        tiff(((GREY / 255).astype("<f8"), {})): "tifffile",
        tiff((RGB.astype("<u2"), {284: 2})): "tifffile",
        tiff((GREY, {259: 34887})): "tifffile",
        tiff((GREY, {262: 32803})): "rawpy",
        fits: "astropy",
        b"\xff\x0a" + bytes(50): "pillow-jxl-plugin",
        bytes(128) + b"DICM" + bytes(50): "pydicom",
    }.items():
        with pytest.raises(ImageError, match=package):
            read(content)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [0, 3]])
def test_premultiplied_colours_become_whole_again(chosen, kind, planar):
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    opacity, top = np.where(X < 9, 0.5, 1)[..., None], 1 if kind == "float32" else np.iinfo(kind).max
    bands = (top * np.dstack([RGB / 255 * opacity, opacity])[..., chosen]).astype(kind)
    layout = {"planarconfig": "separate"} if planar else {}
    array = np.moveaxis(bands, -1, 0) if planar else bands
    photometric = "rgb" if len(chosen) > 2 else "minisblack"
    tifffile.imwrite(file, array, photometric=photometric, extrasamples=["assocalpha"], **layout)
    reading = agreed(file.getvalue())
    expected = RGB[..., chosen[:-1]] * opacity + 255 * (1 - opacity)  # on white
    assert reading["alpha"] and np.abs(read(file.getvalue(), reading) - expected).max() <= 2


def test_a_scale_of_pfm_is_not_ignored():
    pixels = FRACTIONS[::-1].astype("<f4").tobytes()
    for scale in (b"-1", b"-1.000000"):
        assert agreed(b"Pf\n64 48\n" + scale + b"\n" + pixels)
    for scale in (b"-2.0", b"0.5", b"-0.00392157", b"-.5", b"1e-3"):
        with pytest.raises(ImageError, match="scale"):
            read(b"Pf\n64 48\n" + scale + b"\n" + pixels)


def test_png_details():
    image = Image.fromarray(RGB)
    content = io.BytesIO()
    image.save(content, "png")
    after = 33  # the signature and the header
    workflow = b"workflow\0\0" + zlib.compress(b"node " * 600_000)
    chunk = struct.pack(">I", len(workflow)) + b"zTXt" + workflow + struct.pack(">I", zlib.crc32(b"zTXt" + workflow))
    long = content.getvalue()[:after] + chunk + content.getvalue()[after:]
    assert np.abs(read(long) - RGB).max() == 0
    for bits in (2, 4):
        values, top = GREY >> (8 - bits), 2**bits - 1
        expected = grey(np.where(values == 1, 255, values * (255 // top)))
        assert np.abs(read(png(values, 0, bits, tRNS=b"\0\1")) - expected).max() == 0
    linear = (255 * (RGB / 255) ** 2.2).round()
    content = png(np.round(65535 * (RGB / 255) ** 2.2).astype(int), 2, gAMA=struct.pack(">I", 100_000))
    assert np.abs(read(content) - RGB)[linear > 8].max() <= 4


# ------------------------------------------------------------------------------------------------- damage


def written_by_pillow() -> dict[str, bytes]:
    """A picture in every format and compression that Pillow writes."""
    image, files = Image.fromarray(np.random.default_rng(0).integers(0, 99, RGB.shape, dtype=np.uint8) + RGB // 2), {}
    image_formats()
    options = [(name, {}) for name in sorted(Image.SAVE) if name not in ("PDF", "EPS", "PALM", "MSP", "XBM")]
    options += [("TIFF", {"compression": kind}) for kind in
                ("tiff_lzw", "tiff_adobe_deflate", "zstd", "jpeg", "packbits", "lzma")]  # fmt: skip
    options += [("JPEG", {"progressive": True}), ("PNG", {"deep": True}), ("TIFF", {"deep": True})]
    for name, more in options:
        content, deep = io.BytesIO(), more.pop("deep", False)
        try:
            (Image.fromarray(GREY.astype(np.uint16) * 257) if deep else image).save(content, name, **more)
            read(content.getvalue())
        except Exception:
            continue  # Pillow writes no RGB in this format, or was built without it
        files[f"{name} {more or ''}"] = content.getvalue()
    return files


def test_where_pillow_fails_the_image_is_an_error():
    files, failed = written_by_pillow(), 0
    assert len(files) > 15
    for name, content in files.items():
        lengths = 0, 2, 4, 6, 8, *(len(content) * share // 100 for share in (30, 60, 90))
        places = np.random.default_rng(0).integers(0, len(content) - 8, 8).tolist()
        cut = [content[:length] for length in lengths]
        for damaged in cut + [content[:at] + bytes(8) + content[at + 8 :] for at in places]:
            try:
                with Image.open(io.BytesIO(damaged), formats=image_formats()) as image:
                    image.load()
            except Exception:
                failed += 1
                with pytest.raises(ImageError):
                    read(damaged)
                    pytest.fail(f"{name}: a damaged file was read")
    assert failed > 60


def test_values_of_few_bits_reach_white():
    ramp = np.tile(np.arange(4, dtype=np.uint8), (8, 2))  # 0 to 3
    jpeg_2000 = b64decode(  # 2 bits, written by OpenJPEG
        "/0//UQApAAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAABAQEB/1IADAAAAAEAAAQEAAH/XAAEQBD/ZAAlAAFDcmVhdGVkIGJ5IE9w"
        "ZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAAYAAH/k90gEWKMHo2e32n/2Q=="
    )
    assert np.array_equal(read(jpeg_2000), grey(ramp * 85))
    file, tifffile = io.BytesIO(), pytest.importorskip("tifffile")
    tifffile.imwrite(file, ramp, photometric="minisblack", bitspersample=2, bigtiff=True, byteorder=">")
    assert np.array_equal(read(file.getvalue()), grey(ramp * 85))


def test_a_damaged_image_object_stays_an_error():
    content = io.BytesIO()
    Image.fromarray(RGB).save(content, "png")
    middle = len(content.getvalue()) // 2
    image = Image.open(io.BytesIO(content.getvalue()[:middle] + bytes(8) + content.getvalue()[middle + 8 :]))
    for _ in range(3):  # Pillow raises the first time, and gives black pixels from then on
        with pytest.raises(ImageError):
            read_image(image)


def test_ordinary_files_are_none_of_these():
    for content in written_by_pillow().values():
        if Image.open(io.BytesIO(content)).mode == "RGB":
            assert peculiarity(content) is None
    assert agree([]) == ({}, [])
    assert torch.equal(read_image(RGB), read_image(RGB, reading={"uint16": [0, 4095]}))
