"""Numbers in, figures (`plot_...`) or files (`draw_...`) out.

Every plot is drawn for a README at half width: few words, large type, colours that colour-blind people can tell apart.
matplotlib is imported when something is drawn, see `own_settings`.
"""

import importlib
import itertools
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from engine.console import printable
from engine.files import atomic_write
from engine.images import Images, Item, read_for_plot
from engine.page import CAPTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
MARK_COLORS = {"✓": COLORS[0], "✗": COLORS[4]}  # a caption that begins with such a mark has its color
FONTS = (  # those that are installed are used, each character from the first font that has it
    "DejaVu Sans", "Noto Sans", "Arial Unicode MS", "Segoe UI", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP",
    "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "WenQuanYi Zen Hei", "Noto Emoji",
)  # fmt: skip
PLOTTED_IMAGES = 12  # images in a plot
MATRIX_CLASSES = 20  # a confusion matrix of more classes has no room for names and numbers
Picture = tuple[np.ndarray, str, np.ndarray | None]  # an image (H, W, 3), its caption, a heat map (h, w) from 0 to 1


@contextmanager
def own_settings() -> Iterator[None]:
    """Imports matplotlib. Inside the block it has its defaults and our fonts; afterwards the user's settings again."""
    with ThreadPoolExecutor(1) as pool:  # Ctrl-C ends the main thread; C code would make an ImportError of it
        matplotlib, installed = pool.submit(_matplotlib).result()
    fonts = [name for name in FONTS if name in installed]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": fonts, "text.parse_math": False})  # a $ in a class name is no TeX
        yield


def _matplotlib() -> tuple[ModuleType, set[str]]:
    """matplotlib, with all of its C code that draws, and the names of the installed fonts."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except Exception:  # it refuses the user's backend or file of settings
        os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
        for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
            del sys.modules[name]  # a half of it would stay
        matplotlib = importlib.import_module("matplotlib")
    importlib.import_module("matplotlib.backends.backend_agg")
    return matplotlib, set(importlib.import_module("matplotlib.font_manager").get_font_names())


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, its size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def shorten(text: str) -> str:
    """The text, without the middle of lines that are longer than 40 characters."""
    return re.sub(r"(.{19}).{2,}(.{20})", r"\1…\2", text)


@own_settings()
def save(figure: "Figure", path: Path) -> None:
    """Writes an image in the format that the file's name says. Raises OSError, or ValueError for an unknown format."""
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for a character that no font has
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # very long class names
        figure.savefig(file, format=path.suffix[1:].lower() or "png", dpi=DPI)


@own_settings()
def plot_history(row: dict, color: str) -> "Figure":
    """Loss and accuracy over epochs, training dashed and validation solid. A dotted line is that of the saved model."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, history = new_figure(8, 3.6), row["history"]
    figure.suptitle(row["label"], fontsize=15)
    epochs = [epoch["epoch"] for epoch in history]
    best = min(history, key=lambda epoch: epoch["val_loss"])
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "loss", "cross-entropy"), (right, "accuracy", "accuracy")):
        for part, legend, line, dot in (("train", "training", "--", "s"), ("val", "validation", "-", "D")):
            values = [epoch[f"{part}_{name}"] for epoch in history]
            marker = dot if len(epochs) == 1 else None  # one epoch makes no line
            axes.plot(epochs, values, linestyle=line, marker=marker, color=color, linewidth=2, label=legend)
        axes.plot(best["epoch"], best[f"val_{name}"], "o", color=color, markersize=8, label="best epoch")
        axes.axhline(row[f"val_{name}"], linestyle=":", color="#000000", linewidth=2, label="saved model, validation")
        axes.set_xlabel("epoch", fontsize=12)
        axes.set_ylabel(label, fontsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    left.legend(fontsize=11)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


@own_settings()
def plot_confusion(title: str, pairs: Sequence[Sequence[int]], classes: Sequence[str]) -> "Figure":
    """Numbers of images by true class, with its recall, and predicted class. Of many classes, lists the worst pairs.

    `pairs` is the "confusion" of engine/metrics.py.
    """
    from matplotlib.ticker import MaxNLocator

    names, many = [shorten(name) for name in classes], len(classes) > MATRIX_CLASSES
    counts = np.zeros((len(names), len(names)), np.int32)
    for true, taken, count in pairs:
        counts[true, taken] = count
    shares, right = counts / counts.sum(axis=1, keepdims=True).clip(1), np.eye(len(counts), dtype=bool)
    size = 8 if many else max(5.0, 0.55 * len(names) + 1.5)
    figure = new_figure(size, 1.5 * size if many else size)
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1)) if many else (figure, None)
    axes = upper.subplots()
    axes.imshow(np.ma.masked_where(~right, shares), cmap="Blues", vmin=0, vmax=1)
    largest = max(shares[~right].max(), 1e-6)
    axes.imshow(np.ma.masked_where(right, shares), cmap="Oranges", vmin=0, vmax=largest)
    axes.set_title(f"{title}\n{counts[right].sum() / counts.sum():.1%} of {counts.sum():,} right", fontsize=15)
    axes.set_xlabel("predicted", fontsize=12)
    axes.set_ylabel("true class, recall", fontsize=12)
    if many:
        axes.set(xticks=[], yticks=[])
        worst = sorted(np.argwhere(counts * ~right).tolist(), key=lambda pair: -counts[tuple(pair)])[:15]
        bars = lower.subplots()
        bars.barh(range(len(worst)), [counts[true, taken] for true, taken in worst], color=COLORS[0])
        pairs = [f"{names[true]} taken for {names[taken]}" for true, taken in worst]
        bars.set_yticks(range(len(worst)), pairs, fontsize=11)
        bars.invert_yaxis()
        bars.xaxis.set_major_locator(MaxNLocator(integer=True))
        bars.set_xlabel("images", fontsize=12)
        return figure
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=11)
    rows = zip(names, shares[right], counts.sum(axis=1), strict=True)
    recalls = [f"{name}  {recall:.0%}" if count else name for name, recall, count in rows]
    axes.set_yticks(range(len(names)), recalls, fontsize=11)
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > (0.5 if row == column else 0.6 * largest) else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=10, color=color)
    return figure


@own_settings()
def plot_reliability(title: str, calibration: dict[str, dict], color: str) -> "Figure":
    """Accuracy against confidence in bins, before and after scaling. A dot's area is its share of the images."""
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(7, 6)
    figure.suptitle(title, fontsize=15)
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), "k:", linewidth=1.5, label="confidence = accuracy")
    for when, shade in (("before", "#999999"), ("after", color)):
        rows = np.array([calibration[when][key] for key in ("count", "confidence", "accuracy")])
        count, confidence, accuracy = rows[:, rows[0] > 0]
        many, label = count >= 10, f"{when} scaling: error {calibration[when]['ece']:.1%}"
        axes.plot(confidence[many], accuracy[many], color=shade, linewidth=2, label=label)
        fade = 0.7 * (count / 20).clip(0.15, 1)  # an accuracy of few images means little
        axes.scatter(confidence, accuracy, 20 + 600 * count / count.sum(), color=shade, alpha=fade)
    axes.set_xlabel("confidence", fontsize=12)
    axes.set_ylabel("test accuracy", fontsize=12)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12, loc="lower right")
    return figure


@own_settings()
def plot_images(rows: Sequence[Sequence[Picture]], width: float, fontsize: int) -> "Figure":
    """Rows of images, at most 1.9 inches high, with the captions below. Each has `width` inches."""
    columns = max(map(len, rows))
    height = 1.9 + 0.02 * fontsize * max(len(caption.split("\n")) for row in rows for _, caption, _ in row)
    figure = new_figure(width * columns, height * len(rows))
    grid = figure.add_gridspec(len(rows), columns)
    for i, row in enumerate(rows):
        for j, (image, caption, heat) in enumerate(row):
            axes = figure.add_subplot(grid[i, j])
            axes.imshow(image, interpolation="bicubic", extent=(0, 1, 0, 1))
            if heat is not None:
                axes.imshow(heat, cmap="inferno", alpha=0.55, interpolation="bicubic", extent=(0, 1, 0, 1))
            color = MARK_COLORS.get(caption[:1], "black")
            axes.set_title(shorten(caption), fontsize=fontsize, color=color, y=-0.07, va="top")
            axes.axis("off")
    return figure


def plot_predictions(captioned: Iterable[tuple[Item, str]], reading: dict | None) -> "Figure | None":
    """The first PLOTTED_IMAGES images that can be read, four in a row. None if no image can be read."""
    readable = itertools.islice(read_for_plot(captioned, reading), PLOTTED_IMAGES)
    pictures = [(image, caption, None) for image, caption in readable]
    if not pictures:
        return None
    lines = [shorten(caption).split("\n") for _, caption, _ in pictures]
    longest = max(len(line) for caption in lines for line in caption)
    rows = [pictures[i : i + 4] for i in range(0, len(pictures), 4)]
    return plot_images(rows, max(2.2, 0.12 * longest), fontsize=15)


def plot_mistakes(mistakes: Iterable[tuple[Item, str, str, float]], reading: dict | None) -> "Figure | None":
    """The first images with their true class, the predicted class and its probability. None if none can be read."""
    captioned = ((item, f"{true}\ntaken for {taken}, {p:.0%}") for item, true, taken, p in mistakes)
    return plot_predictions(captioned, reading)


def colors(rows: dict[str, dict]) -> dict[str, str]:
    """A color for each backbone, the same in all plots."""
    backbones = dict.fromkeys(row["backbone"] for row in rows.values())
    return dict(zip(backbones, itertools.cycle(COLORS), strict=False))


def draw_model(
    row: dict, items: Sequence[Item], labels: Tensor, logits: Tensor, color: str, folder: Path, reading: dict | None
) -> None:
    """Draws a model's plots from its row of results.json, the test images, their labels and its logits (N, classes)."""
    for kind in CAPTIONS:
        (folder / f"{row['plot']}{kind}.png").unlink(missing_ok=True)  # an earlier run may have left it
    label, classes = row["label"], [printable(name) for name in row["classes"]]
    confidence, predicted = (logits / row["temperature"]).softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)].tolist()
    seen, rank = Counter(), {}  # the clearest mistake of each class comes first, then the second of each
    for i in wrong:
        rank[i] = seen[int(labels[i])]
        seen[int(labels[i])] += 1
    wrong.sort(key=rank.get)
    mistakes = ((items[i], classes[labels[i]], classes[predicted[i]], float(confidence[i])) for i in wrong)
    figures = {
        "": plot_history(row, color),
        "_confusion": plot_confusion(label, row["confusion"], classes),
        "_reliability": plot_reliability(label, row["calibration"], color),
        "_mistakes": plot_mistakes(mistakes, reading),
    }
    for kind, figure in figures.items():
        if figure:
            save(figure, folder / f"{row['plot']}{kind}.png")


@own_settings()
def draw_comparison(rows: dict[str, dict], color: dict[str, str], folder: Path) -> None:
    """Draws the test accuracy and the training time of all models, the most accurate at the top."""
    from matplotlib.ticker import MaxNLocator

    ranked = sorted(rows.values(), key=lambda row: mean(row["accuracy_by_seed"]["test"]))
    times = [sum(row["seconds"].values()) for row in ranked]
    figure = new_figure(9, 1.6 + 0.42 * len(ranked))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, (row, seconds) in enumerate(zip(ranked, times, strict=True)):
        accuracy, shade = mean(row["accuracy_by_seed"]["test"]), color[row["backbone"]]
        low, high = row["test_interval"]
        left.plot((low, high), (y, y), color=shade, linewidth=4, alpha=0.4)
        left.plot(accuracy, y, "o", color=shade, markersize=9)
        left.annotate(f"{accuracy:.1%}", (high, y), (6, 0), textcoords="offset points", va="center", fontsize=12)
        bar = right.barh(y, seconds, color=shade, height=0.6)
        right.bar_label(bar, [f"{seconds:,.{0 if seconds >= 10 else 1}f} s"], padding=4, fontsize=12)
    left.set_yticks(range(len(ranked)), [row["label"] for row in ranked], fontsize=12)
    left.set_xlabel("test accuracy, 95% interval", fontsize=12)
    left.xaxis.set_major_locator(MaxNLocator(4))
    left.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
    left.margins(x=0.35, y=0.1)
    right.set_xlabel("training time", fontsize=12)
    right.set(xscale="log", xlim=(min(times) / 3, max(times) * 20))
    right.xaxis.set_major_formatter("{x:g} s")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    save(figure, folder / "comparison.png")


def draw_audit(report: dict, parts: dict[str, Images], file: Path, reading: dict | None) -> None:
    """Draws the clearest near-duplicates and label errors of an audit. `parts` are the images, by part."""
    items = {path: item for images in parts.values() for path, item in zip(images.paths(), images.items, strict=True)}
    pairs = sorted(report["near_duplicates"] or [], key=lambda pair: len({i["label"] for i in pair["images"]}) == 1)
    shown = []
    for pair in pairs[:4]:
        alike = f"near-duplicate, {pair['correlation']:.0%}"
        shown += [(items[i["path"]], f"{i['part']}: {printable(i['label'])}\n{alike}") for i in pair["images"]]
    for error in report["label_errors"][: PLOTTED_IMAGES - len(shown)]:
        suggested = f"more likely {printable(error['suggested'])}, {error['probability']:.0%}"
        shown.append((items[error["path"]], f"{printable(error['label'])}?\n{suggested}"))
    if figure := plot_predictions(shown, reading):
        save(figure, file)
