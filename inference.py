"""Classifies pictures with trained checkpoints.

python inference.py cat.jpg holiday/                    pictures, and all pictures below a folder
python inference.py cat.jpg --checkpoint checkpoints/mobilenet_v2.pt
python inference.py photos/ --format json > labels.jsonl
python inference.py                                     a sample of the test pictures -> plots/predictions.png
"""

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import find_images, load_data, map_batches, positive, preprocess, read_image, run_script
from models import DTYPES, TransferModel, load_checkpoint, pick_device, pick_precision

SAMPLE = 12  # pictures in plots/predictions.png


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="PATH", help="pictures or folders of them; none: some of the test set")
    add("--checkpoint", nargs="+", type=Path, metavar="FILE", help="default: every checkpoints/*.pt")
    add("--top-k", type=positive, default=3, metavar="K", help="how many labels to give a picture (default: 3)")
    add("--format", choices=("text", "json", "csv"), default="text",
        help="json: one object a line; csv: path, model, label, probability, error (default: text)")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help=f"also draw the first {SAMPLE} pictures with their labels")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    add("--precision", choices=("auto", *DTYPES), default="auto", help="bf16 where the hardware has it (default: auto)")
    return parser.parse_args(argv)


def classify(
    model: TransferModel,
    metrics: dict,
    items: Iterable[Path | np.ndarray],
    device: torch.device,
    precision: str,
    top_k: int,
) -> Iterator[dict]:
    """A record per picture, in order: its path, model, label, probability and top labels, or its path and error.

    Probabilities are calibrated, by the temperature among the checkpoint's metrics.
    """
    dtype = DTYPES[precision]
    fast = model.for_inference(device, dtype)

    def forward(pictures: list[Tensor]) -> Tensor:
        logits = fast(preprocess(pictures, **model.preprocessing, device=device, dtype=dtype))
        return (logits / metrics["temperature"]).softmax(dim=1)

    for batch, probabilities, errors in map_batches(forward, items, device, max_size=model.preprocessing["image_size"]):
        rows = iter(probabilities)
        for i, item in enumerate(batch):
            path = str(item) if isinstance(item, Path) else None
            if i in errors:
                yield {"path": path, "error": str(errors[i])}
                continue
            best, labels = next(rows).topk(min(top_k, len(model.classes)))
            top = [
                {"label": model.classes[label], "probability": p}
                for label, p in zip(labels.tolist(), best.tolist(), strict=True)
            ]
            yield {"path": path, "model": metrics["model"], **top[0], "top": top}


def expand(paths: Iterable[Path]) -> Iterator[Path]:
    """Folders become the pictures below them."""
    for path in paths:
        if path.is_dir():
            yield from find_images(path)
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
            print(f"error: {record['error']}", file=sys.stderr)
            return
        path = record["path"] if record["path"].isprintable() else repr(record["path"])
        labels = ", ".join(f"{guess['label']} {guess['probability']:.1%}" for guess in record["top"])
        print(f"{path}: {record['model'] + ': ' if several_models else ''}{labels}")

    return text


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    files = args.checkpoint or sorted(Path("checkpoints").glob("*.pt"))
    if not files:
        raise FileNotFoundError("no checkpoints/*.pt yet: train with main_train.py, or name one with --checkpoint")
    checkpoints = []
    for model, metrics in map(load_checkpoint, files):
        usual = {"model": model.name, "temperature": 1.0, "data": "cifar10"}  # where save_checkpoint was given less
        checkpoints.append((model, usual | metrics))

    truth = {}
    if not args.paths:
        source = checkpoints[0][1]["data"]
        data = load_data(source)
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
        sample = data.test.subset(order[:SAMPLE])
        truth = {i: data.classes[label] for i, label in enumerate(sample.labels)}
        args.plot = args.plot or Path("plots/predictions.png")

    write = writer(args.format, len(files) > 1)
    drawn = {}  # position of a picture -> (the picture, the lines of its caption)
    good = bad = 0
    for model, metrics in checkpoints:
        items, kept = itertools.tee(expand(args.paths) if args.paths else sample.items)
        records = classify(model, metrics, items, device, precision, args.top_k)
        tuned = " (fine-tuned)" if metrics["model"] != model.name else ""
        bar = tqdm(records, desc=metrics["model"], unit="img", disable=True if sys.stdout.isatty() else None)
        for i, (record, item) in enumerate(zip(bar, kept, strict=True)):
            record["path"] = record["path"] or f"{source} test picture {i}"
            write(record)
            good, bad = good + ("label" in record), bad + ("error" in record)
            if args.plot and "label" in record and (i in drawn or len(drawn) < SAMPLE):
                _, lines = drawn.setdefault(i, (item, [truth[i]] if truth else []))
                lines.append(f"{model.label}{tuned}: {record['label']} {record['probability']:.0%}")
    if not good + bad:
        raise FileNotFoundError(f"no pictures in {', '.join(map(str, args.paths))}")
    if drawn:
        from visualization import plot_predictions  # here: matplotlib takes longer to import than a picture to classify

        pictures = [read_image(item).permute(1, 2, 0).numpy() for item, _ in drawn.values()]
        plot_predictions(args.plot, pictures, ["\n".join(lines) for _, lines in drawn.values()])
        print(f"{args.plot} shows {len(drawn)} of them", file=sys.stderr)
    return 0 if not bad else 1 if good else 2


if __name__ == "__main__":
    run_script(main)
