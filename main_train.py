"""Trains a new classifier on frozen ImageNet backbones and compares them.

    python main_train.py                                  CIFAR-10, downloaded into data/ on first use
    python main_train.py --demo                           every step in a minute, without a network
    python main_train.py --data pets --models vgg16       your own pictures: pets/train/<class>/, pets/test/<class>/
    python main_train.py --limit 2000                     a quick look

Writes checkpoints/<model>.pt, plots/*.png and plots/results.json. Each picture goes through a backbone once; its
features are kept in data/features/, so a second run trains within seconds. A run that was cut off goes on from there.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import visualization
from data import Data, ImageError, load_data, locked, positive, read_image, run_script, whole_or_absent
from models import BACKBONES, DTYPES, TransferModel, pick_device, pick_precision, save_checkpoint
from train_utils import Batches, cached_features, fit, loss_and_accuracy, predict, synchronized_time

COLORS = dict(zip(BACKBONES, visualization.COLORS * len(BACKBONES), strict=False))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    three = ["vgg16", "mobilenet_v2", "mobilenet_v3_large"]
    add("--models", nargs="+", choices=BACKBONES, metavar="NAME", default=three, help=f"of {', '.join(BACKBONES)}")
    add("--data", default="cifar10", help="cifar10, or a folder with train/<class>/ and test/<class>/")
    add("--epochs", type=positive, default=10, help="epochs of head training")
    add("--batch-size", type=positive, default=512, help="pictures a training step; fewer where an epoch has under 16")
    add("--lr", type=float, default=2e-3, help="peak learning rate of the one-cycle schedule")
    add("--image-size", type=positive, default=224, help="pixels to which pictures are resized")
    add("--limit", type=positive, metavar="N", help="use N training and at most N test pictures, balanced over classes")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes a GPU where there is one")
    add("--precision", choices=("auto", *DTYPES), default="auto", help="auto is bf16 where the hardware has it")
    add("--seed", type=int, default=0, help="of the split, the classifier and the order of the batches")
    add("--output", type=Path, default=Path(), metavar="DIR", help="receives checkpoints/ and plots/")
    add("--demo", action="store_true", help="drawn shapes and random backbones, into demo/: a test of the installation")
    args = parser.parse_args(argv)
    if args.demo:
        args.data, args.image_size, args.output = "demo", min(args.image_size, 64), args.output / "demo"
    return args


def train_model(name: str, data: Data, args: argparse.Namespace, device: torch.device, precision: str) -> dict:
    """One backbone from its weights to its checkpoint and plots. Returns its row of results.json."""
    row = BACKBONES[name]
    torch.manual_seed(args.seed)
    model = TransferModel(name, data.classes, args.image_size, pretrained=not args.demo)
    folder = Path("data/features") if not args.demo else args.output / "features"
    features = cached_features(model, data.images, folder, device, precision)
    test_features = cached_features(model, data.test, folder, device, precision)

    def batches(features, images, indices, seed=None):
        return Batches(
            features.array, images.labels, indices[features.readable[indices]], args.batch_size, device, seed
        )

    train = batches(features, data.images, data.train, args.seed)
    val = batches(features, data.images, data.val)
    test = batches(test_features, data.test, torch.arange(len(data.test)))
    if len(train.indices) < 2 or not len(val.indices) or not len(test.indices):
        raise ValueError("too few of the pictures can be read")

    model.to(device)
    start = synchronized_time(device)
    history = fit(model.classifier, train, val, args.epochs, args.lr, precision=precision, name=name)
    head_seconds = synchronized_time(device) - start
    kept = min(history, key=lambda epoch: epoch["val_loss"])
    logits, labels = predict(model.classifier, test)  # the test set is read once, here
    test_loss, test_accuracy = loss_and_accuracy(logits, labels)
    confusion = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    confusion.index_put_((labels, logits.argmax(dim=1)), torch.tensor(1), accumulate=True)

    run = {
        "model": name,
        "weights": "random" if args.demo else row.weights.name,
        "data": args.data,
        "classes": list(data.classes),
        "image_size": args.image_size,
        "seed": args.seed,
        "train_images": len(train.indices),
        "val_images": len(val.indices),
        "test_images": len(test.indices),
        "epochs": args.epochs,
        "val_loss": kept["val_loss"],
        "val_accuracy": kept["val_accuracy"],
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "seconds": {
            "features": features.seconds,
            "head": head_seconds,
            "fine_tune": 0.0,
            "total": features.seconds + head_seconds,
        },
        "features_cached": features.cached,
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "unreadable": [
            str(images.items[i])
            for images, made in ((data.images, features), (data.test, test_features))
            for i in (~made.readable).nonzero().flatten()
        ],
        "history": history,
        "confusion_matrix": confusion.tolist(),
        "device": str(device),
        "precision": precision,
        "torch": str(torch.__version__),
    }
    plots = args.output / "plots"
    save_checkpoint(args.output / "checkpoints" / f"{name}.pt", model, {k: v for k, v in run.items() if k != "history"})
    visualization.plot_history(plots / f"{row.plot}.png", row.label, history, COLORS[name])
    visualization.plot_confusion(plots / f"{row.plot}_confusion.png", row.label, run["confusion_matrix"], data.classes)
    return run


def update_results(file: Path, run: dict) -> list[dict]:
    """Puts the run in the place of the same model's earlier one, leaves the others, and returns all."""
    runs = {}
    if file.exists():
        try:
            runs = {old["model"]: old for old in json.loads(file.read_text())["runs"]}
        except (ValueError, KeyError, TypeError):
            print(f"{file} is unreadable and starts anew", file=sys.stderr)
    runs[run["model"]] = run
    with whole_or_absent(file) as stream:
        stream.write(json.dumps({"schema": 1, "runs": list(runs.values())}, indent=1).encode())
    return list(runs.values())


def print_table(runs: list[dict]) -> None:
    print(f"\n{'model':20} {'val loss':>8} {'val acc':>8} {'test acc':>8} {'seconds':>8} {'trained':>10} {'total':>11}")
    for run in runs:
        seconds, parameters = run["seconds"]["total"], run["parameters"]
        print(
            f"{run['model']:20} {run['val_loss']:8.3f} {run['val_accuracy']:8.2%} {run['test_accuracy']:8.2%} "
            f"{seconds:8.1f} {parameters['trainable']:10,} {parameters['total']:11,}"
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    with locked(args.output / "checkpoints" / ".lock", wait=False):  # two runs would mix their files
        for folder in ("checkpoints", "plots"):
            for left_behind in (args.output / folder).glob(".*.part"):  # by a run that was killed
                left_behind.unlink()
        return compare(args, device, precision)


def compare(args: argparse.Namespace, device: torch.device, precision: str) -> int:
    """Trains one model after the other, prints the table, and returns the exit code."""
    data = load_data(args.data, limit=args.limit, seed=args.seed)
    print(
        f"{args.data}: {len(data.classes)} classes, {len(data.train):,} pictures to train on, {len(data.val):,} for "
        f"validation, {len(data.test):,} to test; {precision} on {device}"
    )
    runs, unreadable = [], set()
    for name in args.models:
        try:
            run = train_model(name, data, args, device, precision)
        except (OSError, ValueError, RuntimeError, ArithmeticError) as error:
            print(f"error: {name} left out: {error}", file=sys.stderr)
            continue
        seconds = run["seconds"]
        cached = " (cached)" if run["features_cached"] else ""
        print(
            f"{name}: test accuracy {run['test_accuracy']:.2%}, features {seconds['features']:.1f} s{cached}, "
            f"head {seconds['head']:.1f} s"
        )
        unreadable.update(run["unreadable"])
        runs.append(run)
        everything = update_results(args.output / "plots" / "results.json", run)
    if not runs:
        return 2
    comparable = [run for run in everything if run["data"] == args.data and run["model"] in BACKBONES]
    points = [
        (BACKBONES[run["model"]].label, run["seconds"]["total"], run["test_accuracy"], COLORS[run["model"]])
        for run in comparable
    ]
    visualization.plot_comparison(args.output / "plots" / "comparison.png", points)
    print_table(comparable)
    for path in sorted(unreadable):
        try:
            read_image(Path(path))
        except ImageError as error:
            print(f"left out: {error}", file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} pictures can't be read and were left out", file=sys.stderr)
    complete = len(runs) == len(args.models) and all(len(run["history"]) == run["epochs"] for run in runs)
    return 0 if complete and not unreadable else 1


if __name__ == "__main__":
    run_script(main)
