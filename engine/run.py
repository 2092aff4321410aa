"""How do many images go through a network, on all cores, on a GPU, on all processes?

`run_images` is the path from images to outputs. A model here is any module with the `preprocessing` of its images.
"""

import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.console import Progress
from engine.device import available_cpus, batch_size_for, full_precision, keep_freed_memory, threads
from engine.distributed import shared_map, world_size
from engine.images import ImageError, Item, preprocess, read_image, reading_arguments

Output = Callable[[nn.Module, Tensor], Tensor]  # a model and images (B, 3, S, S) -> (B, D)


class Batch(NamedTuple):
    """What run_images yields."""

    items: list[Item]  # B images
    outputs: list[Tensor]  # one (B, D) for each model, float32 on the CPU; NaN for unreadable images
    errors: dict[int, ImageError]  # why images are unreadable, by position in the batch


def run_images(
    models: list[nn.Module], items: Iterable[Item], output: Output = nn.Module.__call__, batch_size: int | None = None
) -> Iterator[Batch]:
    """Reads images, preprocesses them and runs every model on them, in order, in constant memory.

    On the CPU each core takes its own batches, from the file to the outputs: a convolution that stays in the cache of
    one core is up to twice as fast as one that all cores share. For a GPU, threads read large batches, and the GPU runs
    one batch at a time, which bounds its memory. If memory runs out, batches are halved.
    Raises torch.OutOfMemoryError, or on MPS RuntimeError, if one image is too large for the GPU.
    """
    device = next(models[0].parameters()).device
    on_cpu = device.type == "cpu"
    workers = torch.get_num_threads() if on_cpu else min(16, available_cpus())
    keep_freed_memory()
    batch_size = batch_size or batch_size_for(device)
    runner, items, pending = _Runner(models, output, device, batch_size), iter(items), deque()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=[1])
    with threads(1) if on_cpu else full_precision():
        try:
            while batch := list(islice(items, batch_size)):
                pending.append(pool.submit(runner.run, batch))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class _Runner:
    """Runs models on one batch. Several threads call `run` at the same time."""

    def __init__(self, models: list[nn.Module], output: Output, device: torch.device, batch_size: int):
        self.models, self.output, self.device = models, output, device
        self.limit = batch_size  # images that fit into the GPU's memory
        self.turn = nullcontext() if device.type == "cpu" else threading.Lock()

    @torch.inference_mode()
    def run(self, batch: list[Item]) -> Batch:
        wanted = [reading_arguments(model.preprocessing) for model in self.models]
        different = [form for i, form in enumerate(wanted) if form not in wanted[:i]]
        images, errors = [], {}
        for form in different:
            pixels = [torch.zeros(3, 1, 1, dtype=torch.uint8)] * len(batch)
            for i, item in enumerate(batch):
                try:
                    pixels[i] = read_image(item, *form)
                except ImageError as error:
                    errors[i] = ImageError(str(error))  # without the traceback, which keeps the batch in memory
            images.append(pinned(pixels, self.device))
        with self.turn:
            inputs = (images[different.index(form)] for form in wanted)
            outputs = [self.forward(model, batch) for model, batch in zip(self.models, inputs, strict=True)]
            if self.device.type == "mps":  # which crashes if two threads use it, even to copy
                outputs = [rows.cpu() for rows in outputs]
        unreadable = torch.tensor(list(errors), dtype=torch.int64)
        return Batch(batch, [rows.float().cpu().index_fill(0, unreadable, math.nan) for rows in outputs], errors)

    def forward(self, model: nn.Module, images: Tensor | list[Tensor]) -> Tensor:
        dtype = next(model.parameters()).dtype  # the classifier's may differ
        while True:
            limit = self.limit
            some = (images[i : i + limit] for i in range(0, len(images), limit))
            batches = (preprocess(each, model.preprocessing, self.device, dtype) for each in some)
            try:
                return torch.cat([self.output(model, batch) for batch in batches])
            except RuntimeError as error:  # MPS has no other type for it
                if limit == 1 or "out of memory" not in str(error):
                    raise
            self.limit = limit // 2  # outside the handler, which keeps the memory of the failed call alive
            print(f"out of memory: continuing with batches of {self.limit}", file=sys.stderr)


def pinned(images: list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """For CUDA and images of one size, a batch (B, 3, H, W) in pinned memory. Otherwise the images as they are."""
    if device.type == "cuda" and len({image.shape for image in images}) == 1:
        return torch.stack(images).pin_memory()
    return images


def outputs_of(model: nn.Module, items: Sequence[Item], title: str) -> Tensor:
    """The outputs (N, D) for N images. All processes share the work. Raises ImageError if an image cannot be read."""

    def rows(items: Iterable[Item]) -> Iterator[Tensor]:
        for batch in run_images([model], items):
            for error in batch.errors.values():
                raise error
            bar.update(len(batch.items) * world_size())
            yield from (row.clone() for row in batch.outputs[0])

    with Progress(len(items), title) as bar:
        return torch.stack([*shared_map(rows, items, batch_size_for(next(model.parameters()).device))])
