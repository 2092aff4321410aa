"""How fast the frozen pass is, and what that means for a training run.

    python benchmarks/speed.py                      random weights, generated 32x32 JPEG files, a few minutes
    python benchmarks/speed.py --data FOLDER        the pictures in FOLDER/train/<class>/

For each model, in one run on one machine, in images a second:

    (a) the obvious loop: ImageFolder, Resize, ToTensor, Normalize, DataLoader with two workers, the whole float32 model
        forward, only the classifier trained; measured over --seconds, then extrapolated to whole epochs
    (b) ours: from picture files to features stored in a file
    (c) the bare forward pass on a tensor that is ready, in the best way of PyTorch's own modules: BatchNorm folded,
        channels_last, the precision of (b), the best of several batch sizes, of all cores on each batch and of a
        batch for each core
    (d) the same through torch.compile with freezing, all cores on each batch, the best of the same batch
        sizes, without the seconds of compiling
    (e) the bare forward pass on a tensor that is ready, as (b) does it: on the CPU by PackedConv, a batch for each
        core, its early blocks on a part of the batch at a time

(b) to (e) take turns, three times, and the median counts. Twenty epochs of (b) are one pass and twenty epochs of its
classifier.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import CPU_BATCH, Images, find_images, map_batches, one_thread, run_script
from models import BACKBONES, DTYPES, TransferModel, pick_device, pick_precision
from train_utils import Batches, cached_features, feature_loader, fit, synchronized_time
from visualization import COLORS

EPOCHS, EPOCH = 20, 50_000  # what the extrapolations are for: 20 epochs of CIFAR-10
ROUNDS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BACKBONES, default=list(BACKBONES)[:3])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plot", type=Path, default=Path("plots/speed.png"))
    args = parser.parse_args()
    device = pick_device(args.device)
    precision = pick_precision("auto", device)
    print(f"{device}, {precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        root = args.data or draw_pictures(Path(scratch) / "pictures", args.images)
        rates = {name: measure(name, root, Path(scratch), args, device, precision) for name in args.models}
    heading = ("(a) loop", "(b) ours", "(c) bare", "(d) compiled", "(e) packed", "b / c", "b / d", "b / e")
    print(f"\n{'images/s':18}", *(f"{column:>12}" for column in heading))
    for name, (loop, ours, *bare, _) in rates.items():
        print(f"{name:18}", *(f"{rate:12.1f}" for rate in (loop, ours, *bare)), *(f"{ours / b:12.2f}" for b in bare))
    print(f"\n{f'{EPOCHS} epochs of {EPOCH:,}':20} {'(a) extrapolated':>17} {'(b) pass + head':>22} {'a / b':>7}")
    for name, (loop, ours, *_, head) in rates.items():
        a, b = EPOCHS * EPOCH / loop, EPOCH / ours + head
        print(f"{name:20} {a / 3600:15.1f} h {EPOCH / ours:12.1f} + {head:5.1f} s {a / b:7.0f}")
    plot_speed(args.plot, {BACKBONES[name].label: (r[0], r[1], max(r[2:5])) for name, r in rates.items()})
    return 0


def draw_pictures(root: Path, count: int) -> Path:
    random = np.random.default_rng(0)
    for i in range(count):
        path = root / "train" / str(i % 10) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return root


def measure(
    name: str, root: Path, scratch: Path, args: argparse.Namespace, device: torch.device, precision: str
) -> tuple[float, ...]:
    """Images a second of (a) to (e), and the seconds of (b)'s classifier."""
    torch.manual_seed(0)
    model = TransferModel(name, "0123456789", pretrained=False)
    loop = obvious_loop(name, root, args.seconds, device)
    files = list(find_images(root / "train"))[: args.images]
    pictures = Images(files, torch.zeros(len(files)))
    bare = bare_forwards(model, device, DTYPES[precision])
    ours, rates = [], {key: [] for key in bare}
    for turn in range(ROUNDS):
        for (key, size, mapped), forward in bare.items():
            images = ready_images(size, device, DTYPES[precision])
            seconds = args.seconds / (1 if key == "e" else 5)  # its large batches don't all end at once
            rates[key, size, mapped].append(rate(forward, images, mapped, seconds, device))
        cache = scratch / str(turn)
        ours.append(len(files) / cached_features(model, pictures, cache, device, precision).seconds)
    best = [max(float(np.median(r)) for (key, *_), r in rates.items() if key == column) for column in "cde"]

    features, labels = torch.randn(EPOCH, model.width, dtype=torch.float16), torch.randint(10, (EPOCH,))
    load = feature_loader([features], device)
    train = Batches(load, labels, torch.arange(EPOCH * 4 // 5), 512, device, seed=0)
    val = Batches(load, labels, torch.arange(EPOCH * 4 // 5, EPOCH), 512, device)
    start = synchronized_time(device)
    fit(model.to(device).classifier, train, val, 2, 1e-3, precision=precision)
    return loop, float(np.median(ours)), *best, (synchronized_time(device) - start) / 2 * EPOCHS


def obvious_loop(name: str, root: Path, seconds: float, device: torch.device) -> float:
    model = BACKBONES[name].build().requires_grad_(False).to(device)
    model.classifier[-1] = torch.nn.Linear(model.classifier[-1].in_features, 10).to(device)
    normalise = BACKBONES[name].weights.transforms()
    steps = [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(normalise.mean, normalise.std)]
    pictures = datasets.ImageFolder(root / "train", transforms.Compose(steps))
    optimizer = torch.optim.Adam(model.classifier[-1].parameters())
    seen, start = 0, None
    while start is None or synchronized_time(device) - start < seconds:
        for images, labels in DataLoader(pictures, batch_size=64, shuffle=True, num_workers=2):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if start is None:  # the first batch warms up
                start = synchronized_time(device)
                continue
            seen += len(labels)
            if synchronized_time(device) - start > seconds:
                break
    return seen / (synchronized_time(device) - start)


def bare_forwards(
    model: TransferModel, device: torch.device, dtype: torch.dtype
) -> dict[tuple[str, int, bool], Callable]:
    """The ways to be timed, by column, batch size, and whether each core gets a batch of its own."""
    fast = model.for_inference(device, dtype).forward_features
    with patch("torch.backends.mkldnn.is_available", return_value=False):  # PyTorch's own modules
        stock = model.for_inference(device, dtype)
    stock.early, stock.part = 0, sys.maxsize  # each batch as a whole
    torch._dynamo.reset()  # of the model before, or it would give up compiling
    compiled = torch.compile(stock.forward_features, dynamic=False)
    sizes = (2, 8, 16) if device.type == "cpu" else (128, 256)
    start = time.perf_counter()
    with torch._inductor.config.patch(freezing=True):
        for size in sizes:
            rate(compiled, ready_images(size, device, dtype), False, 0, device)
    print(f"{model.name}: {time.perf_counter() - start:.1f} s to compile for {len(sizes)} batch sizes")
    ways = {("c", size, mapped): stock.forward_features for size in sizes for mapped in (False, True)}
    ways |= {("d", size, False): compiled for size in sizes}
    return ways | {("e", CPU_BATCH if device.type == "cpu" else 256, True): fast}


def ready_images(batch_size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    images = torch.randn(batch_size, 3, 224, 224, dtype=dtype, device=device)
    return images.to(memory_format=torch.channels_last)


@torch.inference_mode()
def rate(forward: Callable, images: torch.Tensor, mapped: bool, seconds: float, device: torch.device) -> float:
    """Images a second: one batch after the other, or as map_batches runs them, with nothing to read."""
    items, seen = repeat(np.zeros((1, 1, 3), np.uint8), seconds), 0
    with one_thread(mapped):  # as map_batches runs it: the weights' layout depends on it
        forward(images)
    start = synchronized_time(device)
    if mapped:
        for batch, _, _ in map_batches(lambda _: forward(images), items, device, len(images)):
            seen += len(batch)
    else:
        while synchronized_time(device) - start < seconds:
            forward(images)
            seen += len(images)
    return seen / (synchronized_time(device) - start)


def repeat(item: np.ndarray, seconds: float) -> Iterator[np.ndarray]:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        yield item


def plot_speed(path: Path, rates: dict[str, tuple[float, float, float]]) -> None:
    """Images a second by model: the obvious loop, ours from files to features, the bare forward pass."""
    figure = Figure(figsize=(7, 1.6 + 1.1 * len(rates)), layout="constrained")
    axes = figure.subplots()
    position = np.arange(len(rates))
    names = ("the obvious loop", "ours, from files to features", "bare forward pass")
    for i, (name, color) in enumerate(zip(names, ("#999999", COLORS[0], COLORS[5]), strict=True)):
        values = [rate[i] for rate in rates.values()]
        bars = axes.barh(position + 0.27 * i, values, 0.25, color=color, label=name)
        axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=4, fontsize=12)
    axes.set_yticks(position + 0.27, rates, fontsize=13)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, 3 * max(max(rate) for rate in rates.values()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("images a second", fontsize=12)
    figure.legend(loc="outside lower center", ncols=3, fontsize=11, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(main)
