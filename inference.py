"""Classifies images with trained checkpoints.

    python inference.py cat.jpg holiday/                    images, and all images below a folder
    python inference.py cat.jpg --checkpoint checkpoints/mobilenet_v2.pt
    python inference.py photos/ --format json > labels.jsonl
    python inference.py more_pets/ --evaluate               a folder of class folders: how many are right
    find . -name '*.jpg' | python inference.py -            paths from standard input
    python inference.py cat.jpg --explain why.png           what decided it, and the training images most like it
    python inference.py --export model.pt2 --checkpoint checkpoints/mobilenet_v2.pt      for use without this project
    python inference.py                                     a sample of the test images -> plots/predictions.png

Several checkpoints with the same classes answer together: the mean of their log-probabilities is more accurate than the
best of them.
"""

import argparse
import csv
import glob
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from data import (
    Item,
    Progress,
    class_folders,
    find_images,
    first_line,
    labelled,
    load_data,
    not_used,
    positive,
    printable,
    read_shown,
    run_script,
    whole_file,
)
from models import (
    DTYPES,
    TransferModel,
    export,
    fast_copy,
    heat_map,
    load_checkpoint,
    pick_device,
    pick_precision,
    predictions,
    run_images,
    shared,
)

COLUMNS = ("path", "model", "label", "probability", "unfamiliar", "unsure", "error")  # of --format csv
SAMPLE = 12  # images in plots/predictions.png and of --explain
SIMILAR = 5  # training images beside each image of --explain


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "paths", nargs="*", metavar="PATH", help="images, folders, patterns, or - for a list of paths on standard input"
    )
    add("--checkpoint", nargs="+", metavar="FILE", help="models, or patterns (default: checkpoints/*.pt)")
    add("--evaluate", action="store_true", help="PATH is a folder of class folders: measure how many answers are right")
    add("--output", type=Path, default=Path("evaluation"), metavar="DIR",
        help="of --evaluate: confusion matrices, mistakes, and MODEL_wrong.csv (default: evaluation)")  # fmt: skip
    add("--ensemble", action=argparse.BooleanOptionalAction,
        help="one answer of all models (default: if all have the same classes)")  # fmt: skip
    add("--top-k", type=positive(int), default=3, metavar="K", help="labels for each image (default: 3)")
    add("--threshold", type=positive(float, below=1), metavar="P", help="mark answers below this probability as unsure")
    add("--format", choices=("text", "json", "csv"), default="text",
        help=f"json: one object a line; csv: {', '.join(COLUMNS)} (default: text)")  # fmt: skip
    add("-0", dest="separator", action="store_const", const="\0", default="\n",
        help="paths on standard input end with NUL, as from find -print0")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help=f"draw the first {SAMPLE} images with their labels")
    add("--explain", type=Path, metavar="FILE",
        help=f"draw the first {SAMPLE} images with heat maps and the most similar training images")  # fmt: skip
    add("--cache", type=Path, default=Path("data"), metavar="DIR",
        help="where main_train.py keeps CIFAR-10 and the features (default: data)")  # fmt: skip
    add("--export", type=Path, metavar="FILE", help="write the model for torch.export (.pt2) or ONNX (.onnx), and stop")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
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
            parser.error(f"{path} is an address: download the image first, for example with curl -O")
    if args.evaluate and (len(args.paths) != 1 or not Path(args.paths[0]).is_dir()):
        parser.error("--evaluate takes one folder, which holds a folder of images for each class")
    return args


def matches(pattern: str) -> list[str]:
    """The paths that match a pattern, or the pattern itself if it is a path or matches none."""
    return [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True)) or [pattern]


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


def expand(paths: Iterable[str], separator: str, unused: Counter[str]) -> Iterator[Path]:
    """Replaces folders by the images below them, patterns by what they match, and - by the paths on standard input."""
    for path in paths:
        if path == "-":
            yield from expand((line for line in sys.stdin.read().split(separator) if line), separator, unused)
            continue
        found = (
            file
            for match in matches(path)
            for file in (find_images(Path(match), unused) if Path(match).is_dir() else [Path(match)])
        )
        yield from dict.fromkeys(found) if glob.has_magic(path) else found  # ** matches folders and their files


def writer(format: str, several_models: bool) -> Callable[[dict], None]:
    """A function that prints a record."""
    if format == "json":
        return lambda record: print(json.dumps(record))
    if format == "csv":
        table = csv.DictWriter(sys.stdout, COLUMNS, extrasaction="ignore")
        table.writeheader()
        return table.writerow

    def text(record: dict) -> None:
        if "error" in record:
            print(f"error: {printable(record['error'])}", file=sys.stderr)
            return
        guesses = ", ".join(f"{printable(guess['label'])} {guess['probability']:.1%}" for guess in record["top"])
        each = ", ".join(f"{one['model']}: {printable(one['label'])}" for one in record.get("models", ()))
        true = record.get("true")
        doubts = "".join(f", {word}" for word in ("unfamiliar", "unsure") if record.get(word))
        verdict = "" if true is None else " - right" if true == record["label"] else f" - wrong, {printable(true)}"
        name = f"{record['model']}: " if several_models and "models" not in record else ""
        print(f"{printable(record['path'])}: {name}{guesses}{doubts}{f' ({each})' if each else ''}{verdict}")

    return text


def evaluate(records: list[dict], classes: tuple[str, ...], output: Path) -> None:
    """Prints one model's metrics. Writes its confusion matrix, its mistakes and a list of them into `output`.

    `records` are the model's records from `predictions`, each with the true label as "true".
    """
    import train_utils
    import visualization

    name, index = records[0]["model"], {label: i for i, label in enumerate(classes)}
    predicted = torch.tensor([index[record["label"]] for record in records])
    logits = torch.nn.functional.one_hot(predicted, len(classes)).float()
    labels = torch.tensor([index[record["true"]] for record in records])
    found = train_utils.metrics(logits, labels, temperature=1.0)
    low, high = found["test_interval"]
    print(f"\n{name}: {found['test_accuracy']:.2%} of {len(records):,} images right, 95% interval {low:.1%}-{high:.1%}")
    width = max(len(printable(label)) for label in classes)
    print(f"{'':{width}}  images  precision  recall     f1")
    scores = zip(*(found["per_class"][score] for score in ("precision", "recall", "f1")), strict=True)
    for label, row, (precision, recall, f1) in zip(classes, found["confusion_matrix"], scores, strict=True):
        print(f"{printable(label):{width}} {sum(row):7,} {precision:10.1%} {recall:7.1%} {f1:6.3f}")
    wrong = sorted((r for r in records if r["label"] != r["true"]), key=lambda r: -r["probability"])
    table = io.StringIO(newline="")
    lines = csv.DictWriter(table, ("path", "true", "label", "probability"), extrasaction="ignore")
    lines.writeheader()
    lines.writerows(wrong)
    with whole_file(output / f"{name}_wrong.csv") as file:
        file.write(table.getvalue().encode(errors="surrogateescape"))
    drawn = [printable(label) for label in classes]
    figures = {"confusion": visualization.plot_confusion(name, found["confusion_matrix"], drawn)}
    if wrong:
        captioned = (
            (Path(r["path"]), f"{printable(r['true'])}\ntaken for {printable(r['label'])}, {r['probability']:.0%}")
            for r in wrong
        )
        figures["mistakes"] = visualization.plot_predictions(*read_shown(captioned, SAMPLE))
    for what, figure in figures.items():
        visualization.save(figure, output / f"{name}_{what}.png")


def answers_of(records: list[dict]) -> list[dict]:
    """Each model's answer to an image."""
    return records[0].get("models", records)


def guess(answer: dict) -> str:
    return f"{printable(answer['label'])} {answer['probability']:.0%}"


def caption(answer: dict, lines: list[str]) -> str:
    """Lines below an image. If its true label is known, that comes first, with a mark for right or wrong."""
    if "true" in answer:
        mark = "✓" if answer["label"] == answer["true"] else "✗"
        lines = [f"{mark} {printable(answer['true'])}", *lines]
    return "\n".join(lines)


def draw(models: list[TransferModel], shown: list[tuple[Item, list[dict]]], file: Path) -> None:
    """Draws images with their true labels, if these are known, and each model's answer."""
    import visualization  # here, because importing matplotlib takes longer than classifying an image

    captioned = []
    for item, records in shown:
        answers = zip(models, answers_of(records), strict=True)
        lines = [f"{model.label}: {guess(answer)}" for model, answer in answers]
        captioned.append((item, caption(records[0], lines)))
    visualization.save(visualization.plot_predictions(*read_shown(captioned, SAMPLE)), file)


def explain(
    model: TransferModel, captioned: list[tuple[Item, str]], device: torch.device, cache: Path, file: Path
) -> None:
    """Draws a heat map of each image's label, and the training images with the most similar features."""
    import train_utils
    import visualization

    images, captions = read_shown(captioned, SAMPLE, model.preprocessing["image_size"])  # the pixels that it answered
    heat, similar = [], []
    if isinstance(model.features, torch.nn.Sequential):
        rows = torch.cat([rows for _, [rows], _ in run_images([model.to(device)], images, heat_map)])
        side = math.isqrt(rows.shape[1])
        heat = rows.reshape(-1, side, side).numpy()
    try:
        data = load_data(model.metrics.get("data", "cifar10"), cache)
        known = train_utils.cached_features(model, data.train, cache / "features", device, compute=False)
        if not len(known.readable):
            raise FileNotFoundError(f"their features are not in {cache / 'features'}")
    except (OSError, ValueError) as error:
        print(f"{file} shows no training images that are alike: {first_line(error)}", file=sys.stderr)
    else:
        fast = fast_copy(model, device)
        rows = torch.cat([rows for _, [rows], _ in run_images([fast], images, TransferModel.forward_features)])
        for found in train_utils.most_similar(model.cpu(), rows, known, SIMILAR):
            alike = []
            for i, cosine in found:
                label = printable(data.classes[data.train.labels[i]])
                alike.append((data.train.items[i], f"{label}, {cosine:.2f}"))
            similar.append(list(zip(*read_shown(alike, SIMILAR), strict=True)))
    visualization.save(visualization.plot_explanations(images, captions, heat, similar), file)


def choose_images(
    args: argparse.Namespace, model: TransferModel, unused: Counter[str]
) -> tuple[Iterable[Item], list[str] | None, list[str]]:
    """The images, their true labels if these are known, and the names of images that are no files."""
    if not args.paths:
        source = model.metrics.get("data", "cifar10")
        data = load_data(source, args.cache)
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        sample, names = data.test.subset(order), [f"{source} test image {i}" for i in order.tolist()]
        return sample.items, [data.classes[label] for label in sample.labels], names
    if not args.evaluate:
        return expand(args.paths, args.separator, unused), None, []
    folder = Path(args.paths[0])
    if unknown := sorted(set(class_folders(folder, unused)) - set(model.classes)):
        raise ValueError(f"{folder} has folders that are no classes of the model: {', '.join(unknown[:5])}")
    images = labelled(folder, model.classes, unused)
    return images.items, [model.classes[label] for label in images.labels], []


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    precision = args.precision and pick_precision(args.precision, device)
    models, skipped = load_models(args.checkpoint)
    classes, alike = models[0].classes, all(model.classes == models[0].classes for model in models)
    ensemble = len(models) > 1 and alike and args.ensemble is not False
    if not alike and (args.evaluate or args.ensemble):
        raise ValueError("--evaluate and --ensemble take models with the same classes: name them with --checkpoint")
    if not alike:
        print("the models do not have the same classes: each answers alone", file=sys.stderr)
    if args.evaluate and len({model.name for model in models}) < len(models):
        raise ValueError("--evaluate takes one checkpoint of each model: run it for one after the other")

    if args.export:
        if len(models) > 1:
            raise ValueError("--export takes one model: name it with --checkpoint")
        export(models[0], args.export)
        size = models[0].preprocessing["image_size"]
        print(f"{args.export}: images, uint8 (B, 3, {size}, {size}) in RGB -> probabilities (B, {len(classes)})")
        return 0
    unused: Counter[str] = Counter()
    items, truth, names = choose_images(args, models[0], unused)
    plot = args.plot or (None if args.paths else Path("plots/predictions.png"))
    write = writer(args.format, len(models) > 1)
    answers: dict[str, list[dict]] = {}  # of --evaluate, by model
    shown: list[tuple[Item, list[dict]]] = []  # the first images and their records, for the plots
    good = bad = right = 0
    fast = [fast_copy(model, device, precision) for model in models]
    bar = Progress(len(truth) if truth else None, "inference", disable=sys.stdout.isatty() and not args.evaluate)
    for i, (item, records) in enumerate(predictions(fast, items, args.top_k, ensemble)):
        bar.update()
        every = [answer for record in records for answer in (record, *record.get("models", ()))]
        for answer in every:
            answer["path"] = answer["path"] or names[i]
            if truth:
                answer["true"] = truth[i]
        if "error" in records[0]:
            write(records[0])
            bad += 1
            continue
        good, right = good + 1, right + (bool(truth) and records[0]["label"] == truth[i])
        for record in records:
            if args.threshold:
                record["unsure"] = record["probability"] < args.threshold
            if not args.evaluate:
                write(record)
        if args.evaluate:
            for answer in every:
                answers.setdefault(answer["model"], []).append(answer)
        if len(shown) < SAMPLE:
            shown.append((item, records))
    bar.close()
    if unused.total():
        print(not_used(unused), file=sys.stderr)
    if not good + bad:
        raise FileNotFoundError(f"no images in {', '.join(args.paths)}")
    for its in answers.values():
        evaluate(its, classes, args.output)
    if answers:
        print(f"\nconfusion matrices, mistakes and lists of the wrong ones are in {args.output}/")
    elif truth and args.format == "text":
        print(f"{right} of {good} right" + (f" ({models[0].name})" if len(models) > 1 and not ensemble else ""))
    if shown and args.explain:
        best = max(range(len(models)), key=lambda i: models[i].metrics.get("val_accuracy", 0))
        its = [(item, answers_of(records)[best]) for item, records in shown]
        captioned = [(item, caption(answer, [guess(answer)])) for item, answer in its]
        explain(models[best], captioned, device, args.cache, args.explain)
        print(f"{args.explain} explains answers of {models[best].name}", file=sys.stderr)
    if shown and plot:
        draw(models, shown, plot)
        print(f"{plot} shows images with their answers", file=sys.stderr)
    return 0 if not bad + skipped else 1 if good else 2


if __name__ == "__main__":
    run_script(shared(main))
