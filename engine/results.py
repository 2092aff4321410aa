"""What is kept of a run: plots/results.json, its rows, and the table that compares them."""

import json
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from engine import metrics
from engine.console import count_of, first_line
from engine.device import device_name
from engine.files import atomic_write, load_tensors

SCHEMA = 4
COMPARABLE = ("content", "classes", "split")  # only models that agree in these were tested on the same images


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute, of optional ones if they are in use."""
    found = {package: version(package) for package in ("torchvision", "numpy")}
    for package in ("timm", "openvino", "nncf"):
        if used := getattr(sys.modules.get(package), "__version__", None):
            found[package] = used
    return {"python": platform.python_version(), "torch": str(torch.__version__), **found}


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
        "device": device_name(device),
    }


def check_replacement(checkpoint: Path, model: nn.Module, origin: dict, limit: int | None) -> None:
    """Raises ValueError if `checkpoint` is of other data, classes or image size than the model, or of many more images.

    `origin` is the new model's: "data", "content" and "train_images". A data set may shrink, as when its label errors
    are deleted, but not to less than half, with a `limit` to 90%.
    """
    if not checkpoint.exists():
        return
    try:
        old = load_tensors(checkpoint)
        size, classes = old["preprocessing"]["image_size"], tuple(old["classes"])
        row = old["origin"] if "origin" in old else old["metrics"]
    except Exception as error:  # whatever a damaged file makes torch raise
        print(f"{checkpoint} cannot be read ({first_line(error)}) and will be replaced")
        return
    images, same_content = row.get("train_images", 0), origin["content"] == row.get("content")
    other = "" if same_content or origin["data"] == row.get("data") else " of other data"
    same_model = (classes, size) == (model.classes, model.preprocessing["image_size"])
    if other or not same_model or origin["train_images"] < images * (0.9 if limit else 0.5):
        raise ValueError(
            f"{checkpoint} was trained on {images:,} images of {len(classes)} classes at {size} pixels{other}: "
            "choose another --output, or delete it"
        )
    changed = "" if same_content else ", on other images at the same place"
    trained = f"trained on {count_of(images, 'image')} in {old.get('precision', 'fp32')}{changed}"
    print(f"{checkpoint}, {trained}, will be replaced")


def build_row(
    run: dict, model: nn.Module, training: dict, logits: list[dict[str, Tensor]], labels: dict[str, Tensor]
) -> dict:
    """A row of results.json, from what is known of the run, the data included, and of the model's training.

    `logits` are those of the classifiers of each seed for the "val" and "test" images. The first one is the model's.
    """
    return {
        **run,
        "versions": versions(),
        **training,
        "model": model.name,
        **{key: getattr(model, key) for key in ("backbone", "label", "plot", "fine_tuned", "temperature", "views")},
        "image_size": model.preprocessing["image_size"],
        "val_images": len(labels["val"]),
        "val_loss": metrics.loss_and_accuracy(logits[0]["val"], labels["val"])[0],
        **_tested(logits, labels, model.temperature, run["test_groups"]),
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
    }


def _tested(
    logits: list[dict[str, Tensor]], labels: dict[str, Tensor], temperature: float, groups: list[int] | None
) -> dict:
    accuracies = {part: [metrics.loss_and_accuracy(each[part], labels[part])[1] for each in logits] for part in labels}
    right = torch.stack([each["test"].argmax(dim=1) == labels["test"] for each in logits])
    correct = right.float().mean(dim=0).tolist()  # over the seeds
    return {
        "val_accuracy": accuracies["val"][0],
        "accuracy_by_seed": accuracies,
        "correct": correct,
        "test_interval": metrics.accuracy_interval(correct, groups),
        **metrics.classification_metrics(logits[0]["test"], labels["test"], temperature),
    }


def ensemble_row(rows: Sequence[dict], logits: list[dict[str, Tensor]], labels: dict[str, Tensor]) -> dict:
    """The row of all models together, from their rows and their logits for the "val" and "test" images."""
    together = {
        part: metrics.average_models(each[part] / row["temperature"] for each, row in zip(logits, rows, strict=True))
        for part in labels
    }
    return {
        **{key: rows[0][key] for key in (*COMPARABLE, "test_groups", "date", "command", "versions", "device", "data")},
        "model": "ensemble",
        "label": f"{len(rows)} models together",
        "backbone": "ensemble",
        "fine_tuned": any(row["fine_tuned"] for row in rows),
        "seconds": {f"{row['backbone']} {stage}": s for row in rows for stage, s in row["seconds"].items()},
        **_tested([together], labels, 1.0, rows[0]["test_groups"]),
    }


def read_results(file: Path) -> dict[str, dict]:
    """The rows of earlier runs, by model. A file of another version, or a damaged one, is moved out of the way."""
    if not file.exists():
        return {}
    try:
        results = json.loads(file.read_text())
        rows = {row["model"]: row for row in results["runs"]}
        if results["schema"] == SCHEMA:
            return rows
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    print(f"{file} cannot be read by this version and is now {file}.old", file=sys.stderr)
    file.replace(f"{file}.old")
    return {}


def write_results(file: Path, rows: dict[str, dict], ensemble: dict | None = None) -> None:
    """Writes results.json, a run in each line."""
    runs = ",\n".join(map(json.dumps, rows.values()))
    extra = f',\n"ensemble": {json.dumps(ensemble)}' if ensemble else ""
    with atomic_write(file) as stream:
        stream.write(f'{{"schema": {SCHEMA}, "runs": [\n{runs}\n]{extra}}}\n'.encode())


def best_model(rows: Sequence[dict]) -> dict:
    """The row of the model with the highest validation accuracy."""
    return max((r for r in rows if r["backbone"] != "ensemble"), key=lambda r: mean(r["accuracy_by_seed"]["val"]))


def difference_from(best: dict, row: dict) -> tuple[float, float]:
    """The difference between two models' test accuracies, means over the seeds, and its margin at 95%."""
    test, best_test = (mean(each["accuracy_by_seed"]["test"]) for each in (row, best))
    return test - best_test, metrics.paired_difference(row["correct"], best["correct"], row["test_groups"])[1]


def headline(rows: Sequence[dict]) -> str:
    """What models that were tested on the same images show, in sentences."""
    best, models = best_model(rows), [row for row in rows if row["backbone"] != "ensemble"]
    train, val, test = (best[f"{part}_images"] for part in ("train", "val", "test"))
    accuracy = mean(best["accuracy_by_seed"]["test"])
    low, high = best["test_interval"]
    text = (
        f"{train + val + test:,} images of {count_of(len(best['classes']), 'class')}: {train:,} for training, {val:,} "
        f"for validation, {test:,} for testing. The best model on validation is {best['label']}. It classifies "
        f"{accuracy:.1%} of the test images correctly (95% interval: {low:.1%} to {high:.1%})."
    )
    others = [(row["label"], *difference_from(best, row)) for row in models if row is not best]
    if close := [label for label, difference, margin in others if abs(difference) <= margin]:
        text += f" The difference from {' and from '.join(close)} is not significant."
    return text


def comparison_table(rows: Sequence[dict]) -> list[list[str]]:
    """A header and a line for each model. Accuracies are means over the seeds, "best" is the best on validation."""
    best = best_model(rows)
    images, table = Counter(), []
    for true, _, count in best["confusion"]:
        images[true] += count
    for row in rows:
        val, test = (mean(row["accuracy_by_seed"][part]) for part in ("val", "test"))
        low, high = row["test_interval"]
        cells = {"model": row["model"], "val acc": f"{val:.2%}", "test acc": f"{test:.2%}"}
        cells["95% interval"] = f"{low:.1%}-{high:.1%}"
        if len(rows) > 1:
            difference, margin = difference_from(best, row)
            cells["difference"] = "best" if row is best else f"{100 * difference:+.1f} ± {100 * margin:.1f}"
        cells["seconds"] = f"{sum(row['seconds'].values()):.1f}"
        if len(images) < len(best["classes"]) or max(images.values()) > 3 * min(images.values()):
            # accuracy alone would hide the rare classes
            cells["macro F1"] = f"{row['macro']['f1']:.3f}"
            cells["worst recall"] = f"{min(r for r in row['per_class']['recall'] if r is not None):.2%}"
        table.append(cells)
    return [list(table[0]), *(list(cells.values()) for cells in table)]


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Prints a header and lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))


def explanations(rows: Sequence[dict]) -> list[str]:
    """How the numbers in a comparison are read, in sentences."""
    sentences = []
    if len(rows) > 1:
        sentences.append("Differences are in points from the best model on validation.")
        sentences.append("One that is smaller than its ± is not significant (95%).")
    if (seeds := max(len(row["accuracy_by_seed"]["test"]) for row in rows)) > 1:
        sentences.append(f"Accuracies are means over up to {seeds} seeds; checkpoints and plots are of the first.")
    return sentences
