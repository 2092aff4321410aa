"""What is known of each image before anything is trained: can it be read, how does it look, how are its values kept?

One that cannot be read is left out of the data here, and named at the end of the run.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.depth import agree
from engine.device import available_cpus
from engine.groups import SIZE, thumbnail
from engine.images import ImageError, Item, peculiarity, read_image
from engine.records import Features, Records

PIXELS, WORDS = 3 * SIZE**2, 512  # bytes of a record: of a thumbnail, and of what is unusual about an image, as JSON
BATCH = 256  # images after which records are written


@dataclass
class Survey:
    """What is known of N images, of which M can be read."""

    records: Features  # what is kept of the M images, (M, PIXELS + WORDS)
    readable: Tensor  # (M,) their indices
    errors: list[ImageError]  # one for each of the other images

    def thumbnails(self) -> Tensor:
        """uint8 (M, 3, SIZE, SIZE)"""
        return self.records[torch.arange(len(self.records))][:, :PIXELS].unflatten(1, (3, SIZE, SIZE))

    def peculiarities(self, images: Tensor) -> list[dict]:
        """What `depth.agree` needs to know of the unusual ones among `images`, which are numbered as the M are."""
        words = [bytes(row).rstrip(b" ") for row in self.records[images][:, PIXELS:].numpy()]
        return [json.loads(text) for text in words if text]


def survey(items: Sequence[Item], ids: list[str], folder: Path) -> Survey:
    """Reads each image once, small. What it finds is kept in `folder`, so a second run reads no image.

    Raises OSError if a file in `folder` cannot be written.
    """

    def look(i: int) -> tuple[np.ndarray, ImageError | None]:
        unusual = peculiarity(items[i])
        reading = agree([unusual])[0] if unusual else None  # as if it were alone: enough for a thumbnail
        try:
            pixels = thumbnail(read_image(items[i], SIZE, crop=False, reading=reading))
        except ImageError as error:
            # without the path, because files of one content share an error, and without a traceback, which keeps pixels
            return np.zeros(PIXELS + WORDS, np.uint8), ImageError(str(error).removeprefix(f"{items[i]}: "))
        words = json.dumps(unusual, separators=(",", ":")).encode() if unusual else b""
        return np.concatenate([pixels.flatten().numpy(), np.frombuffer(words.ljust(WORDS), np.uint8)]), None

    def compute(images: list[int]) -> Iterator[tuple[np.ndarray, dict[int, ImageError]]]:
        with ThreadPoolExecutor(available_cpus(), initializer=torch.set_num_threads, initargs=[1]) as pool:
            for start in range(0, len(images), BATCH):
                rows, errors = zip(*pool.map(look, images[start : start + BATCH]), strict=True)
                yield np.stack(rows), {k: error for k, error in enumerate(errors) if error}

    records = Records(folder, "thumbnails-1", {".thumbnails": "u1"}, PIXELS + WORDS)
    rows, readable, _, _, errors = records.complete(ids, compute, "looking at images", BATCH)
    return Survey(rows, readable, [ImageError(f"{items[i]}: {error}") for i, error in errors.items()])
