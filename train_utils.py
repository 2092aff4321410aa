"""Features once, then heads: the frozen pass and its cache, the training loop, evaluation.

    features = cached_features(model, data.images, Path("data/features"), device, "bf16")
    train = Batches(features.array, data.images.labels, data.train, 512, device, seed=0)
    val = Batches(features.array, data.images.labels, data.val, 512, device)
    history = fit(model.classifier, train, val, epochs=10, lr=2e-3)

The loop asks nothing about what it trains: any module, on any batches of inputs and labels.
"""

import copy
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Images, explained, locked, map_batches, preprocess
from models import DTYPES, TransferModel, content_hash

BATCH_ALIGNMENT = 1280  # a pass goes on where a batch of 10 or 256 started, so that its features come out the same


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
    batch_size: int | None = None,
) -> Features:
    """Features of all images, from `folder` where they are known, else computed and kept there.

    The file's name is a hash of all that shapes them, so nothing stale is ever read: backbone, weights, preprocessing,
    precision, device, torch's version and the pictures' fingerprint. It is a plain .npy file with a line of JSON at its
    end that holds a checksum. While the pass runs, rows are appended to a .part file; one cut off goes on there.
    """
    key = {
        "backbone": model.name,
        "weights": content_hash(model.features.state_dict()),
        "every_level": model.every_level,
        "preprocessing": model.preprocessing,
        "precision": precision,
        "device": device.type,
        "torch": torch.__version__,
        "images": images.fingerprint(),
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
        while True:
            try:
                with explained(file):
                    seconds = _extract(model, images, file, device, precision, batch_size)
                return Features(_open_features(file).array, seconds, cached=False)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size = (batch_size or 256) // 2
                print(f"{model.name}: out of memory, going on with batches of {batch_size}", file=sys.stderr)


def _extract(
    model: TransferModel, images: Images, file: Path, device: torch.device, precision: str, batch_size: int | None
) -> float:
    """Appends a row per picture to file's .part, seals it, renames it. Returns the seconds that a whole pass takes."""
    fast, dtype = model.for_inference(device, DTYPES[precision]), DTYPES[precision]

    def forward(pictures: list[Tensor]) -> Tensor:
        return fast.forward_features(preprocess(pictures, **model.preprocessing, device=device, dtype=dtype))

    row = np.empty(model.width, np.float32 if precision == "fp32" else np.float16)
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
        for items, outputs, errors in map_batches(forward, images.items[first:], device, batch_size, size):
            block = np.full((len(items), model.width), np.nan, row.dtype)
            good = [i for i in range(len(items)) if i not in errors]
            block[good] = outputs.numpy() if good else 0
            if not np.isfinite(block[good]).all():
                raise FloatingPointError(f"features of {model.name} overflow in {precision}: use --precision fp32")
            rows.write(block)
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


class Batches:
    """Features and labels in batches on the device, in a new order each time where a seed is given.

    A small set gets smaller batches, so that an epoch has 16 steps of 8 rows or more. The remainder is spread over all
    batches: BatchNorm can't train on a single row.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
    ):
        try:  # all of it, once, so that no step waits for a copy
            features = features.to(device)
        except torch.OutOfMemoryError:
            pass
        self.features, self.labels = features, labels.to(features.device)
        self.indices, self.device = indices, device
        rows = max(2, min(batch_size, max(8, len(indices) // 16)))
        self.steps = max(1, len(indices) // rows)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.indices
        if self.generator is not None:
            order = order[torch.randperm(len(order), generator=self.generator)]
        for batch in order.to(self.features.device).tensor_split(self.steps):
            features = self.features[batch].to(self.device, torch.float32, non_blocking=True)
            yield features, self.labels[batch].to(self.device, non_blocking=True)


def train_one_epoch(
    model: nn.Module,
    batches: Batches,
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
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total_loss += loss.detach() * len(labels)  # stays on the device: nothing waits for it here
        correct += (logits.argmax(dim=1) == labels).sum()
        seen += len(labels)
    return float(total_loss) / seen, int(correct) / seen


@torch.inference_mode()
def predict(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,), on the CPU, in the batches' order."""
    model.eval()
    logits, labels = zip(*[(model(images), labels) for images, labels in batches], strict=True)
    return torch.cat(logits).float().cpu(), torch.cat(labels).cpu()


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and the share of the labels, from 0 to 1, that have the largest logit."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).float().mean().item()


def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean loss and accuracy."""
    return loss_and_accuracy(*predict(model, batches))


def fit(
    model: nn.Module,
    train: Batches,
    val: Batches,
    epochs: int,
    lr: float,
    weight_decay: float = 1.0,
    precision: str = "fp32",
    name: str = "",
) -> list[dict]:
    """Trains with AdamW on a one-cycle schedule and leaves the model as it was after the epoch of best validation loss.

    Returns a row per epoch; fewer than `epochs`, with a word about it, where the loss is no longer a number. Raises
    FloatingPointError where it never was one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(train))
    autocast = torch.autocast(train.device.type, torch.bfloat16, enabled=precision == "bf16")
    history, best_loss, best = [], math.inf, copy.deepcopy(model.state_dict())
    bar = tqdm(range(1, epochs + 1), desc=f"{name} head", unit="epoch", disable=None)
    for epoch in bar:
        train_loss, train_accuracy = train_one_epoch(model, train, optimizer, scheduler, autocast)
        val_loss, val_accuracy = evaluate(model, val)
        if not math.isfinite(train_loss + val_loss):
            where = f"the loss is {train_loss} in epoch {epoch}, at a learning rate of {scheduler.get_last_lr()[0]:.2g}"
            if not history:
                raise FloatingPointError(f"{where}: use a smaller --lr")
            print(f"error: {name}: {where}: it stops, and keeps the best epoch", file=sys.stderr)
            break
        if val_loss < best_loss:
            best_loss, best = val_loss, copy.deepcopy(model.state_dict())
        losses = {"train_loss": train_loss, "train_accuracy": train_accuracy}
        history.append({"epoch": epoch, **losses, "val_loss": val_loss, "val_accuracy": val_accuracy})
        bar.set_postfix_str(f"val {val_accuracy:.3f}")
    model.load_state_dict(best)
    return history
