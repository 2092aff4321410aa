"""Compares our classifier with what people would do instead, on a folder of photographs.

    pip install scikit-learn
    python benchmarks/photographs.py --data flowers
    python benchmarks/photographs.py --data caltech101 --per-class 30
    python benchmarks/photographs.py --data flowers --models mobilenet_v2 --image-size 128 --fine-tune

The weights, the images and their split are the same for all:

- ours: what main_train.py trains.
- last block: logistic regression on the last block's averages, as others do. Of 45 penalties the validation images
  choose one, with which it is fitted to these and the training images, as in github.com/linusericsson/ssl-transfer.
- same features: the same on all features that our classifier reads.
- tutorial: a linear layer on the last block's averages, trained for 25 epochs with SGD (learning rate 0.001, momentum
  0.9, divided by 10 every 7 epochs), which keeps the epoch that is best on validation. A frozen backbone gives an image
  the same averages in each epoch, so they are computed once. Its seconds are for 25 passes over the images instead,
  extrapolated from one pass of plain PyTorch over 256 images.
- with --fine-tune only the tutorial's fine-tuning: all layers of torchvision's model, random crops and mirror images in
  batches of 32, and the same 25 epochs, all of them computed. BatchNorm stays in eval mode, because in weights that had
  it folded into the convolutions, the statistics of a batch would destroy what they compute. Ours is that of
  `main_train.py --fine-tune`.

Accuracies are on the test images, that of ours with its 95% interval, the others with the difference from ours and the
95% interval of that, which is paired. With --per-class accuracies are means over the classes, but intervals are not. In
that protocol as many images of each class are for training and validation, all others for testing. Seconds are for
features and training.
"""

import copy
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, Part, arguments, batches, fit, last_block, new_model, print_header, print_row
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torchvision.io import decode_image
from torchvision.transforms import v2

from data import Data, load_data
from engine.batches import Batches, ImageLoader, Loader
from engine.console import run_script
from engine.features import Features, extract_features
from engine.folders import read_folder
from engine.images import Images
from engine.layers import Standardize
from engine.metrics import accuracy_interval, paired_difference, wilson_interval
from models import TransferModel
from train_utils import RECIPE, evaluate, train_one_epoch

EPOCHS, BATCH, LR, STEP = 25, 32, 1e-3, 7  # the tutorial's
TIMED = 256  # images
PENALTIES = np.logspace(5, -6, 45)  # for logistic regression, the strongest first: the best one if several are


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
    print_header("backbone", "ours", "s", "last block", "s", "same features", "s", "tutorial", "s")
    for name in args.models:
        model, cells, first = new_model(name, data.classes, args.seed, args.image_size), [], None
        found = [*extract_features(model, data.parts, Path("data/features"), DEVICE).values()]
        rows = [(each.features, part.labels) for each, part in zip(found, data.parts.values(), strict=True)]
        extraction, passes = found[0].seconds + found[1].seconds, EPOCHS * pass_seconds(model, data)
        for method in (ours, on_last_block, on_same_features, tutorial):
            start = time.perf_counter()
            right = method(model, *rows[:2])(rows[2][0]) == rows[2][1]
            seconds = (passes if method is tutorial else extraction) + time.perf_counter() - start
            first = right if method is ours else first
            cells += [accuracy_cell(right, first, data.test, args.per_class), f"{seconds:,.0f}"]
        print_row(name, *cells)
    return 0


def accuracy_cell(right: Tensor, ours: Tensor, test: Images, per_class: bool) -> str:
    """Which test images a method has right (N,): their share and its interval, or the difference from ours and its."""

    def share(right: Tensor) -> float:
        groups = [right[test.labels == label] for label in test.labels.unique()] if per_class else [right]
        return statistics.mean(group.float().mean().item() for group in groups)

    if right is ours:
        low, high = accuracy_interval(right.tolist(), test.groups)
        return f"{share(right):.1%} ± {50 * (high - low):.1f}"
    margin = paired_difference(right.tolist(), ours.tolist(), test.groups)[1]
    return f"{share(right):.1%}, {100 * (share(right) - share(ours)):+.1f} ± {100 * margin:.1f}"


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


def ours(model: TransferModel, train: Part, val: Part) -> Callable[[Features], Tensor]:
    fit(model.classifier, train, val, seed=0)
    return lambda features: torch.cat([model.classifier.cpu()(block).argmax(dim=1) for block in features.blocks()])


def on_last_block(model: TransferModel, train: Part, val: Part) -> Callable[[Features], Tensor]:
    predict = logistic_regression(*((last_block(model, features), labels) for features, labels in (train, val)))
    return lambda features: predict(last_block(model, features))


def on_same_features(model: TransferModel, train: Part, val: Part) -> Callable[[Features], Tensor]:
    predict = logistic_regression(*((torch.cat([*features.blocks()]), labels) for features, labels in (train, val)))
    return lambda features: torch.cat([predict(block) for block in features.blocks()])


def logistic_regression(train: Part, val: Part) -> Callable[[Tensor], Tensor]:
    """Its penalty is the best one on the validation images, with which it is fitted to all images.

    The features (N, width) are standardised, and rotated into the space that the N images span: as a weight outside it
    changes no image's score, the best weights have none, and a wide table gets N columns. The optimum is reached: on
    land use, scikit-learn from a cold start on the table as it is (penalties 316 and 10,000, a tenth of the tolerance)
    gives all test images the same labels, and probabilities that differ by less than 0.001.
    """
    scale, split = Standardize(train[0].shape[1]), len(train[1])
    scale.fit(train[0])
    table, labels = scale(torch.cat([train[0], val[0]])), torch.cat([train[1], val[1]]).numpy()
    rotation = torch.linalg.qr(table.T).Q
    table, accuracies = (table @ rotation).double().numpy(), []
    classifier = LogisticRegression(tol=1e-5, max_iter=10_000, warm_start=True)  # each fit starts from the one before
    for penalty in PENALTIES:
        classifier.set_params(C=1 / penalty).fit(table[:split], labels[:split])
        accuracies.append(classifier.score(table[split:], labels[split:]))
    classifier.set_params(C=1 / PENALTIES[np.argmax(accuracies)]).fit(table, labels)
    return lambda table: torch.from_numpy(classifier.predict((scale(table) @ rotation).double().numpy()))


def tutorial(model: TransferModel, train: Part, val: Part) -> Callable[[Features], Tensor]:
    table, table_val = (last_block(model, features) for features, _ in (train, val))
    recipe = replace(RECIPE, batch_size=BATCH)
    torch.manual_seed(0)
    layer = nn.Linear(table.shape[1], len(model.classes)).to(DEVICE)
    fit_as_in_tutorial(layer, batches((table, train[1]), 0, recipe), batches((table_val, val[1]), None, recipe))
    return lambda features: layer.cpu()(last_block(model, features)).argmax(dim=1)


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
