"""Trains a new classifier on frozen ImageNet backbones and compares them.

    python main_train.py                                  CIFAR-10, downloaded into data/ on first use
    python main_train.py --demo                           every step within a minute, without a network
    python main_train.py --data pets --models resnet50    your own images, pets/<class>/*.jpg, into runs/pets/
    python main_train.py --limit 2000 --output quick      a quick look, beside the full models
    python main_train.py --fine-tune 6                    trains the backbones, too: hours without a GPU

Writes checkpoints/<model>.pt, plots/*.png, plots/results.json and plots/report.html. Each image goes through a backbone
once: its features are kept in data/features/, so a second run trains within seconds. Run the same command again to
resume an interrupted run.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import models
import train_utils
import visualization
from data import CIFAR10_SIZE, Data, classes_without_images, load_data
from engine import results
from engine.audit import audit, fit_unfamiliarity, summary
from engine.backbones import weights_name
from engine.batches import Batches, feature_loader
from engine.console import HelpFormatter, attempt, count_of, first_line, number, print_failure, printable, run_script
from engine.device import DTYPES, computes_in_bf16, pick_device, pick_precision, synchronized_time, threads
from engine.distributed import gather, is_first, spmd, world_size
from engine.features import Extraction, extract_features
from engine.files import atomic_write, content_hash, locked, save_tensors
from engine.metrics import calibrated_loss, fit_temperature, loss_and_accuracy, with_unread
from engine.openvino import fastest_copy
from engine.run import measure_cost, outputs_of
from train_utils import CLASSIFIER_LR_FACTOR, FINE_TUNING, RECIPE, Recipe


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    three = ["mobilenet_v2", "mobilenet_v3_large", "vgg16"]  # the quick ones first
    add("--models", nargs="+", metavar="NAME", default=three,
        help=f"{', '.join(models.BACKBONES)}, or any classification model of torchvision or timm (timm/NAME); "
        "NAME:WEIGHTS picks the weights")  # fmt: skip
    add("--data", default="cifar10", help="cifar10, or an image folder: DIR/CLASS/* or DIR/{train,val,test}/CLASS/*")
    add("--epochs", type=number(int), default=RECIPE.epochs, help="epochs of classifier training")
    add("--batch-size", type=number(int), default=RECIPE.batch_size, help="images per step; small data sets get fewer, "
        f"fine-tuning at most {FINE_TUNING.batch_size}")  # fmt: skip
    add("--lr", type=number(float), default=RECIPE.lr, help="peak learning rate of the one-cycle schedule")
    add("--class-weights", action="store_true", help="weigh images of rare classes more")
    add("--views", type=int, choices=(1, 2), default=2, help="2: features are the mean over an image and its mirror "
        "image, which gains a point or two for twice the time")  # fmt: skip
    add("--seeds", type=number(int), default=1, metavar="N", help="train N classifiers, report the mean, keep one")
    add("--fine-tune", type=number(int), metavar="EPOCHS", help="then train the backbone, too: <model>_finetuned")
    add("--fine-tune-lr", type=number(float), default=FINE_TUNING.lr, metavar="LR",
        help=f"the backbone's peak learning rate; the classifier's is {CLASSIFIER_LR_FACTOR:g} times that")  # fmt: skip
    add("--image-size", type=number(int), metavar="PIXELS",
        help="side to which images are resized (default: that of the weights, mostly 224; "
        f"{CIFAR10_SIZE} for CIFAR-10, 64 in the demo)")  # fmt: skip
    add("--limit", type=number(int), metavar="N",
        help="use N training images, and the same share of the others; without val/, validation images are a fifth "
        "of the N")  # fmt: skip
    add("--test-split", choices=("test", "val"), default="test",
        help="val: test on the images in val/, and hold out training images for validation")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes a GPU if there is one")
    add("--precision", choices=("auto", *DTYPES), default="fp32",
        help="precision of the features, in training and inference; bf16 is up to twice as fast on hardware that "
        "supports it, but answers depend a little on the machine; auto: bf16 if supported")  # fmt: skip
    add("--seed", type=number(int, -1, 2**32), default=0, help="random seed of the classifier and the batches' order")
    add("--output", type=Path, metavar="DIR",
        help="receives checkpoints/ and plots/ (default: here, or runs/NAME for a folder NAME)")  # fmt: skip
    add("--cache", type=Path, default=Path("data"), metavar="DIR", help="keeps CIFAR-10 and the features")
    add("--demo", action="store_true", help="drawn shapes and random backbones, into demo/: a test of the installation")
    args = parser.parse_args(argv)
    if args.demo and args.data != "cifar10":
        parser.error("--demo draws its own images: leave out --data")
    args.models = list(dict.fromkeys(args.models))
    for name in args.models:
        models.find_backbone(name)  # raises ValueError if there is none
    if args.demo:
        args.data, args.output = "demo", (args.output or Path()) / "demo"
        args.cache, args.image_size = args.output, args.image_size or 64
    elif args.data == "cifar10":
        args.output, args.image_size = args.output or Path(), args.image_size or CIFAR10_SIZE
    else:
        args.data = os.path.abspath(os.path.expanduser(args.data))  # also without a trailing slash
        args.output = args.output or Path("runs", Path(args.data).name)
    return args


@dataclass
class TrainedModel:
    """A trained model, its row of results.json, and what it was trained on."""

    model: models.TransferModel
    row: dict
    logits: dict[str, Tensor]  # for the "val" and "test" images, (N, classes), NaN for those that cannot be read
    features: dict[str, Extraction]  # of the frozen backbone, for "train", "val" and "test"
    failed: list = field(default_factory=list)  # the optional steps that did not work


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    args.precision = gather(pick_precision(args.precision, device))[0]
    if args.precision == "bf16" and not computes_in_bf16(device):
        print("no bf16 instructions are known here: expect up to 40 times the time of fp32", file=sys.stderr)
    provenance = {"data": args.data, **results.provenance(sys.argv[1:] if argv is None else argv, device)}
    print(f"{args.data}: {', '.join(args.models)} on {provenance['device']} in {args.precision}, into {args.output}/")
    with output_folder(args.output):
        data = load_data(args.data, args.cache, args.limit, test_split=args.test_split)
        counts = f"{len(data.train):,} for training, {len(data.val):,} for validation, {len(data.test):,} for testing"
        print(f"{count_of(len(data.classes), 'class')}, images: {counts}", *data.notes, sep="\n")
        if is_first():
            data.save_split(args.output / "checkpoints" / f"split-{data.identity['split']}.json")
        rows = results.read_results(args.output / "plots" / "results.json") if is_first() else {}
        trained = train_models(args, data, device, provenance, rows)
        if not trained:
            return 2
        all_trained = len(trained) == len(args.models) * (2 if args.fine_tune else 1)
        complete = all_trained and not any(each.failed for each in trained)
        if is_first():
            for each in trained if all_trained else ():  # if a model failed, the same command needs these files
                (args.output / "checkpoints" / f"{each.model.name}.resume").unlink(missing_ok=True)
            complete &= summarize(trained, rows, data, args.output)
    best = results.best_model([each.row for each in trained])["model"]
    checkpoint = args.output / "checkpoints" / f"{best}.pt"
    print(f"\nplots are in {args.output / 'plots'}/; next: python inference.py --checkpoint {checkpoint} IMAGE...")
    return 0 if complete else 1


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Locks the folder, because two runs would mix their files. Removes what a killed run has left behind."""
    if not is_first():
        yield
        return
    with locked(folder / "checkpoints" / ".lock", wait=False):
        for leftover in [*folder.glob("checkpoints/.*.part"), *folder.glob("plots/.*.part")]:
            leftover.unlink()
        yield


def train_models(
    args: argparse.Namespace, data: Data, device: torch.device, provenance: dict, rows: dict[str, dict]
) -> list[TrainedModel]:
    """Trains every model, and fine-tunes it if asked to. Each is saved as soon as it is trained."""
    trained = []
    for name in args.models:
        what = f"training {name}"
        try:
            frozen = train_classifier(name, data, args, device)
            save(frozen, data, provenance, rows, device, args.output)
            trained.append(frozen)
            if args.fine_tune:
                what = f"fine-tuning {name}"
                tuned = fine_tune(frozen, data, args, device)
                save(tuned, data, provenance, rows, device, args.output)
                trained.append(tuned)
        except (OSError, ValueError, RuntimeError, ArithmeticError) as error:
            # the other processes would wait for this one, or nobody reads what is printed
            if world_size() > 1 or isinstance(error, BrokenPipeError):
                raise
            print_failure(what, error)
    return trained


def new_model(name: str, data: Data, args: argparse.Namespace, seed: int) -> models.TransferModel:
    """A model with a random classifier. A backbone that accepts images of one size only gets that size."""
    torch.manual_seed(seed)
    try:
        model = models.TransferModel(name, data.classes, args.image_size, pretrained=not args.demo)
    except ValueError as error:
        torch.manual_seed(seed)
        model = models.TransferModel(name, data.classes, pretrained=not args.demo)
        print(f"{first_line(error)}; using {model.preprocessing['image_size']}")
    if args.demo:
        models.set_statistics(model, data.train.items[:128])
    model.precision, model.views = args.precision, args.views
    return model


def extract(
    model: models.TransferModel, data: Data, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Extraction], dict[str, Tensor]]:
    """The features and labels of the readable images of each part. Raises ValueError if too few can be read."""
    features, readable = {}, {}
    for part, images in data.parts.items():
        features[part] = extract_features(model, images.items, images.ids, args.cache / "features", device)
        readable[part] = images.subset(features[part].readable)
    if empty := classes_without_images(data.classes, readable["train"]):
        raise ValueError(f"no training image of {empty} can be read")
    if not len(readable["val"]) or not len(readable["test"]):
        raise ValueError("no image for validation or testing can be read")
    empty = classes_without_images(data.classes, readable["test"])
    if empty and empty != classes_without_images(data.classes, data.test):
        print(f"{model.name}: no test image of {empty} can be read", file=sys.stderr)
    return features, {part: images.labels for part, images in readable.items()}


def train_classifier(name: str, data: Data, args: argparse.Namespace, device: torch.device) -> TrainedModel:
    """Trains the classifier of a frozen backbone on its features, once for each seed. Keeps the first."""
    model = new_model(name, data, args, args.seed)
    for written in [model.name, f"{model.name}_finetuned"] if args.fine_tune else [model.name]:
        results.check_replacement(args.output / "checkpoints" / f"{written}.pt", model, data, args.data)
    features, labels = extract(model, data, args, device)
    recipe = replace(
        RECIPE, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, class_weights=args.class_weights
    )
    precision = pick_precision("auto", device)  # of the steps; the weights and the answers are fp32

    def batches(part: str, seed: int | None = None) -> Batches:
        load = feature_loader(features[part].features, device)
        return Batches(load, labels[part], recipe.batch_size, device, seed)

    def train(seed: int) -> tuple[dict[str, Tensor], list[dict], float]:
        classifier = (model if seed == args.seed else new_model(name, data, args, seed)).classifier.to(device)
        torch.manual_seed(seed)
        start, title = synchronized_time(device), f"{name} classifier"
        parts = batches("train", seed), batches("val")
        with threads(1):  # these matrices are too small to gain from more
            history, val_logits = train_utils.fit_classifier(classifier, *parts, recipe, precision, title)
            logits = {"val": val_logits, "test": train_utils.compute_logits(classifier, batches("test"))[0]}
        return logits, history, synchronized_time(device) - start

    runs = [train(seed) for seed in range(args.seed, args.seed + args.seeds)]
    logits, history, seconds = runs[0]
    accuracies = {part: [loss_and_accuracy(each[part], labels[part])[1] for each, *_ in runs] for part in logits}
    row = {
        "weights": "random" if args.demo else weights_name(models.find_backbone(name).name),
        "seed": args.seed,
        "features": results.extraction_row(features),
        "seconds": {"features": sum(features[part].seconds for part in ("train", "val")), "classifier": seconds},
        **training_row(model, recipe, precision, history, len(labels["train"]), accuracies),
    }
    for_unfamiliarity = features["train"].features, labels["train"], features["val"].features, logits["val"]
    logits = {part: with_unread(rows, features[part].readable, len(data.parts[part])) for part, rows in logits.items()}
    trained = TrainedModel(model.to(device), row, logits, features)
    with attempt("detection of unfamiliar images", trained.failed):
        model.unfamiliarity = fit_unfamiliarity(*for_unfamiliarity)
    return trained


def training_row(
    model: models.TransferModel, recipe: Recipe, precision: str, history: list, train_images: int, accuracies: dict
) -> dict:
    """What a row of results.json says of a training. Accuracies are a list over the seeds for "val" and "test"."""
    return {
        "recipe": asdict(recipe),
        "precision": {"features": model.precision, "training": precision},
        "history": history,
        "train_images": train_images,
        "accuracy_by_seed": accuracies,
    }


def fine_tune(frozen: TrainedModel, data: Data, args: argparse.Namespace, device: torch.device) -> TrainedModel:
    """Trains the backbone as well, starting from the trained classifier. Resumes a training that was interrupted."""
    model = copy.deepcopy(frozen.model)
    model.unfreeze()
    train, val = (data.parts[part].subset(frozen.features[part].readable) for part in ("train", "val"))
    if min(len(train), len(val)) < world_size():
        raise ValueError(f"too few images to fine-tune with {world_size()} processes: start fewer")
    precision = "fp32" if device.type == "cpu" else pick_precision("auto", device)  # CPUs train slower in bf16
    recipe = replace(FINE_TUNING, epochs=args.fine_tune, lr=args.fine_tune_lr, class_weights=args.class_weights)
    recipe = replace(recipe, batch_size=min(args.batch_size, recipe.batch_size))
    # the key holds the settings of classifier training, not the weights, which a GPU may not reproduce bit for bit
    settings = asdict(recipe), precision, args.seed, model.preprocessing, model.views, data.identity
    settings += frozen.row["recipe"], frozen.row["precision"], frozen.row["features"]["unreadable"]
    key = content_hash(model.features.state_dict(), settings)
    file = args.output / "checkpoints" / f"{model.name}.resume"
    if progress := gather(train_utils.load_progress(file, key) if is_first() else None)[0]:
        print(f"{model.name}: resuming after {len(progress['history'])} of {recipe.epochs} epochs")

    def save_progress(training: train_utils.Training) -> None:
        if is_first():
            with attempt(file, failed=[]):
                save_tensors(file, {"key": key, **training.state_dict()})

    known = frozen.features["train"].features
    training = train_utils.fine_tune(
        model.cpu(), train, val, recipe, precision, device, args.seed, known, progress, save_progress
    )
    unread = {str(error) for errors in gather(training.train.load.errors) for error in errors.values()}
    train_images, logits = len(train) - len(unread), {}
    fast = fastest_copy(model, device, len(val) + len(data.test))
    for part in ("val", "test"):
        logits[part], errors = outputs_of(fast, data.parts[part].items, f"{model.name} answers")
        unread |= {str(error) for error in errors}
    loss, frozen_loss = (calibrated_loss(each["val"], data.val.labels) for each in (logits, frozen.logits))
    if not loss < gather(frozen_loss)[0]:  # also if it is not a number
        print(f"{model.name}: no better on validation than the frozen model, whose weights are kept")
        model, logits = copy.deepcopy(frozen.model), frozen.logits
        model.fine_tuned = True
    accuracies = {part: [loss_and_accuracy(rows, data.parts[part].labels)[1]] for part, rows in logits.items()}
    row = {
        **frozen.row,
        "features": {**frozen.row["features"], "unreadable": sorted(unread | {*frozen.row["features"]["unreadable"]})},
        "seconds": {**frozen.row["seconds"], "fine_tuning": sum(epoch["seconds"] for epoch in training.history)},
        **training_row(model, recipe, precision, training.history, train_images, accuracies),
    }
    return TrainedModel(model, row, logits, frozen.features)


def save(
    trained: TrainedModel, data: Data, provenance: dict, rows: dict[str, dict], device: torch.device, output: Path
) -> None:
    """Saves the model and its row of results.json, then measures its speed and draws its plots.

    Only saving the checkpoint may raise; what else fails goes into `trained.failed`.
    """
    model, failed, plots = trained.model, trained.failed, output / "plots"
    model.temperature = fit_temperature(trained.logits["val"], data.val.labels)
    parts = [(trained.logits[part], data.parts[part].labels) for part in ("val", "test")]
    trained.row = row = {**trained.row, **provenance, **data.identity, **results.model_row(model, *parts)}
    if not is_first():
        model.cpu()
        return
    checkpoint, file = output / "checkpoints" / f"{model.name}.pt", plots / "results.json"
    metrics = {key: value for key, value in row.items() if key not in ("history", "correct")}
    models.save_checkpoint(checkpoint, model, metrics)
    row["checkpoint_bytes"] = checkpoint.stat().st_size
    rows[model.name] = row
    with attempt(file, failed):
        results.write_results(file, rows)
    cached = " (cached)" if row["features"]["cached"] else ""
    seconds = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in row["seconds"].items())
    trainable, total = (row["parameters"][kind] / 1e6 for kind in ("trainable", "total"))
    print(f"{model.name}: test accuracy {row['test_accuracy']:.2%}, {seconds}{cached}")
    print(f"{model.name}: {trainable:.2f} of {total:.2f} million parameters trained")
    with attempt("measurement of speed", failed):
        row.update(measure_cost(model, device))
    with attempt(file, failed):
        results.write_results(file, rows)
    with attempt(f"plots of {model.name}", failed):
        color = visualization.colors(rows)[model.backbone]
        visualization.draw_model(row, data.test.items, data.test.labels, trained.logits["test"], color, plots)
    model.cpu()  # makes room on the GPU for the next one


def summarize(trained: list[TrainedModel], rows: dict[str, dict], data: Data, output: Path) -> bool:
    """Compares the models with each other and with earlier models, checks the data, and lists unreadable images.

    Returns whether every step worked, all images were readable, and every training ran for all epochs.
    """
    new, plots = [each.row for each in trained], output / "plots"
    compared = results.comparable(rows, new[0])

    best, report, failed = trained[new.index(results.best_model(new))], None, []
    if len(trained) > 1:
        with attempt("ensemble", failed):
            logits = {part: [each.logits[part] for each in trained] for part in ("val", "test")}
            compared["ensemble"] = results.ensemble_row(new, logits, {part: data.parts[part].labels for part in logits})
            results.write_results(plots / "results.json", rows, compared["ensemble"])
    with attempt("comparison", failed):
        print()
        results.print_table(results.comparison_table(list(compared.values())))
        visualization.draw_comparison(compared, visualization.colors(rows | compared), plots)
    with attempt("check of the data", failed):
        report = check_data(best, data, plots)
    with attempt("report page", failed):
        visualization.write_page(compared, new[0], report, plots)
    unreadable = sorted({reason for row in new for reason in row["features"]["unreadable"]})
    for reason in unreadable:
        print(f"left out: {printable(reason)}", file=sys.stderr)
    if unreadable:
        print(f"{count_of(len(unreadable), 'image')} cannot be read: left out", file=sys.stderr)
    return not failed and not unreadable and all(len(row["history"]) == row["recipe"]["epochs"] for row in new)


def check_data(trained: TrainedModel, data: Data, folder: Path) -> dict:
    """Finds near-duplicates and label errors. Prints a summary, writes data.json, draws a plot, returns the report."""
    parts = {part: data.parts[part].subset(found.readable) for part, found in trained.features.items()}
    features = [found.features for found in trained.features.values()]
    labels = torch.cat([images.labels for images in parts.values()])
    correct = [trained.row["correct"][i] for i in trained.features["test"].readable.tolist()]
    print("\nlooking for near-duplicates and label errors")
    with threads(1):
        logits = train_utils.out_of_sample_logits(features, labels, len(data.classes))
        report = {"model": trained.model.name, **audit(parts, features, logits, data.classes, correct)}
    with atomic_write(folder / "data.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    print(f"{summary(report)}: see {folder / 'data.json'}")
    visualization.draw_audit(report, parts, folder / f"{trained.row['plot']}_data.png")
    return report


if __name__ == "__main__":
    run_script(spmd(main), "Interrupted. Run the same command to resume.")
