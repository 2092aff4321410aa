"""What is known of each image before anything is trained: its identity, and a thumbnail. Which ones can be read?"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.device import available_cpus
from engine.groups import SIZE, thumbnail
from engine.images import ImageError, Item, read_image
from engine.records import Features, Records

BATCH = 256  # images after which records are written


@dataclass
class Survey:
    thumbnails: Features  # of the M readable images, uint8 (M, 3 * SIZE * SIZE)
    readable: Tensor  # (M,) their indices
    errors: list[ImageError]  # one for each of the other images


def survey(items: Sequence[Item], ids: list[str], folder: Path) -> Survey:
    """Reads each image once, small. What it finds is kept in `folder`, so a second run reads no image.

    Raises OSError if a file in `folder` cannot be written.
    """

    def look(i: int) -> Tensor | ImageError:
        try:
            return thumbnail(read_image(items[i], SIZE, crop=False))
        except ImageError as error:
            return ImageError(str(error))  # without its traceback, which keeps the image in memory

    def compute(images: list[int]) -> Iterator[tuple[list[int], np.ndarray, dict[int, ImageError]]]:
        with ThreadPoolExecutor(available_cpus()) as pool:
            for start in range(0, len(images), BATCH):
                batch = images[start : start + BATCH]
                found = dict(zip(batch, pool.map(look, batch), strict=True))
                errors = {i: each for i, each in found.items() if isinstance(each, ImageError)}
                good = [i for i in batch if i not in errors]
                rows = torch.stack([found[i].flatten() for i in good]) if good else torch.empty(0, 3 * SIZE**2)
                yield good, rows.numpy(), errors

    records = Records(folder, "thumbnails-1", {".thumbnails": "u1"}, 3 * SIZE**2)
    thumbnails, readable, _, _, errors = records.complete(ids, compute, "looking at images", BATCH)
    return Survey(thumbnails, readable, list(errors.values()))
