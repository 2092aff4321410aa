"""What several benchmarks do: options, tables, drawn images, features, and classifiers trained as in main_train.py.

Importing it puts the project's modules on the path.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import CIFAR10_SIZE
from engine.batches import Batches, feature_loader
from engine.device import pick_device, pick_precision, threads
from engine.features import Features, extract_features
from engine.images import Images
from models import TransferModel
from train_utils import RECIPE, Recipe, fit_classifier

ROOT = Path(__file__).parent.parent
DEVICE = pick_device()
PRECISION = pick_precision("auto", DEVICE)

Part = tuple[Features | Tensor, Tensor]  # features (N, width) and labels (N,)


def arguments(description: str, **options: object) -> argparse.Namespace:
    """The command line. An option's value is its default, a list if it takes several values, or a type if required."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, type):
            parser.add_argument(flag, type=value, required=True)
        elif value is False:
            parser.add_argument(flag, action="store_true")
        elif isinstance(value, list):
            parser.add_argument(flag, type=type(value[0]), nargs="+", default=value, help=f"default: {value}")
        else:
            kind = str if value is None else type(value)
            parser.add_argument(flag, type=kind, default=value, help=f"default: {value}")
    return parser.parse_args()


def print_row(*cells: object) -> None:
    """A row of a table in Markdown."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(*cells: object, texts: int = 1) -> None:
    """The header of a table whose first columns are texts; the others are numbers."""
    print_row(*cells)
    print_row(*["---"] * texts, *["---:"] * (len(cells) - texts))


def draw_images(folder: Path, count: int) -> Path:
    """Writes different JPEG files of 32x32 pixels into ten class folders. Returns the folder."""
    random = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for i in range(count):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(folder / str(i % 10) / f"{i}.jpg")
    return folder


def new_model(
    name: str, classes: Sequence[str], seed: int, image_size: int = CIFAR10_SIZE, hidden: int = 512
) -> TransferModel:
    torch.manual_seed(seed)
    return TransferModel(name, classes, image_size, hidden=hidden)


def extract(model: TransferModel, *parts: Images, folder: Path = Path("data/features")) -> list[Part]:
    """The features and the labels of each part of a data set."""
    found = extract_features(model, dict(enumerate(parts)), folder, DEVICE)
    return [(found[i].features, part.labels) for i, part in enumerate(parts)]


def last_block(model: TransferModel, features: Features) -> Tensor:
    """The features of the last block alone, which are the last columns."""
    width = model.features(model.example()).shape[1]
    return torch.cat([block[:, -width:] for block in features.blocks()])


def extraction_seconds(model: TransferModel, files: Sequence[Path]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        images = Images(list(files), torch.zeros(len(files), dtype=torch.int64), [str(file) for file in files])
        return extract_features(model, {"all": images}, Path(folder), DEVICE)["all"].seconds


def batches(part: Part, seed: int | None = None, recipe: Recipe = RECIPE) -> Batches:
    return Batches(feature_loader(part[0], DEVICE), part[1], recipe.batch_size, DEVICE, seed)


def fit(classifier: nn.Module, train: Part, val: Part, seed: int, recipe: Recipe = RECIPE) -> tuple[list[dict], Tensor]:
    """Trains a classifier. Returns a row per epoch and the logits of the validation images."""
    torch.manual_seed(seed)
    pair = batches(train, seed, recipe), batches(val, None, recipe)
    with threads(1):
        return fit_classifier(classifier.to(DEVICE), *pair, recipe, PRECISION, "")
