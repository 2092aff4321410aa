"""How fast feature extraction is, and what that means for a training run.

    python benchmarks/speed.py                      random weights, generated 32x32 JPEG files, a few minutes
    python benchmarks/speed.py --data FOLDER        the images in FOLDER/train/<class>/

Measures for each model, in images a second:

    (a) the obvious loop: ImageFolder, Resize, ToTensor, Normalize, a DataLoader with two workers, the whole model
        forward in fp32, only the last layer trained
    (b) ours: from image files to features, in OpenVINO if it is installed and faster
    (c) a bare forward pass of the fast copy that (b) runs without OpenVINO
    (d) a bare forward pass in OpenVINO
    (e) a bare forward pass in ONNX Runtime, in fp32 only

A bare pass has its images ready on the device, in the precision of (b). On a CPU each core runs batches of its own.
(d) and (e) are left out if the packages are not installed (pip install openvino onnxruntime onnx onnxscript), and on a
GPU. (b) to (e) take turns, five times, and the median counts.

Then extrapolates a training run: 20 epochs of (a), against one pass of (b) and 20 epochs of its classifier.
"""

import io
import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from common import DEVICE, PRECISION, arguments, draw_images, fit
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

import visualization
from engine.backbones import torchvision_weights
from engine.console import run_script
from engine.device import DTYPES, batch_size_for, layout_for, synchronized_time, threads
from engine.fast import fast_copy
from engine.folders import find_images
from engine.openvino import fastest_copy
from engine.run import run_images
from models import TransferModel, find_backbone
from train_utils import RECIPE

EPOCHS, EPOCH = 20, 50_000  # the extrapolated training run is CIFAR-10's
ROUNDS = 5
TITLES = {"a": "(a) loop", "b": "(b) ours", "c": "(c) fast copy", "d": "(d) OpenVINO", "e": "(e) ONNX"}


def main() -> int:
    names = ["vgg16", "mobilenet_v2", "mobilenet_v3_large"]
    options = {"precision": PRECISION, "images": 2000, "seconds": 10.0, "plot": Path("plots/speed.png")}
    args = arguments(__doc__, models=names, data=None, **options)
    print(f"{DEVICE}, {args.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rates, epochs = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(args.data, "train") if args.data else draw_images(Path(scratch, "images"), args.images)
        files = find_images(root)[0][: args.images]
        for name in args.models:
            torch.manual_seed(0)
            model = TransferModel(name, "0123456789", pretrained=False)
            model.views, model.precision = 1, args.precision  # one view, as in the obvious loop
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


def frozen_passes(model: TransferModel, files: list[Path], seconds: float) -> dict[str, float]:
    """Columns (b) to (e)."""
    copies = [fast_copy(model, DEVICE), fastest_copy(model, DEVICE, images=EPOCH)]
    bare = {"c": partial(rate_of_forward, copies[0].forward_view, model, batch_size_for(DEVICE), seconds)}
    if DEVICE.type == "cpu":
        with suppress(ImportError):
            bare["d"] = partial(rate_of_openvino, *in_openvino(model), seconds)
        if model.precision == "fp32":
            with suppress(ImportError):
                bare["e"] = partial(rate_of_forward, in_onnx_runtime(model), model, 8, seconds)
    bare["b"], rates = partial(rate_of_files, copies[1], files), {column: [] for column in "bcde"}
    for _ in range(ROUNDS):
        for column, rate in bare.items():
            rates[column].append(rate())
    return {column: float(np.median(found)) if found else math.nan for column, found in rates.items()}


def rate_of_files(fast: TransferModel, files: list[Path]) -> float:
    start = time.perf_counter()
    seen = sum(len(batch.items) for batch in run_images([fast], files, TransferModel.forward_features))
    return seen / (time.perf_counter() - start)


def rate_of_forward(
    forward: Callable[[Tensor], object], model: TransferModel, batch_size: int, seconds: float
) -> float:
    """Images a second. On a CPU each core runs batches of its own."""
    images = ready_images(model, batch_size)

    @torch.inference_mode()
    def run(_core: int = 0) -> float:
        forward(images)  # warms up
        seen, start = 0, synchronized_time(DEVICE)
        while time.perf_counter() - start < seconds:
            forward(images)
            seen += batch_size
        return seen / (synchronized_time(DEVICE) - start)

    if DEVICE.type != "cpu":
        return run()
    cores = torch.get_num_threads()
    with threads(1), ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(run, range(cores)))


def ready_images(model: TransferModel, count: int) -> Tensor:
    size = model.preprocessing["image_size"]
    images = torch.randn(count, 3, size, size, device=DEVICE, dtype=DTYPES[model.precision])
    return images.contiguous(memory_format=layout_for(DEVICE, images.dtype))


class View(nn.Module):
    """One view of a model: (B, 3, H, W) -> (B, width)"""

    def __init__(self, model: TransferModel):
        super().__init__()
        self.model = fast_copy(model, DEVICE, "fp32", packed=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_view(images)


def in_openvino(model: TransferModel) -> tuple:
    """OpenVINO's queue of requests, as its manual recommends for throughput, and an image."""
    import openvino

    program = openvino.convert_model(torch.export.export(View(model).eval(), (model.example(),)))
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(model.precision, "bf16")}
    compiled = openvino.compile_model(program, "CPU", hints)
    return openvino.AsyncInferQueue(compiled), ready_images(model, 1).float().contiguous().numpy()


def rate_of_openvino(queue: object, image: np.ndarray, seconds: float) -> float:
    seen, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        queue.start_async([image], share_inputs=True)
        seen += 1
    queue.wait_all()
    return seen / (time.perf_counter() - start)


def in_onnx_runtime(model: TransferModel) -> Callable[[Tensor], object]:
    """A function that runs eight images in the calling thread."""
    import onnxruntime

    images, file = ready_images(model, 8).contiguous(), io.BytesIO()
    program = torch.onnx.export(View(model).eval(), (images,), dynamo=True, verbose=False)
    file.write(program.model_proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda _: session.run(None, inputs)


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
        values = [np.nanmax([rate[column] for column in columns]) for rate in rates.values()]
        pairs = zip(values, rates.values(), strict=True)
        texts = [f"{v:.0f}" + (f"  \u00d7{v / rate['a']:.0f}" if i else "") for v, rate in pairs]
        drawn = axes.barh(position + 0.27 * i, values, 0.25, color=color, label=label)
        axes.bar_label(drawn, texts, padding=4, fontsize=12)
    axes.set_yticks(position + 0.27, rates, fontsize=13)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, 8 * max(np.nanmax([*rate.values()]) for rate in rates.values()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("images a second", fontsize=12)
    figure.legend(loc="outside lower center", ncols=3, fontsize=11, frameon=False)
    return figure


if __name__ == "__main__":
    run_script(main)
