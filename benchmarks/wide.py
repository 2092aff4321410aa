"""Whether to take the square in the middle of a wide image, or to squeeze all of it into a square.

    python benchmarks/wide.py --data cifar10-images

Makes wide images of square ones: the rest of a 3:2 or 2:1 canvas is the image's reflection. The image is in the middle,
as photographers like it, or anywhere. Prints test accuracies, means over three classifiers, in Markdown.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from common import arguments, batches, extract, fit, new_model, print_header, print_row
from PIL import Image

from data import load_data
from engine.console import run_script
from engine.images import Images, read_image
from train_utils import evaluate


def main() -> int:
    args = arguments(__doc__, data="cifar10", model="mobilenet_v2", limit=5000)
    data = load_data(args.data, limit=args.limit)
    print_header("canvas", "image", "the middle", "squeezed", texts=2)
    for ratio in (1.5, 2.0):
        for place in ("in the middle", "anywhere"):
            with tempfile.TemporaryDirectory() as scratch:
                images = enumerate((data.train, data.val, data.test))
                parts = [widened(part, ratio, place, Path(scratch, str(i))) for i, part in images]
                found = [accuracy(args.model, data.classes, parts, crop, Path(scratch)) for crop in (True, False)]
            print_row(f"{ratio:g}:1", place, *(f"{each:.1%}" for each in found))
    return 0


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
    return Images(paths, images.labels, images.names)


def accuracy(name: str, classes: Sequence[str], parts: list[Images], crop: bool, folder: Path) -> float:
    found = []
    for seed in range(3):
        model = new_model(name, classes, seed)
        model.preprocessing["crop"] = crop
        train, val, test = extract(model, *parts, folder=folder)
        fit(model.classifier, train, val, seed)
        found.append(evaluate(model.classifier, batches(test))[1])
    return mean(found)


if __name__ == "__main__":
    run_script(main)
