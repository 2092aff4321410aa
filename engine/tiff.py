"""What do the tags of a TIFF file say about its pages?"""

import re
import struct
from contextlib import suppress

CODES = {1: "B", 2: "s", 3: "H", 4: "I", 7: "s", 13: "I", 16: "Q", 18: "Q"}  # types of tags, as in struct
COMPRESSIONS = {1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000}  # what Pillow decompresses
RGB, PALETTE, CMYK, YCBCR, LAB = 2, 3, 5, 6, 8  # photometrics that Pillow knows, besides 0 and 1, which are grey
SUB_IFDS, CFA, LINEAR_RAW, DNG_VERSION = 330, 32803, 34892, 50706


class Page:
    """A page, from its tags."""

    def __init__(self, tags: dict[int, tuple], number: int):
        self.tags, self.number = tags, number
        self.size = self.one(256), self.one(257)  # width, height
        self.bands, self.compression, self.photometric = self.one(277, 1), self.one(259, 1), self.one(262, 1)
        self.is_planar, self.orientation = self.one(284, 1) == 2, self.one(274, 1)
        self.bits, self.profile = tags.get(258, (1,)), self.one(34675, None)
        kind = {2: "int", 3: "float"}.get(self.one(339, 1), "uint")
        self.dtype = kind + str(next((size for size in (8, 16, 32) if size >= max(self.bits)), 64))
        self.is_preview = bool(self.one(254) & 5) or self.one(255) == 2  # or a mask
        self.is_inverted = self.photometric == 0
        self.has_alpha = self.bands in (2, 4, 5, 6) and self.one(338) in (1, 2)
        self.is_premultiplied = self.has_alpha and self.one(338) == 1
        images = re.match(rb"ImageJ=.*?\bimages=(\d+)", self.one(270, b""), re.DOTALL)
        self.images = int(images[1]) if images else 0  # pictures in one page, as ImageJ writes them; 0: not known

    def one(self, tag: int, default: object = 0) -> object:
        return self.tags.get(tag, (default,))[0]

    def __str__(self) -> str:
        return f"{self.bands} x {max(self.bits)} bits, compression {self.compression}, photometric {self.photometric}"

    @property
    def is_pillows(self) -> bool:
        """Whether Pillow reads the page right, if it opens it."""
        known = self.compression in COMPRESSIONS and self.photometric in (0, 1, RGB, PALETTE, CMYK, YCBCR, LAB)
        deep_colors = max(self.bits) > 8 and self.bands > 1
        unusual = [deep_colors, self.is_premultiplied, self.is_planar]  # of which Pillow copes with one
        wrong = sum(unusual) > 1 or (self.is_planar and self.bands == 2)
        return known and len(set(self.bits)) == 1 and not wrong

    @property
    def is_plain(self) -> bool:
        """Whether Pillow's 8 bits are all there is."""
        bands = {RGB: 3, YCBCR: 3, LAB: 3, CMYK: 4}.get(self.photometric, 1)
        return self.is_pillows and self.dtype == "uint8" and self.bands == bands

    @property
    def notes(self) -> dict[str, str]:
        """What to tell the user of the bands."""
        if self.bands == 2 and not self.has_alpha:
            return {"bands": "the first of 2 bands is read as grey"}
        if self.bands > 3 + self.has_alpha and self.photometric != CMYK:
            return {"bands": f"the first 3 of {self.bands} bands are read as RGB"}
        if self.bands > 2 and self.photometric < RGB:
            return {"bands": f"{self.bands} bands of grey are read as RGB"}
        return {}

    @property
    def missing(self) -> float | None:
        """The value of pixels without data, as GDAL writes it."""
        with suppress(ValueError):
            return float(self.one(42113, b"").split(b"\0")[0])

    def is_whole(self, size: int) -> bool:
        """Whether all strips or tiles are in a file of that size."""
        offsets = self.tags.get(273) or self.tags.get(324, ())
        counts = self.tags.get(279) or self.tags.get(325, ())
        parts = list(zip(offsets, counts, strict=True))
        return bool(parts) and all(count and offset + count <= size for offset, count in parts)


def read_pages(content: bytes) -> tuple[list[Page], bool]:
    """The pages, as far as they can be read, and whether they or what is below them hold a sensor's raw picture."""
    order, big = "<" if content[:2] == b"II" else ">", 43 in content[2:4]
    word, short, entry, head = ("Q", "Q", 20, 8) if big else ("I", "H", 12, 2)

    def take(code: str, at: int, count: int = 1) -> tuple:
        return struct.unpack_from(f"{order}{count}{code}", content, at)

    def directory(at: int) -> tuple[dict[int, tuple], int]:
        tags = {}
        [entries] = take(short, at)
        for place in range(at + head, at + head + entries * entry, entry):
            tag, kind, count = take("H", place) + take("H", place + 2) + take(word, place + 4)
            value = place + (12 if big else 8)
            if code := CODES.get(kind):
                if count * struct.calcsize(code) > (8 if big else 4):
                    [value] = take(word, value)
                tags[tag] = take(code, value, count)
        return tags, take(word, at + head + entries * entry)[0]

    pages, below, seen = [], [], set()
    with suppress(struct.error):
        [at] = take(word, 8 if big else 4)
        while at and at not in seen:
            seen.add(at)
            tags, at = directory(at)
            pages.append(Page(tags, len(pages)))
            below += [Page(directory(sub)[0], 0) for sub in tags.get(SUB_IFDS, ())]
    sensor = any(page.photometric in (CFA, LINEAR_RAW) or DNG_VERSION in page.tags for page in pages + below)
    return pages, sensor or content[8:10] == b"CR"
