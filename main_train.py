"""Trains a new classifier on frozen ImageNet backbones and compares them.

    python main_train.py                                  CIFAR-10, downloaded into data/ on first use
    python main_train.py --demo                           every step within a minute, without a network
    python main_train.py --data pets --models resnet50    your own images, pets/<class>/*.jpg, into runs/pets/
    python main_train.py --limit 2000 --output quick      a quick look, beside the full models
    python main_train.py --fine-tune 6                    trains the backbones, too: hours without a GPU

Writes checkpoints/<model>.pt, plots/*.png and plots/results.json. Each image goes through a backbone once: its features
are kept in data/features/, so a second run trains within seconds. A run that was interrupted continues.
"""

import argparse
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torchvision
from torch import Tensor

import models
import train_utils
import visualization
from data import (
    CIFAR10_SIZE,
    Data,
    Progress,
    available_cpus,
    first_line,
    load_data,
    locked,
    positive,
    printable,
    read_image,
    read_shown,
    run_script,
    seed_number,
    whole_file,
    without_images,
)
from train_utils import CLASSIFIER_LR_FACTOR, FINE_TUNING, RECIPE, Batches, loss_and_accuracy

SCHEMA = 2  # of results.json
SAME = ("content", "classes", "train_images", "test_images")  # only models that agree in these can be compared
KEYS = {*SAME, *"backbone label fine_tuned accuracy_by_seed seconds confusion_matrix macro per_class right".split()}
KINDS = ("", "_confusion", "_reliability", "_mistakes", "_data")  # of a model's plots
MISTAKES = 12  # images in plots/*_mistakes.png


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str:
            return action.help if action.default in (None, False) else super()._get_help_string(action)

    def backbone(name: str) -> str:
        try:
            return models.find_backbone(name) and name
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    three = ["mobilenet_v2", "mobilenet_v3_large", "vgg16"]  # the quick ones first
    add("--models", nargs="+", type=backbone, metavar="NAME", default=three,
        help=f"of {', '.join(models.BACKBONES)}, or any classification model of torchvision")  # fmt: skip
    add("--data", default="cifar10", help="cifar10, or a folder of class folders, maybe in train/, val/ and test/")
    add("--epochs", type=positive(int), default=RECIPE.epochs, help="epochs of classifier training")
    add("--batch-size", type=positive(int), default=RECIPE.batch_size, help="images a step; fewer in small data sets, "
        f"at most {FINE_TUNING.batch_size} in fine-tuning")  # fmt: skip
    add("--lr", type=positive(float), default=RECIPE.lr, help="peak learning rate of the one-cycle schedule")
    add("--class-weights", action="store_true", help="weigh images of rare classes more")
    add("--views", type=int, choices=(1, 2), default=2, help="2: features are the mean over an image and its mirror "
        "image, which gains a point or two for twice the time")  # fmt: skip
    add("--seeds", type=positive(int), default=1, metavar="N", help="train N classifiers, report the mean, keep one")
    add("--fine-tune", type=positive(int), metavar="EPOCHS", help="then train the backbone, too: <model>_finetuned")
    add("--fine-tune-lr", type=positive(float), default=FINE_TUNING.lr, metavar="LR",
        help=f"the backbone's peak learning rate; the classifier's is {CLASSIFIER_LR_FACTOR:g} times that")  # fmt: skip
    add("--image-size", type=positive(int), metavar="PIXELS",
        help="side to which images are resized (default: that of the weights, mostly 224; "
        f"{CIFAR10_SIZE} for CIFAR-10, 64 in the demo)")  # fmt: skip
    add("--limit", type=positive(int), metavar="N", help="use N training images and that share of the test images")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes a GPU if there is one")
    add("--precision", choices=("auto", *models.DTYPES), default="fp32",
        help="precision of the features, in training and inference; bf16 is up to twice as fast on hardware that "
        "supports it, but answers depend a little on the machine; auto: bf16 if supported")  # fmt: skip
    add("--seed", type=seed_number, default=0, help="random seed of the classifier and the order of the batches")
    add("--output", type=Path, metavar="DIR",
        help="receives checkpoints/ and plots/ (default: here, or runs/NAME for a folder NAME)")  # fmt: skip
    add("--cache", type=Path, default=Path("data"), metavar="DIR", help="keeps CIFAR-10 and the features")
    add("--demo", action="store_true", help="drawn shapes and random backbones, into demo/: a test of the installation")
    args = parser.parse_args(argv)
    args.models = list(dict.fromkeys(args.models))
    if args.demo:
        args.data, args.output = "demo", (args.output or Path()) / "demo"
        args.cache, args.image_size = args.output, args.image_size or 64
    elif args.data == "cifar10":
        args.output, args.image_size = args.output or Path(), args.image_size or CIFAR10_SIZE
    else:
        args.data = os.path.abspath(args.data)  # also without a trailing slash
        args.output = args.output or Path("runs", Path(args.data).name)
    return args


@dataclass
class Outcome:
    """A trained model, what it was trained on, and what it answers."""

    model: models.TransferModel
    data: Data  # only the images that could be read
    val_logits: Tensor
    test_logits: Tensor
    row: dict  # its row of results.json, completed by `finish`
    features: list[Tensor]  # of the frozen backbone, for training, validation and testing


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = models.pick_device(args.device)
    args.precision = models.pick_precision(args.precision, device)
    about = {"data": args.data, **provenance(sys.argv[1:] if argv is None else argv, device)}
    print(f"{args.data}: {', '.join(args.models)} on {about['device']} in {args.precision}, into {args.output}/")
    with locked(args.output / "checkpoints" / ".lock", wait=False):  # two runs would mix their files
        for folder in ("checkpoints", "plots"):
            for leftover in args.output.glob(f"{folder}/.*.part"):  # of a killed run
                leftover.unlink()
        data = load_data(args.data, args.cache, args.limit)
        models.ask_others(models.need_images, data.train.items[:1])
        print(
            f"{len(data.classes)} classes, {len(data.train):,} images for training, {len(data.val):,} for validation, "
            f"{len(data.test):,} for testing"
        )
        print(*data.notes, sep="\n", end="\n" if data.notes else "")
        print(f"this takes about {guess_time(args, device, data)}, and less if features are in {args.cache}/ already")
        rows = read_results(args.output / "plots" / "results.json")
        outcomes, complete = [], True
        for name in args.models:
            try:
                outcome = train_classifier(name, data, args, device)
                complete &= finish(outcome, about, rows, device, args.output)
                outcomes.append(outcome)
                if args.fine_tune:
                    outcome = fine_tune(outcome, args, device)
                    complete &= finish(outcome, about, rows, device, args.output)
                    outcomes.append(outcome)
            except (OSError, ValueError, RuntimeError, ArithmeticError) as error:
                what = f"fine-tuning {name}" if outcomes and outcomes[-1].model.backbone == name else f"training {name}"
                print(f"error: {what} failed: {first_line(error)}", file=sys.stderr)
                complete = False
        if len(outcomes) == len(args.models) * (2 if args.fine_tune else 1):  # else the same command needs them
            for outcome in outcomes:
                (args.output / "checkpoints" / f"{outcome.row['model']}.resume").unlink(missing_ok=True)
        if not outcomes:
            return 2
        complete &= summarize(outcomes, rows, args.output)
    checkpoint = args.output / "checkpoints" / f"{outcomes[-1].row['model']}.pt"
    print(f"\nplots are in {args.output / 'plots'}/; next: python inference.py --checkpoint {checkpoint} IMAGE...")
    return 0 if complete else 1


def guess_time(args: argparse.Namespace, device: torch.device, data: Data) -> str:
    """How long the backbones need, within a factor of two or three: "8 minutes".

    A guess from the multiply-adds that torchvision states, the speed of a matrix product here, and the cores that read.
    Its constants fit five backbones on a CPU: large networks compute more of their multiply-adds at full speed.
    """
    matrix = torch.randn(1024, 1024, device=device)

    def seconds_of_product() -> float:
        start = train_utils.synchronized_time(device)
        torch.mm(matrix, matrix)
        return train_utils.synchronized_time(device) - start

    billion = min(seconds_of_product() for _ in range(5))  # multiply-adds
    passes = args.views * (len(data.train) + len(data.val) + len(data.test))
    passes += 6 * (args.fine_tune or 0) * len(data.train)  # forward and backward, in PyTorch's own modules
    passes /= models.rank_and_count()[1]
    seconds = 0.0
    for weights in (models.find_backbone(name).weights for name in args.models):
        size = weights.transforms().crop_size[0]
        billions = weights.meta["_ops"] * ((args.image_size or size) / size) ** 2
        seconds += passes * max(0.75 * billions**0.7 * billion, 2e-4 / available_cpus())
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{max(1, seconds):.0f} seconds"


def new_model(name: str, data: Data, args: argparse.Namespace, seed: int) -> models.TransferModel:
    """A model with a random classifier. A backbone that takes images of one size only gets that size."""
    torch.manual_seed(seed)
    try:
        model = models.TransferModel(name, data.classes, args.image_size, pretrained=not args.demo)
    except ValueError as error:
        print(f"{error}: using that size")
        torch.manual_seed(seed)
        model = models.TransferModel(name, data.classes, pretrained=not args.demo)
    if args.demo:
        models.set_statistics(model, data.train.items[:128])
    model.precision, model.views = args.precision, args.views
    return model


def check_replacement(checkpoint: Path, model: models.TransferModel, data: Data, source: str) -> None:
    """Raises ValueError if the checkpoint is of a model trained on other or more data, which a run must not replace."""
    try:
        old = models.load_checkpoint(checkpoint)
    except (OSError, ValueError):  # none, or none that anyone can use
        return
    size, known = old.preprocessing["image_size"], old.metrics.get("train_images", 0)
    other = source != old.metrics.get("data") and data.content != old.metrics.get("content")
    if other or old.classes != model.classes or size != model.preprocessing["image_size"] or known > len(data.train):
        raise ValueError(
            f"{checkpoint} was trained on {known:,} images of {len(old.classes)} classes at {size} pixels"
            f"{' of other data' * other}: choose another --output, or delete it"
        )
    print(f"{checkpoint}, made on {old.metrics.get('date')} by {old.metrics.get('command')}, will be replaced")


def extract_features(
    model: models.TransferModel, data: Data, args: argparse.Namespace, device: torch.device
) -> tuple[Data, dict[str, Tensor], dict]:
    """Returns the readable images, the features of each part (train, val, test), and statistics of the extraction.

    Raises ValueError if too few images can be read.
    """
    parts = {part: getattr(data, part) for part in ("train", "val", "test")}
    found = {
        part: train_utils.cached_features(model, images, args.cache / "features", device)
        for part, images in parts.items()
    }
    readable = replace(data, **{part: images.subset(found[part].readable) for part, images in parts.items()})
    if empty := without_images(data.classes, readable.train):
        raise ValueError(f"no training image of {empty} can be read")
    if not len(readable.val) or not len(readable.test):
        raise ValueError("no image for validation or testing can be read")
    if empty := without_images(data.classes, readable.test):
        print(f"{model.name}: no test image of {empty} can be read", file=sys.stderr)
    used = found["train"], found["val"]
    about = {
        "computed": sum(features.computed for features in used),
        "cached": not any(features.computed for features in used),
        "seconds": sum(features.seconds for features in used),
        "batch_size": models.CPU_BATCH if device.type == "cpu" else models.GPU_BATCH,
        "unreadable": sorted({str(error) for features in found.values() for error in features.errors}),
    }
    return readable, {part: features.of(features.readable) for part, features in found.items()}, about


def train_classifier(name: str, data: Data, args: argparse.Namespace, device: torch.device) -> Outcome:
    """Trains the classifier of a frozen backbone on its features, once for each seed. Keeps the first."""
    model = new_model(name, data, args, args.seed)
    for written in [name, f"{name}_finetuned"] if args.fine_tune else [name]:
        check_replacement(args.output / "checkpoints" / f"{written}.pt", model, data, args.data)
    readable, features, about = extract_features(model, data, args, device)
    recipe = replace(
        RECIPE, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, class_weights=args.class_weights
    )

    def batches(part: str, seed: int | None = None) -> Batches:
        load = train_utils.feature_loader(features[part], device)
        return Batches(load, getattr(readable, part).labels, recipe.batch_size, device, seed)

    val, test, kept = batches("val"), batches("test"), []
    precision = models.pick_precision("auto", device)  # of the steps; the weights and the answers are fp32
    for seed in range(args.seed, args.seed + args.seeds):
        candidate = model if seed == args.seed else new_model(name, data, args, seed)
        classifier = candidate.classifier.to(device)
        torch.manual_seed(seed)
        start = train_utils.synchronized_time(device)
        with models.threads(1):  # more gain little, and wait long for each other if anything else runs
            training, val_logits = train_utils.fit_classifier(
                classifier, batches("train", seed), val, recipe, precision, f"{name} classifier"
            )
            test_logits, _ = train_utils.predict(classifier, test)
        kept.append((val_logits, test_logits, training.history, train_utils.synchronized_time(device) - start))
    val_logits, test_logits, history, seconds = kept[0]
    known = features["train"], readable.train.labels, features["val"], val_logits
    attempt("mark for unfamiliar images", lambda: setattr(model, "familiarity", train_utils.fit_familiarity(*known)))
    row = {
        "weights": "random" if args.demo else models.find_backbone(name).weights.name,
        "seed": args.seed,
        "recipe": asdict(recipe),
        "accuracy_by_seed": {
            "val": [loss_and_accuracy(logits, readable.val.labels)[1] for logits, *_ in kept],
            "test": [loss_and_accuracy(logits, readable.test.labels)[1] for _, logits, *_ in kept],
        },
        "features": about,
        "precision": {"features": model.precision, "training": precision},
        "seconds": {"features": about["seconds"], "classifier": seconds},
        "history": history,
    }
    return Outcome(model.to(device), readable, val_logits, test_logits, row, list(features.values()))


def fine_tune(frozen: Outcome, args: argparse.Namespace, device: torch.device) -> Outcome:
    """Trains the backbone as well, starting from the trained classifier. Continues a training that was interrupted."""
    model, data = frozen.model, frozen.data
    # on a CPU the backward pass is slower in bf16
    precision = "fp32" if device.type == "cpu" else models.pick_precision("auto", device)
    size = min(args.batch_size, FINE_TUNING.batch_size)
    recipe = replace(
        FINE_TUNING, epochs=args.fine_tune, batch_size=size, lr=args.fine_tune_lr, class_weights=args.class_weights
    )
    if min(len(data.train), len(data.val)) < (processes := models.rank_and_count()[1]):
        raise ValueError(f"too few images to fine-tune with {processes} processes: start fewer")
    model.unfreeze()
    key = models.content_hash(model.state_dict(), [asdict(recipe), precision, args.seed, len(data.train)])
    file = args.output / "checkpoints" / f"{model.name}.resume"
    if progress := train_utils.load_progress(file, key):
        print(f"{model.name}: continuing after {len(progress['history'])} of {recipe.epochs} epochs")
    arguments = model.cpu(), data.train, data.val, recipe, precision, device, args.seed, progress
    models.ask_others(train_utils.fine_tune, *arguments)

    def save(training: train_utils.Training) -> None:
        attempt(file, lambda: models.write_tensors(file, {"key": key, **training.state_dict()}))

    training = train_utils.fine_tune(*arguments, model.name, save)

    fast, accuracies, answers = models.fast_copy(model, device), {}, {}
    for part in ("val", "test"):
        images, blocks = getattr(data, part), []
        with Progress(len(images), f"{model.name} answers") as bar:
            for items, [block], _ in models.run_images([fast], images.items):
                blocks.append(block)
                bar.update(len(items))
        logits = torch.cat(blocks)
        there = (~logits[:, 0].isnan()).nonzero().flatten()  # a file may have vanished
        data, answers[part] = replace(data, **{part: images.subset(there)}), logits[there]
        accuracies[part] = [loss_and_accuracy(answers[part], getattr(data, part).labels)[1]]
    row = {
        **frozen.row,
        "recipe": asdict(recipe),
        "accuracy_by_seed": accuracies,
        "precision": {"features": model.precision, "training": precision},
        "seconds": {**frozen.row["seconds"], "fine_tuning": sum(epoch["seconds"] for epoch in training.history)},
        "history": training.history,
    }
    return Outcome(model, data, answers["val"], answers["test"], row, frozen.features)


def provenance(argv: list[str], device: torch.device) -> dict:
    """What ran, when and where."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        commit = None
    libraries = {library.__name__: str(library.__version__) for library in (torch, torchvision, np)}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["main_train.py", *argv]),
        "commit": commit,
        "versions": {"python": platform.python_version(), **libraries},
        "device": train_utils.device_name(device),
    }


def finish(outcome: Outcome, about: dict, rows: dict[str, dict], device: torch.device, output: Path) -> bool:
    """Saves the model and its row of results.json, then measures its speed and draws its plots.

    Returns whether all of that worked. Only saving the checkpoint may raise.
    """
    model, data = outcome.model, outcome.data
    model.temperature = train_utils.fit_temperature(outcome.val_logits, data.val.labels)
    val_loss, val_accuracy = loss_and_accuracy(outcome.val_logits, data.val.labels)
    outcome.row = row = {
        **outcome.row,
        **about,
        "model": model.name,
        "backbone": model.backbone,
        "label": model.label,
        "fine_tuned": model.fine_tuned,
        "content": data.content,
        "classes": list(model.classes),
        "image_size": model.preprocessing["image_size"],
        "train_images": len(data.train),
        "val_images": len(data.val),
        "test_images": len(data.test),
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "temperature": model.temperature,
        "views": model.views,
        **train_utils.metrics(outcome.test_logits, data.test.labels, model.temperature),
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
    }
    checkpoint, results = output / "checkpoints" / f"{model.name}.pt", output / "plots" / "results.json"
    models.save_checkpoint(checkpoint, model, {key: value for key, value in row.items() if key != "history"})
    row["checkpoint_bytes"] = checkpoint.stat().st_size
    rows[model.name] = row
    cached = " (cached)" if row["features"]["cached"] else ""
    seconds = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in row["seconds"].items())
    trainable, total = (row["parameters"][kind] / 1e6 for kind in ("trainable", "total"))
    print(f"{model.name}: test accuracy {row['test_accuracy']:.2%}, {seconds}{cached}")
    print(f"{model.name}: {trainable:.2f} of {total:.2f} million parameters trained")
    saved = attempt(results, lambda: write_results(results, rows))
    measured = attempt("measurement of speed", lambda: row.update(train_utils.cost(model, device)))
    completed = attempt(results, lambda: write_results(results, rows))
    drawn = attempt(f"plots of {model.name}", lambda: draw_plots(outcome, colors(rows), output / "plots"))
    return saved and measured and completed and drawn


def summarize(outcomes: list[Outcome], rows: dict[str, dict], output: Path) -> bool:
    """Compares the models with each other and with earlier models, checks the data, and lists unreadable images.

    Returns whether every step worked, all images were readable, and every training ran for all epochs.
    """
    complete, trained = True, [outcome.row for outcome in outcomes]
    alike = {name: row for name, row in rows.items() if all(row[key] == trained[0][key] for key in SAME)}
    if len(outcomes) > 1 and len({(row["val_images"], row["test_images"]) for row in trained}) == 1:
        results = output / "plots" / "results.json"
        complete &= attempt("ensemble", lambda: alike.update(ensemble=combine(outcomes)))
        complete &= attempt(results, lambda: write_results(results, rows, alike.get("ensemble")))
    complete &= attempt("comparison", lambda: compare(alike, colors(alike), output))
    best = max(outcomes, key=lambda outcome: outcome.row["val_accuracy"])
    complete &= attempt("check of the data", lambda: check_data(best, output / "plots"))
    complete &= attempt("report page", lambda: write_page(alike, trained[0], output))
    unreadable = sorted({reason for row in trained for reason in row["features"]["unreadable"]})
    for reason in unreadable:
        print(f"left out: {printable(reason)}", file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} images cannot be read and were left out", file=sys.stderr)
    return complete and not unreadable and all(len(row["history"]) == row["recipe"]["epochs"] for row in trained)


def combine(outcomes: list[Outcome]) -> dict:
    """A row for the answer of all models together: the mean of their calibrated log-probabilities."""
    first, found, logits = outcomes[0], {}, {}
    for part in ("val", "test"):
        answers = [(getattr(o, f"{part}_logits") / o.row["temperature"]).log_softmax(dim=1) for o in outcomes]
        logits[part] = torch.stack(answers).mean(dim=0)
        found[part] = [loss_and_accuracy(logits[part], getattr(first.data, part).labels)[1]]
    seconds = {f"{o.model.backbone} {stage}": s for o in outcomes for stage, s in o.row["seconds"].items()}
    return {
        **{key: first.row[key] for key in (*SAME, "val_images", "date", "command", "versions", "device", "data")},
        "model": "ensemble",
        "label": f"all {len(outcomes)} together",
        "backbone": "ensemble",
        "fine_tuned": any(outcome.row["fine_tuned"] for outcome in outcomes),
        "accuracy_by_seed": found,
        "seconds": seconds,
        **train_utils.metrics(logits["test"], first.data.test.labels, 1.0),
    }


def attempt(what: object, action: Callable[[], object]) -> bool:
    """Does something that must never cost a result. Returns whether it worked."""
    try:
        action()
        return True
    except Exception as error:  # whatever goes wrong, the model is on disk
        print(f"error: {what} failed: {first_line(error)}", file=sys.stderr)
        return False


def read_results(file: Path) -> dict[str, dict]:
    """The rows of earlier runs, by model. A file of another version, or a damaged one, is moved out of the way."""
    if not file.exists():
        return {}
    try:
        results = json.loads(file.read_text())
        rows = {row["model"]: row for row in results["runs"]}
        if results["schema"] == SCHEMA and all(KEYS <= row.keys() for row in rows.values()):
            return rows
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    print(f"{file} cannot be read by this version and is now {file}.old", file=sys.stderr)
    file.replace(f"{file}.old")
    return {}


def write_results(file: Path, rows: dict[str, dict], ensemble: dict | None = None) -> None:
    results = {"schema": SCHEMA, "runs": list(rows.values())} | ({"ensemble": ensemble} if ensemble else {})
    with whole_file(file) as stream:
        stream.write(json.dumps(results, indent=1).encode())


def colors(rows: dict[str, dict]) -> dict[str, str]:
    """A color for each backbone, the same in all plots."""
    backbones = dict.fromkeys(row["backbone"] for row in rows.values())
    return dict(zip(backbones, itertools.cycle(visualization.COLORS), strict=False))


def stem(row: dict) -> str:
    """How the names of a model's plots begin."""
    return models.find_backbone(row["backbone"]).plot + "_finetuned" * row["fine_tuned"]


def draw_plots(outcome: Outcome, colors: dict[str, str], folder: Path) -> None:
    """A model's history, confusion matrix, calibration and most confident mistakes."""
    model, row, test = outcome.model, outcome.row, outcome.data.test
    name = stem(row)
    for kind in KINDS:
        (folder / f"{name}{kind}.png").unlink(missing_ok=True)  # of an earlier run
    color, classes = colors[model.backbone], [printable(name) for name in model.classes]
    only = ", the hidden layer" if isinstance(model.classifier, models.Classifier) and not model.fine_tuned else ""
    figure = visualization.plot_history(model.label + only, row["history"], color)
    visualization.save(figure, folder / f"{name}.png")
    figure = visualization.plot_confusion(model.label, row["confusion_matrix"], classes)
    visualization.save(figure, folder / f"{name}_confusion.png")
    figure = visualization.plot_reliability(model.label, row["calibration"], color)
    visualization.save(figure, folder / f"{name}_reliability.png")
    confidence, predicted = (outcome.test_logits / model.temperature).softmax(dim=1).max(dim=1)
    wrong = (predicted != test.labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)].tolist()
    nth = defaultdict(itertools.count)  # mistake of its class: the clearest of every class come first
    wrong.sort(key=lambda i: next(nth[int(test.labels[i])]))
    captioned = (
        (test.items[i], f"{classes[test.labels[i]]}\ntaken for {classes[predicted[i]]}, {confidence[i]:.0%}")
        for i in wrong
    )
    images, captions = read_shown(captioned, MISTAKES)
    if images:
        visualization.save(visualization.plot_predictions(images, captions), folder / f"{name}_mistakes.png")


def check_data(outcome: Outcome, folder: Path) -> None:
    """Finds copies among the images and doubtful labels. Prints a summary, writes data.json and draws a plot."""
    model, data = outcome.model, outcome.data
    parts = {"train": data.train, "val": data.val, "test": data.test}
    place = [(part, i, item) for part, images in parts.items() for i, item in enumerate(images.items)]
    labels = torch.cat([images.labels for images in parts.values()]).tolist()
    print("\nlooking for copies among the images and for doubtful labels")
    with models.threads(1):
        copies, doubtful = train_utils.check_data(
            outcome.features,
            [images.labels for images in parts.values()],
            len(model.classes),
            lambda i: read_image(place[i][2], 32),
        )

    def about(index: int) -> dict:
        part, i, item = place[index]
        name = str(item) if isinstance(item, Path) else f"{part} image {i}"
        return {"path": name, "part": part, "label": model.classes[labels[index]]}

    report = {
        "model": outcome.row["model"],
        "copies": copies and [{**pair, "images": [about(i) for i in pair["images"]]} for pair in copies],
        "doubtful_labels": [
            {**about(image["image"]), "rather": model.classes[image["label"]], "probability": image["probability"]}
            for image in doubtful
        ],
    }
    found, two = "too many images to look for copies", []
    if copies is not None:
        leaked = sorted({place[i][1] for pair in copies for i in pair["images"] if place[i][0] == "test"})
        right = outcome.test_logits.argmax(dim=1) == data.test.labels
        others = torch.ones(len(right), dtype=torch.bool)
        others[leaked] = False
        accuracy = right[others].float().mean().item() if others.any() else None
        report |= {"test_images_with_copies": len(leaked), "test_accuracy_without_them": accuracy}
        two = [pair for pair in copies if len({labels[i] for i in pair["images"]}) == 2]
        without = f" (test accuracy without them: {accuracy:.2%})" if leaked and accuracy is not None else ""
        found = f"{len(leaked)} test images seem to have copies{without}, {len(two)} copies have two labels"
    with whole_file(folder / "data.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    print(f"{found}, {len(doubtful)} labels look doubtful: see {folder / 'data.json'}")
    names = [printable(name) for name in model.classes]
    shown = [
        (place[i][2], f"{place[i][0]}: {names[labels[i]]}\ncopy, {pair['correlation']:.0%}")
        for pair in sorted(copies or [], key=lambda pair: pair not in two)[:4]
        for i in pair["images"]
    ]
    for image in doubtful[: MISTAKES - len(shown)]:
        i, rather = image["image"], names[image["label"]]
        shown.append((place[i][2], f"{names[labels[i]]}?\nrather {rather}, {image['probability']:.0%}"))
    images, captions = read_shown(shown, MISTAKES)
    if images:
        figure = visualization.plot_predictions(images, captions)
        visualization.save(figure, folder / f"{stem(outcome.row)}_data.png")


def comparison_table(rows: dict[str, dict]) -> list[list[str]]:
    """A header row and one row per model. Accuracies are means over the seeds.

    The difference is to the model that is best on validation; the ensemble does not count as a model here.
    """

    def accuracy(row: dict, part: str) -> float:
        return mean(row["accuracy_by_seed"][part])

    def right(row: dict) -> Tensor:
        return torch.tensor(list(map(int, row["right"])))

    best = max((row for row in rows.values() if row["backbone"] != "ensemble"), key=lambda row: accuracy(row, "val"))
    support = [sum(row) for row in best["confusion_matrix"]]
    table = []
    for name, row in rows.items():
        test = accuracy(row, "test")
        low, high = train_utils.interval(test, row["test_images"])
        cells = {"model": name, "val acc": f"{accuracy(row, 'val'):.2%}", "test acc": f"{test:.2%}"}
        cells["95% interval"] = f"{low:.1%}-{high:.1%}"
        if len(rows) > 1:
            _, margin = train_utils.difference(right(row), right(best))
            change = f"{100 * (test - accuracy(best, 'test')):+.1f} ± {100 * margin:.1f}"
            cells["difference"] = "best" if row is best else change
        cells["seconds"] = f"{sum(row['seconds'].values()):.1f}"
        if max(support) > 3 * min(support):  # accuracy alone would hide the rare classes
            cells["macro F1"] = f"{row['macro']['f1']:.3f}"
            cells["worst recall"] = f"{min(row['per_class']['recall']):.2%}"
        table.append(cells)
    return [list(table[0]), *(list(cells.values()) for cells in table)]


def compare(rows: dict[str, dict], colors: dict[str, str], output: Path) -> None:
    """Prints a table and draws the comparison."""
    table = comparison_table(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for name, *cells in table:
        columns = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *columns]))
    if len(rows) > 1:
        print("difference: in points from the best model on validation; a difference below its ± may be chance")
    points = []
    for row in rows.values():
        test, seconds = mean(row["accuracy_by_seed"]["test"]), sum(row["seconds"].values())
        interval = train_utils.interval(test, row["test_images"])
        points.append((row["label"], seconds, test, interval, colors[row["backbone"]]))
    visualization.save(visualization.plot_comparison(points), output / "plots" / "comparison.png")


def write_page(rows: dict[str, dict], trained: dict, output: Path) -> None:
    """Writes plots/report.html: the table, the plots of every model, and how they were made."""
    folder, sections = output / "plots", {"Comparison": [output / "plots" / "comparison.png"]}
    for row in (row for row in rows.values() if row["backbone"] != "ensemble"):
        sections[row["label"]] = [folder / f"{stem(row)}{kind}.png" for kind in KINDS]
    sections = {title: [file for file in files if file.exists()] for title, files in sections.items()}
    facts = {name: str(trained[name]) for name in ("command", "date", "commit", "device", "data")}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in trained["versions"].items())
    facts["images"] = ", ".join(f"{trained[f'{part}_images']:,} for {part}" for part in ("train", "val", "test"))
    page = visualization.report_page(Path(trained["data"]).name, comparison_table(rows), sections, facts)
    with whole_file(folder / "report.html") as file:
        file.write(page.encode(errors="backslashreplace"))


if __name__ == "__main__":
    run_script(models.shared(main), "interrupted: the same command continues from what is finished")
