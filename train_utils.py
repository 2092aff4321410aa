"""Features once, then heads: the frozen pass and its cache, the training loop, evaluation.

    features = cached_features(model, data.images, Path("data/features"), device, "bf16")
    load = feature_loader([features.array], device)
    train = Batches(load, data.images.labels, data.train, 512, device, seed=0)
    val = Batches(load, data.images.labels, data.val, 512, device)
    history = fit(model.classifier, train, val, epochs=10, lr=2e-3)

The loop asks nothing about what it trains: any module, on any batches of inputs and labels.
"""

import copy
import hashlib
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Images, explained, locked, map_batches, one_thread, preprocess, read_image, whole_or_absent
from models import DTYPES, TransferModel, content_hash

LABEL_SMOOTHING = 0.1  # worth half a point of frozen accuracy
BATCH_ALIGNMENT = 256  # a pass goes on where a batch of 32 or 256 started, so that its features come out the same


def synchronized_time(device: torch.device) -> float:
    """Seconds on a clock that never jumps, with the work given to the device done."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------------------------------- the frozen pass


@dataclass
class Features:
    """What the frozen backbone makes of every picture, once and for all."""

    array: Tensor  # (N, width), mapped from the file; a row of NaN for a picture that can't be read
    seconds: float  # that the pass took, whenever that was
    cached: bool

    @property
    def readable(self) -> Tensor:
        """bool (N,)"""
        return ~self.array[:, 0].isnan()


def cached_features(
    model: TransferModel,
    images: Images,
    folder: Path,
    device: torch.device,
    precision: str,
    mirrored: bool = False,
) -> Features:
    """Features of all images, or of their mirror images, from `folder` where they are known, else computed and kept.

    The file's name is a hash of all that shapes them, so nothing stale is ever read: backbone, weights, preprocessing,
    precision, device, torch's version, the pictures' fingerprint and the view. It is a plain .npy file with a line of
    JSON at its end that holds a checksum. While the pass runs, rows are appended to a .part file; one cut off goes on
    there.
    """
    key = {
        "backbone": model.name,
        "weights": content_hash(model.features.state_dict()),
        "width": model.width,
        "preprocessing": model.preprocessing,
        "precision": precision,
        "device": device.type,
        "torch": torch.__version__,
        "images": images.fingerprint(),
        "mirrored": mirrored,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"{model.name}-{digest}.npy"
    with locked(folder / f".{file.name}.lock", wait=True):  # another run may be computing the same
        if file.exists():
            try:
                return _open_features(file)
            except (OSError, ValueError) as error:
                print(f"{file} is unusable ({error}): computing the features again", file=sys.stderr)
                file.unlink()
        with explained(file):
            seconds = _extract(model, images, file, device, precision, mirrored)
        return Features(_open_features(file).array, seconds, cached=False)


def _extract(
    model: TransferModel,
    images: Images,
    file: Path,
    device: torch.device,
    precision: str,
    mirrored: bool,
) -> float:
    """Appends a row per picture to file's .part, seals it, renames it. Returns the seconds that a whole pass takes."""
    fast, dtype = model.for_inference(device, DTYPES[precision]), DTYPES[precision]

    def forward(pictures: list[Tensor]) -> Tensor:
        if mirrored:
            pictures = [picture.flip(2) for picture in pictures]
        return fast.forward_features(preprocess(pictures, **model.preprocessing, device=device, dtype=dtype))

    kept = torch.float32 if precision == "fp32" else torch.float16
    row = torch.empty(model.width, dtype=kept).numpy()
    header = io.BytesIO()
    shape = {"descr": row.dtype.str, "fortran_order": False, "shape": (len(images), model.width)}
    np.lib.format.write_array_header_1_0(header, shape)
    part = file.with_suffix(".part")
    with part.open("ab") as rows:
        there = min(len(images), max(0, rows.tell() - header.tell()) // row.nbytes)
        first = there // BATCH_ALIGNMENT * BATCH_ALIGNMENT
        rows.truncate(header.tell() + first * row.nbytes if first else 0)
        if first:
            print(f"{model.name}: the features of {first:,} pictures are there already, going on with the others")
        else:
            rows.write(header.getbuffer())
        start = synchronized_time(device)
        bar = tqdm(total=len(images), initial=first, desc=f"{model.name} features", unit="img", disable=None)
        size = model.preprocessing["image_size"]
        for items, outputs, errors in map_batches(forward, images.items[first:], device, max_size=size):
            block = torch.full((len(items), model.width), math.nan, dtype=kept)
            if good := [i for i in range(len(items)) if i not in errors]:
                block[good] = outputs.to(kept)
            if not block[good].isfinite().all():
                raise FloatingPointError(f"features of {model.name} overflow in {precision}: use --precision fp32")
            rows.write(block.numpy())
            bar.update(len(items))
        bar.close()
        seconds = (synchronized_time(device) - start) * len(images) / max(1, len(images) - first)
    seal = {"sha256": _checksum(np.load(part, mmap_mode="r")), "seconds": seconds}
    with part.open("ab") as rows:
        rows.write(b"\n" + json.dumps(seal).encode())
        rows.flush()
        os.fsync(rows.fileno())
    part.replace(file)
    return seconds


def _open_features(file: Path) -> Features:
    """Raises OSError or ValueError where the file isn't what `_extract` wrote."""
    try:
        array = np.load(file, mmap_mode="c", allow_pickle=False)
        with file.open("rb") as stream:
            stream.seek(array.offset + array.nbytes)
            seal = json.loads(stream.read(1000))
        if seal["sha256"] != _checksum(array):
            raise ValueError("its checksum is wrong")
    except (EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return Features(torch.from_numpy(array), seal["seconds"], cached=True)


def _checksum(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(array)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ the loops


# (a batch's indices, randomness while training or None) -> the inputs, on the device
Loader = Callable[[Tensor, torch.Generator | None], Tensor]


def feature_loader(views: Sequence[Tensor], device: torch.device) -> Loader:
    """Rows of features (N, width). Where there are several views, each training batch takes one of them."""
    with suppress(torch.OutOfMemoryError):  # all of it, once, so that no step waits for a copy
        views = [view.to(device) for view in views]

    def load(batch: Tensor, generator: torch.Generator | None) -> Tensor:
        chosen = 0 if generator is None or len(views) == 1 else int(torch.randint(len(views), (), generator=generator))
        view = views[chosen]
        return view[batch.to(view.device)].to(device, torch.float32, non_blocking=True)

    return load


def image_loader(images: Images, preprocessing: dict, device: torch.device) -> Loader:
    """Preprocessed pictures (B, 3, S, S), augmented while training."""
    threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def read(i: int) -> Tensor:
        return read_image(images.items[i], preprocessing["image_size"])

    def load(batch: Tensor, generator: torch.Generator | None) -> Tensor:
        return preprocess(list(threads.map(read, batch.tolist())), **preprocessing, device=device, augment=generator)

    return load


class Batches:
    """Inputs and labels in batches on the device, in a new order each time where a seed is given.

    A small set gets smaller batches, so that an epoch has 16 steps of 8 rows or more. The remainder is spread over all
    batches: BatchNorm can't train on a single row.
    """

    def __init__(
        self,
        load: Loader,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
    ):
        self.load, self.labels, self.indices, self.device = load, labels.to(device), indices, device
        rows = max(2, min(batch_size, max(8, len(indices) // 16)))
        self.steps = max(1, len(indices) // rows)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.indices
        if self.generator is not None:
            order = order[torch.randperm(len(order), generator=self.generator)]
        for batch in order.tensor_split(self.steps):
            yield self.load(batch, self.generator), self.labels[batch.to(self.device, non_blocking=True)]


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    autocast: torch.autocast,
) -> tuple[float, float]:
    """One pass over the batches. Returns the mean loss and the accuracy, as the model was at each step."""
    model.train()
    total_loss, correct, seen = 0.0, 0, 0
    for images, labels in batches:
        with autocast:
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total_loss += F.cross_entropy(logits.detach().float(), labels) * len(labels)  # stays on the device: no waiting
        correct += (logits.argmax(dim=1) == labels).sum()
        seen += len(labels)
    return float(total_loss) / seen, int(correct) / seen


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Batches, autocast: AbstractContextManager | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,), on the CPU, in the batches' order."""
    model.eval()
    with autocast or nullcontext():
        logits, labels = zip(*[(model(inputs), labels) for inputs, labels in batches], strict=True)
    return torch.cat(logits).float().cpu(), torch.cat(labels).cpu()


def predict_images(model: TransferModel, images: Images, device: torch.device, precision: str) -> Tensor:
    """Logits (N, classes), as inference.py computes them."""
    fast, dtype = model.for_inference(device, DTYPES[precision]), DTYPES[precision]

    def forward(pictures: list[Tensor]) -> Tensor:
        return fast(preprocess(pictures, **model.preprocessing, device=device, dtype=dtype))

    size = model.preprocessing["image_size"]
    return torch.cat([logits for _, logits, _ in map_batches(forward, images.items, device, max_size=size)])


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and the share of the labels, from 0 to 1, that have the largest logit."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).float().mean().item()


def evaluate(model: nn.Module, batches: Batches, autocast: AbstractContextManager | None = None) -> tuple[float, float]:
    """Mean loss and accuracy."""
    return loss_and_accuracy(*predict(model, batches, autocast))


def fit(
    model: nn.Module,
    train: Batches,
    val: Batches,
    epochs: int,
    lr: float,
    weight_decay: float = 1.0,
    precision: str = "fp32",
    name: str = "",
    groups: list[dict] | None = None,
    resume: Path | None = None,
) -> list[dict]:
    """Trains with AdamW on a one-cycle schedule and leaves the model as it was after the epoch of best validation loss.

    `groups` are the optimizer's, where not all parameters train, or not at the same rate. With `resume`, each epoch's
    end is written to that file, and a training that was cut off goes on from there, as if it never had been.
    Returns a row per epoch; fewer than `epochs`, with a word about it, where the loss is no longer a number. Raises
    FloatingPointError where it never was one.
    """
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=epochs * len(train))
    autocast = torch.autocast(train.device.type, torch.bfloat16, enabled=precision == "bf16")
    history, best_loss, best = [], math.inf, copy.deepcopy(model.state_dict())
    stages = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    start = content_hash(best, [epochs, rates, weight_decay, precision, len(train), train.generator.initial_seed()])
    if resume and (state := _interrupted(resume, start)):
        for stage, holder in stages.items():
            holder.load_state_dict(state[stage])
        torch.set_rng_state(state["random"])
        train.generator.set_state(state["order"])
        history, best_loss, best = state["history"], state["best_loss"], state["best"]
        print(f"{name}: {len(history)} epochs of {epochs} are done already, going on with the others")
    size = len(train.indices)
    bar = tqdm(total=epochs * size, initial=len(history) * size, desc=name, unit="img", disable=None)
    for epoch in range(len(history) + 1, epochs + 1):
        begin = synchronized_time(train.device)
        train_loss, train_accuracy = train_one_epoch(model, counted(train, bar), optimizer, scheduler, autocast)
        val_loss, val_accuracy = evaluate(model, val, autocast)
        if not math.isfinite(train_loss + val_loss):
            where = f"the loss is {train_loss} in epoch {epoch}, at a learning rate of {scheduler.get_last_lr()[0]:.2g}"
            if not history:
                raise FloatingPointError(f"{where}: use a smaller learning rate")
            print(f"error: {name}: {where}: it stops, and keeps the best epoch", file=sys.stderr)
            break
        if val_loss < best_loss:
            best_loss, best = val_loss, copy.deepcopy(model.state_dict())
        seconds = synchronized_time(train.device) - begin
        row = {"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy}
        history.append({**row, "val_loss": val_loss, "val_accuracy": val_accuracy, "seconds": seconds})
        bar.set_postfix_str(f"val {val_accuracy:.3f}")
        if resume:
            state = {stage: holder.state_dict() for stage, holder in stages.items()}
            state |= {"random": torch.get_rng_state(), "order": train.generator.get_state(), "start": start}
            with whole_or_absent(resume) as file:
                torch.save({**state, "history": history, "best_loss": best_loss, "best": best}, file)
    bar.close()
    model.load_state_dict(best)
    return history


def counted(batches: Batches, bar: tqdm) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, each counted on the bar."""
    for inputs, labels in batches:
        yield inputs, labels
        bar.update(len(labels))


def _interrupted(file: Path, start: str) -> dict | None:
    """What `fit` wrote to the file, if it belongs to the training that begins with `start`."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return state if state["start"] == start else None
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file makes torch raise
        print(f"{file} is unusable ({type(error).__name__}): training starts anew", file=sys.stderr)
        return None


# ---------------------------------------------------------------------------------------------- what came of it


def metrics(logits: Tensor, labels: Tensor, temperature: float) -> dict:
    """Plain numbers about logits (N, classes): accuracies, a row per class, calibration, the confusion matrix."""
    classes = logits.shape[1]
    predicted = logits.argmax(dim=1)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)  # rows are the true classes
    confusion.index_put_((labels, predicted), torch.tensor(1), accumulate=True)
    right = confusion.diagonal()
    precision, recall = right / confusion.sum(dim=0).clamp(1), right / confusion.sum(dim=1).clamp(1)
    f1 = 2 * right / (confusion.sum(dim=0) + confusion.sum(dim=1)).clamp(1)
    scores = {"precision": precision, "recall": recall, "f1": f1}
    loss, accuracy = loss_and_accuracy(logits, labels)
    return {
        "test_loss": loss,
        "test_accuracy": accuracy,
        "top2_accuracy": (logits.topk(min(2, classes)).indices == labels[:, None]).any(dim=1).float().mean().item(),
        "per_class": {name: score.tolist() for name, score in scores.items()},
        "macro": {name: score.mean().item() for name, score in scores.items()},
        "temperature": temperature,
        "calibration": {"before": calibration(logits, labels), "after": calibration(logits / temperature, labels)},
        "confusion_matrix": confusion.tolist(),
    }


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The one number by which to divide logits, so that probabilities mean what they say (Guo et al. 2017).

    Minimises the cross-entropy of validation logits, by ever finer steps of its logarithm.
    """
    best = 0.0
    for step in (0.5, 0.1, 0.02, 0.004):
        candidates = [best + step * i for i in range(-6, 7)]
        best = min(candidates, key=lambda t: F.cross_entropy(logits / math.exp(t), labels).item())
    return math.exp(best)


def calibration(logits: Tensor, labels: Tensor, bins: int = 15) -> dict:
    """Expected calibration error, and for each bin of confidence its count, mean confidence and accuracy."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    which = (confidence * bins).long().clamp(max=bins - 1)
    count = which.bincount(minlength=bins)
    sums = [torch.zeros(bins).index_add_(0, which, value) for value in (confidence, (predicted == labels).float())]
    confidences, accuracies = (total / count.clamp(1) for total in sums)
    error = ((confidences - accuracies).abs() * count).sum() / len(labels)
    rows = {"count": count.tolist(), "confidence": confidences.tolist(), "accuracy": accuracies.tolist()}
    return {"ece": error.item(), **rows}


def cost(model: TransferModel, device: torch.device, precision: str) -> dict:
    """Multiply-adds of a picture, and pictures a second, by batch size: one, and the best of some."""
    size, dtype = model.preprocessing["image_size"], DTYPES[precision]
    fast = model.for_inference(device, dtype)
    rates = {}
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, 3, size, size, device=device))
        for batch_size in (1, 8, 32) if device.type == "cpu" else (1, 64, 256):
            images = torch.zeros(batch_size, 3, size, size, dtype=dtype, device=device)
            images = images.to(memory_format=torch.channels_last)
            seconds = []
            with one_thread(device.type == "cpu" and batch_size == 1):  # as in map_batches
                for _ in range(6):  # the first one warms up
                    start = synchronized_time(device)
                    fast(images)
                    seconds.append(synchronized_time(device) - start)
            rates[batch_size] = batch_size / statistics.median(seconds[1:])
    best = max(rates, key=rates.get)
    return {
        "multiply_adds": counter.get_total_flops() // 2,
        "images_per_second": {"one": rates[1], "best": rates[best], "best_batch_size": best},
    }
