"""Whether to take the square in the middle of a wide image, or to squeeze all of it into a square.

    python benchmarks/wide.py --data cifar10-images

Makes wide images of square ones: the rest of a 3:2 or 2:1 canvas is the image's reflection. The image is in the middle,
as photographers like it, or anywhere. Prints test accuracies, means over three classifiers, in Markdown.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from common import batches, fit, known
from PIL import Image

from data import CIFAR10_SIZE, Data, Images, load_data, read_image, run_script
from models import TransferModel
from train_utils import evaluate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--limit", type=int, default=5000)
    args = parser.parse_args()
    data = load_data(args.data, limit=args.limit)
    print("| canvas | image | the middle | squeezed |\n| --- | --- | ---: | ---: |")
    for ratio in (1.5, 2.0):
        for place in ("in the middle", "anywhere"):
            with tempfile.TemporaryDirectory() as scratch:
                parts = {part: widened(getattr(data, part), ratio, place, Path(scratch, part)) for part in PARTS}
                cells = [f"{accuracy(args.model, replace(data, **parts), crop, scratch):.1%}" for crop in (True, False)]
            print(f"| {ratio:g}:1 | {place} | {' | '.join(cells)} |", flush=True)
    return 0


PARTS = ("train", "val", "test")


def widened(images: Images, ratio: float, place: str, folder: Path) -> Images:
    """The images on a wide canvas, as files in `folder`."""
    random, paths = np.random.default_rng(0), []
    folder.mkdir()
    for i, item in enumerate(images.items):
        pixels = read_image(item).permute(1, 2, 0).numpy()
        more = round((ratio - 1) * pixels.shape[1])
        left = more // 2 if place == "in the middle" else int(random.integers(more + 1))
        paths.append(folder / f"{i}.png")
        Image.fromarray(np.pad(pixels, ((0, 0), (left, more - left), (0, 0)), mode="reflect")).save(paths[-1])
    return Images(paths, images.labels)


def accuracy(name: str, data: Data, crop: bool, scratch: str) -> float:
    found = []
    model = TransferModel(name, data.classes, CIFAR10_SIZE)
    model.preprocessing["crop"] = crop
    train, val, test = known(model, [getattr(data, part) for part in PARTS], Path(scratch))
    for seed in range(3):
        torch.manual_seed(seed)
        classifier = TransferModel(name, data.classes, pretrained=False).classifier
        fit(classifier, train, val, seed)
        found.append(evaluate(classifier, batches(test))[1])
    return mean(found)


if __name__ == "__main__":
    run_script(main)
