"""What each choice in the recipe of the classifiers is worth: validation accuracy with one of them changed at a time.

    python benchmarks/recipe.py --data cifar10-images

Run it where main_train.py ran: it reads the same features, or computes them. Prints a table in Markdown, means over
--seeds. It does not look at the test set.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Data, load_data, run_script
from models import BACKBONES, TransferModel, pick_device, pick_precision
from train_utils import RECIPE, Batches, Recipe, Training, cached_features, feature_loader, fit


@dataclass(frozen=True)
class Variant:
    recipe: Recipe = RECIPE
    hidden: int = 256
    dropout: float = 0.0
    views: int = 1


VARIANTS = {
    "the recipe": Variant(),
    "learning rate halved": Variant(replace(RECIPE, lr=RECIPE.lr / 2)),
    "learning rate doubled": Variant(replace(RECIPE, lr=RECIPE.lr * 2)),
    "weight decay 0.3": Variant(replace(RECIPE, weight_decay=0.3)),
    "weight decay 3": Variant(replace(RECIPE, weight_decay=3.0)),
    "half the epochs": Variant(replace(RECIPE, epochs=RECIPE.epochs // 2)),
    "twice the epochs": Variant(replace(RECIPE, epochs=RECIPE.epochs * 2)),
    "labels not smoothed": Variant(replace(RECIPE, label_smoothing=0.0)),
    "dropout 0.5": Variant(dropout=0.5),
    "hidden layer of 512": Variant(hidden=512),
    "hidden layer of 1024": Variant(hidden=1024),
    "mirror images as well": Variant(views=2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_large_levels")
    parser.add_argument("--models", nargs="+", choices=BACKBONES, default=names)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    device = pick_device()
    precision = pick_precision("auto", device)
    data = load_data(args.data)
    folder, features = Path("data/features"), {}
    for name in args.models:
        model = TransferModel(name, data.classes)
        train, mirrored = (
            cached_features(model, data.train, folder, device, precision, mirrored) for mirrored in (False, True)
        )
        val = cached_features(model, data.val, folder, device, "fp32")
        features[name] = [train.array, mirrored.array], val.array
    print(f"| validation accuracy | {' | '.join(BACKBONES[name].label for name in args.models)} |")
    print("| --- |" + " ---: |" * len(args.models))
    for title, variant in VARIANTS.items():
        cells = [accuracy(name, variant, data, *features[name], args.seeds, device, precision) for name in args.models]
        print(f"| {title} | {' | '.join(cells)} |")
    return 0


def accuracy(
    name: str,
    variant: Variant,
    data: Data,
    train_views: list[Tensor],
    val_view: Tensor,
    seeds: int,
    device: torch.device,
    precision: str,
) -> str:
    """The mean over the seeds, or "-" for another hidden layer or dropout in a pretrained classifier."""
    if BACKBONES[name].keep_classifier and (variant.hidden, variant.dropout) != (256, 0.0):
        return "-"
    load_train, load_val = feature_loader(train_views[: variant.views], device), feature_loader([val_view], device)
    val = Batches(load_val, data.val.labels, variant.recipe.batch_size, device)
    accuracies = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        classifier = TransferModel(name, data.classes, hidden=variant.hidden).classifier
        if variant.dropout:
            classifier.insert(3, nn.Dropout(variant.dropout))  # after the hidden layer's activation
        train = Batches(load_train, data.train.labels, variant.recipe.batch_size, device, seed)
        training = Training(classifier.to(device), train, val, variant.recipe, precision)
        fit(training, f"{name} {seed}")
        accuracies.append(training.best_epoch["val_accuracy"])
    return f"{mean(accuracies):.2%}"


if __name__ == "__main__":
    run_script(main)
