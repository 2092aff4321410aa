"""How do values of more than 8 bits become 8? By one scale for all images of a kind, chosen over the training images.

`agree` chooses it; a model keeps it in its preprocessing, as "reading". A kind that is not in there has a fixed scale,
or none and is refused. No scale follows a single image, or its brightest pixel would change all others.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

DEPTHS = (8, 10, 12, 14, 16, 20, 24, 32)  # bits
FILLED_SHARE = 0.7  # if the brightest value is beyond this share of a depth's range, the end of that range is white
OUTLIER_SHARE = 0.01  # this share of images may have values beyond the scale, for example from broken pixels
MAX_SOFTNESS = 0.25  # in transparency few pixels are neither transparent nor opaque; in a near infrared, most are
# scales without a "reading"
FIXED_SCALES = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "float": (0, 1)}


@dataclass
class Values:
    """What a file holds, before it is scaled, as engine/readers.py finds it."""

    colors: np.ndarray  # (H, W) or (H, W, 3)
    alpha: np.ndarray | None = None  # (H, W): transparency
    alpha_is_certain: bool = True  # False if another band may be marked as transparency, as in TIFF and JPEG 2000
    missing: float | None = None  # the value of pixels without data
    inverted: bool = False  # the smallest value is white
    orientation: int = 1  # as in EXIF
    info: dict = field(default_factory=dict)  # what Pillow knows besides pixels: the colour profile
    notes: dict[str, str] = field(default_factory=dict)  # what was left out: "pages" or "bands", and in words

    @property
    def kind(self) -> str:
        """The name of the type, such as "uint16"; "float" for all floats."""
        return "float" if self.colors.dtype.kind == "f" else self.colors.dtype.name

    @property
    def softness(self) -> float:
        """The share of pixels that are neither transparent nor opaque."""
        return float(((self.alpha > 0) & (self.alpha < self.alpha.max())).mean())

    @property
    def extent(self) -> list[float] | None:
        """The smallest and the largest value. None if there is no data."""
        values = self.colors if self.lacking is None else self.colors[~self.lacking]
        return [values.min().item(), values.max().item()] if values.size else None

    @property
    def lacking(self) -> np.ndarray | None:
        """Which values are not data. None if all are."""
        if self.missing is None and self.kind != "float":
            return None
        return ~np.isfinite(self.colors) | (self.colors == self.missing)

    def beyond(self, black: float, white: float) -> float:
        """The share of values that are darker than black or brighter than white."""
        outside = (self.colors < black) | (self.colors > white)
        return float((outside if self.lacking is None else outside & ~self.lacking).mean())

    def record(self) -> dict:
        """What `agree` needs to know of an image, as plain types."""
        record = {"kind": self.kind, "notes": self.notes}
        if self.kind not in ("uint8", "int8"):
            record["extent"] = self.extent
        if self.alpha is not None and not self.alpha_is_certain:
            record["softness"] = self.softness
        return record


def agree(records: Sequence[dict]) -> tuple[dict, list[str]]:
    """How all images of a data set are read, from the records of its training images, and what to tell the user.

    The first goes into a model's preprocessing as "reading"; it is empty if there is nothing to agree on. It maps a
    kind of values to those of black and white, "alpha" to whether a band marked as such is transparency, and the keys
    of what was told to True.
    """
    reading, lines = {}, []
    for kind in sorted({record["kind"] for record in records if record.get("extent")}):
        extents = np.array([record["extent"] for record in records if record["kind"] == kind and record["extent"]])
        low = np.quantile(extents[:, 0], OUTLIER_SHARE, method="lower").item()
        high = np.quantile(extents[:, 1], 1 - OUTLIER_SHARE, method="higher").item()
        black, white = reading[kind] = list(_scale(low, high, DEPTHS[:1] if kind == "float" else DEPTHS))
        name = {"uint16": "16-bit", "uint32": "32-bit", "float": "floating-point"}.get(kind, kind)
        lines.append(f"{name} images: {_number(black)} to {_number(white)} is black to white")
    if softness := [record["softness"] for record in records if "softness" in record]:
        reading["alpha"] = sum(softness) / len(softness) <= MAX_SOFTNESS
        if not reading["alpha"]:
            lines.append("the 4th band is not transparency: taken as RGB alone")
    for (key, note), count in Counter(note for record in records for note in record["notes"].items()).most_common():
        reading[key] = True
        if len(lines) < 10:
            lines.append(f"{count:,} image{'s' * (count > 1)}: {note}")
    return reading, lines


def _scale(low: float, high: float, depths: Sequence[int]) -> tuple[float, float]:
    """The values of black and white for values from `low` to `high`. Black is zero if that is not far away."""
    if low < 0 or low > high / 2:
        return low, max(high, low + 1e-6)
    top = 1 if high <= 1 else next((2**depth - 1 for depth in depths if high < 2**depth), high)
    return 0, top if high > FILLED_SHARE * top or high <= 1 else high


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:.4g}"


def to_8_bits(values: Values, reading: dict | None = None) -> Image.Image:
    """The image in 8 bits: L, RGB or RGBA. Values beyond the scale become black or white; pixels without data, black.

    Raises ValueError if there is no scale for such values, or if most are beyond it: they have another scale.
    """
    reading = reading or {}
    scale = reading.get(values.kind) or _fixed_scale(values)
    if values.beyond(*scale) > 0.5:
        found, known = (" to ".join(map(_number, ends)) for ends in (values.extent, scale))
        raise ValueError(f"{values.kind} values from {found}: the model was trained on values from {known}")
    pixels = _scaled(values.colors, *scale)
    pixels = 255 - pixels if values.inverted else pixels
    if values.lacking is not None:
        pixels[values.lacking] = 0
    image = Image.fromarray(pixels)
    if values.alpha is not None and (values.alpha_is_certain or reading.get("alpha", values.softness <= MAX_SOFTNESS)):
        image = image.convert("RGB")
        image.putalpha(Image.fromarray(_scaled(values.alpha, *scale)))
    image.info |= {key: values.info[key] for key in ("icc_profile", "gamma", "srgb") if key in values.info}
    image.getexif()[0x0112] = values.orientation
    return ImageOps.exif_transpose(image)


def _fixed_scale(values: Values) -> tuple[float, float]:
    """Black and white by the type alone: the whole range of 8 and 16 bits, or 0 to 1. Raises ValueError if in doubt.

    Sensors of 10, 12 or 14 bits store 16: what is less than a quarter of the range is in doubt, unless it is flat.
    """
    kind, (low, high) = values.kind, values.extent or (0, 0)
    doubtful = (kind == "uint16" and low < high < 16384) or (kind == "float" and not (low >= 0 and high <= 1))
    if kind not in FIXED_SCALES or doubtful:
        raise ValueError(
            f"{kind} values from {_number(low)} to {_number(high)}: the model was not trained on such images, so it is "
            "not known which are black and white; convert the images to 8 bits, or train on such images"
        )
    return FIXED_SCALES[kind]


def _scaled(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Values as uint8, rounded: `black` becomes 0, `white` 255."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind in "ui" and values.itemsize < 4:  # a table, because large images as floats take much memory
        unsigned = np.dtype(f"uint{8 * values.itemsize}")
        table = _to_uint8(np.arange(256**values.itemsize).astype(unsigned).view(values.dtype), black, white)
        return np.stack([table[row] for row in values.view(unsigned)])
    return _to_uint8(values, black, white)


def _to_uint8(values: np.ndarray, black: float, white: float) -> np.ndarray:
    scaled = values.astype(np.float32 if values.dtype == np.float32 else np.float64)
    np.nan_to_num(scaled, copy=False)
    scaled -= black
    scaled *= 255 / (white - black)
    return np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)
