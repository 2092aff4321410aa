"""How do many images go through a model, on all cores, on a GPU, on all processes?

`run_images` is the path from images to outputs. A model here is a TransferModel or its fast copy.
"""

import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.console import Progress
from engine.device import available_cpus, batch_size_for, full_precision, keep_freed_memory, threads
from engine.distributed import shared_map, world_size
from engine.images import ImageError, Item, preprocess, read_image, reading_arguments, stack
from engine.layers import averages, run_layers
from engine.metrics import average_models

Output = Callable[[nn.Module, Tensor], Tensor]  # of a model and images (B, 3, S, S): (B, D)


class Batch(NamedTuple):
    """What run_images yields."""

    items: list[Item]  # B images
    outputs: list[Tensor]  # of each model, (B, D), float32 on the CPU; NaN for unreadable images
    errors: dict[int, ImageError]  # of unreadable images, by position in the batch


def run_images(
    models: list[nn.Module], items: Iterable[Item], output: Output = nn.Module.__call__, batch_size: int | None = None
) -> Iterator[Batch]:
    """Reads images, preprocesses them and runs every model on them, in order, in constant memory.

    On the CPU each core takes its own batches, from the file to the outputs: a convolution that stays in the cache of
    one core is up to twice as fast as one that all cores share. For a GPU, threads read large batches, and the GPU runs
    one batch at a time, which bounds its memory. If memory runs out, batches are halved.
    Raises torch.OutOfMemoryError if one image is too large for the GPU.
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
            images.append(stack(pixels, self.device))
        with self.turn:
            inputs = (images[different.index(form)] for form in wanted)
            outputs = [self.forward(model, batch) for model, batch in zip(self.models, inputs, strict=True)]
        unread = torch.tensor(list(errors), dtype=torch.int64)
        return Batch(batch, [rows.float().cpu().index_fill(0, unread, math.nan) for rows in outputs], errors)

    def forward(self, model: nn.Module, images: Tensor | list[Tensor]) -> Tensor:
        dtype = next(model.features.parameters()).dtype
        while True:
            limit = self.limit
            parts = (images[i : i + limit] for i in range(0, len(images), limit))
            batches = (preprocess(part, model.preprocessing, self.device, dtype) for part in parts)
            try:
                return torch.cat([self.output(model, batch) for batch in batches])
            except torch.OutOfMemoryError:
                if limit == 1:
                    raise
            self.limit = limit // 2  # outside the handler, which keeps the memory of the failed attempt alive
            print(f"out of memory: continuing with batches of {self.limit}", file=sys.stderr)


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


def predictions(
    models: list[nn.Module], items: Iterable[Item], top_k: int, ensemble: bool = False
) -> Iterator[tuple[Item, list[dict]]]:
    """Yields each item with one record for each model, as in `TransferModel.predict`, or with one error record.

    With `ensemble`, yields one record for all models, which must have the same classes. Its probabilities are the
    softmax of the models' mean log-probabilities. Its "models" is the list of the models' records.
    """
    temperatures = [model.temperature for model in models]
    for batch, outputs, errors in run_images(models, items, type(models[0]).answer):
        answers = [rows[:, :-1] / temperature for rows, temperature in zip(outputs, temperatures, strict=True)]
        together = average_models(answers) if ensemble else None
        for i, item in enumerate(batch):
            path = {"path": str(item) if isinstance(item, Path | str) else None}
            if i in errors:
                yield item, [{**path, "error": str(errors[i])}]
                continue
            records = []
            for model, answer, rows in zip(models, answers, outputs, strict=True):
                records.append({**path, "model": model.name, **_best(answer[i], model.classes, top_k)})
                if model.unfamiliarity is not None:
                    records[-1]["unfamiliar"] = bool(rows[i, -1] > 0)
            if ensemble:
                best = _best(together[i], models[0].classes, top_k)
                votes = [record["unfamiliar"] for record in records if "unfamiliar" in record]
                if votes:
                    best["unfamiliar"] = sum(votes) > len(votes) / 2
                records = [{**path, "model": "ensemble", **best, "models": records}]
            yield item, records


def _best(logits: Tensor, classes: Sequence[str], top_k: int) -> dict:
    """The label of one image's logits (classes), its probability, and the `top_k` best."""
    best = logits.softmax(dim=0).topk(min(top_k, len(classes)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    top = [{"label": classes[label], "probability": probability} for label, probability in pairs]
    return {**top[0], "top": top}


def heat_map(model: nn.Module, images: Tensor) -> Tensor:
    """How much each place of the last maps supports the label, from 0 to 1: (B, 3, H, W) -> (B, h * w)

    Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391). The backbone must be a sequence of layers.
    """
    with torch.inference_mode(False), torch.enable_grad():
        maps, levels = run_layers(model.features, model.levels, images.clone())
        maps.requires_grad_()
        logits = model.classifier(torch.cat([levels, averages(maps, 1)], dim=1))
        [gradient] = torch.autograd.grad(logits.amax(dim=1).sum(), maps)
        heat = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu().flatten(1)
        return (heat / heat.amax(dim=1, keepdim=True).clamp(1e-9)).detach()
