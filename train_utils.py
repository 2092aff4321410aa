"""How a classifier is trained: the recipe, the batches, the training loop, fine-tuning.

    train = Batches(feature_loader(features, device), labels, RECIPE.batch_size, device, seed=0)
    fit_classifier(model.classifier, train, val, RECIPE, "fp32", "classifier")

The training loop takes any module and any batches of inputs and labels, so it fine-tunes on images as well.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data import Images
from engine.console import Progress
from engine.device import available_cpus, synchronized_time, threads
from engine.distributed import rank, world_size
from engine.fast import training_copy
from engine.features import Features
from engine.files import load_tensors
from engine.images import ImageError, augment, preprocess, read_image
from models import Classifier, TransferModel, balanced_weights


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are for classifiers on features; all were chosen on CIFAR-10's validation set.

    `python benchmarks/recipe.py` measures what each is worth. The learning rate goes through one cycle (Smith and Topin
    2017, arXiv 1708.07120). The classifier's layers are in models.py, the augmentation for fine-tuning in
    engine/images.py.
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

# The maximum number of images for ridge regression. With more images, the network has most of the weight.
RIDGE_IMAGES = 4096


# ---------------------------------------------------------------------------------------------------- batches

# Input: the indices (B,) of a batch, and random numbers (B, 5) for augmentation or None. Output: the inputs on the
# device, and the indices of the images that could be read.
Loader = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def feature_loader(features: Features | Tensor, device: torch.device) -> Loader:
    """Loads rows of features (N, width)."""
    if device.type != "cpu":
        with suppress(torch.OutOfMemoryError):  # all of them on the device, so that no step waits for a copy
            blocks = torch.arange(len(features)).split(4096)
            features = torch.cat([features[block].to(device) for block in blocks])

    def load(batch: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        chosen = batch.to(features.device) if isinstance(features, Tensor) else batch
        return features[chosen].to(device, torch.float32, non_blocking=True), batch

    return load


class ImageLoader:
    """Loads preprocessed images (B, 3, S, S), augmented while training. `errors` names those that cannot be read."""

    def __init__(self, images: Images, preprocessing: dict, device: torch.device):
        self.images, self.preprocessing, self.device = images, preprocessing, device
        self.pool, self.errors = ThreadPoolExecutor(min(16, available_cpus())), {}

    def read(self, i: int, draws: Tensor | None) -> Tensor | None:
        try:
            image = read_image(self.images.items[i], self.preprocessing["image_size"], self.preprocessing["crop"])
        except ImageError as error:  # it could be read before
            self.errors[i] = error
            return None
        return image if draws is None else augment(image, draws, self.preprocessing["mean"])

    def __call__(self, batch: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        results = list(self.pool.map(self.read, batch.tolist(), [None] * len(batch) if draws is None else draws))
        readable = [i for i, image in enumerate(results) if image is not None]
        if not readable:
            raise OSError("no image of a batch can be read: are the files still there?")
        return preprocess([results[i] for i in readable], self.preprocessing, self.device), batch[readable]


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
        self.progress: Callable[[int], object] = lambda images: None  # called with the size of each finished batch
        self.process, self.processes = (rank(), world_size()) if shared else (0, 1)
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
            inputs, readable = self.load(batch[share], draws)
            yield inputs, self.labels[readable.to(self.device, non_blocking=True)]
            self.progress(len(batch))

    def means(self, loss: Tensor, correct: Tensor, images: int) -> tuple[float, float]:
        """The mean loss and the accuracy, from sums over all batches of this process. The processes' sums are added."""
        sums = torch.tensor([float(loss), float(correct), images], dtype=torch.float64)
        if self.processes > 1:
            dist.all_reduce(sums)
        loss, correct, images = sums.tolist()
        return loss / images, correct / images


BLOCK, WINDOW = 64, 2**17  # images that stay together, and images among which they are then shuffled one by one


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """The numbers from 0 to `count` - 1 in random order: first blocks are shuffled, then the numbers in each window.

    Features that are larger than memory are then read block by block, without a seek for every row.
    """
    order = BLOCK * torch.randperm(-(-count // BLOCK), generator=generator)[:, None] + torch.arange(BLOCK)
    order = order[order < count]
    return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in order.split(WINDOW)])


# ------------------------------------------------------------------------------------------------------ loops


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
    for inputs, labels in batches:
        with autocast:
            logits = model(inputs)
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
def compute_logits(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,), float32 and int64 on the CPU, in the batches' order."""
    model.eval()
    logits, labels = zip(*[(model(inputs), labels) for inputs, labels in batches], strict=True)
    return torch.cat(logits).float().cpu(), torch.cat(labels).cpu()


def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    logits, labels = compute_logits(model, batches)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return batches.means(loss, (logits.argmax(dim=1) == labels).sum(), len(labels))


class Training:
    """A model in training: its batches, optimizer, schedule, a row per finished epoch, and the best weights so far.

    `groups` are the optimizer's parameter groups, if not all parameters train at the recipe's rate. `network`: the
    module used for forward and backward; it shares the model's parameters.
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
        if train.processes > 1:  # every process has a copy of the network; their gradients are averaged
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
        weights = balanced_weights(train.labels) if recipe.class_weights else None
        self.total_loss = nn.CrossEntropyLoss(weights, label_smoothing=recipe.label_smoothing, reduction="sum")
        self.history: list[dict] = []
        self.best = copy.deepcopy(model.state_dict())

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch. Batches differ in size by an image, and all images weigh the same."""
        return self.total_loss(logits, labels) / self.train.mean_size

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
    train, val, history, epochs = training.train, training.val, training.history, training.recipe.epochs
    size = len(train.labels) + len(val.labels)
    bar = Progress(epochs * size, name, len(history) * size, disable=not name)
    train.progress = val.progress = bar.update
    for epoch in range(len(history) + 1, epochs + 1):
        start = synchronized_time(train.device)
        train_loss, train_accuracy = train_one_epoch(
            training.network, train, training.optimizer, training.scheduler, training.criterion, training.autocast
        )
        val_loss, val_accuracy = evaluate(training.network, val)
        if not math.isfinite(train_loss + val_loss):
            losses = f"the loss is {train_loss:.3g} in training and {val_loss:.3g} in validation"
            where = f"{losses} in epoch {epoch}, at a learning rate of {training.recipe.lr:.2g}"
            if not history:
                raise FloatingPointError(f"{where}: use a smaller learning rate")
            print(f"error: {name}: {where}: training stops here and keeps the best epoch", file=sys.stderr)
            break
        row = {"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "val_loss": val_loss}
        history.append({**row, "val_accuracy": val_accuracy, "seconds": synchronized_time(train.device) - start})
        if min(history, key=lambda row: row["val_loss"]) is history[-1]:
            training.best = copy.deepcopy(training.model.state_dict())
        bar.set_postfix_str(f"val {val_accuracy:.3f}", refresh=False)
        after_epoch()
    bar.close()
    training.model.load_state_dict(training.best)


# ---------------------------------------------------------------------------------------------- the two trainings


def fit_classifier(
    classifier: nn.Module, train: Batches, val: Batches, recipe: Recipe, precision: str, name: str
) -> tuple[list[dict], Tensor]:
    """Trains a classifier on features. Returns a row per epoch and its logits (N, classes) for the validation images.

    A pretrained classifier is trained by `fit` alone. A Classifier is the weighted mean of a linear layer and a
    network. Ridge regression fits the linear layer to the training and validation images together; for the returned
    logits of an image, it is fitted without that image (stacking: Wolpert 1992). `fit` trains the network; its weight
    is images / (images + features).
    """
    if not isinstance(classifier, Classifier):
        training = Training(classifier, train, val, recipe, precision)
        fit(training, name)
        return training.history, compute_logits(classifier, val)[0]
    linear = _fit_linear(classifier, train, val, recipe)
    training = Training(nn.Sequential(classifier.standardize, classifier.network), train, val, recipe, precision)
    fit(training, name)
    images, width = len(train.labels) + len(val.labels), classifier.linear.in_features
    weight = images / (images + width)
    logits = (1 - weight) * linear + weight * compute_logits(training.model, val)[0]
    with torch.no_grad():
        for layer, factor in ((classifier.linear, 1 - weight), (classifier.network[-1], weight)):
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
    return training.history, logits


def _fit_linear(classifier: Classifier, train: Batches, val: Batches, recipe: Recipe) -> Tensor:
    """Fits the linear layer to a sample of all images. Returns its logits for the validation images, each left out."""
    split, labels = len(train.labels), torch.cat([train.labels, val.labels])
    chosen = sample(labels.cpu(), RIDGE_IMAGES)
    of_train, of_val = chosen[chosen < split], chosen[chosen >= split] - split
    features = torch.cat([train.load(of_train, None)[0], val.load(of_val, None)[0]])
    loo_logits = classifier.fit_ridge(features, labels[chosen], recipe.class_weights)
    logits = compute_logits(nn.Sequential(classifier.standardize, classifier.linear), val)[0].clone()
    logits[of_val] = loo_logits[len(of_train) :].cpu()
    return logits


def sample(labels: Tensor, count: int) -> Tensor:
    """The indices of `count` images at random, in order, and of at least one image of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    _, first_of_each_class = np.unique(labels[order].numpy(), return_index=True)
    return torch.cat([order[:count], order[first_of_each_class]]).unique()


@torch.no_grad()
def out_of_sample_logits(parts: Sequence[Features], labels: Sequence[Tensor], classes: int) -> Tensor:
    """Logits (N, classes) of all images, from ridge regression on the first part, fitted without the image itself."""
    chosen, ridge = sample(labels[0], RIDGE_IMAGES), Classifier(parts[0].width, classes, hidden=1)
    loo_logits = ridge.fit_ridge(parts[0][chosen].float(), labels[0][chosen])
    logits = torch.cat([ridge.linear(ridge.standardize(block)) for part in parts for block in part.blocks()])
    logits[chosen] = loo_logits
    return logits


def fine_tune(
    model: TransferModel,
    train: Images,
    val: Images,
    recipe: Recipe,
    precision: str,
    device: torch.device,
    seed: int,
    progress: dict | None = None,
    after_epoch: Callable[[Training], None] = lambda training: None,
) -> Training:
    """Trains the whole model on images, from the start or from a training's `progress`.

    Under torchrun all processes call this; each takes its share of every batch.
    """

    def batches(images: Images, seed: int | None = None) -> Batches:
        load = ImageLoader(images, model.preprocessing, device)
        return Batches(load, images.labels, recipe.batch_size, device, seed, shared=True)

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
        fit(training, model.name, lambda: after_epoch(training))
    return training


def load_progress(file: Path, key: str) -> dict | None:
    """Loads a saved Training.state_dict(), or None if the file is missing, damaged or has another "key" (a hash)."""
    try:
        state = load_tensors(file)
        if state["key"] == key:
            return state
        reason = "of another training"
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = f"unusable ({type(error).__name__})"
    print(f"{file} is {reason}: training starts again", file=sys.stderr)
    return None
