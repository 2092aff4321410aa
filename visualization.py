"""Numbers in, a matplotlib figure or a page out.

    save(plot_history("VGG16", history, COLORS[0]), Path("vgg16.png"))

Every plot is drawn for a README at half width: few words, large type, colours that colour-blind people can tell apart.
"""

import itertools
import re
import warnings
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import mean
from string import Template

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from engine.console import printable
from engine.files import atomic_write
from engine.images import Item, read_for_plot
from engine.metrics import wilson_interval

DPI = 120
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
INKS = {"✓": COLORS[0], "✗": COLORS[4]}  # of captions, by their first character
FONTS = (  # matplotlib takes each character from the first font that has it
    "DejaVu Sans", "Noto Sans", "Arial Unicode MS", "Segoe UI", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP",
    "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "WenQuanYi Zen Hei", "Noto Emoji",
)  # fmt: skip
KINDS = ("", "_confusion", "_reliability", "_mistakes", "_data")  # of a model's plots
SHOWN = 12  # images in a plot
MANY = 20  # a confusion matrix of more classes has no room for names and numbers


def labels_and_font(labels: Sequence[str]) -> tuple[list[str], dict]:
    """The labels as they are drawn, and text options: fonts for most scripts, and no TeX. Long labels are shortened."""
    shortened = [re.sub(r"(.{19}).{2,}(.{20})", r"\1…\2", label) for label in labels]
    installed = {font.name for font in font_manager.fontManager.ttflist}  # matplotlib warns of any other
    return shortened, {"family": [name for name in FONTS if name in installed], "parse_math": False}


def plot_history(title: str, history: list[dict], color: str) -> Figure:
    """Loss and accuracy over epochs, training dashed and validation solid."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=15)
    epochs = [row["epoch"] for row in history]
    best = min(history, key=lambda row: row["val_loss"])
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        style, dots = {"color": color, "linewidth": 2}, ("s", "D") if len(epochs) == 1 else (None, None)
        train, val = ([row[f"{part}_{name}"] for row in history] for part in ("train", "val"))
        axes.plot(epochs, train, linestyle="--", label="training", marker=dots[0], **style)
        axes.plot(epochs, val, label="validation", marker=dots[1], **style)
        axes.plot(best["epoch"], best[f"val_{name}"], "o", color=color, markersize=8, label="kept")
        axes.set_xlabel("epoch", fontsize=12)
        axes.set_ylabel("cross-entropy" if name == "loss" else name, fontsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.legend(fontsize=11)
    return figure


def plot_confusion(title: str, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Rows are the true classes, with their recall. A number is a count of images.

    The diagonal is blue, darker for a higher recall. Mistakes are orange, on their own scale: the darkest one is the
    most frequent in its class. More than MANY classes go without names and numbers; the worst pairs are listed below.
    """
    counts, (names, font) = np.asarray(matrix), labels_and_font(classes)
    shares, right = counts / counts.sum(axis=1, keepdims=True).clip(1), np.eye(len(counts), dtype=bool)
    size = max(5.0, 0.55 * len(names) + 1.5) if len(names) <= MANY else 8
    figure = Figure(figsize=(size, size) if len(names) <= MANY else (size, 1.5 * size), layout="constrained")
    upper, *lower = figure.subfigures(2, 1, height_ratios=(2, 1)) if len(names) > MANY else [figure]
    axes = upper.subplots()
    axes.imshow(np.ma.masked_where(~right, shares), cmap="Blues", vmin=0, vmax=1)
    largest = max(shares[~right].max(), 1e-6)
    axes.imshow(np.ma.masked_where(right, shares), cmap="Oranges", vmin=0, vmax=largest)
    axes.set_title(f"{title}\n{counts[right].sum() / counts.sum():.1%} of {counts.sum():,} right", fontsize=15)
    axes.set_xlabel("predicted", fontsize=12)
    axes.set_ylabel("true class, recall", fontsize=12)
    if lower:
        axes.set(xticks=[], yticks=[])
        worst = sorted(np.argwhere(counts * ~right).tolist(), key=lambda pair: -counts[tuple(pair)])[:15]
        pairs = [f"{names[true]} taken for {names[taken]}" for true, taken in worst]
        bars = lower[0].subplots()
        bars.barh(range(len(worst)), [counts[true, taken] for true, taken in worst], color=COLORS[0])
        bars.set_yticks(range(len(worst)), pairs, fontsize=11, **font)
        bars.invert_yaxis()
        bars.xaxis.set_major_locator(MaxNLocator(integer=True))
        bars.set_xlabel("images", fontsize=12)
        return figure
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=11, **font)
    recalls = [f"{name}  {recall:.0%}" for name, recall in zip(names, shares[right], strict=True)]
    axes.set_yticks(range(len(names)), recalls, fontsize=11, **font)
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > (0.5 if row == column else 0.6 * largest) else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=10, color=color)
    return figure


def plot_reliability(title: str, calibration: dict[str, dict], color: str) -> Figure:
    """Accuracy against confidence in bins, before and after scaling. A dot's area is its share of the images."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color="#999999", linewidth=1)
    axes.text(0.03, 0.06, "confidence = accuracy", color="#777777", fontsize=11, rotation=45, rotation_mode="anchor")
    for when, shade in (("before", "#999999"), ("after", color)):
        bins = calibration[when]
        rows = np.array([bins[key] for key in ("count", "confidence", "accuracy")])
        count, confidence, accuracy = rows[:, rows[0] > 0]
        many, label = count >= 10, f"{when} scaling: error {bins['ece']:.1%}"
        axes.plot(confidence[many], accuracy[many], color=shade, linewidth=2, label=label)
        fade = 0.7 * (count / 20).clip(0.15, 1)  # an accuracy of few images means little
        axes.scatter(confidence, accuracy, 20 + 600 * count / count.sum(), color=to_rgba_array(shade, fade))
    figure.suptitle(title, fontsize=14)
    axes.set_xlabel("confidence", fontsize=12)
    axes.set_ylabel("test accuracy", fontsize=12)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12, loc="lower right")
    return figure


def plot_comparison(points: Sequence[tuple[str, float, float, tuple[float, float], str]]) -> Figure:
    """Test accuracy and training time of models, the most accurate first.

    A point is (label, seconds, accuracy, its 95 % interval, color), accuracies from 0 to 1.
    """
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(points)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, (_, seconds, accuracy, (low, high), color) in enumerate(points := sorted(points, key=lambda p: p[2])):
        left.plot((low, high), (y, y), color=color, linewidth=4, alpha=0.4)
        left.plot(accuracy, y, "o", color=color, markersize=9)
        left.annotate(f"{accuracy:.1%}", (high, y), (6, 0), textcoords="offset points", va="center", fontsize=12)
        right.barh(y, seconds, color=color, height=0.6)
        time = f"{seconds:,.{0 if seconds >= 10 else 1}f} s"
        right.annotate(time, (seconds, y), (4, 0), textcoords="offset points", va="center", fontsize=12)
    left.set_yticks(range(len(points)), [point[0] for point in points], fontsize=12)
    left.set_xlabel("test accuracy, 95 % interval", fontsize=12)
    left.xaxis.set_major_locator(MaxNLocator(4))
    left.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
    left.margins(x=0.35, y=0.1)
    right.set_xlabel("training time", fontsize=12)
    right.set_xscale("log")
    right.set_xlim(min(point[1] for point in points) / 3, max(point[1] for point in points) * 20)
    right.xaxis.set_major_formatter("{x:g} s")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    return figure


def plot_predictions(images: Sequence[np.ndarray], captions: Sequence[str]) -> Figure:
    """Images (H, W, 3), each with its caption below it: blue if it begins with a ✓, orange with a ✗."""
    captions, font = labels_and_font(captions)
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    longest = max(len(line) for caption in captions for line in caption.split("\n"))
    size = (max(2.5, 0.095 * longest) * columns, rows * (1.7 + 0.24 * lines))
    figure = Figure(figsize=size, layout="constrained")
    for axes in np.ravel(figure.subplots(rows, columns, squeeze=False)):
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image, interpolation="bicubic")
        axes.set_title(caption, fontsize=12, color=INKS.get(caption[:1], "black"), y=-0.04, va="top", **font)
    return figure


def plot_explanations(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    heat: Sequence[np.ndarray],
    similar: Sequence[Sequence[tuple[np.ndarray, str]]],
) -> Figure:
    """A row for each image (H, W, 3): itself, its heat map (h, w) from 0 to 1, if any, and images like it."""
    columns = 1 + bool(len(heat)) + max(map(len, similar), default=0)
    texts = [caption for row in similar for _, caption in row]
    texts, font = labels_and_font([*captions, *texts])
    figure = Figure(figsize=(1.9 * columns, 2.5 * len(images)), layout="constrained")
    rows, texts = figure.subplots(len(images), columns, squeeze=False), iter(texts)
    for axes in rows.flat:
        axes.axis("off")

    def show(axes: Axes, image: np.ndarray, caption: str) -> None:
        axes.imshow(image, interpolation="bicubic", extent=(0, 1, 0, 1))
        axes.set_title(caption, fontsize=11, color=INKS.get(caption[:1], "black"), y=-0.04, va="top", **font)

    for row, image in zip(rows, images, strict=True):
        show(row[0], image, next(texts))
    for row, image, parts in zip(rows, images, heat, strict=False):
        show(row[1], image, "what decided")
        row[1].imshow(parts, cmap="inferno", alpha=0.55, interpolation="bicubic", extent=(0, 1, 0, 1))
    for row, its in zip(rows, similar, strict=False):
        for axes, (image, _) in zip(row[columns - len(its) :], its, strict=True):
            show(axes, image, next(texts))
    return figure


PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 64rem; margin: auto; padding: 1rem; color: #222; background: #fff }
div { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th { cursor: pointer }
th:first-child, td:first-child { text-align: left }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); align-items: start }
img { max-width: 100%; break-inside: avoid }
dt { font-weight: 600 }
dd { margin: 0 0 0.5rem; overflow-wrap: anywhere }
</style>
<h1>$title</h1>
<div><table><thead>$header</thead><tbody>$rows</tbody></table></div>
<p>A click on a heading sorts. Differences smaller than ± are not significant (95 %).</p>
$sections
<h2>How it was made</h2>
<dl>$facts</dl>
<script>
document.querySelectorAll("th").forEach((heading, i) => heading.onclick = () => {
  const body = document.querySelector("tbody"), text = row => row.cells[i].textContent;
  const order = (a, b) => parseFloat(text(b)) - parseFloat(text(a)) || text(a).localeCompare(text(b));
  body.append(...[...body.rows].sort(order));
});
</script>
""")


def report_page(
    title: str, table: Sequence[Sequence[str]], sections: dict[str, Sequence[Path]], facts: dict[str, str]
) -> str:
    """One HTML page that needs nothing else: a table, its first row the header, sections of PNG files, and facts."""

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    def image(file: Path) -> str:
        return f'<img alt="{escape(file.stem)}" src="data:image/png;base64,{b64encode(file.read_bytes()).decode()}">'

    return PAGE.substitute(
        title=escape(title),
        header=row(table[0], "th"),
        rows="".join(row(cells, "td") for cells in table[1:]),
        sections="".join(
            f"<h2>{escape(name)}</h2><section>{''.join(map(image, files))}</section>"
            for name, files in sections.items()
        ),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items()),
    )


def save(figure: Figure, path: Path) -> None:
    """Writes an image in the format that the file's name says. Raises OSError, or ValueError for an unknown format."""
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for a character that no font has
        figure.savefig(file, format=path.suffix[1:].lower() or "png", dpi=DPI)


# -------------------------------------------------------------------------------------------- the plots of a run


def colors(rows: dict[str, dict]) -> dict[str, str]:
    """A color for each backbone, the same in all plots."""
    backbones = dict.fromkeys(row["backbone"] for row in rows.values())
    return dict(zip(backbones, itertools.cycle(COLORS), strict=False))


def draw_model(row: dict, items: Sequence[Item], labels: Tensor, logits: Tensor, color: str, folder: Path) -> None:
    """Draws a model's history, confusion matrix, calibration and most confident mistakes.

    `row` is its row of results.json; the rest are the test images, their labels and its logits (N, classes).
    """
    for kind in KINDS:
        (folder / f"{row['plot']}{kind}.png").unlink(missing_ok=True)  # of an earlier run
    label, classes = row["label"], [printable(name) for name in row["classes"]]
    figures = {
        "": plot_history(label, row["history"], color),
        "_confusion": plot_confusion(label, row["confusion_matrix"], classes),
        "_reliability": plot_reliability(label, row["calibration"], color),
    }
    confidence, predicted = (logits / row["temperature"]).softmax(dim=1).max(dim=1)
    wrong = ((predicted != labels) & ~confidence.isnan()).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)].tolist()
    nth = defaultdict(itertools.count)  # mistake of its class: the clearest of every class come first
    wrong.sort(key=lambda i: next(nth[int(labels[i])]))
    mistakes = ((items[i], classes[labels[i]], classes[predicted[i]], float(confidence[i])) for i in wrong)
    if figure := plot_mistakes(mistakes):
        figures["_mistakes"] = figure
    for kind, figure in figures.items():
        save(figure, folder / f"{row['plot']}{kind}.png")


def plot_mistakes(mistakes: Iterable[tuple[Item, str, str, float]]) -> Figure | None:
    """The first images with their true class, the predicted class and its probability. None if there is none."""
    captioned = ((item, f"{true}\ntaken for {taken}, {p:.0%}") for item, true, taken, p in mistakes)
    images, captions = read_for_plot(captioned, SHOWN)
    return plot_predictions(images, captions) if images else None


def draw_comparison(rows: dict[str, dict], folder: Path) -> None:
    """Draws the accuracy and the training time of all models."""
    points = []
    for row in rows.values():
        test, seconds = mean(row["accuracy_by_seed"]["test"]), sum(row["seconds"].values())
        points.append((row["label"], seconds, test, wilson_interval(test, row["test_images"]), row["backbone"]))
    color = colors(rows)
    save(plot_comparison([(*point, color[backbone]) for *point, backbone in points]), folder / "comparison.png")


def draw_audit(report: dict, parts: dict[str, object], file: Path) -> None:
    """Draws the clearest near-duplicates and label errors of an audit. `parts` are the images, by part."""
    items = {path: item for images in parts.values() for path, item in zip(images.paths(), images.items, strict=True)}
    pairs = sorted(report["near_duplicates"] or [], key=lambda pair: len({i["label"] for i in pair["images"]}) == 1)
    shown = [
        (items[i["path"]], f"{i['part']}: {printable(i['label'])}\nnear-duplicate, {pair['correlation']:.0%}")
        for pair in pairs[:4]
        for i in pair["images"]
    ]
    for error in report["label_errors"][: SHOWN - len(shown)]:
        suggested = f"rather {printable(error['suggested'])}, {error['probability']:.0%}"
        shown.append((items[error["path"]], f"{printable(error['label'])}?\n{suggested}"))
    images, captions = read_for_plot(shown, SHOWN)
    if images:
        save(plot_predictions(images, captions), file)


def write_page(rows: dict[str, dict], table: Sequence[Sequence[str]], run: dict, folder: Path) -> None:
    """Writes report.html: the table, the plots of every model, and how the rows were made. `run` is one of the rows."""
    sections = {"Comparison": [folder / "comparison.png"]}
    for row in (row for row in rows.values() if row["backbone"] != "ensemble"):
        sections[row["label"]] = [folder / f"{row['plot']}{kind}.png" for kind in KINDS]
    sections = {title: [file for file in files if file.exists()] for title, files in sections.items()}
    facts = {name: str(run[name]) for name in ("command", "date", "commit", "device", "data")}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    facts["images"] = ", ".join(f"{run[f'{part}_images']:,} for {part}" for part in ("train", "val", "test"))
    with atomic_write(folder / "report.html") as file:
        file.write(report_page(Path(run["data"]).name, table, sections, facts).encode(errors="backslashreplace"))
