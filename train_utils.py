"""Features extracted once, classifiers trained on them: the recipe, the feature cache, the training loop, the metrics.

    features = cached_features(model, data.train, Path("data/features"), device)
    train = Batches(feature_loader(features.table, device), data.train.labels, 512, device, seed=0)
    fit_classifier(model.classifier, train, val, RECIPE, "fp32", "classifier")

The training loop takes any module and any batches of inputs and labels, so it fine-tunes on images as well.
"""

import copy
import hashlib
import json
import math
import platform
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data import ImageError, Images, Progress, available_cpus, explained, locked, preprocess, read_image
from models import (
    CPU_BATCH,
    GPU_BATCH,
    Classifier,
    Familiarity,
    TransferModel,
    content_hash,
    fast_copy,
    rank_and_count,
    run_images,
    run_images_here,
    threads,
    together,
    training_copy,
)


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are for classifiers on features; all were chosen on CIFAR-10's validation set.

    `python benchmarks/recipe.py` measures what each is worth. The learning rate goes through one cycle (Smith and Topin
    2017, arXiv 1708.07120). The classifier's layers are in models.py, the augmentation for fine-tuning in data.py.
    """

    epochs: int = 7  # half as many lose a point, twice as many change little
    batch_size: int = 512  # small data sets get smaller batches, see Batches
    lr: float = 2e-3  # the peak; half or twice as much changes accuracy by up to 0.4 points
    warm_up: float = 0.3  # the share of the steps in which the rate rises to it
    weight_decay: float = 1.0  # AdamW multiplies it by lr; 0.3 or 3 changes little, dropout instead loses a point
    label_smoothing: float = 0.1  # half a point
    class_weights: bool = False  # weigh each image by the inverse frequency of its class


RECIPE = Recipe()

# Fine-tuning starts from good weights: a low rate that falls for most of the time, and hardly any weight decay. The
# classifier, which is new, learns twice as fast as the backbone.
FINE_TUNING = Recipe(epochs=6, batch_size=32, lr=1.5e-4, warm_up=0.1, weight_decay=0.05)
CLASSIFIER_LR_FACTOR = 2.0

# The maximum number of images for the linear layer. With more images, the network has most of the weight.
RIDGE_IMAGES = 4096
# The maximum number of images for Familiarity, and the weight of the identity in its shrunk covariance.
FAMILIAR_IMAGES, SHRINKAGE = 20_000, 0.9
# The prior of the temperature's logarithm: mean 0 and this standard deviation. A few images cannot move it far.
TEMPERATURE_PRIOR = 0.1


def synchronized_time(device: torch.device) -> float:
    """Seconds on a clock that never jumps, read when the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


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

LARGE = 200_000  # features of more images are kept as float16: half the space, the same accuracy (benchmarks/scale.md)


@dataclass
class Features:
    """The outputs of the frozen backbone for N images. They stay in their file, which is mapped into memory."""

    table: Tensor  # (rows of the file, width)
    rows: Tensor  # (N,) each image's row of the table, -1 for one that cannot be read
    seconds: float  # time to compute the features, in this run and in earlier runs
    computed: int  # number of images whose features were computed in this run
    errors: list[ImageError]  # one for each image that cannot be read

    @property
    def readable(self) -> Tensor:
        """The indices of the images that could be read."""
        return (self.rows >= 0).nonzero().flatten()

    def of(self, images: Tensor) -> Tensor:
        """The features (B, width) of B images: a part of the file if it has them in this order, else a copy."""
        rows = self.rows[images]
        if rows.diff().eq(1).all():
            return self.table[rows[0] : rows[-1] + 1]
        return self.table[rows]


def cached_features(
    model: TransferModel,
    images: Images,
    folder: Path,
    device: torch.device,
    compute: bool = True,
) -> Features:
    """Returns the features of all images. Computes only the features that are not in `folder` yet.

    If `compute` is False, images without cached features are treated as unreadable.

    The file's name holds a hash of everything else that determines the features: backbone, weights, preprocessing,
    precision, views, device type and torch version. A record holds the image's hash, the seconds spent on the image,
    its features and their checksum, so stale or damaged features are never used. Records are appended batch by batch:
    an interrupted run continues, and a larger data set computes only its new images. An unreadable image leaves no
    record; the next run tries it again.
    Raises OSError if the file cannot be written, FloatingPointError if features overflow.
    """
    key = {
        "backbone": model.backbone,
        "weights": content_hash(model.features.state_dict()),
        "width": model.width,
        "preprocessing": model.preprocessing,
        "precision": model.precision,
        "device": device.type,
        "torch": torch.__version__,
        "views": model.views,
    }
    if half := len(images) > LARGE:
        key["kept"] = "float16"
    kept = "<f2" if half or model.precision == "bf16" else "<f4"  # float16 holds more digits than bf16
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"{model.backbone}-{digest}.features"
    layout = np.dtype([("image", "S32"), ("seconds", "<f4"), ("checksum", "<u4"), ("features", kept, (model.width,))])
    ids = [image.encode() for image in images.ids()]
    errors: list[ImageError] = []
    with locked(folder / f".{file.name}.lock", wait=True), explained(file):  # another run may be computing the same
        table, found = _find_records(file, layout, ids)
        missing = [i for i, image in enumerate(ids) if compute and image not in found]
        if missing:
            if found:
                print(f"{model.backbone}: {len(ids) - len(missing):,} of {len(ids):,} images have their features")
            wanted = (images.items[i] for i in missing)
            fast = fast_copy(model, device)
            title, position, before = f"{model.backbone} features", 0, time.perf_counter()
            with file.open("ab") as stream, Progress(len(ids), title, len(ids) - len(missing)) as bar:
                stream.truncate(len(table) * layout.itemsize)
                for items, [block], failed in run_images([fast], wanted, TransferModel.forward_features):
                    good = [i for i in range(len(items)) if i not in failed]
                    errors += failed.values()
                    records = np.zeros(len(good), layout)
                    records["image"] = [ids[missing[position + i]] for i in good]
                    with np.errstate(over="ignore"):  # see below
                        records["features"] = block[good].numpy()
                    rows = records["features"]
                    if not np.isfinite(rows).all():
                        raise FloatingPointError(f"features of {model.backbone} overflow in {rows.dtype}")
                    records["checksum"] = [zlib.crc32(row) for row in rows]
                    after = synchronized_time(device)
                    records["seconds"] = (after - before) / max(1, len(good))
                    stream.write(records.tobytes())
                    stream.flush()
                    position, before = position + len(items), after
                    bar.update(len(items))
            table, new = _find_records(file, layout, [ids[i] for i in missing])
            found |= new
    rows = np.array([found.get(image, -1) for image in ids])
    seconds = float(table["seconds"][rows[rows >= 0]].sum())
    computed = len(missing) - len(errors)
    return Features(torch.from_numpy(table["features"]), torch.from_numpy(rows), seconds, computed, errors)


def _find_records(file: Path, layout: np.dtype, ids: list[bytes]) -> tuple[np.ndarray, dict[bytes, int]]:
    """The whole records of a file, mapped into memory, and the rows of the given images."""
    count = file.stat().st_size // layout.itemsize if file.exists() else 0
    if not count:
        return np.zeros(0, layout), {}
    table = np.memmap(file, layout, mode="c", shape=count)  # read only; torch wants to be able to write
    found = {image: row for row, image in enumerate(table["image"].tolist())}
    found = {image: found[image] for image in ids if image in found}
    damaged = {image for image, row in found.items() if zlib.crc32(table["features"][row]) != table["checksum"][row]}
    if damaged:
        print(f"{file}: {len(damaged)} images' features are damaged: computing them again", file=sys.stderr)
    return table, {image: row for image, row in found.items() if image not in damaged}


@torch.inference_mode()
def most_similar(
    model: TransferModel, queries: Tensor, features: Features, count: int
) -> list[list[tuple[int, float]]]:
    """For each of Q images, features (Q, width), the images whose features are most similar, and the cosines."""
    scale = model.classifier.standardize if isinstance(model.classifier, Classifier) else nn.Identity()
    queries, known = F.normalize(scale(queries)), features.readable
    cosines = [F.normalize(scale(features.of(images).float())) @ queries.T for images in known.split(1024)]
    cosines, best = torch.cat(cosines).T.topk(min(count, len(known)))
    pairs = zip(known[best].tolist(), cosines.tolist(), strict=True)
    return [list(zip(images, values, strict=True)) for images, values in pairs]


# ------------------------------------------------------------------------------------------ batches and loops

# Input: the indices (B,) of a batch, and random numbers (B, 5) for augmentation or None. Output: the inputs on the
# device, and the indices of the images that could be read.
Loader = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def feature_loader(features: Tensor, device: torch.device) -> Loader:
    """Loads rows of features (N, width)."""
    with suppress(torch.OutOfMemoryError):  # all of them on the device, so that no step waits for a copy
        features = features.to(device)

    def load(batch: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        return features[batch.to(features.device)].to(device, torch.float32, non_blocking=True), batch

    return load


def image_loader(images: Images, preprocessing: dict, device: torch.device) -> Loader:
    """Loads preprocessed images (B, 3, S, S), augmented while training."""
    pool = ThreadPoolExecutor(min(16, available_cpus()))

    def read(i: int) -> Tensor | None:
        try:
            return read_image(images.items[i], preprocessing["image_size"], preprocessing["crop"])
        except ImageError as error:  # it could be read before
            print(f"left out: {error}", file=sys.stderr)
            return None

    def load(batch: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        read_images = list(pool.map(read, batch.tolist()))
        there = [i for i, image in enumerate(read_images) if image is not None]
        if not there:
            raise OSError("no image of a batch can be read: are the files still there?")
        draws = None if draws is None else draws[there]
        return preprocess([read_images[i] for i in there], preprocessing, device, draws=draws), batch[there]

    return load


class Batches:
    """Inputs and labels in batches on the device. With a seed, every epoch has another order.

    A small set gets smaller batches, so that an epoch has about 16 steps of 8 images or more. The remainder is spread
    over all batches, which may make them a little larger than `batch_size`. If `shared`, each process of torchrun gets
    its share of every batch. There must be at least as many images as processes.
    """

    def __init__(
        self,
        load: Loader,
        labels: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        shared: bool = False,
    ):
        self.load, self.labels, self.device = load, labels.to(device), device
        self.report: Callable[[int], object] = lambda images: None  # called with the size of each batch that is done
        self.process, self.processes = rank_and_count() if shared else (0, 1)
        size = max(2, self.processes, min(batch_size, max(8, len(labels) // 16)))
        self.steps = max(1, len(labels) // size)
        self.mean_size = len(labels) / self.steps / self.processes  # of this process's batches
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = len(self.labels)
        order = torch.arange(size) if self.generator is None else shuffled(size, self.generator)
        share = slice(self.process, None, self.processes)
        for batch in order.tensor_split(self.steps):
            draws = torch.rand(len(batch), 5, generator=self.generator)[share] if self.generator else None
            inputs, there = self.load(batch[share], draws)
            yield inputs, self.labels[there.to(self.device, non_blocking=True)]
            self.report(len(batch))

    def means(self, loss: Tensor, right: Tensor, images: int) -> tuple[float, float]:
        """The mean loss and the accuracy, from sums over all batches of this process. The processes' sums are added."""
        sums = torch.tensor([float(loss), float(right), images], dtype=torch.float64)
        if self.processes > 1:
            dist.all_reduce(sums)
        loss, right, images = sums.tolist()
        return loss / images, right / images


BLOCK, WINDOW = 64, 2**17  # images that stay together, and images among which they are then shuffled one by one


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """The numbers from 0 to `count` - 1 in random order: first blocks are shuffled, then the numbers in each window.

    Features that are larger than memory are then read block by block, without a seek for every row.
    """
    order = BLOCK * torch.randperm(-(-count // BLOCK), generator=generator)[:, None] + torch.arange(BLOCK)
    order = order[order < count]
    return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in order.split(WINDOW)])


def train_one_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    criterion: Callable[[Tensor, Tensor], Tensor],
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
    return batches.means(total_loss, correct, seen)


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
    logits, labels = predict(model, batches)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return batches.means(loss, (logits.argmax(dim=1) == labels).sum(), len(labels))


class Training:
    """A model in training: its batches, optimizer, schedule, a row per finished epoch, and the best weights so far.

    `groups` are the optimizer's parameter groups, if not all parameters train at the recipe's rate. `network` is what
    runs, if not the model itself: it has the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        val: Batches,
        recipe: Recipe,
        precision: str = "fp32",
        groups: list[dict] | None = None,
        network: nn.Module | None = None,
    ):
        self.model, self.train, self.val, self.recipe = model, train, val, recipe
        self.network = network or model
        if train.processes > 1:  # with shared batches every process has a copy, and their gradients are averaged
            self.network = nn.parallel.DistributedDataParallel(self.network, broadcast_buffers=False)
        self.optimizer = torch.optim.AdamW(
            groups or model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in self.optimizer.param_groups],
            total_steps=recipe.epochs * train.steps,
            pct_start=recipe.warm_up + 1e-9,  # it divides by zero if the rise takes exactly one step
        )
        self.autocast = torch.autocast(train.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.history: list[dict] = []
        self.best = copy.deepcopy(model.state_dict())

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

    Stops early, with a message on stderr, if the loss is not finite. Raises FloatingPointError if that happens in the
    first epoch. Calls `after_epoch` after every finished epoch.
    """
    model, train, history, epochs = training.model, training.train, training.history, training.recipe.epochs
    weights = balanced_weights(train.labels) if training.recipe.class_weights else None
    total_loss = nn.CrossEntropyLoss(weights, label_smoothing=training.recipe.label_smoothing, reduction="sum")
    size = len(train.labels) + len(training.val.labels)
    bar = Progress(epochs * size, name, len(history) * size, disable=not name)
    train.report = training.val.report = bar.update

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return total_loss(logits, labels) / train.mean_size  # batches differ by an image, and all weigh the same

    for epoch in range(len(history) + 1, epochs + 1):
        start = synchronized_time(train.device)
        train_loss, train_accuracy = train_one_epoch(
            training.network, train, training.optimizer, training.scheduler, criterion, training.autocast
        )
        val_loss, val_accuracy = evaluate(training.network, training.val)
        if not math.isfinite(train_loss + val_loss):
            losses = f"the loss is {train_loss:.3g} in training and {val_loss:.3g} in validation"
            where = f"{losses} in epoch {epoch}, at a learning rate of {training.recipe.lr:.2g}"
            if not history:
                raise FloatingPointError(f"{where}: use a smaller learning rate")
            if name:  # the other processes of torchrun have none, and say nothing
                print(f"error: {name}: {where}: training stops here and keeps the best epoch", file=sys.stderr)
            break
        row = {"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "val_loss": val_loss}
        history.append({**row, "val_accuracy": val_accuracy, "seconds": synchronized_time(train.device) - start})
        if min(history, key=lambda row: row["val_loss"]) is history[-1]:
            training.best = copy.deepcopy(model.state_dict())
        bar.set_postfix_str(f"val {val_accuracy:.3f}", refresh=False)
        after_epoch()
    bar.close()
    model.load_state_dict(training.best)


def balanced_weights(labels: Tensor) -> Tensor:
    """A weight for each class, in inverse proportion to its number of labels. Their mean over the labels is 1."""
    counts = labels.bincount()
    return len(labels) / (len(counts) * counts.clamp(1))


def fit_classifier(
    classifier: nn.Module, train: Batches, val: Batches, recipe: Recipe, precision: str, name: str
) -> tuple[Training, Tensor]:
    """Trains a classifier on features. Returns its training and its logits (N, classes) for the validation images.

    A Classifier is the weighted mean of a linear layer and a network. Ridge regression fits the linear layer to the
    training and validation images together. For the returned logits of an image, the linear layer is fitted without
    that image (stacking: Wolpert 1992). `fit` trains the network; its weight is images / (images + features). Any
    other classifier, such as a pretrained classifier, is trained by `fit` alone.
    """
    if not isinstance(classifier, Classifier):
        training = Training(classifier, train, val, recipe, precision)
        fit(training, name)
        return training, predict(classifier, val)[0]
    split, images = len(train.labels), len(train.labels) + len(val.labels)
    labels = torch.cat([train.labels, val.labels])
    chosen = _sample(labels.cpu(), RIDGE_IMAGES)
    of_train, of_val = chosen[chosen < split], chosen[chosen >= split] - split
    features, labels = torch.cat([train.load(of_train, None)[0], val.load(of_val, None)[0]]), labels[chosen]
    left_out = fit_linear(classifier, features, labels, recipe.class_weights)
    training = Training(nn.Sequential(classifier.standardize, classifier.network), train, val, recipe, precision)
    fit(training, name)

    linear = predict(nn.Sequential(classifier.standardize, classifier.linear), val)[0].clone()
    linear[of_val] = left_out[len(of_train) :].cpu()
    share = images / (images + features.shape[1])
    logits = (1 - share) * linear + share * predict(training.model, val)[0]
    with torch.no_grad():
        for layer, weight in ((classifier.linear, 1 - share), (classifier.network[-1], share)):
            layer.weight.mul_(weight)
            layer.bias.mul_(weight)
    return training, logits


def _sample(labels: Tensor, count: int) -> Tensor:
    """`count` images at random, in their order, and at least one of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    _, first_of_each_class = np.unique(labels[order].numpy(), return_index=True)
    return torch.cat([order[:count], order[first_of_each_class]]).unique()


@torch.no_grad()
def fit_linear(classifier: Classifier, features: Tensor, labels: Tensor, class_weights: bool = False) -> Tensor:
    """Sets the standardisation and the linear layer from features (N, width) of images of every class.

    Ridge regression (Hoerl and Kennard 1970) on one-hot labels (N,), in its dual form. Its strength is the number of
    features. The same matrix gives leave-one-out scores: each image's scores without that image in the fit (Allen
    1974). Logits are scores times a factor, which minimises the cross-entropy of the leave-one-out logits (Platt
    1999). Returns the leave-one-out logits (N, classes).
    """
    count, width = features.shape
    weights = balanced_weights(labels)[labels] if class_weights else torch.ones(count, device=features.device)
    root, targets = weights.sqrt()[:, None], F.one_hot(labels, classifier.linear.out_features).float()
    classifier.standardize.fit(features)
    x = classifier.standardize(features)
    middle, average = (weights[:, None] * x).mean(dim=0), (weights[:, None] * targets).mean(dim=0)
    x = root * (x - middle)
    kernel = x @ x.T / width
    kernel.diagonal().add_(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    residuals = inverse @ (root * (targets - average))
    left_out = targets - residuals / root / (inverse.diagonal() - weights / count).clamp(1e-3)[:, None]
    factors = torch.linspace(0, 4, 201).exp().tolist()
    smoothing = 1 / (count + 2)  # as if one image more had spoken against every answer
    losses = [F.cross_entropy(factor * left_out, labels, label_smoothing=smoothing) for factor in factors]
    factor = factors[int(torch.stack(losses).argmin())]
    classifier.linear.weight.copy_(factor * (residuals.T @ x) / width)
    classifier.linear.bias.copy_(factor * average - classifier.linear.weight @ middle)
    return factor * left_out


@torch.no_grad()
def fit_familiarity(train: Tensor, labels: Tensor, val: Tensor, logits: Tensor) -> Familiarity:
    """Fits Familiarity to features `train` (N, width) with their labels (N,), and calibrates it on validation images.

    `val` (M, width) and `logits` (M, classes) belong to the validation images; 95 % of these get a familiar score.
    Distance and doubt are divided by their standard deviations on the validation images; the doubt has less weight if
    the training images are few. The covariance is shrunk towards a multiple of the identity. Without that, directions
    in which images vary much would hardly count, and a blank image would seem familiar.
    """
    generator, size = torch.Generator().manual_seed(0), Familiarity.SIZE
    (count, width), classes = train.shape, logits.shape[1]
    chosen = torch.randperm(len(train), generator=generator)[:FAMILIAR_IMAGES]
    train, labels = train[chosen].float(), labels[chosen]
    familiarity = Familiarity(width, classes)
    familiarity.standardize.fit(train)
    familiarity.bucket.copy_(torch.randint(size, (width,), generator=generator))
    familiarity.sign.copy_(2 * torch.randint(2, (width,), generator=generator) - 1)
    projected = familiarity.project(train)
    counts = labels.bincount(minlength=classes).clamp(1)
    familiarity.centers.index_add_(0, labels, projected).div_(counts[:, None])
    projected -= familiarity.centers[labels]
    covariance = projected.T @ projected / len(train)
    sphere = (covariance.diagonal().mean() + 1e-6) * torch.eye(size)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * sphere
    familiarity.whitening.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)))
    blocks = zip(val.split(1024), logits.split(1024), strict=True)
    found = torch.cat([familiarity.distance_and_doubt(block.float(), its) for block, its in blocks])
    weights = torch.tensor([1, count / (count + width)]) / (found.std(dim=0, correction=0) + 1e-6)
    familiarity.weights.copy_(torch.cat([weights, -(found @ weights).quantile(0.95)[None]]))
    return familiarity


def fine_tune(
    model: TransferModel,
    train: Images,
    val: Images,
    recipe: Recipe,
    precision: str,
    device: torch.device,
    seed: int,
    progress: dict | None = None,
    name: str = "",
    after_epoch: Callable[[Training], None] = lambda training: None,
) -> Training:
    """Trains the whole model on images, from the start or from a training's `progress`.

    Under torchrun all processes call this; each takes its share of every batch.
    """

    def batches(images: Images, seed: int | None = None) -> Batches:
        load = image_loader(images, model.preprocessing, device)
        return Batches(load, images.labels, recipe.batch_size, device, seed, shared=True)

    with together():
        model.to(device, memory_format=torch.channels_last)
        groups = [
            {"params": model.features.parameters(), "lr": recipe.lr},
            {"params": model.classifier.parameters(), "lr": CLASSIFIER_LR_FACTOR * recipe.lr},
        ]
        cores = torch.get_num_threads()
        most = min(cores, recipe.batch_size // 8) if device.type == "cpu" else 1  # parts of at least 8 images
        parts = next(count for count in range(max(1, most), 0, -1) if cores % count == 0)  # no core is left over
        network = training_copy(model, parts)
        training = Training(model, batches(train, seed), batches(val), recipe, precision, groups, network)
        if progress:
            training.load_state_dict(progress)
        with threads(cores // parts):
            fit(training, name, lambda: after_epoch(training))
    return training


def load_progress(file: Path, key: str) -> dict | None:
    """Loads a saved Training.state_dict(), or None if the file is missing, damaged or has another "key" (a hash)."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["key"] == key:
            return state
        reason = "of another training"
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = f"unusable ({type(error).__name__})"
    print(f"{file} is {reason}: training starts again", file=sys.stderr)
    return None


# ------------------------------------------------------------------------ what the features know about the data

COMPARED = 100_000  # with more images than this, check_data does not look for copies
CANDIDATES = 10_000  # the maximum number of pairs with similar features whose pixels are compared
ALIKE, COPIES = 0.6, 0.93  # copies have a higher cosine of features and a higher correlation of pixels
DOUBTFUL = 0.9  # by how much another label must be more probable than an image's own one


@torch.no_grad()
def check_data(
    parts: list[Tensor], labels: list[Tensor], classes: int, read: Callable[[int], Tensor]
) -> tuple[list[dict] | None, list[dict]]:
    """Finds copies and doubtful labels, from the features and labels of the training, validation and test images.

    An image's index counts from the first training image to the last test image; `read` returns one image, uint8
    (3, H, W). Returns two lists, the clearest cases first:
    copies, {"images": (i, j), "correlation"}: an image and the training or validation image with the most similar
    features, if their 16x16 pixels correlate; None instead of the list for more than COMPARED images;
    doubtful labels, {"image": i, "label", "probability"}: ridge regression, fitted without the image, gives another
    label a much higher probability.
    """

    def judge(logits: Tensor, labels: Tensor) -> Tensor:
        """(B, classes), (B,) -> (B, 3): the best label, its probability, by how much it is the more probable one"""
        probabilities = logits.softmax(dim=1)
        best, label = probabilities.max(dim=1)
        return torch.stack([label, best, best - probabilities.gather(1, labels[:, None])[:, 0]], dim=1)

    width, count = parts[0].shape[1], sum(map(len, parts))
    chosen, ridge = _sample(labels[0], RIDGE_IMAGES), Classifier(width, classes, 1)
    left_out = fit_linear(ridge, parts[0][chosen].float(), labels[0][chosen])
    project = torch.randn(width, 256, generator=torch.Generator().manual_seed(0)) / 16  # changes cosines by hundredths
    judged, sketches = [], []
    bar = Progress(count if count > COMPARED else 2 * count, "looking for copies")
    for features, its in zip(parts, labels, strict=True):
        for block, truth in zip(features.split(1024), its.split(1024), strict=True):
            block = ridge.standardize(block.float())
            judged.append(judge(ridge.linear(block), truth))
            sketches.append(F.normalize(block @ project))
            bar.update(len(block))
    judged, sketches = torch.cat(judged), torch.cat(sketches)
    judged[chosen] = judge(left_out, labels[0][chosen])
    label, probability, doubt = judged.T
    doubtful = [
        {"image": i, "label": int(label[i]), "probability": float(probability[i])}
        for i in doubt.argsort(descending=True)[: int((doubt > DOUBTFUL).sum())].tolist()
    ]
    if count > COMPARED:
        bar.close()
        return None, doubtful

    alike, seen = {}, sketches[: count - len(parts[-1])]
    for start in range(0, count, 1024):
        cosines = sketches[start : start + 1024] @ seen.T
        cosines.diagonal(start).fill_(-1)  # of an image with itself
        for i, (cosine, j) in enumerate(zip(*(best.tolist() for best in cosines.max(dim=1)), strict=True), start):
            if cosine > ALIKE:
                alike[min(i, j), max(i, j)] = cosine
        bar.update(len(cosines))
    bar.close()
    copies = []
    for i, j in sorted(alike, key=alike.get, reverse=True)[:CANDIDATES]:
        with suppress(ImageError):  # a file may have vanished
            one, other = (_thumbnails(read(k)) for k in (i, j))
            correlation = float((one @ other.T).flatten()[:3].max())  # the two middles agree too easily
            if correlation > COPIES:
                copies.append({"images": (i, j), "correlation": correlation})
    return sorted(copies, key=lambda pair: -pair["correlation"]), doubtful


def _thumbnails(image: Tensor) -> Tensor:
    """The whole of an image (3, H, W) and its middle, which a crop may have kept, as unit vectors (2, 768)."""
    _, H, W = image.shape
    parts = image, image[:, H // 16 : H - H // 16, W // 16 : W - W // 16]
    pixels = torch.stack([F.adaptive_avg_pool2d(part.float(), 16).flatten(1) for part in parts])
    return F.normalize((pixels - pixels.mean(dim=2, keepdim=True)).flatten(1))


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
        "test_interval": interval(accuracy, len(labels)),
        "right": "".join(map(str, (predicted == labels).int().tolist())),  # a digit for each image
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
    right = (predicted == labels).float()
    count, *sums = (which.bincount(values, minlength=bins) for values in (None, confidence, right))
    confidences, accuracies = (total / count.clamp(1) for total in sums)
    error = ((confidences - accuracies).abs() * count).sum() / len(labels)
    rows = {"count": count.tolist(), "confidence": confidences.tolist(), "accuracy": accuracies.tolist()}
    return {"ece": error.item(), **rows}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The most probable temperature given validation logits (N, classes), as in Guo et al. 2017 but with a prior.

    Searches its logarithm from -3.7 to 3.7 in ever finer steps.
    """

    def improbability(t: float) -> float:
        loss = F.cross_entropy(logits / math.exp(t), labels, reduction="sum").item()
        return loss + (t / TEMPERATURE_PRIOR) ** 2 / 2

    best = 0.0
    for step in (0.5, 0.1, 0.02, 0.004):
        best = min((best + step * i for i in range(-6, 7)), key=improbability)
    return math.exp(best)


def interval(accuracy: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy on `count` images (Wilson 1927)."""
    z = 1.96
    center = accuracy + z**2 / (2 * count)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / count + (z / (2 * count)) ** 2)
    return max(0.0, center - spread) / (1 + z**2 / count), min(1.0, (center + spread) / (1 + z**2 / count))


def difference(right: Tensor, other: Tensor) -> tuple[float, float]:
    """By how much one accuracy exceeds another one on the same N images, and the margin of its 95 % interval.

    `right` and `other` say which images (N,) each model has right. A difference smaller than the margin may be chance.
    Only images that one of them has right count, as in McNemar's test (interval: Bonett and Price 2012).
    """
    count = len(right) + 2
    gains, losses = (int((one > two).sum()) + 1 for one, two in ((right, other), (other, right)))
    margin = 1.96 * math.sqrt(gains + losses - (gains - losses) ** 2 / count) / count
    return (gains - losses) / count, margin


def cost(model: TransferModel, device: torch.device) -> dict:
    """Multiply-adds of one forward pass, and images a second: one at a time, and many.

    The images are black arrays of the model's size. Many are as many as should take about a second.
    """
    with FlopCounterMode(display=False) as counter, threads(1), torch.no_grad():  # inference_mode hides operators
        model.eval().classifier(model.forward_view(model.example()))
    fast, size = fast_copy(model, device), model.preprocessing["image_size"]
    image = np.zeros((size, size, 3), np.uint8)

    def seconds(count: int, batch_size: int) -> float:
        start = time.perf_counter()
        for _ in run_images_here([fast], [image] * count, batch_size=batch_size):
            pass
        return time.perf_counter() - start

    one = statistics.median([seconds(1, 1) for _ in range(6)][1:])  # the first one warms up
    workers, batch_size = (torch.get_num_threads(), CPU_BATCH) if device.type == "cpu" else (1, GPU_BATCH)
    batch_size = max(1, min(batch_size, int(1 / one)))
    count = workers * batch_size * max(1, int(1 / one / batch_size))
    seconds(workers * batch_size, batch_size)  # warms up, too
    speed = {"one": 1 / one, "best": count / seconds(count, batch_size), "best_batch_size": batch_size}
    return {"multiply_adds": counter.get_total_flops() // 2, "images_per_second": speed}
