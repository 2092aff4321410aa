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

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import fit, known
from PIL import Image

from data import load_data, run_script
from models import TransferModel
from train_utils import RECIPE

IMAGENET = 1_281_167
ROWS = {"list": "s", "features": "s", "open": "s", "train": "s", "memory": "MB", "file": "MB"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # what the processes for each size do
    args = parser.parse_args()
    if len(args.images) < 2:
        parser.error("--images takes two numbers or more")
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return 0
    found = []
    for count in args.images:
        with tempfile.TemporaryDirectory() as scratch:
            draw_images(Path(scratch), count)
            command = [sys.executable, __file__, "--measure", scratch]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    print("| | " + " | ".join(f"{count:,}" for count in args.images) + f" | {IMAGENET:,} |")
    print("| --- |" + " ---: |" * (len(args.images) + 1))
    for name, unit in ROWS.items():
        values = [row[name] for row in found]
        slope = (values[-1] - values[-2]) / (args.images[-1] - args.images[-2])
        values.append(values[-1] + slope * (IMAGENET - args.images[-1]))
        print(f"| {name} | " + " | ".join(f"{value:,.{1 if value < 100 else 0}f} {unit}" for value in values) + " |")
    return 0


def draw_images(folder: Path, count: int) -> None:
    random, files = np.random.default_rng(0), []
    for _ in range(100):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    for label in range(10):
        (folder / "images" / str(label)).mkdir(parents=True)
    for i in range(count):
        (folder / "images" / str(i % 10) / f"{i}.jpg").write_bytes(files[i % 100])


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
    parts = data.train, data.val, data.test
    for name in ("features", "open"):
        train, val, _ = known(model, parts, folder)
        start = stage(name, start)
    fit(model.classifier, train, val, 0, replace(RECIPE, epochs=1))
    stage("train", start)
    [file] = folder.glob("*.features")
    return {**times, "memory": max(memory), "file": file.stat().st_size / 1e6}


if __name__ == "__main__":
    run_script(main)
