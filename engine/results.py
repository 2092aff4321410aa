"""What is kept of a run: plots/results.json, its rows, and the table that compares them."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from engine.console import first_line
from engine.device import batch_size_for, device_name
from engine.features import Extraction
from engine.files import atomic_write, load_tensors
from engine.metrics import (
    average_models,
    classification_metrics,
    log_probabilities,
    loss_and_accuracy,
    paired_difference,
    wilson_interval,
)

SCHEMA = 3
COMPARABLE = ("content", "classes", "split")  # only models that agree in these were tested on the same images
KEYS = {*COMPARABLE, *"backbone label plot fine_tuned accuracy_by_seed seconds correct confusion_matrix".split()}
KEYS |= {*"macro per_class calibration val_accuracy test_images".split()}


def provenance(argv: Sequence[str], device: torch.device) -> dict:
    """What ran, when and where."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        commit = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["main_train.py", *argv]),
        "commit": commit,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "torchvision", "numpy")}},
        "device": device_name(device),
    }


def check_replacement(checkpoint: Path, model: nn.Module, data: object, source: str) -> None:
    """Raises ValueError if the checkpoint is of a model trained on other or more data, which a run must not replace.

    `data` is the Data of this run, from `source`.
    """
    if not checkpoint.exists():
        return
    try:
        old = load_tensors(checkpoint)
        size, metrics, classes = old["preprocessing"]["image_size"], old["metrics"], tuple(old["classes"])
    except Exception as error:  # whatever a damaged file makes torch raise
        print(f"{checkpoint} cannot be read ({first_line(error)}) and will be replaced")
        return
    images = metrics.get("train_images", 0)
    other = source != metrics.get("data") and data.content != metrics.get("content")
    same = classes == model.classes and size == model.preprocessing["image_size"]
    if other or not same or images > len(data.train):
        raise ValueError(
            f"{checkpoint} was trained on {images:,} images of {len(classes)} classes at {size} pixels"
            f"{' of other data' if other else ''}: choose another --output, or delete it"
        )
    changed = "" if data.content == metrics.get("content") else ", on other images at the same place"
    print(f"{checkpoint}, made on {metrics.get('date')} by {metrics.get('command')}{changed}, will be replaced")


def extraction_row(extractions: Iterable[Extraction], used: Sequence[Extraction], device: torch.device) -> dict:
    """What a row says of the extraction. Those that are `used` in training count as computed."""
    computed = sum(each.computed for each in used)
    unreadable = sorted({str(error) for each in extractions for error in each.errors})
    return {
        "computed": computed,
        "cached": not computed,
        "batch_size": batch_size_for(device),
        "unreadable": unreadable,
    }


def model_row(model: nn.Module, val: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict:
    """A row's part that follows from a model and its logits and labels for the validation and test images."""
    val_loss, val_accuracy = loss_and_accuracy(*val)
    metrics = classification_metrics(*test, model.temperature)
    return {
        "model": model.name,
        "backbone": model.backbone,
        "label": model.label,
        "plot": model.plot,
        "fine_tuned": model.fine_tuned,
        "image_size": model.preprocessing["image_size"],
        "val_images": int((~val[0][:, 0].isnan()).sum()),
        "test_images": sum(hit is not None for hit in metrics["correct"]),
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "temperature": model.temperature,
        "views": model.views,
        **metrics,
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
    }


def ensemble_row(
    rows: Sequence[dict], val: Sequence[Tensor], test: Sequence[Tensor], labels: dict[str, Tensor]
) -> dict:
    """The row of all models together, from each one's row and logits for the validation and test images.

    The ensemble answers for the images that every model could read.
    """
    logits = {
        part: average_models(
            [log_probabilities(each, row["temperature"]) for each, row in zip(every, rows, strict=True)]
        )
        for part, every in (("val", val), ("test", test))
    }
    accuracies = {part: loss_and_accuracy(logits[part], labels[part])[1] for part in logits}
    metrics = classification_metrics(logits["test"], labels["test"], 1.0)
    return {
        **{key: rows[0][key] for key in (*COMPARABLE, "date", "command", "versions", "device", "data")},
        "model": "ensemble",
        "label": f"all {len(rows)} together",
        "backbone": "ensemble",
        "fine_tuned": any(row["fine_tuned"] for row in rows),
        "val_accuracy": accuracies["val"],
        "test_images": sum(hit is not None for hit in metrics["correct"]),
        "accuracy_by_seed": {part: [accuracy] for part, accuracy in accuracies.items()},
        "seconds": {f"{row['backbone']} {stage}": s for row in rows for stage, s in row["seconds"].items()},
        **metrics,
    }


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
    with atomic_write(file) as stream:
        stream.write(json.dumps(results, indent=1).encode())


def comparable(rows: dict[str, dict], row: dict) -> dict[str, dict]:
    """The rows of models that were tested on the same images as `row`."""
    return {name: each for name, each in rows.items() if all(each[key] == row[key] for key in COMPARABLE)}


def best_on_validation(rows: Sequence[dict]) -> dict:
    """The row with the highest mean validation accuracy. The ensemble does not count as a model."""
    return max((r for r in rows if r["backbone"] != "ensemble"), key=lambda r: mean(r["accuracy_by_seed"]["val"]))


def comparison_table(rows: Sequence[dict]) -> list[list[str]]:
    """A header and a line for each model. Accuracies are means over the seeds."""
    best = best_on_validation(rows)
    images = [sum(row) for row in best["confusion_matrix"]]
    table = []
    for row in rows:
        val, test = (mean(row["accuracy_by_seed"][part]) for part in ("val", "test"))
        low, high = wilson_interval(test, row["test_images"])
        cells = {"model": row["model"], "val acc": f"{val:.2%}", "test acc": f"{test:.2%}"}
        cells["95% interval"] = f"{low:.1%}-{high:.1%}"
        if len(rows) > 1:
            _, margin = paired_difference(row["correct"], best["correct"])
            difference = f"{100 * (test - mean(best['accuracy_by_seed']['test'])):+.1f} ± {100 * margin:.1f}"
            cells["difference"] = "best" if row is best else difference
        cells["seconds"] = f"{sum(row['seconds'].values()):.1f}"
        if max(images) > 3 * min(images):  # accuracy alone would hide the rare classes
            cells["macro F1"] = f"{row['macro']['f1']:.3f}"
            cells["worst recall"] = f"{min(row['per_class']['recall']):.2%}"
        table.append(cells)
    return [list(table[0]), *(list(cells.values()) for cells in table)]


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Prints a table, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        columns = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *columns]))
