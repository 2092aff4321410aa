"""What each choice in the recipe of the classifiers is worth: validation accuracy with one of them changed at a time.

    python benchmarks/recipe.py --data cifar10-images

Run it where main_train.py ran: it reads the same features, or computes them. Prints a table in Markdown, means over
--seeds. It does not read the test set.
"""

import argparse
from dataclasses import dataclass, replace
from statistics import mean

import torch
from common import fit, known
from torch import nn

from data import CIFAR10_SIZE, Data, load_data, run_script
from models import BACKBONES, TransferModel, pick_device, pick_precision
from train_utils import RECIPE, Recipe, loss_and_accuracy


@dataclass(frozen=True)
class Variant:
    recipe: Recipe = RECIPE
    hidden: int | None = None  # the model's own
    dropout: float = 0.0
    views: int = 2


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
    "hidden layer of 256": Variant(hidden=256),
    "hidden layer of 1024": Variant(hidden=1024),
    "the image alone, without its mirror image": Variant(views=1),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_large_levels")
    parser.add_argument("--models", nargs="+", choices=BACKBONES, default=names)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data, precision = load_data(args.data), pick_precision("auto", pick_device())
    columns = [accuracies(name, data, args.seeds, precision) for name in args.models]
    print(f"| validation accuracy | {' | '.join(BACKBONES[name].label for name in args.models)} |")
    print("| --- |" + " ---: |" * len(args.models))
    for title, *cells in zip(VARIANTS, *columns, strict=True):
        print(f"| {title} | {' | '.join(cells)} |")
    return 0


def accuracies(name: str, data: Data, seeds: int, precision: str) -> list[str]:
    """A column of the table: the mean over the seeds for each variant.

    A pretrained classifier keeps its own hidden layer: "-" for the variants that change it.
    """
    cells = []
    for variant in VARIANTS.values():
        if BACKBONES[name].keep_classifier and (variant.hidden or variant.dropout):
            cells.append("-")
            continue
        recipe, found, options = variant.recipe, [], {"hidden": variant.hidden} if variant.hidden else {}
        frozen = TransferModel(name, data.classes, CIFAR10_SIZE)
        frozen.views = variant.views
        train, val = known(frozen, (data.train, data.val))
        for seed in range(seeds):
            torch.manual_seed(seed)
            classifier = TransferModel(name, data.classes, CIFAR10_SIZE, **options).classifier
            if variant.dropout:
                classifier.network.insert(2, nn.Dropout(variant.dropout))  # after the hidden layer's activation
            logits = fit(classifier, train, val, seed, recipe, precision)
            found.append(loss_and_accuracy(logits, val[1])[1])
        cells.append(f"{mean(found):.2%}")
    return cells


if __name__ == "__main__":
    run_script(main)
