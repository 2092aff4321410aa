"""How well a model tells foreign images from those of its test set: the area under the ROC curve.

    python benchmarks/unfamiliar.py --data cifar10-images --foreign folder/with/other/images

The foreign images and 300 of the test set are resized to the size of the first test image and pass through JPEG once
more, so that neither resolution nor format gives them away. A cell holds the area under the curve of the score
(models.Familiarity), in parentheses that of the largest probability alone, and the share of the images called
unfamiliar, where 95 % of the validation images are not. The last kind is a class that is left out of training.
"""

import argparse
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import fit, known
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from data import CIFAR10_SIZE, Data, ImageError, find_images, load_data, read_image, run_script
from models import TransferModel, fast_copy, pick_device, run_images
from train_utils import fit_familiarity

COUNT = 300  # images of each kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "mobilenet_v3_large_levels"])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--foreign", type=Path, help="a folder of images of other things")
    parser.add_argument("--image-size", type=int, default=CIFAR10_SIZE)
    parser.add_argument("--left-out", default="truck", metavar="CLASS")
    parser.add_argument("--images", nargs="+", type=int, default=[0, 100, 20], help="of each class; 0: all")
    args = parser.parse_args()
    whole = load_data(args.data)
    size, label = read_image(whole.test.items[0]).shape[1], whole.classes.index(args.left_out)
    sample = whole.test.subset(torch.arange(0, len(whole.test), max(1, len(whole.test) // COUNT)))
    own = [once_more(item, size) for item in sample.items]
    kinds = foreign(size, args.foreign)
    print(f"| model | images of each class | {' | '.join(kinds)} | {args.left_out}, left out |")
    print("| --- |" + " ---: |" * (len(kinds) + 2))
    for name in args.models:
        for count in args.images:
            data = load_data(args.data, limit=count * len(whole.classes)) if count else whole
            rows = measure(train(name, data, args.image_size), own, kinds)
            others = {}
            for part in ("train", "val", "test"):
                images = getattr(data, part)
                others[part] = images.subset((images.labels != label).nonzero().flatten())
            those = whole.test.subset((whole.test.labels == label).nonzero().flatten()[:COUNT])
            known = [image for image, its in zip(own, sample.labels.tolist(), strict=True) if its != label]
            left_out = {args.left_out: [once_more(item, size) for item in those.items]}
            rows |= measure(train(name, replace(data, **others), args.image_size), known, left_out)
            cells = (f"{score:.2f} ({probability:.2f}), {caught:.0%}" for score, probability, caught in rows.values())
            print(f"| {name} | {count or 'all'} | {' | '.join(cells)} |", flush=True)
    return 0


def once_more(item: Path | np.ndarray | Image.Image, size: int) -> np.ndarray:
    """The image (size, size, 3) as it comes out of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(read_image(item, 512).permute(1, 2, 0).numpy()).resize((size, size)).save(file, "JPEG", quality=90)
    return np.array(Image.open(file))


def foreign(size: int, folder: Path | None) -> dict[str, list[np.ndarray]]:
    """Images of each kind that have nothing to do with any class."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(COUNT)]
    digits = [Image.fromarray((16 * digit).clip(0, 255).astype(np.uint8)) for digit in load_digits().images[:COUNT]]
    kinds = {
        "noise": noise,
        "digits": digits,
        "blurred colours": [image.filter(ImageFilter.GaussianBlur(6)) for image in noise],
    }
    if folder:
        kinds[folder.name] = list(find_images(folder, Counter()))
    found = {}
    for kind, images in kinds.items():
        found[kind] = []
        for image in images:
            try:
                found[kind].append(once_more(image, size))
            except ImageError:
                continue
    return found


def train(name: str, data: Data, image_size: int) -> TransferModel:
    """The frozen backbone with a classifier for the data."""
    torch.manual_seed(0)
    model = TransferModel(name, data.classes, image_size)
    train, val = known(model, (data.train, data.val))
    logits = fit(model.classifier, train, val, seed=0)
    model.familiarity = fit_familiarity(*train, val[0], logits)
    return fast_copy(model, pick_device())


def measure(model: TransferModel, own: list[np.ndarray], kinds: dict[str, list[np.ndarray]]) -> dict[str, tuple]:
    """For each kind the area under the curve of the score and of the probability, and the share that is caught."""

    def answers(images: list[np.ndarray]) -> torch.Tensor:
        return torch.cat([rows for _, [rows], _ in run_images([model], images, TransferModel.answer)])

    own_answers, rows = answers(own), {}
    for kind, images in kinds.items():
        both = torch.cat([own_answers, answers(images)])
        is_foreign = torch.arange(len(both)) >= len(own)
        score, probability = both[:, -1], both[:, :-1].softmax(dim=1).amax(dim=1)
        areas = roc_auc_score(is_foreign, score), roc_auc_score(is_foreign, -probability)
        rows[kind] = (*areas, (score[is_foreign] > 0).float().mean().item())
    return rows


if __name__ == "__main__":
    run_script(main)
