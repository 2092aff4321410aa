"""Classifies images with trained checkpoints.

    python inference.py cat.jpg holiday/                    images, and all images below a folder
    python inference.py cat.jpg --checkpoint checkpoints/mobilenet_v2.pt
    python inference.py photos/ --format json > labels.jsonl
    python inference.py more_pets/ --evaluate               a folder of class folders, or a table: how many are right
    find . -name '*.jpg' | python inference.py -            paths from standard input
    python inference.py cat.jpg --explain why.png           what decided it, and the training images most like it
    python inference.py --export model.pt2 --checkpoint checkpoints/mobilenet_v2.pt      for use without this project
    python inference.py                                     a sample of the test images -> plots/predictions.png

If all checkpoints have the same classes, they form an ensemble: the mean of their log-probabilities is usually more
accurate than the best of them. Individual predictions are printed too, but not as csv.
"""

import csv
import glob
import io
import json
import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import visualization
from data import Data, load_data, load_split, trained_on
from engine.console import HelpFormatter, Progress, first_line, number, printable, run_script
from engine.device import PRECISIONS, batch_size_for, pick_device, pick_precision
from engine.distributed import is_first, shared_map, with_process_group
from engine.export import advice, export
from engine.features import known_features, most_similar
from engine.files import atomic_write
from engine.folders import find_images, not_used
from engine.images import Item, read_and_preprocess, read_for_plot
from engine.layers import averages, run_layers
from engine.metrics import accuracy_interval, class_scores
from engine.openvino import check_answers, fastest_copy
from engine.results import print_table
from engine.run import run_images
from engine.sources import read_labelled
from engine.tables import TABLES
from models import TransferModel, load_checkpoint, predictions
from visualization import PLOTTED_IMAGES

COLUMNS = ("path", "model", "label", "probability", "unfamiliar", "unsure", "error")  # what --format csv prints
WRONG_COLUMNS = ("path", "true", "label", "probability")  # what --evaluate writes of each mistake
SIMILAR_IMAGES = 5  # training images beside each image of --explain
Answer = tuple[Item, list[dict]]  # an image and its records, one for each model or for the ensemble


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH",
        help="images, folders, patterns, or - for a list of paths on standard input")  # fmt: skip
    add("--checkpoint", nargs="+", metavar="FILE", help="models, or patterns (default: checkpoints/*.pt)")
    add("--evaluate", action="store_true",
        help="PATH is a folder of class folders, or a table of labels: measure how many answers are right")  # fmt: skip
    add("--output", type=Path, default="evaluation", metavar="DIR",
        help="where --evaluate writes confusion matrices, mistakes, and MODEL_wrong.csv")  # fmt: skip
    add("--ensemble", action=BooleanOptionalAction,
        help="one answer of all models (default: if all have the same classes)")  # fmt: skip
    add("--top-k", type=number(int), default=3, metavar="K", help="labels for each image, not in csv")
    add("--threshold", type=number(float, below=1), metavar="P", help="mark answers below this probability as unsure")
    add("--format", choices=("text", "json", "csv"), default="text",
        help=f"json: one object a line; csv: {', '.join(COLUMNS)}")  # fmt: skip
    add("-0", dest="separator", action="store_const", const="\0", default="\n",
        help="paths on standard input end with NUL, as from find -print0")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help=f"draw the first {PLOTTED_IMAGES} images with their labels")
    add("--explain", type=Path, metavar="FILE", help="as --plot, with heat maps (if possible), similar training images")
    add("--data", metavar="PATH", help="where the training data are now, if moved; for --explain or without images")
    add("--cache", type=Path, default="data", metavar="DIR", help="where main_train.py keeps CIFAR-10 and the features")
    add("--export", type=Path, metavar="FILE", help="write the model for torch.export (.pt2) or ONNX (.onnx), and stop")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes a GPU if there is one")
    add("--precision", choices=("auto", *PRECISIONS), help="of the features (default: the model's)")
    args = parser.parse_args(argv)
    if args.checkpoint:  # as in `--checkpoint a.pt cat.jpg`
        args.paths += [path for path in args.checkpoint if not path.endswith(".pt")]
        files = [file for path in args.checkpoint if path.endswith(".pt") for file in matches(path)]
        args.checkpoint = list(dict.fromkeys(files))  # a pattern may match a file that is named, too
        if not args.checkpoint:
            parser.error("--checkpoint takes files that end in .pt")
    if urls := [path for path in args.paths if "://" in path]:
        parser.error(f"{urls[0]} is a URL: download the image first, for example with curl -O")
    table = len(args.paths) == 1 and Path(args.paths[0]).suffix.lower() in TABLES
    if args.evaluate and not table and (len(args.paths) != 1 or not Path(args.paths[0]).is_dir()):
        parser.error("--evaluate takes one folder, which holds a folder of images for each class, or one table")
    if args.evaluate and args.format != "text":
        parser.error(f"--evaluate prints text; it writes the wrong answers to {args.output}/MODEL_wrong.csv")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    models, skipped = load_models(args.checkpoint, args.precision)
    ensemble = pick_ensemble(models, args)
    in_int8 = "int8" in [args.precision or model.precision for model in models]  # which runs on CPUs only
    device = pick_device("cpu" if in_int8 and args.device == "auto" else args.device)
    if args.export:
        if is_first():
            export(models[0], args.export)
        size, classes = models[0].preprocessing["image_size"], len(models[0].classes)
        print(f"{args.export}: images, uint8 (B, 3, {size}, {size}) in RGB -> probabilities (B, {classes})")
        print(f"prepare {advice(models[0])}")
        return 0
    items, known, unused = choose_images(args, models)
    if args.format == "csv":
        print_csv(COLUMNS)
    answers, unreadable = [], 0
    for item, records in classify(args, device, models, ensemble, items, known):
        failed = "error" in records[0]
        unreadable += failed
        if failed or not args.evaluate:
            print_records(records, args.format)
        if not failed and (args.evaluate or len(answers) < PLOTTED_IMAGES):
            answers.append((item, records))
    if unused.total():
        print(not_used(unused), file=sys.stderr)
    if not answers and not unreadable:
        raise FileNotFoundError(f"no images in {', '.join(args.paths)}")
    if answers and is_first():
        report(args, device, models, ensemble, answers)
    return 0 if not unreadable + skipped else 1 if answers else 2


def load_models(files: list[str] | None, precision: str | None) -> tuple[list[TransferModel], int]:
    """Loads the given files, or the usable ones in checkpoints/, and counts the rest. Raises OSError or ValueError."""
    models, skipped = [], 0
    for file in files or sorted(Path("checkpoints").glob("*.pt")):
        try:
            model = load_checkpoint(file)
            check_answers(model, precision)
            models.append(model)
        except (OSError, ValueError) as error:
            if files:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            skipped += 1
    if not models:
        raise FileNotFoundError("no usable model in checkpoints/: train with main_train.py, or use --checkpoint FILE")
    return models, skipped


def pick_ensemble(models: Sequence[TransferModel], args: Namespace) -> bool:
    """Whether the models form an ensemble. Raises ValueError if they cannot do what the arguments ask for."""
    same_classes = len({model.classes for model in models}) == 1
    if not same_classes and (args.evaluate or args.ensemble):
        raise ValueError("--evaluate and --ensemble take models with the same classes: name them with --checkpoint")
    if not same_classes:
        print("the models have different classes: no ensemble", file=sys.stderr)
    if len({model.name for model in models}) < len(models):
        if args.evaluate:
            raise ValueError("--evaluate takes one checkpoint of each model: run it for one after the other")
        print(f"answers come in this order: {', '.join(str(model.path) for model in models)}", file=sys.stderr)
    if args.export and len(models) > 1:
        raise ValueError("--export takes one model: name it with --checkpoint")
    return len(models) > 1 and same_classes and args.ensemble is not False


def choose_images(args: Namespace, models: Sequence[TransferModel]) -> tuple[Iterable[Item], list[dict], Counter[str]]:
    """The images to classify, their paths, true labels and groups if known, and counts of unused files by reason."""
    skipped = Counter()
    if not args.paths:
        data = data_of(models[0], args.cache, args.data)
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:PLOTTED_IMAGES]
        images, classes = data.test.subset(order), data.classes
    elif args.evaluate:
        origin, classes = models[0].origin, models[0].classes
        images, notes = read_labelled(Path(args.paths[0]), classes, origin.get("columns"), origin.get("groups"))
        splits = {model.path.with_name(f"split-{model.origin.get('split')}.json") for model in models}
        for note in [*notes, *trained_on(splits, images)]:
            print(note, file=sys.stderr)
    else:
        return expand(args.paths, args.separator, skipped), [], skipped
    known = [{"path": path, "true": classes[label]} for path, label in zip(images.paths(), images.labels, strict=True)]
    for record, group in zip(known, images.groups or (), strict=False):
        record["group"] = group or record["path"]  # an image without a group is one of its own
    return images.items, known, skipped


@lru_cache
def data_of(model: TransferModel, cache: Path, moved: str | None) -> Data:
    """The images of the run that trained the model, in the parts in which they were then. Prints notes about them.

    `moved` is where they are now, if not where they were.
    """
    source, split, columns = (model.origin.get(key) for key in ("data", "split", "columns"))
    source = moved or source or "cifar10"
    if source not in ("cifar10", "demo") and not Path(source).exists():
        raise FileNotFoundError(f"{source}, used to train {model.name}, is not there: --data PATH says where it is now")
    if split:
        data = load_split(source, cache, model.path.with_name(f"split-{split}.json"), columns)
    else:  # saved without main_train.py
        data = load_data(source, cache, columns=columns)
    for note in data.notes:
        print(note, file=sys.stderr)
    return data


def expand(paths: Iterable[str], separator: str, skipped: Counter[str]) -> Iterator[Path]:
    """Replaces folders by the images below them, patterns by what they match, and - by the paths on standard input."""
    for path in paths:
        if path == "-":
            yield from expand(filter(None, sys.stdin.read().split(separator)), separator, skipped)
            continue
        found = []
        for match in map(Path, matches(path)):
            images, more = find_images(match) if os.path.isdir(match) else ([match], Counter())
            found += images
            skipped.update(more)
        yield from dict.fromkeys(found)  # ** matches both a folder and its files


def matches(pattern: str) -> list[str]:
    """The paths that match a pattern, or the pattern itself if it is a path or matches none."""
    prefix = pattern  # a path that exists is no pattern, nor is the beginning of one, as in "runs [v2]/*.pt"
    while prefix and not os.path.exists(prefix):
        prefix = os.path.dirname(prefix)
    return sorted(glob.glob(glob.escape(prefix) + pattern[len(prefix) :], recursive=True)) or [pattern]


def classify(
    args: Namespace,
    device: torch.device,
    models: list[TransferModel],
    ensemble: bool,
    items: Iterable[Item],
    known: list[dict],
) -> Iterator[Answer]:
    """Yields each image with its records, completed by its path and true label, if these are known, and "unsure"."""
    precision = args.precision and pick_precision(args.precision, device)
    fast = [fastest_copy(model, device, len(known), precision) for model in models]
    work = partial(predictions, fast, top_k=args.top_k, ensemble=ensemble)
    with Progress(len(known) or None, "inference", disable=sys.stdout.isatty() and not args.evaluate) as bar:
        for i, (item, records) in enumerate(shared_map(work, items, batch_size_for(device))):
            for record in with_models(records):
                if known:
                    record |= known[i]
                if args.threshold and "label" in record:
                    record["unsure"] = record["probability"] < args.threshold
            yield item, records
            bar.update()


def with_models(records: list[dict]) -> list[dict]:
    """The records of an image; before an ensemble's record those of its models."""
    return [one for record in records for one in (*record.get("models", ()), record)]


def print_records(records: list[dict], format: str) -> None:
    """Prints the records of one image as text, JSON lines or CSV."""
    for record in records:
        if format == "json":
            print(json.dumps(record))
        elif format == "csv":
            print_csv([record.get(column) for column in COLUMNS])
        elif "error" in record:
            print(f"error: {printable(record['error'])}", file=sys.stderr)
        else:
            name = f"{record['model']}: " if len(records) > 1 else ""
            print(f"{printable(record['path'])}: {name}{answer_text(record)}")


def print_csv(row: Sequence[object]) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerow(row)


def answer_text(record: dict) -> str:
    text = ", ".join(f"{printable(guess['label'])} {guess['probability']:.1%}" for guess in record["top"])
    text += "".join(f", {mark}" for mark in ("unfamiliar", "unsure") if record.get(mark))
    if each := ", ".join(f"{one['model']}: {printable(one['label'])}" for one in record.get("models", ())):
        text += f" ({each})"
    if "true" in record:
        text += " - right" if record["true"] == record["label"] else f" - wrong, {printable(record['true'])}"
    return text


def evaluate(records: list[dict], classes: tuple[str, ...], output: Path, reading: dict | None) -> None:
    """Prints the metrics of one model's records. Writes its confusion matrix, its mistakes and a list of them."""
    name, names = records[0]["model"], [printable(label) for label in classes]
    index = {label: i for i, label in enumerate(classes)}
    predicted = torch.tensor([index[record["label"]] for record in records])
    labels = torch.tensor([index[record["true"]] for record in records])
    scores, right = class_scores(predicted, labels, len(classes)), (predicted == labels).float()
    groups = [record.get("group", i) for i, record in enumerate(records)]
    low, high = accuracy_interval(right.tolist(), groups)
    print(f"\n{name}: {right.mean():.2%} of {len(records):,} images right, 95% interval {low:.1%}-{high:.1%}")
    table, images = [["class", "images", "precision", "recall", "f1"]], labels.bincount(minlength=len(classes)).tolist()
    for label, count, precision, recall, f1 in zip(names, images, *scores["per_class"].values(), strict=True):
        figures = [f"{precision:.1%}", f"{recall:.1%}", f"{f1:.3f}"] if count else [""] * 3
        table.append([label, f"{count:,}", *figures])
    print_table(table)
    wrong = [record for record in records if record["label"] != record["true"]]
    wrong.sort(key=lambda record: -record["probability"])
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, WRONG_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(wrong)
    with atomic_write(output / f"{name}_wrong.csv") as file:
        file.write(table.getvalue().encode(errors="surrogateescape"))
    visualization.save(visualization.plot_confusion(name, scores["confusion"], names), output / f"{name}_confusion.png")
    mistakes = ((Path(r["path"]), printable(r["true"]), printable(r["label"]), r["probability"]) for r in wrong)
    if figure := visualization.plot_mistakes(mistakes, reading):
        visualization.save(figure, output / f"{name}_mistakes.png")


def report(
    args: Namespace, device: torch.device, models: list[TransferModel], ensemble: bool, answers: list[Answer]
) -> None:
    """Evaluates, draws and explains the answers, as the arguments ask for."""
    reading = models[0].preprocessing.get("reading")
    if args.evaluate:
        for records in zip(*(with_models(records) for _, records in answers), strict=True):
            evaluate(records, models[0].classes, args.output, reading)
        print(f"\nconfusion matrices, mistakes and lists of the wrong ones are in {args.output}/")
    elif not args.paths and args.format == "text":
        correct = sum(records[0]["label"] == records[0]["true"] for _, records in answers)
        name = f" ({models[0].name})" if len(models) > 1 and not ensemble else ""
        print(f"{correct} of {len(answers)} right{name}")
    shown = [(item, records[0], records[0].get("models", records)) for item, records in answers[:PLOTTED_IMAGES]]
    if args.explain:
        best = max(range(len(models)), key=lambda i: models[i].origin.get("val_accuracy", 0))
        explain(args, device, models[best], [(item, by_model[best]) for item, _, by_model in shown])
    if plot := args.plot or (None if args.paths else Path("plots/predictions.png")):
        names = [f"{model.label}: " for model in models]
        captioned = [(item, caption(first, zip(names, by_model, strict=True))) for item, first, by_model in shown]
        if figure := visualization.plot_predictions(captioned, reading):
            visualization.save(figure, plot)
            print(f"{plot} shows images with their answers", file=sys.stderr)


def caption(record: dict, answers: Iterable[tuple[str, dict]]) -> str:
    """A line for each answer, after its prefix. If the true label is known, it comes first, with a mark."""
    lines = [f"{prefix}{printable(one['label'])} {one['probability']:.0%}" for prefix, one in answers]
    if "true" in record:
        mark = "✓" if record["label"] == record["true"] else "✗"
        lines.insert(0, f"{mark} {printable(record['true'])}")
    return "\n".join(lines)


def explain(args: Namespace, device: torch.device, model: TransferModel, answers: list[tuple[Item, dict]]) -> None:
    """Draws, for images with the model's records, heat maps of the labels and the most similar training images."""
    reading, size = model.preprocessing.get("reading"), model.preprocessing["image_size"]
    images, records = zip(*islice(read_for_plot(answers, reading, size), PLOTTED_IMAGES), strict=True)
    rows = [[(image, caption(one, [("", one)]), None)] for image, one in zip(images, records, strict=True)]
    if isinstance(model.features, torch.nn.Sequential):
        model.to(device)
        for row, image, record in zip(rows, images, records, strict=True):
            batch, label = read_and_preprocess(image, model.preprocessing, device), model.classes.index(record["label"])
            row.append((image, "what decided it", heat_map(model, batch, label)))
    try:
        for row, similar in zip(rows, similar_training_images(model, images, args, device), strict=True):
            row += similar
    except (OSError, ValueError) as error:
        print(f"{args.explain} shows no similar training images: {first_line(error)}", file=sys.stderr)
    visualization.save(visualization.plot_images(rows, 1.9, fontsize=11), args.explain)
    print(f"{args.explain} explains answers of {model.name}", file=sys.stderr)


def heat_map(model: TransferModel, image: Tensor, label: int) -> np.ndarray:
    """How much each place of the last maps supports the label, from 0 to 1: (1, 3, H, W) -> (h, w)

    Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391). The backbone must be a sequence of layers.
    """
    maps, levels = run_layers(model.features, model.levels, image)
    maps.requires_grad_()
    logits = model.classifier(torch.cat([levels, averages(maps, 1)], dim=1))
    [gradient] = torch.autograd.grad(logits[0, label], maps)
    heat = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu()[0]
    return (heat / heat.max().clamp(1e-9)).detach().cpu().numpy()


def similar_training_images(
    model: TransferModel, images: Sequence[Item], args: Namespace, device: torch.device
) -> Iterator[list[tuple]]:
    """Yields each image's most similar training images. Raises OSError or ValueError if these are not known."""
    data, cache = data_of(model, args.cache, args.data), args.cache / "features"
    device = torch.device("cpu") if model.precision == "int8" else device  # also with --precision fp32
    features, known = known_features(model, data.train.ids, cache, device)
    if not len(known):
        raise FileNotFoundError(f"their features are not in {cache}; those of other versions do not count")
    train, fast = data.train.subset(known), fastest_copy(model, device)
    rows = torch.cat([batch.outputs[0] for batch in run_images([fast], images, TransferModel.forward_features)])
    labels, reading = [printable(data.classes[label]) for label in train.labels], model.preprocessing.get("reading")
    for found in most_similar(model.cpu(), rows, features, SIMILAR_IMAGES):
        captioned = [(train.items[i], f"{labels[i]}, {cosine:.2f}") for i, cosine in found]
        yield [(image, caption, None) for image, caption in read_for_plot(captioned, reading)]


if __name__ == "__main__":
    run_script(with_process_group(main))
