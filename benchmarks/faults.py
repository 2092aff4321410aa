"""Plants near-duplicates and label errors in a folder of images and counts those that main_train.py finds.

    pip install cleanlab imagehash scikit-learn
    python benchmarks/faults.py --data cifar10-images

Takes 500 training and 100 test images of each class. Puts 60 of the training images into the test set as well (20 as
they are, 20 recompressed, 20 cropped), 20 into another class, and moves 100 (2%) to another class.

For comparison: the average precision of cleanlab's scores, from the same probabilities, and the near-duplicates that a
perceptual hash finds. At last, the near-duplicates in images of little variety: scikit-learn's digits, and the demo's
drawings.
"""

import importlib
import json
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import arguments, extract, new_model
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

import main_train
from data import CIFAR10_SIZE, Data, load_data
from engine.audit import SOFTENING, near_duplicates
from engine.console import run_script
from train_utils import out_of_sample_logits

LABEL_ERROR, CONFLICT = "label error", "duplicate with another label"
KINDS = [*["exact duplicate", "recompressed near-duplicate", "cropped near-duplicate"] * 20]
KINDS += [CONFLICT] * 20 + [LABEL_ERROR] * 100
CLEANLAB = [("self_confidence", False), ("self_confidence", True), ("normalized_margin", False)]
CLEANLAB += [("normalized_margin", True), ("confidence_weighted_entropy", False)]  # its score, and whether adjusted
HASH_BITS = 10  # imagededup's default: perceptual hashes of near-duplicates differ in at most so many of 64 bits


def main() -> int:
    args = arguments(__doc__, data=Path, model="mobilenet_v2")
    score_labels = importlib.import_module("cleanlab.rank").get_label_quality_scores  # not in requirements-dev.txt
    perceptual_hash = importlib.import_module("imagehash").phash
    with tempfile.TemporaryDirectory() as scratch:
        planted, folder = plant(args.data, Path(scratch, "images")), Path(scratch, "features")
        where = ["--data", f"{scratch}/images", "--output", scratch, "--cache", scratch]
        code = main_train.main([*where, "--models", args.model, "--image-size", str(CIFAR10_SIZE)])
        report = json.loads(Path(scratch, "plots", "data.json").read_text())
        duplicates = {image["path"] for pair in report["near_duplicates"] for image in pair["images"]}
        errors = {image["path"] for image in report["label_errors"]}
        wrong, both = planted[LABEL_ERROR] | planted[CONFLICT], set().union(*planted.values())
        data = load_data(f"{scratch}/images")
        hashed = hashed_alike(perceptual_hash, data.test.items, data.train.items + data.val.items)
        for kind, paths in planted.items():
            found = f"{len(paths & (errors if kind == LABEL_ERROR else duplicates))} of {len(paths)} found"
            in_test = any("/test/" in path for path in paths)
            print(f"{kind}: {found}{f', {len(paths & hashed)} by a perceptual hash' if in_test else ''}")
        for what, paths in (("near-duplicates", duplicates), ("near-duplicates by a perceptual hash", hashed)):
            tested = {path for path in paths if "/test/" in path}
            print(f"{len(tested & both)} of {len(tested)} test images reported as {what} are planted")
        print(f"{len(errors & wrong)} of {len(errors)} reported label errors are planted")
        compare_scores(score_labels, data, args.model, wrong, folder)
        digits = folder_of_digits(Path(scratch, "digits"))
        for name, data in (("digits", load_data(str(digits))), ("drawings", load_data("demo"))):
            parts = list(data.parts.values())
            features = [part for part, _ in extract(new_model(args.model, data.classes, 0), *parts, folder=folder)]
            pairs = near_duplicates(features, [item for part in parts for item in part.items])
            images = {i for *pair, _ in pairs for i in pair}
            print(f"{len(images)} of {sum(map(len, parts)):,} {name} are reported as near-duplicates")
    return code


def compare_scores(score_labels: Callable, data: Data, name: str, wrong: set[str], folder: Path) -> None:
    """Prints the average precision of our score and of cleanlab's for the training and validation images."""
    parts = list(data.parts.values())
    labels = torch.cat([part.labels for part in parts])
    features = [part for part, _ in extract(new_model(name, data.classes, 0), *parts, folder=folder)]
    logits, count = out_of_sample_logits(features, labels, len(data.classes)), len(data.train) + len(data.val)
    is_wrong = [path in wrong for part in parts[:2] for path in part.paths()]
    given = labels[:count].numpy()
    softened = (logits[:count] / SOFTENING).softmax(dim=1)[range(count), given]
    print(f"average precision of our score {average_precision_score(is_wrong, -softened):.2f}")
    probabilities = logits[:count].softmax(dim=1).double().numpy()
    for method, adjusted in CLEANLAB:
        score = score_labels(given, probabilities, method=method, adjust_pred_probs=adjusted)
        precision = average_precision_score(is_wrong, -score)
        print(f"average precision of cleanlab's {method}{', adjusted' if adjusted else ''} {precision:.2f}")


def hashed_alike(perceptual_hash: Callable, tested: list[Path], known: list[Path]) -> set[str]:
    """The paths of test images whose perceptual hash is close to that of another image."""
    one, other = (
        np.array([perceptual_hash(Image.open(path)).hash.ravel() for path in paths]) for paths in (tested, known)
    )
    bits = np.array([(hash_ != other).sum(axis=1).min() for hash_ in one])
    return {str(path) for path, count in zip(tested, bits, strict=True) if count <= HASH_BITS}


def folder_of_digits(folder: Path) -> Path:
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((16 * pixels).clip(0, 255).astype(np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(folder / str(label) / f"{i}.png")
    return folder


def plant(source: Path, target: Path) -> dict[str, set[str]]:
    """Makes the folder. Returns the paths of the planted images, by kind."""
    draw, classes = random.Random(0), sorted(folder.name for folder in (source / "train").iterdir())
    for part, count in (("train", 500), ("test", 100)):
        for name in classes:
            (target / part / name).mkdir(parents=True)
            for path in sorted((source / part / name).iterdir())[:count]:
                shutil.copy(path, target / part / name / path.name)
    images, planted = sorted((target / "train").rglob("*.*")), defaultdict(set)
    draw.shuffle(images)
    for kind, path in zip(KINDS, images, strict=False):
        name = path.parent.name
        other = draw.choice([each for each in classes if each != name])
        folder = target / "train" / other if kind in (CONFLICT, LABEL_ERROR) else target / "test" / name
        place = folder / f"planted_{name}_{path.name}"
        with Image.open(path) as image:
            if kind.startswith("recompressed"):
                image.convert("RGB").save(place, "JPEG", quality=60)
            elif kind.startswith("cropped"):
                (width, height), edge = image.size, image.width // 16
                middle = image.convert("RGB").crop((edge, edge, width - edge, height - edge))
                middle.resize((width, height)).save(place, "JPEG", quality=95)
            else:
                shutil.copy(path, place)
        if kind == LABEL_ERROR:
            path.unlink()
        planted[kind].add(str(place))
    return planted


if __name__ == "__main__":
    run_script(main)
