"""The recipe of the frozen classifiers, and what becomes of validation accuracy when one thing in it is another.

    python benchmarks/heads.py --data cifar10-images

Run it where main_train.py ran: it reads the same features, or computes them. Prints a table in Markdown, means over
--seeds. The test set is not read.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_utils
from data import Data, load_data, run_script
from main_train import best_epoch, parse_args
from models import BACKBONES, TransferModel, pick_device, pick_precision
from train_utils import LABEL_SMOOTHING, Batches, cached_features, feature_loader, fit

VARIANTS = {
    "the recipe": {},
    "learning rate halved": {"lr": 0.5},
    "learning rate doubled": {"lr": 2},
    "weight decay 0.3": {"weight_decay": 0.3},
    "weight decay 3": {"weight_decay": 3.0},
    "half the epochs": {"epochs": 0.5},
    "twice the epochs": {"epochs": 2},
    "labels not smoothed": {"smoothing": 0.0},
    "dropout 0.5": {"dropout": 0.5},
    "hidden layer of 512": {"hidden": 512},
    "hidden layer of 1024": {"hidden": 1024},
    "mirror images as well": {"views_used": 2},
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
    print(f"| validation accuracy | {' | '.join(BACKBONES[name].label for name in args.models)} |")
    print("| --- |" + " ---: |" * len(args.models))
    views = {}
    for name in args.models:
        model = TransferModel(name, data.classes)
        views[name] = [
            cached_features(model, data.images, Path("data/features"), device, precision, mirrored=mirrored).array
            for mirrored in (False, True)
        ]
    for title, changes in VARIANTS.items():
        cells = [accuracy(name, views[name], data, args.seeds, device, precision, **changes) for name in args.models]
        print(f"| {title} | {' | '.join(cells)} |")
    return 0


def accuracy(
    name: str,
    views: list[Tensor],
    data: Data,
    seeds: int,
    device: torch.device,
    precision: str,
    lr: float = 1,
    weight_decay: float = 1.0,
    epochs: float = 1,
    smoothing: float = LABEL_SMOOTHING,
    dropout: float = 0,
    hidden: int = 256,
    views_used: int = 1,
) -> str:
    """The mean over the seeds. `lr` and `epochs` are multiples of main_train.py's."""
    recipe = parse_args([])
    train_utils.LABEL_SMOOTHING = smoothing
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = TransferModel(name, data.classes)
        head = model.classifier
        if dropout or hidden != 256:
            if not isinstance(head[0], nn.BatchNorm1d):
                return "-"  # the backbone's own classifier stays as it is
            layers = (
                nn.Linear(model.width, hidden),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(hidden, len(data.classes)),
            )
            head = nn.Sequential(head[0], *layers)
        load = feature_loader(views[:views_used], device)
        train = Batches(load, data.images.labels, data.train, recipe.batch_size, device, seed)
        val = Batches(load, data.images.labels, data.val, recipe.batch_size, device)
        rounds = round(recipe.epochs * epochs)
        history = fit(head.to(device), train, val, rounds, recipe.lr * lr, weight_decay, precision, f"{name} {seed}")
        found.append(best_epoch(history)["val_accuracy"])
    return f"{mean(found):.2%}"


if __name__ == "__main__":
    run_script(main)
