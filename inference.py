"""Classifies images with trained checkpoints.

    python inference.py cat.jpg holiday/                    images, and all images below a folder
    python inference.py cat.jpg --checkpoint checkpoints/mobilenet_v2.pt
    python inference.py photos/ --format json > labels.jsonl
    python inference.py more_pets/ --evaluate               a folder of class folders: how many are right
    find . -name '*.jpg' | python inference.py -            paths from standard input
    python inference.py cat.jpg --explain why.png           what decided it, and the training images most like it
    python inference.py --export model.pt2 --checkpoint checkpoints/mobilenet_v2.pt      for use without this project
    python inference.py                                     a sample of the test images -> plots/predictions.png

All checkpoints with the same classes form an ensemble: the mean of their log-probabilities is more accurate than the
best of them. Individual predictions are printed too.
"""

import argparse
import csv
import glob
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data import class_folders, find_images, labelled_images, load_data, not_used
from engine.console import HelpFormatter, Progress, first_line, positive, printable, run_script
from engine.device import DTYPES, batch_size_for, pick_device, pick_precision
from engine.distributed import is_first, shared_map, spmd
from engine.export import export
from engine.fast import fast_copy
from engine.features import extract_features, most_similar
from engine.files import atomic_write
from engine.images import Item, read_for_plot
from engine.metrics import class_scores, wilson_interval
from engine.run import heat_map, predictions, run_images
from models import TransferModel, load_checkpoint

COLUMNS = ("path", "model", "label", "probability", "unfamiliar", "unsure", "error")  # of --format csv
SAMPLE = 12  # images in plots/predictions.png and of --explain
SIMILAR = 5  # training images beside each image of --explain


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", default=None,
        help="images, folders, patterns, or - for a list of paths on standard input")  # fmt: skip
    add("--checkpoint", nargs="+", metavar="FILE", help="models, or patterns (default: checkpoints/*.pt)")
    add("--evaluate", action="store_true", help="PATH is a folder of class folders: measure how many answers are right")
    add("--output", type=Path, default=Path("evaluation"), metavar="DIR",
        help="of --evaluate: confusion matrices, mistakes, and MODEL_wrong.csv")  # fmt: skip
    add("--ensemble", action=argparse.BooleanOptionalAction,
        help="one answer of all models (default: if all have the same classes)")  # fmt: skip
    add("--top-k", type=positive(int), default=3, metavar="K", help="labels for each image")
    add("--threshold", type=positive(float, below=1), metavar="P", help="mark answers below this probability as unsure")
    add("--format", choices=("text", "json", "csv"), default="text",
        help=f"json: one object a line; csv: {', '.join(COLUMNS)}")  # fmt: skip
    add("-0", dest="separator", action="store_const", const="\0", default="\n",
        help="paths on standard input end with NUL, as from find -print0")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help=f"draw the first {SAMPLE} images with their labels")
    add("--explain", type=Path, metavar="FILE",
        help=f"draw the first {SAMPLE} images with heat maps and the most similar training images")  # fmt: skip
    add("--cache", type=Path, default=Path("data"), metavar="DIR",
        help="where main_train.py keeps CIFAR-10 and the features")  # fmt: skip
    add("--export", type=Path, metavar="FILE", help="write the model for torch.export (.pt2) or ONNX (.onnx), and stop")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes a GPU if there is one")
    add("--precision", choices=("auto", *DTYPES), help="of the features (default: that of the model's training)")
    args = parser.parse_args(argv)
    if args.checkpoint:  # as in `--checkpoint a.pt cat.jpg`
        args.paths += [path for path in args.checkpoint if not path.endswith(".pt")]
        patterns = [path for path in args.checkpoint if path.endswith(".pt")]
        args.checkpoint = [file for pattern in patterns for file in matches(pattern)]
        if not args.checkpoint:
            parser.error("--checkpoint takes files that end in .pt")
    for path in args.paths:
        if "://" in path:
            parser.error(f"{path} is a URL: download the image first, for example with curl -O")
    if args.evaluate and (len(args.paths) != 1 or not Path(args.paths[0]).is_dir()):
        parser.error("--evaluate takes one folder, which holds a folder of images for each class")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    models, skipped = load_models(args.checkpoint)
    ensemble = pick_ensemble(models, args)
    if args.export:
        return export_model(models, args.export)
    images = choose_images(args, models[0])
    answered = answer(args, models, ensemble, images, device)
    if images.not_used.total():
        print(not_used(images.not_used), file=sys.stderr)
    if not answered.good + answered.bad:
        raise FileNotFoundError(f"no images in {', '.join(args.paths)}")
    if is_first():
        report(args, models, ensemble, answered, device)
    return 0 if not answered.bad + skipped else 1 if answered.good else 2


def load_models(files: list[str] | None) -> tuple[list[TransferModel], int]:
    """Loads the given checkpoints, or all in checkpoints/. Returns the models and the number of skipped files.

    Raises OSError or ValueError if a given file cannot be loaded, FileNotFoundError if there is no model. Unusable
    files in checkpoints/ are reported and skipped.
    """
    models, skipped = [], 0
    for file in files or sorted(Path("checkpoints").glob("*.pt")):
        try:
            models.append(load_checkpoint(file))
        except (OSError, ValueError) as error:
            if files:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            skipped += 1
    if not models:
        raise FileNotFoundError(
            "no model in checkpoints/: train with main_train.py, or name one with --checkpoint FILE"
        )
    return models, skipped


def pick_ensemble(models: Sequence[TransferModel], args: argparse.Namespace) -> bool:
    """Whether the models form an ensemble. Raises ValueError if they cannot do what the arguments ask for."""
    same_classes = len({model.classes for model in models}) == 1
    if not same_classes and (args.evaluate or args.ensemble):
        raise ValueError("--evaluate and --ensemble take models with the same classes: name them with --checkpoint")
    if not same_classes:
        print("the models have different classes: no ensemble", file=sys.stderr)
    if args.evaluate and len({model.name for model in models}) < len(models):
        raise ValueError("--evaluate takes one checkpoint of each model: run it for one after the other")
    return len(models) > 1 and same_classes and args.ensemble is not False


def export_model(models: Sequence[TransferModel], file: Path) -> int:
    if len(models) > 1:
        raise ValueError("--export takes one model: name it with --checkpoint")
    [model], size = models, models[0].preprocessing["image_size"]
    if is_first():
        export(model, file)
    print(f"{file}: images, uint8 (B, 3, {size}, {size}) in RGB -> probabilities (B, {len(model.classes)})")
    return 0


# ----------------------------------------------------------------------------------------------- which images


@dataclass
class Chosen:
    """The images to classify."""

    items: Iterable[Item]
    labels: list[str] | None  # their true labels, if these are known
    names: list[str]  # of images that are no files
    not_used: Counter[str]  # numbers of other files, by reason


def choose_images(args: argparse.Namespace, model: TransferModel) -> Chosen:
    """The images that the arguments name, or a sample of the test images."""
    if not args.paths:
        data = load_data(model.metrics.get("data", "cifar10"), args.cache)
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        sample = data.test.subset(order)
        return Chosen(sample.items, [data.classes[label] for label in sample.labels], sample.names, Counter())
    if not args.evaluate:
        not_used = Counter()
        return Chosen(expand(args.paths, args.separator, not_used), None, [], not_used)
    folder = Path(args.paths[0])
    names, not_used = class_folders(folder)
    if unknown := sorted(set(names) - set(model.classes)):
        raise ValueError(f"{folder} has folders that are no classes of the model: {', '.join(unknown[:5])}")
    images, more = labelled_images(folder, model.classes, folder)
    return Chosen(images.items, [model.classes[label] for label in images.labels], images.names, not_used + more)


def expand(paths: Iterable[str], separator: str, not_used: Counter[str]) -> Iterator[Path]:
    """Replaces folders by the images below them, patterns by what they match, and - by the paths on standard input."""
    for path in paths:
        if path == "-":
            yield from expand((line for line in sys.stdin.read().split(separator) if line), separator, not_used)
            continue
        found = []
        for match in map(Path, matches(path)):
            images, skipped = find_images(match) if match.is_dir() else ([match], Counter())
            found += images
            not_used.update(skipped)
        yield from dict.fromkeys(found)  # ** matches folders and their files


def matches(pattern: str) -> list[str]:
    """The paths that match a pattern, or the pattern itself if it is a path or matches none."""
    return [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True)) or [pattern]


# ---------------------------------------------------------------------------------------------------- answers


@dataclass
class Answered:
    """What is kept of the answers."""

    shown: list[tuple[Item, list[dict]]]  # the first images and their records, for the plots
    by_model: dict[str, list[dict]]  # for --evaluate: every record of each model
    good: int = 0
    bad: int = 0  # images that cannot be read
    correct: int = 0


def answer(
    args: argparse.Namespace, models: list[TransferModel], ensemble: bool, images: Chosen, device: torch.device
) -> Answered:
    """Classifies the images and prints the records as they come."""
    precision = args.precision and pick_precision(args.precision, device)
    fast = [fast_copy(model, device, precision) for model in models]
    printer, answered = Printer(args.format, len(models) > 1), Answered([], {})
    records_of = shared_map(
        lambda items: predictions(fast, items, args.top_k, ensemble), images.items, batch_size_for(device)
    )
    total = len(images.labels) if images.labels else None
    with Progress(total, "inference", disable=sys.stdout.isatty() and not args.evaluate) as bar:
        for i, (item, records) in enumerate(records_of):
            bar.update()
            every = [one for record in records for one in (record, *record.get("models", ()))]
            for record in every:
                record["path"] = record["path"] or images.names[i]
                if images.labels:
                    record["true"] = images.labels[i]
                if args.threshold and "label" in record:
                    record["unsure"] = record["probability"] < args.threshold
            if "error" in records[0]:
                answered.bad += 1
                printer.print(records)
                continue
            answered.good += 1
            answered.correct += records[0]["label"] == records[0].get("true")
            if args.evaluate:
                for record in every:
                    answered.by_model.setdefault(record["model"], []).append(record)
            else:
                printer.print(records)
            if len(answered.shown) < SAMPLE:
                answered.shown.append((item, records))
    return answered


class Printer:
    """Prints records as text, JSON lines or CSV."""

    def __init__(self, format: str, several_models: bool):
        self.format, self.several_models = format, several_models
        if format == "csv":
            self.table = csv.DictWriter(sys.stdout, COLUMNS, extrasaction="ignore")
            self.table.writeheader()

    def print(self, records: Iterable[dict]) -> None:
        for record in records:
            if self.format == "json":
                print(json.dumps(record))
            elif self.format == "csv":
                self.table.writerow(record)
            elif "error" in record:
                print(f"error: {printable(record['error'])}", file=sys.stderr)
            else:
                print(self.line(record))

    def line(self, record: dict) -> str:
        guesses = ", ".join(f"{printable(guess['label'])} {guess['probability']:.1%}" for guess in record["top"])
        marks = "".join(f", {mark}" for mark in ("unfamiliar", "unsure") if record.get(mark))
        each = ", ".join(f"{one['model']}: {printable(one['label'])}" for one in record.get("models", ()))
        name = f"{record['model']}: " if self.several_models and not each else ""
        verdict = ""
        if "true" in record:
            verdict = " - right" if record["true"] == record["label"] else f" - wrong, {printable(record['true'])}"
        return f"{printable(record['path'])}: {name}{guesses}{marks}{f' ({each})' if each else ''}{verdict}"


# ---------------------------------------------------------------------------------------------- after the last


def report(
    args: argparse.Namespace, models: list[TransferModel], ensemble: bool, answered: Answered, device: torch.device
) -> None:
    """Prints and draws what the arguments ask for, after all images are classified."""
    for records in answered.by_model.values():
        evaluate(records, models[0].classes, args.output)
    if answered.by_model:
        print(f"\nconfusion matrices, mistakes and lists of the wrong ones are in {args.output}/")
    elif not args.paths and args.format == "text":
        name = f" ({models[0].name})" if len(models) > 1 and not ensemble else ""
        print(f"{answered.correct} of {answered.good} right{name}")
    if not answered.shown:
        return
    if args.explain:
        best = max(range(len(models)), key=lambda i: models[i].metrics.get("val_accuracy", 0))
        captioned = [(item, caption(one, [guess(one)])) for item, one in
                     ((item, model_records(records)[best]) for item, records in answered.shown)]  # fmt: skip
        explain(models[best], captioned, device, args.cache, args.explain)
        print(f"{args.explain} explains answers of {models[best].name}", file=sys.stderr)
    if plot := args.plot or (None if args.paths else Path("plots/predictions.png")):
        draw(models, answered.shown, plot)
        print(f"{plot} shows images with their answers", file=sys.stderr)


def evaluate(records: list[dict], classes: tuple[str, ...], output: Path) -> None:
    """Prints one model's metrics. Writes its confusion matrix, its mistakes and a list of them into `output`.

    `records` are the model's records from `predictions`, each with the true label as "true".
    """
    import visualization

    name, index = records[0]["model"], {label: i for i, label in enumerate(classes)}
    predicted, labels = (torch.tensor([index[record[key]] for record in records]) for key in ("label", "true"))
    scores, accuracy = class_scores(predicted, labels, len(classes)), (predicted == labels).float().mean().item()
    low, high = wilson_interval(accuracy, len(records))
    print(f"\n{name}: {accuracy:.2%} of {len(records):,} images right, 95% interval {low:.1%}-{high:.1%}")
    width = max(len(printable(label)) for label in classes)
    print(f"{'':{width}}  images  precision  recall     f1")
    columns = zip(*(scores["per_class"][score] for score in ("precision", "recall", "f1")), strict=True)
    for label, row, (precision, recall, f1) in zip(classes, scores["confusion_matrix"], columns, strict=True):
        print(f"{printable(label):{width}} {sum(row):7,} {precision:10.1%} {recall:7.1%} {f1:6.3f}")
    wrong = sorted((r for r in records if r["label"] != r["true"]), key=lambda r: -r["probability"])
    table = io.StringIO(newline="")
    lines = csv.DictWriter(table, ("path", "true", "label", "probability"), extrasaction="ignore")
    lines.writeheader()
    lines.writerows(wrong)
    with atomic_write(output / f"{name}_wrong.csv") as file:
        file.write(table.getvalue().encode(errors="surrogateescape"))
    figure = visualization.plot_confusion(name, scores["confusion_matrix"], [printable(label) for label in classes])
    visualization.save(figure, output / f"{name}_confusion.png")
    mistakes = ((Path(r["path"]), printable(r["true"]), printable(r["label"]), r["probability"]) for r in wrong)
    if figure := visualization.plot_mistakes(mistakes):
        visualization.save(figure, output / f"{name}_mistakes.png")


def model_records(records: list[dict]) -> list[dict]:
    """Each model's record of an image."""
    return records[0].get("models", records)


def guess(record: dict) -> str:
    return f"{printable(record['label'])} {record['probability']:.0%}"


def caption(record: dict, lines: list[str]) -> str:
    """Lines below an image. If its true label is known, that comes first, with a mark for right or wrong."""
    if "true" in record:
        mark = "✓" if record["label"] == record["true"] else "✗"
        lines = [f"{mark} {printable(record['true'])}", *lines]
    return "\n".join(lines)


def draw(models: list[TransferModel], shown: list[tuple[Item, list[dict]]], file: Path) -> None:
    """Draws images with their true labels, if these are known, and each model's answer."""
    import visualization  # here, because importing matplotlib takes longer than classifying an image

    captioned = []
    for item, records in shown:
        lines = [f"{model.label}: {guess(one)}" for model, one in zip(models, model_records(records), strict=True)]
        captioned.append((item, caption(records[0], lines)))
    visualization.save(visualization.plot_predictions(*read_for_plot(captioned, SAMPLE)), file)


def explain(
    model: TransferModel, captioned: list[tuple[Item, str]], device: torch.device, cache: Path, file: Path
) -> None:
    """Draws a heat map of each image's label, and the training images with the most similar features."""
    import visualization

    images, captions = read_for_plot(captioned, SAMPLE, model.preprocessing["image_size"])  # the pixels that it saw
    heat, similar = [], []
    if isinstance(model.features, torch.nn.Sequential):
        rows = torch.cat([batch.outputs[0] for batch in run_images([model.to(device)], images, heat_map)])
        side = math.isqrt(rows.shape[1])
        heat = rows.reshape(-1, side, side).numpy()
    try:
        similar = similar_training_images(model, images, device, cache)
    except (OSError, ValueError) as error:
        print(f"{file} shows no similar training images: {first_line(error)}", file=sys.stderr)
    visualization.save(visualization.plot_explanations(images, captions, heat, similar), file)


def similar_training_images(model: TransferModel, images: list[Item], device: torch.device, cache: Path) -> list[list]:
    """For each image, training images with their captions. Raises OSError or ValueError if these are not known."""
    data = load_data(model.metrics.get("data", "cifar10"), cache)
    known = extract_features(model, data.train.items, data.train.ids(), cache / "features", device, compute=False)
    if not len(known.readable):
        raise FileNotFoundError(f"their features are not in {cache / 'features'}")
    train, fast = data.train.subset(known.readable), fast_copy(model, device)
    rows = torch.cat([b.outputs[0] for b in run_images([fast], images, TransferModel.forward_features)])
    similar = []
    for found in most_similar(model.cpu(), rows, known.features, SIMILAR):
        captioned = [
            (train.items[i], f"{printable(data.classes[train.labels[i]])}, {cosine:.2f}") for i, cosine in found
        ]
        similar.append(list(zip(*read_for_plot(captioned, SIMILAR), strict=True)))
    return similar


if __name__ == "__main__":
    run_script(spmd(main))
