"""Features extracted once, classifiers trained on them: the recipe, the feature cache, the training loop, the metrics.

    features = cached_features(model, data.train, Path("data/features"), device, "bf16")
    train = Batches(feature_loader([features.array], device), data.train.labels, 512, device, seed=0)
    training = Training(model.classifier, train, val, RECIPE)
    fit(training)

The training loop takes any module and any batches of inputs and labels, so it fine-tunes on images as well.
"""

import copy
import hashlib
import io
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Images, explained, locked, preprocess, read_image
from models import TransferModel, content_hash, fast_copy, one_thread, run_images, write_tensors


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are for classifiers on features; all were chosen on CIFAR-10's validation set.

    `python benchmarks/recipe.py` measures what each is worth. The learning rate goes through one cycle (Smith and Topin
    2017, arXiv 1708.07120). The classifier's layers are in models.py, the augmentation for fine-tuning in data.py.
    """

    epochs: int = 8  # twice as many gain nothing, half as many lose up to 0.7 points
    batch_size: int = 512  # small data sets get smaller batches, see Batches
    lr: float = 2e-3  # the peak; half or twice as much loses up to 0.3 points
    weight_decay: float = 1.0  # AdamW multiplies it by lr; 0.3 loses up to 0.8 points, dropout instead up to 0.9
    label_smoothing: float = 0.1  # half a point


RECIPE = Recipe()

# Fine-tuning starts from good weights: a tenth of the rate, and hardly any weight decay. The classifier, which is new,
# learns twice as fast as the backbone.
FINE_TUNING = Recipe(epochs=6, batch_size=32, lr=2e-4, weight_decay=0.05)
CLASSIFIER_LR_FACTOR = 2.0


def synchronized_time(device: torch.device) -> float:
    """Seconds on a clock that never jumps, read when the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def now() -> str:
    """The date and time, UTC, in ISO format."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    """What people call it: "NVIDIA H100 80GB HBM3", or "AMD EPYC 9R14, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # only Linux has the file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"Apple {device.type} on {name}"


# --------------------------------------------------------------------------------- features and their cache

ALIGNMENT = 256  # a pass resumes where a batch of 32 or 256 began, so that every feature comes out the same


@dataclass
class Features:
    """The outputs of the frozen backbone for N images."""

    array: Tensor  # (N, width), mapped from a file; a row of NaN for an image that cannot be read
    made: dict  # how: seconds, date, device
    cached: bool  # read from an earlier run's file

    @property
    def readable(self) -> Tensor:
        """The indices of the images that could be read."""
        return (~self.array[:, 0].isnan()).nonzero().flatten()

    @property
    def unreadable(self) -> Tensor:
        return self.array[:, 0].isnan().nonzero().flatten()


def mirrored_features(model: TransferModel, images: Tensor) -> Tensor:
    """The features of the mirror images: (B, 3, H, W) -> (B, width)"""
    return model.forward_features(images.flip(3))


def cached_features(
    model: TransferModel,
    images: Images,
    folder: Path,
    device: torch.device,
    precision: str,
    mirrored: bool = False,
) -> Features:
    """The features of all images, or of their mirror images, from a file in `folder` if it exists, else computed.

    The file's name is a hash of everything that shapes them: backbone, weights, preprocessing, precision, device type,
    torch's version, the images' fingerprint, the view. So a stale file is never read. It is a .npy file followed by a
    line of JSON with a checksum. While the features are computed they are appended to a .part file, from which an
    interrupted run continues. Raises OSError if the file cannot be written, FloatingPointError if features overflow.
    """
    key = {
        "backbone": model.backbone,
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
    file = folder / f"{model.backbone}-{digest}.npy"
    with locked(folder / f".{file.name}.lock", wait=True):  # another run may be computing the same features
        if file.exists():
            try:
                return _read_features(file)
            except (OSError, ValueError) as error:
                print(f"{file} is unusable ({error}): computing the features again", file=sys.stderr)
                file.unlink()
        with explained(file):
            return _extract_features(model, images, file, device, precision, mirrored)


def _extract_features(
    model: TransferModel, images: Images, file: Path, device: torch.device, precision: str, mirrored: bool
) -> Features:
    kept = torch.float32 if precision == "fp32" else torch.float16  # which holds more digits than bf16
    row_bytes, header = model.width * kept.itemsize, io.BytesIO()
    descr = torch.empty(0, dtype=kept).numpy().dtype.str
    shape = {"descr": descr, "fortran_order": False, "shape": (len(images), model.width)}
    np.lib.format.write_array_header_1_0(header, shape)
    part, clock = file.with_suffix(".part"), file.with_suffix(".seconds.part")
    with part.open("ab") as rows:
        done = min(len(images), max(0, rows.tell() - header.tell()) // row_bytes) // ALIGNMENT * ALIGNMENT
        seconds = seconds_before = float(clock.read_text() or 0) if done and clock.exists() else 0.0
        rows.truncate(header.tell() + done * row_bytes if done else 0)
        if done:
            print(f"{model.backbone}: continuing after the features of {done:,} images")
        else:
            rows.write(header.getbuffer())
        start = synchronized_time(device)
        fast = fast_copy(model, device, precision)
        output = mirrored_features if mirrored else TransferModel.forward_features
        title = f"{model.backbone} features" + " (mirrored)" * mirrored
        with tqdm(total=len(images), initial=done, desc=title, unit="img", disable=None) as bar:
            for items, [block], errors in run_images([fast], images.items[done:], output):
                block = block.to(kept)
                if block.isfinite().all(dim=1).sum() != len(items) - len(errors):
                    raise FloatingPointError(f"features of {model.backbone} overflow in {precision}: use fp32")
                seconds = seconds_before + synchronized_time(device) - start
                clock.write_text(f"{seconds:.3f}")
                rows.write(block.numpy())
                bar.update(len(items))
    array = np.load(part, mmap_mode="c")
    made = {"seconds": seconds, "date": now(), "device": device_name(device)}
    with part.open("ab") as rows:
        rows.write(b"\n" + json.dumps({"sha256": _checksum(array), "made": made}).encode())
        rows.flush()
        os.fsync(rows.fileno())
    part.replace(file)
    clock.unlink(missing_ok=True)
    return Features(torch.from_numpy(array), made, cached=False)


def _read_features(file: Path) -> Features:
    """Raises OSError or ValueError if the file is not what `_extract_features` wrote."""
    try:
        array = np.load(file, mmap_mode="c", allow_pickle=False)
        with file.open("rb") as stream:
            stream.seek(array.offset + array.nbytes)
            seal = json.loads(stream.read(1000))
        if seal["sha256"] != _checksum(array):
            raise ValueError("its checksum is wrong")
        return Features(torch.from_numpy(array), seal["made"], cached=True)
    except (EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _checksum(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(array)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ batches and loops

# (indices of a batch, a generator while training or None) -> the inputs, on the device
Loader = Callable[[Tensor, torch.Generator | None], Tensor]


def feature_loader(views: Sequence[Tensor], device: torch.device) -> Loader:
    """Loads rows of features (N, width). Each training batch takes one of the views at random."""
    with suppress(torch.OutOfMemoryError):  # all of them on the device, so that no step waits for a copy
        views = [view.to(device) for view in views]

    def load(batch: Tensor, generator: torch.Generator | None) -> Tensor:
        chosen = 0 if generator is None or len(views) == 1 else int(torch.randint(len(views), (), generator=generator))
        view = views[chosen]
        return view[batch.to(view.device)].to(device, torch.float32, non_blocking=True)

    return load


def image_loader(images: Images, preprocessing: dict, device: torch.device) -> Loader:
    """Loads preprocessed images (B, 3, S, S), augmented while training."""
    threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def read(i: int) -> Tensor:
        return read_image(images.items[i], preprocessing["image_size"])

    def load(batch: Tensor, generator: torch.Generator | None) -> Tensor:
        return preprocess(list(threads.map(read, batch.tolist())), **preprocessing, device=device, augment=generator)

    return load


class Batches:
    """Inputs and labels in batches on the device. With a seed, every epoch has another order.

    `indices` are those of the images to use; by default all. A small set gets smaller batches, so that an epoch has
    about 16 steps of 8 images or more. The remainder is spread over all batches, which may make them a little larger
    than `batch_size`: BatchNorm cannot train on a single row.
    """

    def __init__(
        self,
        load: Loader,
        labels: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        indices: Tensor | None = None,
    ):
        self.load, self.labels, self.device = load, labels.to(device), device
        self.indices = torch.arange(len(labels)) if indices is None else indices
        size = max(2, min(batch_size, max(8, len(self.indices) // 16)))
        self.steps = max(1, len(self.indices) // size)
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
    criterion: nn.Module,
    autocast: torch.autocast,
) -> tuple[float, float]:
    """Trains on every batch once. Returns the mean cross-entropy and the accuracy, as the model was at each step."""
    model.train()
    total_loss, correct, seen = 0.0, 0, 0
    for images, labels in batches:
        with autocast:
            logits = model(images)
            loss = criterion(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total_loss += F.cross_entropy(logits.detach().float(), labels) * len(labels)  # stays on the device: no waiting
        correct += (logits.argmax(dim=1) == labels).sum()
        seen += len(labels)
    return float(total_loss) / seen, int(correct) / seen


@torch.inference_mode()
def predict(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,), float32 and int64 on the CPU, in the batches' order."""
    model.eval()
    logits, labels = zip(*[(model(inputs), labels) for inputs, labels in batches], strict=True)
    return torch.cat(logits).float().cpu(), torch.cat(labels).cpu()


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean cross-entropy, and the share of images, from 0 to 1, whose label has the largest logit."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).float().mean().item()


def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    return loss_and_accuracy(*predict(model, batches))


class Training:
    """A model in training: its batches, optimizer, schedule, a row per finished epoch, and the best weights so far.

    `groups` are the optimizer's parameter groups, if not all parameters train at the recipe's rate.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        val: Batches,
        recipe: Recipe,
        precision: str = "fp32",
        groups: list[dict] | None = None,
    ):
        self.model, self.train, self.val, self.recipe = model, train, val, recipe
        self.optimizer = torch.optim.AdamW(
            groups or model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in self.optimizer.param_groups],
            total_steps=recipe.epochs * len(train),
        )
        self.autocast = torch.autocast(train.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.history: list[dict] = []
        self.best = copy.deepcopy(model.state_dict())

    @property
    def best_epoch(self) -> dict:
        """The row of the epoch with the best validation loss, whose weights `fit` leaves in the model."""
        return min(self.history, key=lambda row: row["val_loss"])

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.history)

    def state_dict(self) -> dict:
        """All that changes from epoch to epoch."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "best": self.best,
            "order": self.train.generator.get_state(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        for part in ("model", "optimizer", "scheduler"):
            getattr(self, part).load_state_dict(state[part])
        self.history, self.best = state["history"], state["best"]
        self.train.generator.set_state(state["order"])
        torch.set_rng_state(state["random"])


def fit(training: Training, name: str = "", after_epoch: Callable[[], None] = lambda: None) -> None:
    """Trains for the recipe's epochs and leaves the model as it was after the epoch with the best validation loss.

    Stops early, with a line on stderr, if the loss is no longer finite. Raises FloatingPointError if that of the first
    epoch is not. Calls `after_epoch` after each.
    """
    model, train, history, epochs = training.model, training.train, training.history, training.recipe.epochs
    criterion = nn.CrossEntropyLoss(label_smoothing=training.recipe.label_smoothing)
    size = len(train.indices)
    bar = tqdm(total=epochs * size, initial=len(history) * size, desc=name, unit="img", disable=None)
    for epoch in range(len(history) + 1, epochs + 1):
        start = synchronized_time(train.device)
        train_loss, train_accuracy = train_one_epoch(
            model, counted(train, bar), training.optimizer, training.scheduler, criterion, training.autocast
        )
        val_loss, val_accuracy = evaluate(model, training.val)
        if not math.isfinite(train_loss + val_loss):
            where = f"the loss is {train_loss} in epoch {epoch}, at a learning rate of {training.recipe.lr:.2g}"
            if not history:
                raise FloatingPointError(f"{where}: use a smaller learning rate")
            print(f"error: {name}: {where}: training stops here and keeps the best epoch", file=sys.stderr)
            break
        row = {"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "val_loss": val_loss}
        history.append({**row, "val_accuracy": val_accuracy, "seconds": synchronized_time(train.device) - start})
        if training.best_epoch is history[-1]:
            training.best = copy.deepcopy(model.state_dict())
        bar.set_postfix_str(f"val {val_accuracy:.3f}")
        after_epoch()
    bar.close()
    model.load_state_dict(training.best)


def counted(batches: Batches, bar: tqdm) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, each counted on the progress bar."""
    for inputs, labels in batches:
        yield inputs, labels
        bar.update(len(labels))


def save_progress(file: Path, training: Training, key: str) -> None:
    """Saves a training after an epoch, for `load_progress`. `key` identifies it: a hash of all that shapes it."""
    write_tensors(file, {"key": key, **training.state_dict()})


def load_progress(file: Path, training: Training, key: str) -> bool:
    """Continues the training that was saved with the same `key`. Returns whether there was one."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["key"] == key:
            training.load_state_dict(state)
            return True
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever a damaged file makes torch raise
        print(f"{file} is unusable ({type(error).__name__}): training starts again", file=sys.stderr)
    return False


# ---------------------------------------------------------------------------------------------- the metrics


def metrics(logits: Tensor, labels: Tensor, temperature: float) -> dict:
    """Test metrics of logits (N, classes) as plain numbers: accuracies, a row per class, calibration, confusion."""
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
        "calibration": {"before": calibration(logits, labels), "after": calibration(logits / temperature, labels)},
        "confusion_matrix": confusion.tolist(),
    }


def calibration(logits: Tensor, labels: Tensor, bins: int = 15) -> dict:
    """The expected calibration error, and for each bin of confidence its count, mean confidence and accuracy."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    which = (confidence * bins).long().clamp(max=bins - 1)
    count = which.bincount(minlength=bins)
    sums = [torch.zeros(bins).index_add_(0, which, value) for value in (confidence, (predicted == labels).float())]
    confidences, accuracies = (total / count.clamp(1) for total in sums)
    error = ((confidences - accuracies).abs() * count).sum() / len(labels)
    rows = {"count": count.tolist(), "confidence": confidences.tolist(), "accuracy": accuracies.tolist()}
    return {"ece": error.item(), **rows}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the cross-entropy of validation logits (N, classes) (Guo et al. 2017).

    Searches its logarithm from -3.7 to 3.7 in ever finer steps.
    """
    best = 0.0
    for step in (0.5, 0.1, 0.02, 0.004):
        candidates = [best + step * i for i in range(-6, 7)]
        best = min(candidates, key=lambda t: F.cross_entropy(logits / math.exp(t), labels).item())
    return math.exp(best)


def cost(model: TransferModel, device: torch.device) -> dict:
    """Multiply-adds of one forward pass for one image, and images a second in fp32.

    The latter at batch size 1 and at the fastest batch size tried: none is tried after one that takes over a second.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # inference_mode would hide the operators
        model.eval().classifier(model.forward_features(model.example()).float())
    fast, rates = fast_copy(model, device, "fp32"), {}
    for batch_size in (1, 8, 32) if device.type == "cpu" else (1, 64, 256):
        images = model.example().expand(batch_size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        seconds = []
        with torch.inference_mode(), one_thread() if device.type == "cpu" and batch_size == 1 else nullcontext():
            for _ in range(6):  # the first one warms up
                start = synchronized_time(device)
                fast(images)
                seconds.append(synchronized_time(device) - start)
        rates[batch_size] = batch_size / statistics.median(seconds[1:])
        if seconds[-1] > 1:
            break
    best = max(rates, key=rates.get)
    return {
        "multiply_adds": counter.get_total_flops() // 2,
        "images_per_second": {"one": rates[1], "best": rates[best], "best_batch_size": best},
    }
