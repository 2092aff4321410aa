"""What many images cost: time and memory at 1,000, 10,000 and 100,000 files, and what follows for ImageNet.

    python benchmarks/scale.py                      three minutes on two cores, a gigabyte of disk

The files are generated: 32x32 JPEG, in ten class folders. MobileNetV3-Small with random weights gets them at 32 pixels,
so that the forward pass is cheap and the times show everything else. Each size runs in its own process:

    list        load_data: find the files, split them, fingerprint the data set
    features    compute the features and append them to their file
    open        find and check all features in that file, as a second run does
    train       one epoch of the classifier, and its ridge regression
    memory      the most at the end of any stage, without the mapped parts of the feature file
    file        the features on disk

The last column extends the line through the last two sizes.
"""

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from common import arguments, draw_images, extract, fit, print_header, print_row

from data import load_data
from engine.console import run_script
from models import TransferModel
from train_utils import RECIPE

IMAGENET = 1_281_167


def main() -> int:
    counts = arguments(__doc__, images=[1000, 10_000, 100_000]).images
    if len(counts) < 2:
        raise ValueError("--images takes two numbers or more")
    found = []
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(1, get_context("spawn")) as own_process:
            draw_images(Path(scratch, "images"), count)
            found.append(own_process.submit(measure, Path(scratch)).result())
    print_header("", *(f"{count:,}" for count in (*counts, IMAGENET)))
    for name in found[0]:
        values, unit = [row[name] for row in found], "MB" if name in ("memory", "file") else "s"
        slope = (values[-1] - values[-2]) / (counts[-1] - counts[-2])
        values.append(values[-1] + slope * (IMAGENET - counts[-1]))
        print_row(name, *(f"{value:,.{1 if value < 100 else 0}f} {unit}" for value in values))
    return 0


def measure(folder: Path) -> dict[str, float]:
    """The rows of the table, for the images in `folder`."""
    times, memory = {}, []

    def stage(name: str, start: float) -> float:
        times[name] = time.perf_counter() - start
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        memory.append(int(status["RssAnon"].split()[0]) / 1000)
        return time.perf_counter()

    start = time.perf_counter()
    data = load_data(str(folder / "images"))
    torch.manual_seed(0)
    start = stage("list", start)
    model = TransferModel("mobilenet_v3_small", data.classes, image_size=32, pretrained=False)
    for name in ("features", "open"):
        train, val, _ = extract(model, data.train, data.val, data.test, folder=folder)
        start = stage(name, start)
    fit(model.classifier, train, val, 0, replace(RECIPE, epochs=1))
    stage("train", start)
    [file] = folder.glob("*.features")
    return {**times, "memory": max(memory), "file": file.stat().st_size / 1e6}


if __name__ == "__main__":
    run_script(main)
