"""How a classifier is trained: the recipe, the training loop, fine-tuning.

    train = Batches(feature_loader(features, device), labels, RECIPE.batch_size, device, seed=0)
    fit_classifier(model.classifier, train, val, RECIPE, "fp32", "classifier")

The training loop takes any module and any batches of inputs and labels, so it fine-tunes on images as well.
"""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batches, ImageLoader
from engine.console import Progress
from engine.device import DTYPES, full_precision, keep_freed_memory, layout_for, synchronized_time, threads
from engine.fast import InParts, set_layout
from engine.features import Features
from engine.files import load_tensors
from engine.images import Images
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

# The maximum number of images for ridge regression. With more images, the MLP has most of the weight.
RIDGE_IMAGES = 4096


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
        # stays on the device, so that nothing waits
        total_loss += F.cross_entropy(logits.detach().float(), labels, reduction="sum")
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

    `parameter_groups` are the optimizer's, if not all parameters train at the recipe's rate. `network`: the module
    used for forward and backward; it shares the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        val: Batches,
        recipe: Recipe,
        precision: str = "fp32",
        parameter_groups: list[dict] | None = None,
        network: nn.Module | None = None,
    ):
        self.model, self.train, self.val, self.recipe = model, train, val, recipe
        self.network = network or model
        if train.processes > 1:  # every process has a copy of the network; their gradients are averaged
            self.network = nn.parallel.DistributedDataParallel(self.network, broadcast_buffers=False)
        self.optimizer = torch.optim.AdamW(
            parameter_groups or model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
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
        self.best, self.best_loss = copy.deepcopy(model.state_dict()), math.inf

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch. Batches differ in size by an image, and all images weigh the same."""
        return self.total_loss(logits, labels) / self.train.mean_size

    def state_dict(self) -> dict:
        """All that changes from epoch to epoch."""
        states = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        return {**states, "history": self.history, "best": self.best, "best_loss": self.best_loss}

    def load_state_dict(self, state: dict) -> None:
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.history, self.best, self.best_loss = state["history"], state["best"], state["best_loss"]


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
        train.start_epoch(epoch)
        train_loss, train_accuracy = train_one_epoch(
            training.network, train, training.optimizer, training.scheduler, training.criterion, training.autocast
        )
        with training.autocast:
            val_loss, val_accuracy = evaluate(training.network, val)
        if not math.isfinite(train_loss + val_loss):
            losses = f"the loss is {train_loss:.3g} in training and {val_loss:.3g} in validation"
            where = f"{losses} in epoch {epoch}, at a peak learning rate of {training.recipe.lr:.2g}"
            if not history:
                raise FloatingPointError(f"{where}: use a smaller learning rate")
            print(f"error: {name}: {where}: training stops here and keeps the best epoch", file=sys.stderr)
            break
        row = {"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "val_loss": val_loss}
        history.append({**row, "val_accuracy": val_accuracy, "seconds": synchronized_time(train.device) - start})
        if val_loss < training.best_loss:
            training.best, training.best_loss = copy.deepcopy(training.model.state_dict()), val_loss
        bar.set_postfix_str(f"val {val_accuracy:.3f}", refresh=False)
        after_epoch()
    bar.close()
    training.model.load_state_dict(training.best)


# ------------------------------------------------------------------------ classifier training and fine-tuning


def fit_classifier(
    classifier: nn.Module, train: Batches, val: Batches, recipe: Recipe, precision: str, name: str
) -> tuple[list[dict], Tensor]:
    """Trains a classifier on features. Returns a row per epoch and its logits (N, classes) for the validation images.

    A pretrained classifier is trained by `fit` alone. A Classifier is the weighted mean of ridge regression and an MLP.
    Ridge regression is fitted to a sample of training and validation images; for the returned logits of such an image,
    it is fitted without that image (stacking: Wolpert 1992). `fit` trains the MLP; its weight is images / (images +
    features). Raises FloatingPointError as `fit` does.
    """
    if not isinstance(classifier, Classifier):
        training = Training(classifier, train, val, recipe, precision)
        fit(training, name)
        return training.history, compute_logits(classifier, val)[0]
    ridge_logits = _fit_ridge(classifier, train, val, recipe)
    training = Training(nn.Sequential(classifier.standardize, classifier.mlp), train, val, recipe, precision)
    fit(training, name)
    images, width = len(train.labels) + len(val.labels), classifier.ridge.in_features
    mlp_weight = images / (images + width)
    logits = (1 - mlp_weight) * ridge_logits + mlp_weight * compute_logits(training.model, val)[0]
    with torch.no_grad():
        for layer, factor in ((classifier.ridge, 1 - mlp_weight), (classifier.mlp[-1], mlp_weight)):
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
    return training.history, logits


def _fit_ridge(classifier: Classifier, train: Batches, val: Batches, recipe: Recipe) -> Tensor:
    """Fits ridge regression to a sample of all images. Returns its logits for the validation images, each left out."""
    split, labels = len(train.labels), torch.cat([train.labels, val.labels])
    chosen = sample(labels.cpu(), RIDGE_IMAGES)
    of_train, of_val = chosen[chosen < split], chosen[chosen >= split] - split
    features = torch.cat([train.load(of_train, None), val.load(of_val, None)])
    loo_logits = classifier.fit_ridge(features, labels[chosen], recipe.class_weights)
    logits = compute_logits(nn.Sequential(classifier.standardize, classifier.ridge), val)[0].clone()
    logits[of_val] = loo_logits[len(of_train) :].cpu()
    return logits


@torch.no_grad()
def refit_ridge(
    classifier: nn.Module, features: Features, labels: Tensor, val_images: int, class_weights: bool = False
) -> None:
    """Fits a trained Classifier's ridge regression again, to training images alone: fine-tuning validates on others.

    The MLP, and so the standardisation (x - m) / s, stay. With M and S those of the new fit,

        w @ (x - M) / S + b  =  (w * s / S) @ ((x - m) / s) + b + w @ ((m - M) / S)
    """
    if not isinstance(classifier, Classifier):
        return
    chosen, refitted = sample(labels, RIDGE_IMAGES), copy.deepcopy(classifier).cpu()
    old = copy.deepcopy(refitted.standardize)
    refitted.fit_ridge(features[chosen].float(), labels[chosen], class_weights)
    new, ridge = refitted.standardize, refitted.ridge
    ridge_weight = features.width / (len(labels) + val_images + features.width)  # as in fit_classifier
    classifier.ridge.weight.copy_(ridge_weight * ridge.weight * old.std / new.std)
    classifier.ridge.bias.copy_(ridge_weight * (ridge.bias + ridge.weight @ ((old.mean - new.mean) / new.std)))


def sample(labels: Tensor, count: int) -> Tensor:
    """The indices, ascending, of `count` random images, and of one image of each class that these lack."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    _, first_of_each_class = np.unique(labels[order].numpy(), return_index=True)
    return torch.cat([order[:count], order[first_of_each_class]]).unique()


@torch.no_grad()
def out_of_sample_logits(parts: Sequence[Features], labels: Tensor, classes: int) -> Tensor:
    """Logits (N, classes) of all images, from ridge regression on a sample of them, each of which is left out in turn.

    `parts` are the features of the training, validation and test images, `labels` (N,) all their labels.
    """
    chosen, classifier = sample(labels, RIDGE_IMAGES), Classifier(parts[0].width, classes, hidden=1)
    features, start = [], 0
    for part in parts:
        own = chosen[(chosen >= start) & (chosen < start + len(part))] - start
        features.append(part[own].float())
        start += len(part)
    loo_logits = classifier.fit_ridge(torch.cat(features), labels[chosen])
    logits = torch.cat([classifier.ridge(classifier.standardize(block)) for part in parts for block in part.blocks()])
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
    features: Features | None = None,
    progress: dict | None = None,
    after_epoch: Callable[[Training], None] = lambda training: None,
) -> Training:
    """Trains the whole model on images, from the start or from a training's `progress`.

    `features` are those of the frozen model for the training images: ridge regression, which was fitted to validation
    images, too, is fitted to these alone. Under torchrun all processes call this; each takes its share of every batch.
    Raises ValueError if memory runs out, ImageError if an image cannot be read, FloatingPointError as `fit` does.
    """

    def batches(images: Images, seed: int | None = None) -> Batches:
        load = ImageLoader(images, model.preprocessing, device)
        return Batches(load, images.labels, recipe.batch_size, device, seed, shared=True)

    set_layout(model.to(device), layout_for(device, DTYPES[precision]))
    parameter_groups = [
        {"params": model.features.parameters(), "lr": recipe.lr},
        {"params": model.classifier.parameters(), "lr": CLASSIFIER_LR_FACTOR * recipe.lr},
    ]
    cores, parts = torch.get_num_threads(), _parts_of_a_batch(recipe, device)
    network = InParts(model, parts) if parts > 1 else model
    keep_freed_memory()
    if features:
        refit_ridge(model.classifier, features, train.labels, len(val), recipe.class_weights)
    training = Training(model, batches(train, seed), batches(val), recipe, precision, parameter_groups, network)
    if progress:
        training.load_state_dict(progress)
    try:
        with threads(cores // parts), full_precision():
            fit(training, model.name, lambda: after_epoch(training))
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of memory: use --batch-size {max(1, recipe.batch_size // 2)}") from error
    return training


def _parts_of_a_batch(recipe: Recipe, device: torch.device) -> int:
    """Into how many parts of at least 8 images a batch is cut on a CPU, so that no core is left over."""
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    most = max(1, min(cores, recipe.batch_size // 8))
    return next(count for count in range(most, 0, -1) if cores % count == 0)


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
