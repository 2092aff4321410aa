"""What several benchmarks do: features of the images that can be read, and classifiers trained on them.

Importing it puts the project's scripts on the path.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Images
from models import TransferModel, pick_device, threads
from train_utils import RECIPE, Batches, Recipe, cached_features, feature_loader, fit_classifier

Part = tuple[Tensor, Tensor]  # features (N, width) and labels (N,)


def known(model: TransferModel, parts: Sequence[Images], folder: Path = Path("data/features")) -> list[Part]:
    """The features and the labels of each part of a data set, without the images that cannot be read."""
    found = [cached_features(model, images, folder, pick_device()) for images in parts]
    return [(each.of(each.readable), part.labels[each.readable]) for each, part in zip(found, parts, strict=True)]


def batches(part: Part, seed: int | None = None, recipe: Recipe = RECIPE) -> Batches:
    return Batches(feature_loader(part[0], pick_device()), part[1], recipe.batch_size, pick_device(), seed)


def fit(
    classifier: nn.Module, train: Part, val: Part, seed: int, recipe: Recipe = RECIPE, precision: str = "fp32"
) -> Tensor:
    """Trains a classifier as main_train.py does. Returns its logits for the validation images."""
    torch.manual_seed(seed)
    pair = batches(train, seed, recipe), batches(val, None, recipe)
    with threads(1):
        return fit_classifier(classifier.to(pick_device()), *pair, recipe, precision, "")[1]
