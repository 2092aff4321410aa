"""Compares our classifier with what people would do instead, on a folder of photographs.

    pip install scikit-learn
    python benchmarks/photographs.py --data flowers
    python benchmarks/photographs.py --data caltech101 --per-class 30
    python benchmarks/photographs.py --data flowers --models mobilenet_v2 --image-size 128 --fine-tune

The weights, the images and their split are the same for all:

- ours: what main_train.py trains.
- logistic regression: scikit-learn's, on the last block's averages. Its strength is chosen on the validation images; it
  is then fitted to these and the training images.
- tutorial: a linear layer on the last block's averages, trained for 25 epochs with SGD (learning rate 0.001, momentum
  0.9, divided by 10 every 7 epochs), which keeps the epoch that is best on validation. A frozen backbone gives an image
  the same averages in each epoch, so they are computed once. Its seconds are for 25 passes over the images instead,
  extrapolated from one pass of plain PyTorch over 256 images.
- with --fine-tune only the tutorial's fine-tuning: all layers of torchvision's model, random crops and mirror images in
  batches of 32, and the same 25 epochs, all of them computed. BatchNorm stays in eval mode, because in weights that had
  it folded into the convolutions, the statistics of a batch would destroy what they compute. Ours is that of
  `main_train.py --fine-tune`.

Accuracies are on the test images, with the 95% interval of ours; with --per-class they are means over the classes. In
that protocol as many images of each class are for training and validation, all others for testing. Seconds are for
features and training.
"""

import copy
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, Part, arguments, batches, fit, new_model, print_header, print_row
from logistic_regression import best_on_validation, last_block, logistic_regression
from torch import nn
from torchvision.io import decode_image
from torchvision.transforms import v2

from data import Data, load_data
from engine.batches import Batches, ImageLoader, Loader
from engine.console import run_script
from engine.features import extract_features
from engine.folders import Images, read_folder
from engine.metrics import class_scores, wilson_interval
from models import TransferModel
from train_utils import RECIPE, evaluate, train_one_epoch

EPOCHS, BATCH, LR, STEP = 25, 32, 1e-3, 7  # of the tutorial
TIMED = 256  # images


def main() -> int:
    names = ["mobilenet_v2", "mobilenet_v3_large_levels", "efficientnet_b0"]
    args = arguments(__doc__, data=Path, models=names, image_size=224, per_class=0, seed=0, fine_tune=False)
    data = per_class(args.data, args.per_class, args.seed) if args.per_class else load_data(str(args.data))
    print(", ".join(f"{len(images):,} for {part}" for part, images in data.parts.items()))
    if args.fine_tune:
        for name in args.models:
            accuracy, seconds = tutorial_fine_tuning(name, data, args.image_size)
            low, high = wilson_interval(accuracy, len(data.test))
            print(f"{name}: test accuracy {accuracy:.1%} ± {50 * (high - low):.1f}, {seconds:,.0f} s")
        return 0
    print_header("backbone", "ours", "s", "logistic regression", "s", "tutorial", "s")
    for name in args.models:
        model, cells = new_model(name, data.classes, args.seed, args.image_size), []
        found = [*extract_features(model, data.parts, Path("data/features"), DEVICE).values()]
        rows = [(each.features, part.labels) for each, part in zip(found, data.parts.values(), strict=True)]
        extraction, passes = found[0].seconds + found[1].seconds, EPOCHS * pass_seconds(model, data)
        for method, before in ((ours, extraction), (regression, extraction), (tutorial, passes)):
            start = time.perf_counter()
            predicted = method(model, *rows[:2])(rows[2][0])
            seconds = before + time.perf_counter() - start
            scores = class_scores(predicted, rows[2][1], len(data.classes))
            accuracy = (predicted == rows[2][1]).float().mean().item()
            low, high = wilson_interval(accuracy, len(predicted))
            shown = scores["macro"]["recall"] if args.per_class else accuracy
            cells += [f"{shown:.1%}" + (f" ± {50 * (high - low):.1f}" if method is ours else ""), f"{seconds:,.0f}"]
        print_row(name, *cells)
    return 0


def per_class(folder: Path, count: int, seed: int) -> Data:
    """`count` images of each class for training and validation (a fifth), and the others for testing."""
    classes, parts, _ = read_folder(folder)
    images, chosen = Images.joined(parts.values()), {"train": [], "val": [], "test": []}
    generator = torch.Generator().manual_seed(seed)
    for label in range(len(classes)):
        members = (images.labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        for part, some in zip(chosen, members.tensor_split([count - count // 5, count]), strict=True):
            chosen[part].append(some)
    return Data(classes, *(images.subset(torch.cat(each)) for each in chosen.values()), content="", notes=())


def pass_seconds(model: TransferModel, data: Data) -> float:
    """The time in which plain PyTorch reads the training and validation images and runs the backbone on them."""
    load, count = ImageLoader(data.train, model.preprocessing, DEVICE), len(data.train) + len(data.val)
    model.to(DEVICE)
    with torch.inference_mode():
        model.forward_view(load(torch.arange(32), None))  # warms up
        start = time.perf_counter()
        for batch in torch.arange(min(TIMED, len(data.train))).split(32):
            model.forward_view(load(batch, None))
    return (time.perf_counter() - start) / min(TIMED, len(data.train)) * count


# A method takes a model, and the features and labels of training and validation images. It returns a function that
# predicts labels from features.


def ours(model: TransferModel, train: Part, val: Part) -> object:
    fit(model.classifier, train, val, seed=0)
    return lambda features: torch.cat([model.classifier.cpu()(block).argmax(dim=1) for block in features.blocks()])


def regression(model: TransferModel, train: Part, val: Part) -> object:
    known, held_out = ((last_block(model, features), labels.numpy()) for features, labels in (train, val))
    _, strength, _ = best_on_validation(known, held_out)
    both = [np.concatenate(pair) for pair in zip(known, held_out, strict=True)]
    best = logistic_regression(strength).fit(*both)
    return lambda features: torch.from_numpy(best.predict(last_block(model, features)))


def tutorial(model: TransferModel, train: Part, val: Part) -> object:
    table, table_val = (torch.from_numpy(last_block(model, features)) for features, _ in (train, val))
    recipe = replace(RECIPE, batch_size=BATCH)
    torch.manual_seed(0)
    layer = nn.Linear(table.shape[1], len(model.classes)).to(DEVICE)
    fit_as_in_tutorial(layer, batches((table, train[1]), 0, recipe), batches((table_val, val[1]), None, recipe))
    return lambda features: layer.cpu()(torch.from_numpy(last_block(model, features))).argmax(dim=1)


def fit_as_in_tutorial(model: nn.Module, train: Batches, val: Batches) -> list[float]:
    """Leaves the model as it was after the epoch that is best on validation. Returns the seconds of each epoch."""
    optimizer, best, seconds = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), (0.0, {}), []
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, STEP * train.steps, 0.1)
    for epoch in range(EPOCHS):
        start = time.perf_counter()
        train.start_epoch(epoch)
        train_one_epoch(model, train, optimizer, scheduler, nn.functional.cross_entropy, nullcontext())
        best = max(best, (evaluate(model, val)[1], copy.deepcopy(model.state_dict())), key=lambda pair: pair[0])
        seconds.append(time.perf_counter() - start)
    model.load_state_dict(best[1])
    return seconds


def tutorial_fine_tuning(name: str, data: Data, size: int) -> tuple[float, float]:
    """Trains all layers. Returns the test accuracy, and the seconds: the median epoch's times the number of epochs."""
    model = new_model(name, data.classes, 0, size)
    model.levels, model.views = [], 1
    model.classifier = nn.Linear(model.forward_features(model.example()).shape[1], len(data.classes))
    model.to(DEVICE).unfreeze()
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*(model.preprocessing[key] for key in ("mean", "std")))]
    augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *end])
    plain = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *end])
    train, val, test = (
        Batches(photograph_loader(part, transform), part.labels, BATCH, DEVICE, seed)
        for part, transform, seed in ((data.train, augmented, 0), (data.val, plain, None), (data.test, plain, None))
    )
    seconds = fit_as_in_tutorial(model, train, val)
    return evaluate(model, test)[1], EPOCHS * statistics.median(seconds)


def photograph_loader(images: Images, transform: v2.Transform) -> Loader:
    pool = ThreadPoolExecutor()

    def load(batch: torch.Tensor, _: object) -> torch.Tensor:
        photographs = pool.map(lambda i: decode_image(str(images.items[i]), "RGB"), batch.tolist())
        return torch.stack([transform(photograph) for photograph in photographs]).to(DEVICE)

    return load


if __name__ == "__main__":
    run_script(main)
