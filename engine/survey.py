"""What is known of each image before anything is trained: can it be read, how does it look, how are its values kept?

One that cannot be read is left out of the data here, and named at the end of the run.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.depth import agree
from engine.device import available_cpus
from engine.groups import SIZE, thumbnail
from engine.images import ImageError, Item, peculiarity, read_image
from engine.records import Records

PIXELS, WORDS = 3 * SIZE**2, 512  # bytes of a record: of a thumbnail, and of what is unusual about an image, as JSON
BATCH = 256  # images after which records are written


class Survey(NamedTuple):
    """What is known of N images, of which M can be read."""

    readable: Tensor  # (M,) their indices
    thumbnails: Tensor  # uint8 (M, 3, SIZE, SIZE)
    unusual: list[dict | None]  # for each of the M what `depth.agree` needs to know, if it is not as most are
    errors: list[ImageError]  # one for each of the other images


def survey(items: Sequence[Item], ids: list[str], folder: Path) -> Survey:
    """Decodes each image, small, unless `folder` holds what was found in it. Tries unreadable ones again in each run.

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
    kept, readable, _, _, errors = records.complete(ids, compute, "looking at images", BATCH)
    rows = kept[torch.arange(len(kept))]
    words = [bytes(row).rstrip(b" ") for row in rows[:, PIXELS:].numpy()]
    unusual = [json.loads(text) if text else None for text in words]
    named = [ImageError(f"{items[i]}: {error}") for i, error in errors.items()]
    return Survey(readable, rows[:, :PIXELS].unflatten(1, (3, SIZE, SIZE)), unusual, named)
