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
import shlex
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
from data import CIFAR10_SIZE, Data, load_data
from engine import results
from engine.audit import audit, summary
from engine.batches import Batches, feature_loader
from engine.console import HelpFormatter, count_of, number, optional_step, pattern, print_failure, printable, run_script
from engine.device import PRECISIONS, computes_in_bf16, pick_device, pick_precision, synchronized_time, threads
from engine.distributed import is_first, of_first, with_process_group, world_size
from engine.features import Extraction, extract_features
from engine.files import atomic_write, content_hash, locked, save_tensors
from engine.metrics import calibrated_loss, fit_temperature
from engine.openvino import check_int8, fastest_copy
from engine.page import write_page
from engine.run import outputs_of
from engine.unfamiliar import fit_unfamiliarity
from train_utils import CLASSIFIER_LR_FACTOR, FINE_TUNING, RECIPE, Recipe


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    three = ["mobilenet_v2", "mobilenet_v3_large", "vgg16"]  # the quick ones first
    add("--models", nargs="+", metavar="NAME", default=three,
        help=f"{', '.join(models.BACKBONES)}, or any classification model of torchvision or timm (timm/NAME); "
        "NAME:WEIGHTS picks the weights")  # fmt: skip
    add("--data", default="cifar10", help="cifar10, DIR/CLASS/*, DIR/{train,val,test}/CLASS/*, or a table (.csv, .tsv)")
    add("--columns", nargs=2, metavar=("IMAGE", "LABEL"), help="the columns of the table, if they cannot be guessed")
    add("--epochs", type=number(int), default=RECIPE.epochs, help="epochs of classifier training")
    add("--batch-size", type=number(int), default=RECIPE.batch_size, help="images per step; small data sets get fewer, "
        f"fine-tuning at most {FINE_TUNING.batch_size}")  # fmt: skip
    add("--lr", type=number(float), default=RECIPE.lr, help="peak learning rate of classifier training (one cycle)")
    add("--class-weights", action="store_true", help="weigh images of rare classes more")
    add("--views", type=int, choices=(1, 2), default=2, help="2: features are the mean over an image and its mirror "
        "image, which gains a point or two for twice the time")  # fmt: skip
    add("--seeds", type=number(int), default=1, metavar="N",
        help="train N classifiers, report the mean, keep the first")  # fmt: skip
    add("--fine-tune", type=number(int), metavar="EPOCHS", help="then train the backbone, too: <model>_finetuned")
    add("--fine-tune-lr", type=number(float), default=FINE_TUNING.lr, metavar="LR",
        help=f"the backbone's peak learning rate; the classifier's is {CLASSIFIER_LR_FACTOR:g} times that")  # fmt: skip
    add("--image-size", type=number(int), metavar="PIXELS",
        help="side to which images are resized (default: that of the weights, mostly 224; "
        f"{CIFAR10_SIZE} for CIFAR-10, 64 in the demo)")  # fmt: skip
    add("--limit", type=number(int), metavar="N",
        help="use N training images, and the same share of the others; held-out validation images are a fifth of the "
        "N")  # fmt: skip
    add("--groups", type=pattern, metavar="REGEX",
        help="images whose paths below the data folder give the same match, or the same first parentheses, stay on one "
        "side of the split: 'patient[0-9]+' (default: a table's groups, or near-duplicates)")  # fmt: skip
    add("--test-split", choices=("test", "val"), default="test",
        help="val: test on the images in val/, and hold out training images for validation")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes a GPU if there is one")
    add("--precision", choices=("auto", *PRECISIONS), default="fp32",
        help="precision of the features, in training and inference; bf16 is up to twice as fast on hardware that "
        "supports it, but answers depend a little on the machine; auto: bf16 if supported; int8: on CPUs, with "
        "pip install openvino nncf. A fine-tuned model answers in fp32")  # fmt: skip
    add("--seed", type=number(int, -1, 2**32), default=0, help="random seed of training, not of the split")
    add("--output", type=Path, metavar="DIR",
        help="receives checkpoints/ and plots/ (default: here; runs/NAME for a folder NAME or its table)")  # fmt: skip
    add("--cache", type=Path, default=Path("data"), metavar="DIR", help="keeps CIFAR-10 and the features")
    add("--demo", action="store_true", help="drawn shapes and random backbones, into demo/: a test of the installation")
    args = parser.parse_args(argv)
    if args.demo and args.data != "cifar10":
        parser.error("--demo draws its own images: leave out --data")
    if args.demo and args.precision == "int8":
        parser.error("--demo has random weights, whose features int8 changes too much: leave out --precision")
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
        folder = os.path.dirname(args.data) if os.path.isfile(args.data) else args.data
        args.output = args.output or Path("runs", os.path.basename(folder))
    args.device = pick_device("cpu" if (args.device, args.precision) == ("auto", "int8") else args.device)
    args.precision = of_first(pick_precision(args.precision, args.device))
    return args


@dataclass
class TrainedModel:
    """A trained model and what it was trained on."""

    model: models.TransferModel
    training: dict  # what results.json says of the training
    # (N, classes) for "val" and "test" images, from the classifier of each seed; the first one is the model's
    logits: list[dict[str, Tensor]]
    features: dict[str, Extraction]  # what the frozen backbone makes of "train", "val" and "test" images
    row: dict = field(default_factory=dict)  # its row of results.json, once it is saved
    failed: list = field(default_factory=list)  # the optional steps that did not work


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.precision == "int8":
        check_int8(args.device)
    if args.precision == "bf16" and not computes_in_bf16(args.device):
        print("no bf16 instructions are known here: expect up to 40 times the time of fp32", file=sys.stderr)
    provenance = results.provenance(sys.argv[1:] if argv is None else argv, args.device)
    provenance |= {"data": args.data, "columns": args.columns, "groups": args.groups}
    print(f"{args.data}: {', '.join(args.models)} on {provenance['device']} in {args.precision}, into {args.output}/")
    with output_folder(args.output):
        data = load_data(
            args.data, args.cache, args.limit, test_split=args.test_split, groups=args.groups, columns=args.columns
        )
        counts = f"{len(data.train):,} for training, {len(data.val):,} for validation, {len(data.test):,} for testing"
        print(f"{count_of(len(data.classes), 'class')}, images: {counts}", *data.notes, sep="\n")
        if is_first():
            data.save_split(args.output / "checkpoints" / f"split-{data.identity['split']}.json")
        rows = results.read_results(args.output / "plots" / "results.json") if is_first() else {}
        trained = train_models(args, data, provenance, rows)
        all_trained = len(trained) == len(args.models) * (2 if args.fine_tune else 1)
        complete = all_trained and not any(each.failed for each in trained) and not data.unreadable
        if is_first():
            for each in trained if all_trained else ():  # if a model failed, the same command needs these files
                (args.output / "checkpoints" / f"{each.model.name}.resume").unlink(missing_ok=True)
            if trained:
                complete &= summarize(trained, rows, data, args.output)
            for reason in data.unreadable:
                print(f"left out: {printable(reason)}", file=sys.stderr)
            if data.unreadable:
                print(f"{count_of(len(data.unreadable), 'image')} cannot be read: left out", file=sys.stderr)
    if not trained:
        return 2
    best = results.best_model([each.row for each in trained])["model"]
    checkpoint = shlex.quote(str(args.output / "checkpoints" / f"{best}.pt"))
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


def train_models(args: argparse.Namespace, data: Data, provenance: dict, rows: dict[str, dict]) -> list[TrainedModel]:
    """Trains every model, and fine-tunes it if asked to. Each is saved as soon as it is trained."""
    trained = []
    for name in args.models:
        what = f"training {name}"
        try:
            frozen = train_classifier(name, data, args)
            save(frozen, data, provenance, rows, args.output)
            trained.append(frozen)
            if args.fine_tune:
                what = f"fine-tuning {name}"
                tuned = fine_tune(frozen, data, args)
                save(tuned, data, provenance, rows, args.output)
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
        print(f"{error}; using {model.preprocessing['image_size']}")
    model.preprocessing |= {"reading": data.reading} if data.reading else {}
    if args.demo:
        models.set_statistics(model, data.train.items[:128])
    model.precision, model.views = args.precision, args.views
    return model


def train_classifier(name: str, data: Data, args: argparse.Namespace) -> TrainedModel:
    """Trains the classifier of a frozen backbone on its features, once for each seed. Keeps the first."""
    model, device = new_model(name, data, args, args.seed), args.device
    origin = {"data": args.data, "content": data.content, "train_images": len(data.train)}
    for written in [model.name, f"{model.name}_finetuned"] if args.fine_tune else [model.name]:
        results.check_replacement(args.output / "checkpoints" / f"{written}.pt", model, origin, args.limit)
    print(f"{model.name}: weights {model.weights}")
    features = extract_features(model, data.parts, args.cache / "features", device)
    recipe = replace(RECIPE, **{name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "class_weights")})
    precision = pick_precision("auto", device)  # in training steps; weights and answers are fp32

    def batches(part: str, seed: int | None = None) -> Batches:
        load = feature_loader(features[part].features, device)
        return Batches(load, data.parts[part].labels, recipe.batch_size, device, seed)

    def train_one(seed: int) -> tuple[dict[str, Tensor], list[dict], float]:
        classifier = (model if seed == args.seed else new_model(name, data, args, seed)).classifier.to(device)
        torch.manual_seed(seed)
        start, title = synchronized_time(device), f"{name} classifier"
        train, val = batches("train", seed), batches("val")
        with threads(1):  # these matrices are too small to gain from more
            history, val_logits = train_utils.fit_classifier(classifier, train, val, recipe, precision, title)
            logits = {"val": val_logits, "test": train_utils.compute_logits(classifier, batches("test"))[0]}
        return logits, history, synchronized_time(device) - start

    logits, histories, seconds = zip(*map(train_one, range(args.seed, args.seed + args.seeds)), strict=True)
    extracted = features["train"], features["val"]  # test images do not count
    computed, extraction = sum(part.computed for part in extracted), sum(part.seconds for part in extracted)
    in_openvino = {"openvino": extracted[0].openvino} if extracted[0].openvino else {}
    training = {
        "weights": model.weights,
        "weights_sha256": content_hash(model.features.state_dict()),
        "seed": args.seed,
        "features": {"computed": computed, "cached": not computed, **in_openvino},
        "seconds": {"features": extraction, "classifier": seconds[0]},
        **describe(recipe, model.precision, precision, histories[0], data),
    }
    trained = TrainedModel(model.to(device), training, list(logits), features)
    with optional_step("detection of unfamiliar images", trained.failed):
        model.unfamiliarity = fit_unfamiliarity(
            features["train"].features, data.train.labels, features["val"].features, logits[0]["val"]
        )
    model.temperature = fit_temperature(logits[0]["val"], data.val.labels)
    return trained


def describe(recipe: Recipe, of_features: str, of_training: str, history: list[dict], data: Data) -> dict:
    """What a row of results.json says of a training."""
    precision = {"features": of_features, "training": of_training}
    return {"recipe": asdict(recipe), "precision": precision, "history": history, "train_images": len(data.train)}


def fine_tune(frozen: TrainedModel, data: Data, args: argparse.Namespace) -> TrainedModel:
    """Trains the backbone as well, starting from the trained classifier. Resumes a training that was interrupted."""
    model, device = copy.deepcopy(frozen.model), args.device
    model.unfreeze()
    if min(len(data.train), len(data.val)) < world_size():
        raise ValueError(f"too few images to fine-tune with {world_size()} processes: start fewer")
    precision = "fp32" if device.type == "cpu" else pick_precision("auto", device)  # CPUs train slower in bf16
    recipe = replace(FINE_TUNING, epochs=args.fine_tune, lr=args.fine_tune_lr, class_weights=args.class_weights)
    recipe = replace(recipe, batch_size=min(args.batch_size, recipe.batch_size))
    # the key holds the settings of classifier training, not the weights, which a GPU may not reproduce bit for bit
    settings = asdict(recipe), precision, args.seed, model.preprocessing, model.views, data.identity
    settings += frozen.training["recipe"], frozen.training["precision"], models.SCHEMA
    key = content_hash(model.features.state_dict(), settings)
    file = args.output / "checkpoints" / f"{model.name}.resume"
    if progress := of_first(train_utils.load_progress(file, key) if is_first() else None):
        print(f"{model.name}: resuming after {len(progress['history'])} of {recipe.epochs} epochs")

    def save_progress(training: train_utils.Training) -> None:
        if is_first():
            with optional_step(file, failed=[]):
                save_tensors(file, {"key": key, **training.state_dict()})

    known = frozen.features["train"].features
    training = train_utils.fine_tune(
        model.cpu(), data.train, data.val, recipe, precision, device, args.seed, known, progress, save_progress
    )
    fast, labels = fastest_copy(model, device, len(data.val) + len(data.test)), data.val.labels
    logits = {part: outputs_of(fast, data.parts[part].items, f"{model.name} answers") for part in ("val", "test")}
    loss, frozen_loss = (calibrated_loss(each["val"], labels) for each in (logits, frozen.logits[0]))
    if not loss < of_first(frozen_loss):  # also if it is not a number
        print(f"{model.name}: no better on validation than the frozen model, whose weights are kept")
        model, logits = copy.deepcopy(frozen.model), frozen.logits[0]
        model.fine_tuned = True
    model.temperature = fit_temperature(logits["val"], labels)
    described = {
        **frozen.training,
        "seconds": {**frozen.training["seconds"], "fine_tuning": sum(epoch["seconds"] for epoch in training.history)},
        **describe(recipe, model.precision, precision, training.history, data),
    }
    return TrainedModel(model, described, [logits], frozen.features)


def save(trained: TrainedModel, data: Data, provenance: dict, rows: dict[str, dict], output: Path) -> None:
    """Saves the model and its row of results.json, then draws its plots.

    Only saving the checkpoint may raise; what else fails goes into `trained.failed`.
    """
    model, failed, plots = trained.model, trained.failed, output / "plots"
    labels = {part: data.parts[part].labels for part in ("val", "test")}
    run = {**provenance, **data.identity}
    trained.row = row = results.build_row(run, model, trained.training, trained.logits, labels)
    model.cpu()  # makes room on the GPU for the next one
    if not is_first():
        return
    checkpoint, file = output / "checkpoints" / f"{model.name}.pt", plots / "results.json"
    models.save_checkpoint(checkpoint, model, row)
    row["checkpoint_bytes"] = checkpoint.stat().st_size
    rows[model.name] = row
    with optional_step(file, failed):
        results.write_results(file, rows)
    cached = " (cached)" if row["features"]["cached"] else ""
    seconds = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in row["seconds"].items())
    trainable, total = (row["parameters"][kind] / 1e6 for kind in ("trainable", "total"))
    print(f"{model.name}: test accuracy {row['test_accuracy']:.2%}, {seconds}{cached}")
    print(f"{model.name}: {trainable:.2f} of {total:.2f} million parameters trained")
    with optional_step(f"plots of {model.name}", failed):
        color = visualization.colors(rows)[model.backbone]
        test = data.test.items, data.test.labels, trained.logits[0]["test"]
        visualization.draw_model(row, *test, color, plots, data.reading)


def summarize(trained: list[TrainedModel], rows: dict[str, dict], data: Data, output: Path) -> bool:
    """Compares the models with each other and with earlier models, and checks the data.

    Returns whether every step worked and every training ran for all epochs.
    """
    new, plots = [each.row for each in trained], output / "plots"
    compared = {name: row for name, row in rows.items() if all(row[k] == new[0][k] for k in results.COMPARABLE)}
    best, report, failed = trained[new.index(results.best_model(new))], None, []
    if len(trained) > 1:
        with optional_step("ensemble", failed):
            labels = {part: data.parts[part].labels for part in ("val", "test")}
            compared["ensemble"] = results.ensemble_row(new, [each.logits[0] for each in trained], labels)
            results.write_results(plots / "results.json", rows, compared["ensemble"])
    with optional_step("comparison", failed):
        print()
        results.print_table(results.comparison_table(list(compared.values())))
        for sentence in results.explanations(list(compared.values())):
            print(sentence)
        visualization.draw_comparison(compared, visualization.colors(rows | compared), plots)
    with optional_step("check of the data", failed):
        report = check_data(best, data, plots)
    with optional_step("report page", failed):
        write_page(compared, new[0], report, plots)
    return not failed and all(len(row["history"]) == row["recipe"]["epochs"] for row in new)


def check_data(trained: TrainedModel, data: Data, folder: Path) -> dict:
    """Finds label errors, and tells of near-duplicates. Prints a summary, writes data.json, draws a plot."""
    features = [found.features for found in trained.features.values()]
    labels = torch.cat([images.labels for images in data.parts.values()])
    print("\nlooking for label errors")
    with threads(1):
        logits = train_utils.out_of_sample_logits(features, labels, len(data.classes))
        found = audit(data.parts, data.similar, logits, data.classes, trained.row["correct"])
    report = {"model": trained.model.name, **found}
    with atomic_write(folder / "data.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    print(f"{summary(report)}: see {folder / 'data.json'}")
    visualization.draw_audit(report, data.parts, folder / f"{trained.row['plot']}_data.png", data.reading)
    return report


if __name__ == "__main__":
    run_script(with_process_group(main), "Interrupted. Run the same command to resume.")
