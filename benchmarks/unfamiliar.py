"""How well a model tells foreign images from those of its test set: the area under the ROC curve.

    python benchmarks/unfamiliar.py --data cifar10-images --foreign folder/with/other/images

The foreign images and 300 of the test set are resized to the size of the first test image and pass through JPEG once
more, so that neither resolution nor format gives them away. A cell holds the area under the curve of the score
(engine/unfamiliar.py), in parentheses that of the largest probability alone, and the share of the images flagged as
unfamiliar, at 5% false positives on the validation images. "own" is the share of the test images, as they are in
the data set, that is flagged. The last kind is a class that is left out of training.
--images are the training images of each class; 0 takes all.
"""

import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, arguments, extract, fit, new_model, print_header, print_row
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor

from data import CIFAR10_SIZE, load_data
from engine.console import run_script
from engine.fast import fast_copy
from engine.folders import find_images
from engine.images import ImageError, Images, Item, read_image
from engine.run import run_images
from engine.unfamiliar import fit_unfamiliarity
from models import TransferModel

COUNT = 300  # images of each kind


def main() -> int:
    names = ["mobilenet_v2", "mobilenet_v3_large_levels"]
    options = {"foreign": None, "image_size": CIFAR10_SIZE, "left_out": "truck", "images": [0, 100, 20]}
    args = arguments(__doc__, data="cifar10", models=names, **options)
    whole = load_data(args.data)
    size, label = read_image(whole.test.items[0]).shape[1], whole.classes.index(args.left_out)
    test = whole.test.subset(torch.arange(0, len(whole.test), max(1, len(whole.test) // COUNT)))
    kinds, own = foreign(size, args.foreign), recompressed(test.items, size)
    known = recompressed(only(test, test.labels != label).items, size)
    left_out = recompressed(only(whole.test, whole.test.labels == label).items[:COUNT], size)
    print_header("model", "images of each class", "own", *kinds, f"{args.left_out}, left out")
    for name in args.models:
        for count in args.images:
            data = load_data(args.data, limit=count * len(whole.classes) or None)
            parts = data.train, data.val
            model = train(name, data.classes, parts, args.image_size)
            cells = [f"{(answers(model, whole.test.items)[:, -1] > 0).float().mean():.1%}"]
            cells += [compare(model, own, images) for images in kinds.values()]
            model = train(name, data.classes, [only(part, part.labels != label) for part in parts], args.image_size)
            print_row(name, count or "all", *cells, compare(model, known, left_out))
    return 0


def only(images: Images, chosen: Tensor) -> Images:
    return images.subset(chosen.nonzero().flatten())


def recompressed(items: list[Item], size: int) -> list[np.ndarray]:
    """The images that can be read, (size, size, 3), as they come out of a JPEG file."""
    found = []
    for item in items:
        with suppress(ImageError):
            image, file = Image.fromarray(read_image(item, 512).permute(1, 2, 0).numpy()), io.BytesIO()
            image.resize((size, size)).save(file, "JPEG", quality=90)
            found.append(np.array(Image.open(file)))
    return found


def foreign(size: int, folder: str | None) -> dict[str, list[np.ndarray]]:
    """Images of each kind that have nothing to do with any class."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(COUNT)]
    kinds = {
        "noise": noise,
        "digits": [Image.fromarray((16 * each).clip(0, 255).astype(np.uint8)) for each in load_digits().images[:COUNT]],
        "blurred colours": [image.filter(ImageFilter.GaussianBlur(6)) for image in noise],
    }
    if folder:
        kinds[Path(folder).name] = find_images(Path(folder))[0]
    return {kind: recompressed(images, size) for kind, images in kinds.items()}


def train(name: str, classes: Sequence[str], parts: Sequence[Images], image_size: int) -> TransferModel:
    """The frozen backbone with a classifier for the training and validation images."""
    model = new_model(name, classes, 0, image_size)
    train, val = extract(model, *parts)
    _, logits = fit(model.classifier, train, val, seed=0)
    model.unfamiliarity = fit_unfamiliarity(*train, val[0], logits)
    return fast_copy(model, DEVICE)


def answers(model: TransferModel, items: Sequence[Item]) -> Tensor:
    return torch.cat([batch.outputs[0] for batch in run_images([model], items, TransferModel.answer)])


def compare(model: TransferModel, own: list[np.ndarray], others: list[np.ndarray]) -> str:
    """The areas under the curve of the score and of the probability, and the share of the others that is detected."""
    rows = answers(model, own + others)
    is_foreign = torch.arange(len(rows)) >= len(own)
    score, probability = rows[:, -1], rows[:, :-1].softmax(dim=1).amax(dim=1)
    areas = [roc_auc_score(is_foreign, values) for values in (score, -probability)]
    return "{:.2f} ({:.2f}), {:.0%}".format(*areas, (score[is_foreign] > 0).float().mean().item())


if __name__ == "__main__":
    run_script(main)
