"""How fast feature extraction is, and what that means for a training run.

    python benchmarks/speed.py                      random weights, generated 32x32 JPEG files, a few minutes
    python benchmarks/speed.py --data FOLDER        the images in FOLDER/train/<class>/

Measures for each model, in images a second:

    (a) the obvious loop: ImageFolder, Resize, ToTensor, Normalize, a DataLoader with two workers, the whole model
        forward in fp32, only the last layer trained
    (b) ours: from image files to features stored in a file
    (c) a bare forward pass of PyTorch's own modules, BatchNorm folded, channels_last
    (d) a bare forward pass of the same through torch.compile with freezing, without the time to compile
    (e) a bare forward pass of the fast copy that (b) runs

A bare pass has its batch ready on the device, in the precision of (b). On a CPU, either all cores share a batch, as in
(d), or each core runs batches of its own, as in (b) and (e). (c) is the better of the two. (c) and (d) are the best of
several batch sizes. (b) to (e) take turns, three times, and the median counts.

Then extrapolates a training run: 20 epochs of (a), against one pass of (b) and 20 epochs of its classifier.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))

import models
from data import Images, find_images, run_script
from models import BACKBONES, TransferModel
from train_utils import Batches, Recipe, Training, cached_features, feature_loader, fit, synchronized_time
from visualization import COLORS, DPI

EPOCHS, EPOCH = 20, 50_000  # of the extrapolated training run: CIFAR-10
ROUNDS = 3
TITLES = {"a": "(a) loop", "b": "(b) ours", "c": "(c) bare", "d": "(d) compiled", "e": "(e) fast copy"}


class BarePass(NamedTuple):
    column: str  # of the table
    forward: Callable[[Tensor], Tensor]
    batch_size: int
    each_core: bool  # each core runs batches of its own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("vgg16", "mobilenet_v2", "mobilenet_v3_large")
    parser.add_argument("--models", nargs="+", choices=BACKBONES, default=names)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10, help="for (a); a fifth of it for each bare pass")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plot", type=Path, default=Path("plots/speed.png"))
    args = parser.parse_args()
    device = models.pick_device(args.device)
    precision = models.pick_precision("auto", device)
    print(f"{device}, {precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rates, epochs = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        root = (args.data or draw_images(Path(scratch, "images"), args.images)) / "train"
        files = list(find_images(root, Counter()))[: args.images]
        for name in args.models:
            torch.manual_seed(0)
            model = TransferModel(name, "0123456789", pretrained=False)
            model.views = 1  # as in the obvious loop
            model.precision = precision
            rates[name] = {"a": obvious_loop(name, root, args.seconds, device)}
            rates[name] |= frozen_passes(model, files, Path(scratch), args.seconds / 5, device, precision)
            epochs[name] = classifier_epoch(model, device, precision)

    print(f"\n{'images/s':26}", *(f"{title:>13}" for title in (*TITLES.values(), "b / c", "b / d", "b / e")))
    for name, rate in rates.items():
        ratios = (rate["b"] / rate[column] for column in "cde")
        print(f"{name:26}", *(f"{rate[column]:13.1f}" for column in TITLES), *(f"{ratio:13.2f}" for ratio in ratios))
    print(f"\n{f'{EPOCHS} epochs of {EPOCH:,}':26} {'(a) extrapolated':>17} {'(b) pass + classifier':>23} {'a / b':>7}")
    for name, rate in rates.items():
        loop, once, training = EPOCHS * EPOCH / rate["a"], EPOCH / rate["b"], EPOCHS * epochs[name]
        print(f"{name:26} {loop / 3600:15.1f} h {once:12.1f} + {training:6.1f} s {loop / (once + training):7.0f}")
    plot_speed(args.plot, {BACKBONES[name].label: rate for name, rate in rates.items()})
    return 0


def draw_images(root: Path, count: int) -> Path:
    """Writes small JPEG files of random colours into root/train/<class>/, in ten classes."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = root / "train" / str(i % 10) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return root


def obvious_loop(name: str, root: Path, seconds: float, device: torch.device) -> float:
    """Column (a), on the images in root/<class>/."""
    model = torchvision.models.get_model(BACKBONES[name].architecture).requires_grad_(False).to(device)
    model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, 10).to(device)
    normal = BACKBONES[name].weights.transforms()
    steps = [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(normal.mean, normal.std)]
    dataset = torchvision.datasets.ImageFolder(root, transforms.Compose(steps))
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=2)
    optimizer = torch.optim.Adam(model.classifier[-1].parameters())
    seen, start = 0, None
    for images, labels in chain.from_iterable(repeat(loader)):
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if start is None:  # the first batch warms up
            start = synchronized_time(device)
            continue
        seen += len(labels)
        if (elapsed := synchronized_time(device) - start) > seconds:
            return seen / elapsed


@inductor.patch(freezing=True)  # for torch.compile, whose option of that name does not freeze
def frozen_passes(
    model: TransferModel, files: list[Path], scratch: Path, seconds: float, device: torch.device, precision: str
) -> dict[str, float]:
    """Columns (b) to (e)."""
    images, passes, rounds = Images(files, torch.zeros(len(files))), bare_passes(model, device, precision), []
    for turn in range(ROUNDS):
        bare = [bare_rate(each, model, seconds, device, precision) for each in passes]
        features = cached_features(model, images, scratch / f"features{turn}", device)
        rounds.append([len(files) / features.seconds, *bare])
    ours, *bare = np.median(rounds, axis=0).tolist()
    rates = {"b": ours, "c": 0, "d": 0, "e": 0}
    for each, rate in zip(passes, bare, strict=True):
        rates[each.column] = max(rates[each.column], rate)
    return rates


def bare_passes(model: TransferModel, device: torch.device, precision: str) -> list[BarePass]:
    """All that columns (c) to (e) try."""
    plain = models.fast_copy(model, device, precision, packed=False).forward_features
    fast = models.fast_copy(model, device, precision).forward_features
    torch.compiler.reset()  # it stops compiling after eight models and batch sizes
    compiled = torch.compile(plain, dynamic=False)
    on_cpu = device.type == "cpu"
    sizes, each_core = ((2, 8, 16), (False, True)) if on_cpu else ((128, 256), (False,))
    return [
        *(BarePass("c", plain, size, each) for size in sizes for each in each_core),
        *(BarePass("d", compiled, size, each_core=False) for size in sizes),
        BarePass("e", fast, models.CPU_BATCH if on_cpu else models.GPU_BATCH, each_core=on_cpu),
    ]


def bare_rate(bare: BarePass, model: TransferModel, seconds: float, device: torch.device, precision: str) -> float:
    """Images a second."""
    size = model.preprocessing["image_size"]
    images = torch.randn(bare.batch_size, 3, size, size, device=device, dtype=models.DTYPES[precision])
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(_core: int = 0) -> float:
        bare.forward(images)  # warms up, and compiles
        seen, start = 0, synchronized_time(device)
        while time.perf_counter() - start < seconds:
            bare.forward(images)
            seen += len(images)
        return seen / (synchronized_time(device) - start)

    if not bare.each_core:
        return run()
    cores = torch.get_num_threads()
    with models.threads(1), ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(run, range(cores)))


def classifier_epoch(model: TransferModel, device: torch.device, precision: str) -> float:
    """The seconds of an epoch of training the classifier, on random features."""
    features, labels = torch.randn(EPOCH, model.width).half(), torch.randint(10, (EPOCH,))
    recipe, held_out = Recipe(epochs=2), EPOCH // 5  # the first epoch warms up
    parts = ((features[held_out:], labels[held_out:], 0), (features[:held_out], labels[:held_out], None))
    train, val = (
        Batches(feature_loader(part, device), its_labels, recipe.batch_size, device, seed)
        for part, its_labels, seed in parts
    )
    training = Training(model.classifier.to(device), train, val, recipe, precision)
    fit(training)
    return training.history[-1]["seconds"]


def plot_speed(path: Path, rates: dict[str, dict[str, float]]) -> None:
    """Images a second, by model and column. Of the bare forward passes it shows the fastest."""
    figure = Figure(figsize=(7, 1.6 + 1.1 * len(rates)), layout="constrained")
    axes = figure.subplots()
    position = np.arange(len(rates))
    bars = (("the obvious loop", "a", "#999999"), ("ours, from files to features", "b", COLORS[0]))
    for i, (label, columns, color) in enumerate((*bars, ("bare forward pass", "cde", COLORS[5]))):
        values = [max(rate[column] for column in columns) for rate in rates.values()]
        pairs = zip(values, rates.values(), strict=True)
        texts = [f"{v:.0f}" + (f"  \u00d7{v / rate['a']:.0f}" if i else "") for v, rate in pairs]
        drawn = axes.barh(position + 0.27 * i, values, 0.25, color=color, label=label)
        axes.bar_label(drawn, texts, padding=4, fontsize=12)
    axes.set_yticks(position + 0.27, rates, fontsize=13)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, 8 * max(max(rate.values()) for rate in rates.values()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("images a second", fontsize=12)
    figure.legend(loc="outside lower center", ncols=3, fontsize=11, frameon=False)
    figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    run_script(main)
