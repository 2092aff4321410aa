"""Trains a new classifier on frozen ImageNet backbones and compares them.

    python main_train.py                                  CIFAR-10, downloaded into data/ on first use
    python main_train.py --demo                           every step in a minute, without a network
    python main_train.py --data pets --models vgg16       your own pictures: pets/train/<class>/, pets/test/<class>/
    python main_train.py --limit 2000                     a quick look
    python main_train.py --fine-tune 6 --image-size 128   the backbones as well; hours without a GPU

Writes checkpoints/<model>.pt, plots/*.png and plots/results.json. Each picture goes through a backbone once; its
features are kept in data/features/, so a second run trains within seconds. A run that was cut off goes on from there.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

import visualization
from data import Data, ImageError, Images, load_data, locked, positive, read_image, run_script, whole_or_absent
from models import BACKBONES, DTYPES, TransferModel, pick_device, pick_precision, save_checkpoint
from train_utils import (
    Batches,
    Features,
    cached_features,
    cost,
    feature_loader,
    fit,
    fit_temperature,
    image_loader,
    loss_and_accuracy,
    metrics,
    predict,
    predict_images,
)

COLORS = dict(zip(BACKBONES, visualization.COLORS * len(BACKBONES), strict=False))
FINE_TUNE_BATCH = 32
MISTAKES = 12  # pictures in plots/*_mistakes.png


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    three = ["vgg16", "mobilenet_v2", "mobilenet_v3_large"]
    add("--models", nargs="+", choices=BACKBONES, metavar="NAME", default=three, help=f"of {', '.join(BACKBONES)}")
    add("--data", default="cifar10", help="cifar10, or a folder with train/<class>/ and test/<class>/")
    add("--epochs", type=positive, default=8, help="epochs of head training")
    add("--batch-size", type=positive, default=512, help="pictures a training step; fewer where an epoch has under 16")
    add("--lr", type=float, default=2e-3, help="peak learning rate of the one-cycle schedule")
    add("--views", type=int, choices=(1, 2), default=1, help="2: train on features of the mirror images as well")
    add("--seeds", type=positive, default=1, metavar="N", help="train N heads and report the mean; the first is kept")
    add("--fine-tune", type=positive, metavar="EPOCHS", help="then train the backbone, too: <model>_finetuned")
    add("--fine-tune-lr", type=float, default=2e-4, metavar="LR", help="the backbone's peak; twice that for the head")
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


def train_model(name: str, data: Data, args: argparse.Namespace) -> Iterator[dict]:
    """One backbone from its weights to its checkpoints and plots. Yields its rows of results.json."""
    folder = args.output / "features" if args.demo else Path("data/features")

    def new_model(seed: int) -> TransferModel:
        torch.manual_seed(seed)
        return TransferModel(name, data.classes, args.image_size, pretrained=not args.demo)

    frozen = new_model(args.seed)

    def features_of(images: Images, mirrored: bool = False) -> Features:
        return cached_features(frozen, images, folder, args.device, args.precision, mirrored=mirrored)

    views = [features_of(data.images, mirrored) for mirrored in (False, True)[: args.views]]
    test_view = features_of(data.test)
    train_rows, val_rows = (rows[views[0].readable[rows]] for rows in (data.train, data.val))
    test_rows = test_view.readable.nonzero().flatten()
    if len(train_rows) < 2 or not len(val_rows) or not len(test_rows):
        raise ValueError("too few of the pictures can be read")

    load, load_test = (feature_loader([view.array for view in part], args.device) for part in (views, [test_view]))
    val_batches = Batches(load, data.images.labels, val_rows, args.batch_size, args.device)
    test_batches = Batches(load_test, data.test.labels, test_rows, args.batch_size, args.device)
    heads = []
    for seed in range(args.seed, args.seed + args.seeds):
        model = new_model(seed).to(args.device)
        train_batches = Batches(load, data.images.labels, train_rows, args.batch_size, args.device, seed)
        history = fit(
            model.classifier,
            train_batches,
            val_batches,
            args.epochs,
            args.lr,
            precision=args.precision,
            name=f"{name} head",
        )
        heads.append((model, history, predict(model.classifier, test_batches)))
    model, history, (logits, _) = heads[0]

    about = {
        "model": name,
        "weights": "random" if args.demo else BACKBONES[name].weights.name,
        "data": args.data,
        "classes": list(data.classes),
        "image_size": args.image_size,
        "views": args.views,
        "seed": args.seed,
        "train_images": len(train_rows),
        "val_images": len(val_rows),
        "test_images": len(test_rows),
        "epochs": args.epochs,
        "lr": args.lr,
        "val_loss": best_epoch(history)["val_loss"],
        "val_accuracy": best_epoch(history)["val_accuracy"],
        "features_cached": all(view.cached for view in views),
        "unreadable": [
            str(images.items[i])
            for images, made in ((data.images, views[0]), (data.test, test_view))
            for i in (~made.readable).nonzero().flatten()
        ],
        "device": str(args.device),
        "precision": args.precision,
        "torch": str(torch.__version__),
        "accuracy_by_seed": {
            "val": [best_epoch(history)["val_accuracy"] for _, history, _ in heads],
            "test": [loss_and_accuracy(*answers)[1] for _, _, answers in heads],
        },
        "seconds": {"features": sum(v.seconds for v in views), "head": seconds_of(history), "fine_tune": 0.0},
    }
    temperature = fit_temperature(*predict(model.classifier, val_batches))
    readable = data.test.subset(test_rows)
    yield save_run(about, model, history, logits, temperature, readable, args)
    if args.fine_tune:
        yield fine_tune(about, model, data.images, train_rows, val_rows, readable, args)


def fine_tune(
    about: dict,
    model: TransferModel,
    images: Images,
    train_rows: Tensor,
    val_rows: Tensor,
    test: Images,
    args: argparse.Namespace,
) -> dict:
    """Goes on from a trained classifier with the backbone unfrozen. Returns its row of results.json."""
    about = about | {"model": f"{model.name}_finetuned", "epochs": args.fine_tune, "lr": args.fine_tune_lr}
    model.features.requires_grad_(True)
    model.to(memory_format=torch.channels_last)
    load = image_loader(images, model.preprocessing, args.device)
    batch_size = min(args.batch_size, FINE_TUNE_BATCH)
    resume = args.output / "checkpoints" / f"{about['model']}.resume"
    history = fit(
        model,
        Batches(load, images.labels, train_rows, batch_size, args.device, args.seed),
        Batches(load, images.labels, val_rows, batch_size, args.device),
        args.fine_tune,
        args.fine_tune_lr,
        weight_decay=0.05,
        precision="fp32" if args.device.type == "cpu" else args.precision,  # on the CPU the way back is slower in bf16
        name=about["model"],
        groups=[
            {"params": model.features.parameters(), "lr": args.fine_tune_lr},
            {"params": model.classifier.parameters(), "lr": 2 * args.fine_tune_lr},
        ],
        resume=resume,
    )
    model.test_views = 2  # half a point, for twice the work of an answer
    val = images.subset(val_rows)
    val_logits, logits = (predict_images(model, part, args.device, args.precision) for part in (val, test))
    temperature = fit_temperature(val_logits, val.labels)
    about["val_loss"], about["val_accuracy"] = loss_and_accuracy(val_logits, val.labels)
    about["accuracy_by_seed"] = {
        "val": [about["val_accuracy"]],
        "test": [loss_and_accuracy(logits, test.labels)[1]],
    }
    about["seconds"] = about["seconds"] | {"fine_tune": seconds_of(history)}
    run = save_run(about, model, history, logits, temperature, test, args)
    resume.unlink(missing_ok=True)
    return run


def best_epoch(history: list[dict]) -> dict:
    """The one that `fit` keeps."""
    return min(history, key=lambda epoch: epoch["val_loss"])


def seconds_of(history: list[dict]) -> float:
    return sum(epoch["seconds"] for epoch in history)


def save_run(
    about: dict,
    model: TransferModel,
    history: list[dict],
    logits: Tensor,
    temperature: float,
    test: Images,
    args: argparse.Namespace,
) -> dict:
    """Writes the checkpoint and the plots of a trained model. Returns its row of results.json."""
    run = {
        **about,
        "test_views": model.test_views,
        **metrics(logits, test.labels, temperature),
        "seconds": {**about["seconds"], "total": sum(about["seconds"].values())},
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        **cost(model, args.device, args.precision),
        "history": history,
    }
    checkpoint = args.output / "checkpoints" / f"{run['model']}.pt"
    save_checkpoint(checkpoint, model, {key: value for key, value in run.items() if key != "history"})
    run["checkpoint_bytes"] = checkpoint.stat().st_size

    label, color, file = appearance(run["model"])
    plots = args.output / "plots"
    visualization.plot_history(plots / f"{file}.png", label, history, color)
    visualization.plot_confusion(plots / f"{file}_confusion.png", label, run["confusion_matrix"], model.classes)
    visualization.plot_reliability(plots / f"{file}_reliability.png", label, run["calibration"], color)
    confidence, predicted = (logits / temperature).softmax(dim=1).max(dim=1)
    wrong = (predicted != test.labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    pictures, captions = [], []
    for i in wrong.tolist():
        pictures.append(read_image(test.items[i]).permute(1, 2, 0).numpy())
        captions.append(
            f"{model.classes[test.labels[i]]}\ntaken for {model.classes[predicted[i]]}, {confidence[i]:.0%}"
        )
    if pictures:
        visualization.plot_predictions(plots / f"{file}_mistakes.png", pictures, captions)
    return run


def appearance(model: str) -> tuple[str, str, str]:
    """A run's label, color and plots' name."""
    name = model.removesuffix("_finetuned")
    row, tuned = BACKBONES[name], model != name
    return row.label + ", fine-tuned" * tuned, COLORS[name], row.plot + "_finetuned" * tuned


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
    """Accuracies are means over the seeds, the test's with its standard deviation."""
    print(
        f"\n{'model':35} {'val loss':>8} {'val acc':>8} {'test acc':>16} {'seconds':>8} {'trained':>10} {'total':>11}"
    )
    for run in runs:
        val, test = (run["accuracy_by_seed"][part] for part in ("val", "test"))
        spread = f"± {stdev(test):.2%}" if len(test) > 1 else ""
        seconds, parameters = run["seconds"]["total"], run["parameters"]
        print(
            f"{run['model']:35} {run['val_loss']:8.3f} {mean(val):8.2%} {mean(test):8.2%} {spread:7} "
            f"{seconds:8.1f} {parameters['trainable']:10,} {parameters['total']:11,}"
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.device = pick_device(args.device)
    args.precision = pick_precision(args.precision, args.device)
    with locked(args.output / "checkpoints" / ".lock", wait=False):  # two runs would mix their files
        for folder in ("checkpoints", "plots"):
            for left_behind in (args.output / folder).glob(".*.part"):  # by a run that was killed
                left_behind.unlink()
        return compare(args)


def compare(args: argparse.Namespace) -> int:
    """Trains one model after the other, prints the table, and returns the exit code."""
    data = load_data(args.data, limit=args.limit, seed=args.seed)
    print(
        f"{args.data}: {len(data.classes)} classes, {len(data.train):,} pictures to train on, {len(data.val):,} for "
        f"validation, {len(data.test):,} to test; {args.precision} on {args.device}"
    )
    runs, unreadable = [], set()
    for name in args.models:
        try:
            for run in train_model(name, data, args):
                seconds = run["seconds"]
                cached = " (cached)" if run["features_cached"] else ""
                tuned = f", fine-tuning {seconds['fine_tune']:.1f} s" if seconds["fine_tune"] else ""
                print(
                    f"{run['model']}: test accuracy {run['test_accuracy']:.2%}, "
                    f"features {seconds['features']:.1f} s{cached}, head {seconds['head']:.1f} s{tuned}"
                )
                unreadable.update(run["unreadable"])
                runs.append(run)
                everything = update_results(args.output / "plots" / "results.json", run)
        except (OSError, ValueError, RuntimeError, ArithmeticError) as error:
            print(f"error: {name} left out: {error}", file=sys.stderr)
    if not runs:
        return 2
    known = {name + suffix for name in BACKBONES for suffix in ("", "_finetuned")}
    comparable = [run for run in everything if run["data"] == args.data and run["model"] in known]
    points = []
    for run in comparable:
        label, color, _ = appearance(run["model"])
        marker = "^" if run["model"].endswith("_finetuned") else "o"
        points.append((label, run["seconds"]["total"], mean(run["accuracy_by_seed"]["test"]), color, marker))
    visualization.plot_comparison(args.output / "plots" / "comparison.png", points)
    print_table(comparable)
    for path in sorted(unreadable):
        try:
            read_image(Path(path))
        except ImageError as error:
            print(f"left out: {error}", file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} pictures can't be read and were left out", file=sys.stderr)
    complete = len(runs) == len(args.models) * (2 if args.fine_tune else 1) and all(
        len(run["history"]) == run["epochs"] for run in runs
    )
    return 0 if complete and not unreadable else 1


if __name__ == "__main__":
    run_script(main)
