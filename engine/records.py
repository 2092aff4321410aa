"""What is known of each image already, and where is it kept? Records in files, to which later runs append."""

import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.console import Progress
from engine.distributed import barrier, gather, is_first, rank, share, world_size
from engine.files import explain_write_error, locked
from engine.images import ImageError

# Given the indices of images without a record: yields, batch by batch, their rows, an array (B, length), and why images
# of the batch cannot be read, by their position in it. The rows of such images mean nothing.
Compute = Callable[[list[int]], Iterator[tuple[np.ndarray, dict[int, ImageError]]]]


@dataclass
class Features:
    """A row of numbers for each of N images. The files stay mapped into memory; `rows[indices]` reads some."""

    tables: Sequence[Tensor]  # one for each file, (rows, width)
    places: Tensor  # (N, 2): for each image the number of its table and its row there

    def __len__(self) -> int:
        return len(self.places)

    @property
    def width(self) -> int:
        return self.tables[0].shape[1]

    def __getitem__(self, images: Tensor) -> Tensor:
        """The rows (B, width) of B images, as they are kept."""
        tables, rows = self.places[images].T
        if len(self.tables) == 1:
            return self.tables[0][rows]
        kind = reduce(torch.promote_types, (table.dtype for table in self.tables))
        found = torch.empty(len(rows), self.width, dtype=kind)
        for number, table in enumerate(self.tables):
            here = tables == number
            found[here] = table[rows[here]].to(kind)
        return found

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, float32, 1024 images at a time."""
        return (self[images].float() for images in torch.arange(len(self)).split(1024))

    @classmethod
    def in_memory(cls, table: Tensor) -> "Features":
        return cls([table], F.pad(torch.arange(len(table))[:, None], (1, 0)))


class Records:
    """The records of images in a folder: files NAME.RANK.features, one for each process that has written some.

    The name holds a hash of everything that determines the rows, except the image. A record holds the image's id, the
    seconds spent on it, its row and the row's checksum, so stale or damaged rows are never used. `kinds` are the types
    of numbers in which rows may be kept, by the ending of the file's name; new rows are kept in the first one.
    """

    def __init__(self, folder: Path, name: str, kinds: dict[str, str], width: int):
        self.folder, self.name = folder, name
        head = [("image", "S32"), ("seconds", "<f4"), ("checksum", "<u4")]
        self.layouts = {end: np.dtype([*head, ("features", kind, (width,))]) for end, kind in kinds.items()}
        self.end = next(iter(kinds))

    def read(self, ids: Sequence[str], check: bool = True) -> tuple[list[np.ndarray], dict[int, tuple[int, int]], int]:
        """The tables of all files, the table and row of each image that has one, and how many are damaged only.

        Without `check`, which reads whole rows, damaged ones are not noticed.
        """
        tables, places, damaged = [], {}, set()
        encoded = [image.encode() for image in ids]
        wanted = set(encoded)
        for end, layout in reversed(self.layouts.items()):  # where an image is in several files, the first kind counts
            for file in sorted(self.folder.glob(f"{self.name}.*[0-9]{end}")):
                if not (count := file.stat().st_size // layout.itemsize):
                    continue
                table = np.asarray(np.memmap(file, layout, mode="c", shape=count))  # torch wants it writable
                rows = {image: row for row, image in enumerate(table["image"].tolist()) if image in wanted}
                for image, row in rows.items():
                    if not check or zlib.crc32(table["features"][row]) == table["checksum"][row]:
                        places[image] = len(tables), row
                    else:
                        damaged.add(image)
                tables.append(table)
        found = {i: places[image] for i, image in enumerate(encoded) if image in places}
        return tables or [np.zeros(0, self.layouts[self.end])], found, len(damaged - places.keys())

    def known(self, ids: Sequence[str]) -> tuple[Features, Tensor, float]:
        """The rows of the images that have one, the indices (M,) of these images, and the seconds that it took."""
        tables, found, _ = self.read(ids)
        seconds = sum(float(tables[number]["seconds"][row]) for number, row in found.values())
        places = torch.tensor(list(found.values()), dtype=torch.int64).reshape(-1, 2)
        rows = Features([torch.from_numpy(table["features"]) for table in tables], places)
        return rows, torch.tensor(list(found), dtype=torch.int64), seconds

    def complete(
        self, ids: Sequence[str], compute: Compute, title: str, batch_size: int
    ) -> tuple[Features, Tensor, float, int, dict[int, ImageError]]:
        """Computes what is missing. Returns what is `known` then, how many were computed, and the errors by image.

        Under torchrun each process computes a share, then reads the files of all. An interrupted run resumes; the next
        run tries unreadable images again. Raises OSError if a file cannot be written.
        """
        computed, errors, known = 0, {}, self.known(ids)
        if not all(gather(len(known[1]) == len(ids))):
            # one lock for all processes; another run may be computing the same rows
            with locked(self.folder / f".{self.name}.lock", wait=True) if is_first() else nullcontext():
                barrier()
                computed, errors = self._compute_missing(ids, compute, title, batch_size)
                known = self.known(ids)
                barrier()  # every process has read the files
        if len(known[1]) + len(errors) < len(ids):
            raise OSError(f"records of other processes are not in {self.folder}: is it on shared storage?")
        return *known, computed, errors

    def _compute_missing(
        self, ids: Sequence[str], compute: Compute, title: str, batch_size: int
    ) -> tuple[int, dict[int, ImageError]]:
        """Computes this process's share of the missing rows. Returns the total and the errors of all processes."""
        _, found, damaged = self.read(ids)  # under the lock
        barrier()  # before any process writes
        first = {}  # identical images share a record
        for i, image in enumerate(ids):
            first.setdefault(image, i)
        missing = [i for i in first.values() if i not in found]
        if damaged:
            print(f"{self.name}: {damaged} images' records are damaged: computing them again", file=sys.stderr)
        if missing and found:
            print(f"{title}: {len(ids) - len(missing):,} of {len(ids):,} images are known")
        own, errors = [missing[i] for i in share(len(missing), batch_size)], {}
        with Progress(len(ids), title, len(ids) - len(missing)) as bar:
            for count, unreadable in self._append([ids[i] for i in own], compute(own)):
                errors |= {own[k]: error for k, error in unreadable.items()}
                bar.update(count * world_size())
        errors = {i: error for part in gather(errors) for i, error in part.items()}  # waits until all have written
        of_all = {i: errors[first[image]] for i, image in enumerate(ids) if first[image] in errors}
        return len(missing) - len(errors), of_all

    def _append(self, ids: list[str], batches: Iterator) -> Iterator[tuple[int, dict[int, ImageError]]]:
        """Appends the records of images to this process's file. Yields, for each batch, its size and errors."""
        file, layout = self.folder / f"{self.name}.{rank()}{self.end}", self.layouts[self.end]
        before, start = time.perf_counter(), 0
        with explain_write_error(file), file.open("ab") as stream:
            stream.truncate(stream.tell() // layout.itemsize * layout.itemsize)  # a killed run's last record
            for rows, errors in batches:
                good = [k for k in range(len(rows)) if k not in errors]
                records = np.zeros(len(good), layout)
                records["image"] = [ids[start + k] for k in good]
                with np.errstate(over="ignore"):  # the next lines raise an error
                    records["features"] = rows[good]
                if not np.isfinite(records["features"]).all():
                    raise FloatingPointError(f"{self.name}: values overflow in {layout['features'].base}")
                records["checksum"] = [zlib.crc32(row) for row in records["features"]]
                now = time.perf_counter()
                records["seconds"] = (now - before) / max(1, len(good)) / world_size()
                stream.write(records.tobytes())
                stream.flush()
                yield len(rows), {start + k: error for k, error in errors.items()}
                before, start = now, start + len(rows)
