"""Classifies images with trained checkpoints.

python inference.py cat.jpg holiday/                    images, and all images below a folder
python inference.py cat.jpg --checkpoint checkpoints/mobilenet_v2.pt
python inference.py photos/ --format json > labels.jsonl
python inference.py                                     a sample of the test images -> plots/predictions.png
"""

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from data import (
    Item,
    Progress,
    find_images,
    load_data,
    not_used,
    positive,
    printable,
    read_image,
    run_script,
    whole_file,
)
from models import DTYPES, TransferModel, fast_copy, load_checkpoint, pick_device, pick_precision, predictions

SAMPLE = 12  # images in plots/predictions.png


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="PATH", help="images or folders of images; none: some of the test set")
    add("--checkpoint", nargs="+", type=Path, metavar="FILE", help="default: every checkpoints/*.pt")
    add("--top-k", type=positive, default=3, metavar="K", help="labels for each image (default: 3)")
    add("--format", choices=("text", "json", "csv"), default="text",
        help="json: one object a line; csv: path, model, label, probability, error (default: text)")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help=f"draw the first {SAMPLE} images with their labels")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    add("--precision", choices=("auto", *DTYPES), default="fp32",
        help="fp32 answers the same on every machine; bf16 is up to twice as fast (default: fp32)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.checkpoint:  # as in `--checkpoint a.pt cat.jpg`
        args.paths += [path for path in args.checkpoint if path.suffix != ".pt"]
        args.checkpoint = [path for path in args.checkpoint if path.suffix == ".pt"]
    return args


def load_models(files: list[Path] | None) -> tuple[list[TransferModel], int]:
    """The models of the given files, or of those in checkpoints/, where foreign files are named and skipped."""
    if files:
        return [load_checkpoint(file) for file in files], 0
    models, skipped = [], 0
    for file in sorted(Path("checkpoints").glob("*.pt")):
        try:
            models.append(load_checkpoint(file))
        except ValueError as error:
            print(f"skipped: {error}", file=sys.stderr)
            skipped += 1
    if not models:
        raise FileNotFoundError(
            "no model in checkpoints/: train with main_train.py, or name one with --checkpoint FILE"
        )
    return models, skipped


def expand(paths: Iterable[Path], unused: Counter[str]) -> Iterator[Path]:
    """Replaces folders by the images below them."""
    for path in paths:
        if path.is_dir():
            yield from find_images(path, unused)
        else:
            yield path


def writer(format: str, several_models: bool) -> Callable[[dict], None]:
    """A function that prints a record."""
    if format == "json":
        return lambda record: print(json.dumps(record))
    if format == "csv":
        table = csv.DictWriter(sys.stdout, ("path", "model", "label", "probability", "error"), extrasaction="ignore")
        table.writeheader()
        return table.writerow

    def text(record: dict) -> None:
        if "error" in record:
            print(f"error: {printable(record['error'])}", file=sys.stderr)
            return
        labels = ", ".join(f"{printable(guess['label'])} {guess['probability']:.1%}" for guess in record["top"])
        print(f"{printable(record['path'])}: {record['model'] + ': ' if several_models else ''}{labels}")

    return text


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    models, skipped = load_models(args.checkpoint)

    unused: Counter[str] = Counter()
    items, truth, plot = expand(args.paths, unused), None, args.plot
    if not args.paths:
        source = models[0].metrics.get("data", "cifar10")
        data = load_data(source)
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
        sample = data.test.subset(order[:SAMPLE])
        items, truth = sample.items, [printable(data.classes[label]) for label in sample.labels]
        plot = args.plot or Path("plots/predictions.png")

    write = writer(args.format, len(models) > 1)
    drawn: list[tuple[Item, str]] = []  # images and their captions
    good = bad = 0
    fast = [fast_copy(model, device, precision) for model in models]
    bar = Progress(None, "inference", disable=sys.stdout.isatty())
    for i, (item, records) in enumerate(predictions(fast, items, args.top_k)):
        bar.update()
        for record in records:
            record["path"] = record["path"] or f"{source} test image {i}"
            write(record)
        if "error" in records[0]:
            bad += 1
            continue
        good += 1
        if plot and len(drawn) < SAMPLE:
            lines = [
                f"{m.label}: {printable(r['label'])} {r['probability']:.0%}"
                for m, r in zip(models, records, strict=True)
            ]
            drawn.append((item, "\n".join([truth[i], *lines] if truth else lines)))
    bar.close()
    if unused.total():
        print(not_used(unused), file=sys.stderr)
    if not good + bad:
        raise FileNotFoundError(f"no images in {', '.join(map(str, args.paths))}")
    if drawn:
        import visualization  # here, because importing matplotlib takes longer than classifying an image

        images = [read_image(item).permute(1, 2, 0).numpy() for item, _ in drawn]
        with whole_file(plot) as file:
            figure = visualization.plot_predictions(images, [caption for _, caption in drawn])
            figure.savefig(file, format="png", dpi=visualization.DPI)
        print(f"{plot} shows {len(drawn)} of them", file=sys.stderr)
    return 0 if not bad + skipped else 1 if good else 2


if __name__ == "__main__":
    run_script(main)
