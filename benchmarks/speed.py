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

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from common import DEVICE, PRECISION, arguments, draw_images, extraction_seconds, fit
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.utils.data import DataLoader
from torchvision import transforms

import visualization
from engine.backbones import torchvision_weights
from engine.console import run_script
from engine.device import DTYPES, batch_size_for, synchronized_time, threads
from engine.fast import fast_copy
from engine.folders import find_images
from models import TransferModel, find_backbone
from train_utils import RECIPE

EPOCHS, EPOCH = 20, 50_000  # of the extrapolated training run: CIFAR-10
ROUNDS = 3
TITLES = {"a": "(a) loop", "b": "(b) ours", "c": "(c) bare", "d": "(d) compiled", "e": "(e) fast copy"}


class BarePass(NamedTuple):
    column: str  # of the table
    forward: Callable[[Tensor], Tensor]
    batch_size: int
    each_core: bool  # each core runs batches of its own


def main() -> int:
    names = ["vgg16", "mobilenet_v2", "mobilenet_v3_large"]
    args = arguments(__doc__, models=names, data=None, images=2000, seconds=10.0, plot=Path("plots/speed.png"))
    print(f"{DEVICE}, {PRECISION}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rates, epochs = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(args.data, "train") if args.data else draw_images(Path(scratch, "images"), args.images)
        files = find_images(root)[0][: args.images]
        for name in args.models:
            torch.manual_seed(0)
            model = TransferModel(name, "0123456789", pretrained=False)
            model.views, model.precision = 1, PRECISION  # one view, as in the obvious loop
            rates[name] = {"a": obvious_loop(name, root, args.seconds), **frozen_passes(model, files, args.seconds / 5)}
            epochs[name] = classifier_epoch(model)

    print(f"\n{'images/s':26}", *(f"{title:>13}" for title in (*TITLES.values(), "b / c", "b / d", "b / e")))
    for name, rate in rates.items():
        ratios = (rate["b"] / rate[column] for column in "cde")
        print(f"{name:26}", *(f"{rate[column]:13.1f}" for column in TITLES), *(f"{ratio:13.2f}" for ratio in ratios))
    print(f"\n{f'{EPOCHS} epochs of {EPOCH:,}':26} {'(a) extrapolated':>17} {'(b) pass + classifier':>23} {'a / b':>7}")
    for name, rate in rates.items():
        loop, once, training = EPOCHS * EPOCH / rate["a"], EPOCH / rate["b"], EPOCHS * epochs[name]
        print(f"{name:26} {loop / 3600:15.1f} h {once:12.1f} + {training:6.1f} s {loop / (once + training):7.0f}")
    visualization.save(plot_speed({find_backbone(name).label: rate for name, rate in rates.items()}), args.plot)
    return 0


def obvious_loop(name: str, root: Path, seconds: float) -> float:
    """Column (a), on the images in root/<class>/."""
    backbone = find_backbone(name)
    model = torchvision.models.get_model(backbone.name).requires_grad_(False).to(DEVICE)
    model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, 10).to(DEVICE)
    normal = torchvision_weights(backbone.name).transforms()
    steps = [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(normal.mean, normal.std)]
    dataset = torchvision.datasets.ImageFolder(root, transforms.Compose(steps))
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=2)
    optimizer = torch.optim.Adam(model.classifier[-1].parameters())
    seen, start = 0, None
    for images, labels in chain.from_iterable(repeat(loader)):
        loss = F.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if start is None:  # the first batch warms up
            start = synchronized_time(DEVICE)
            continue
        seen += len(labels)
        if (elapsed := synchronized_time(DEVICE) - start) > seconds:
            return seen / elapsed


@inductor.patch(freezing=True)  # for torch.compile, whose option of that name does not freeze
def frozen_passes(model: TransferModel, files: list[Path], seconds: float) -> dict[str, float]:
    """Columns (b) to (e)."""
    passes, rounds = bare_passes(model), []
    for _ in range(ROUNDS):
        bare = [bare_rate(each, model, seconds) for each in passes]
        rounds.append([len(files) / extraction_seconds(model, files), *bare])
    ours, *bare = np.median(rounds, axis=0).tolist()
    rates = {"b": ours, "c": 0, "d": 0, "e": 0}
    for each, rate in zip(passes, bare, strict=True):
        rates[each.column] = max(rates[each.column], rate)
    return rates


def bare_passes(model: TransferModel) -> list[BarePass]:
    """All that columns (c) to (e) try."""
    plain = fast_copy(model, DEVICE, packed=False).forward_features
    fast = fast_copy(model, DEVICE).forward_features
    torch.compiler.reset()  # it stops compiling after eight models and batch sizes
    compiled = torch.compile(plain, dynamic=False)
    on_cpu = DEVICE.type == "cpu"
    sizes, each_core = ((2, 8, 16), (False, True)) if on_cpu else ((128, 256), (False,))
    return [
        *(BarePass("c", plain, size, each) for size in sizes for each in each_core),
        *(BarePass("d", compiled, size, each_core=False) for size in sizes),
        BarePass("e", fast, batch_size_for(DEVICE), each_core=on_cpu),
    ]


def bare_rate(bare: BarePass, model: TransferModel, seconds: float) -> float:
    """Images a second."""
    size = model.preprocessing["image_size"]
    images = torch.randn(bare.batch_size, 3, size, size, device=DEVICE, dtype=DTYPES[PRECISION])
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(_core: int = 0) -> float:
        bare.forward(images)  # warms up, and compiles
        seen, start = 0, synchronized_time(DEVICE)
        while time.perf_counter() - start < seconds:
            bare.forward(images)
            seen += len(images)
        return seen / (synchronized_time(DEVICE) - start)

    if not bare.each_core:
        return run()
    cores = torch.get_num_threads()
    with threads(1), ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(run, range(cores)))


def classifier_epoch(model: TransferModel) -> float:
    """The seconds of an epoch of training the classifier, on random features."""
    features, labels = torch.randn(EPOCH, model.width).half(), torch.randint(10, (EPOCH,))
    train, val = ((features[part], labels[part]) for part in (slice(EPOCH // 5, None), slice(EPOCH // 5)))
    history, _ = fit(model.classifier, train, val, 0, replace(RECIPE, epochs=2))  # the first epoch warms up
    return history[-1]["seconds"]


def plot_speed(rates: dict[str, dict[str, float]]) -> Figure:
    """Images a second, by model and column. Of the bare forward passes it shows the fastest."""
    figure = Figure(figsize=(7, 1.6 + 1.1 * len(rates)), layout="constrained")
    axes = figure.subplots()
    position = np.arange(len(rates))
    bars = (("the obvious loop", "a", "#999999"), ("ours, from files to features", "b", visualization.COLORS[0]))
    for i, (label, columns, color) in enumerate((*bars, ("bare forward pass", "cde", visualization.COLORS[5]))):
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
    return figure


if __name__ == "__main__":
    run_script(main)
