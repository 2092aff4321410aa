"""Plants near-duplicates and label errors in a folder of images and counts those that main_train.py finds.

    pip install cleanlab imagehash scikit-learn
    python benchmarks/faults.py --data cifar10-images

Takes 500 training and 100 test images of each class. Puts 60 of the training images into the test set as well (20 as
they are, 20 recompressed, 20 cropped), 20 into another class, and moves 100 (2%) to another class.

For comparison: the average precision of cleanlab's scores, from the same probabilities, and the near-duplicates that a
perceptual hash finds. Then, without a model: groups of noisy copies, changed copies of 400 images, frames of films (a
camera drifts over an enlarged image), and images of little variety, scikit-learn's digits and the demo's drawings.
"""

import importlib
import io
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
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

import main_train
from data import CIFAR10_SIZE, Data, load_data
from engine.audit import SOFTENING
from engine.console import run_script
from engine.groups import components, near_duplicates, thumbnail
from train_utils import out_of_sample_logits

LABEL_ERROR, CONFLICT = "label error", "duplicate with another label"
KINDS = [*["exact duplicate", "recompressed near-duplicate", "cropped near-duplicate"] * 20]
KINDS += [CONFLICT] * 20 + [LABEL_ERROR] * 100
CLEANLAB = [("self_confidence", False), ("self_confidence", True), ("normalized_margin", False)]
CLEANLAB += [("normalized_margin", True), ("confidence_weighted_entropy", False)]  # its score, and whether adjusted
HASH_BITS = 10  # imagededup's default: perceptual hashes of near-duplicates differ in at most so many of 64 bits
CHANGES = {
    "recompressed": lambda image: recompressed(image, 60),
    "mirrored": ImageOps.mirror,
    "upside down": ImageOps.flip,
    "turned by 90 degrees": lambda image: image.rotate(90),
    "turned by 180 degrees": lambda image: image.rotate(180),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "brightened by 40%": lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    "cropped to 94%": lambda image: cropped(image, 1),
    "cropped to 88%": lambda image: cropped(image, 2),
    "cropped to 81%": lambda image: cropped(image, 3),
}


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
    count_groups(args.data)
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


def count_groups(source: Path) -> None:
    """Prints how many copies, frames, digits and drawings near_duplicates finds."""
    files = sorted((source / "train").rglob("*.*"))
    random.Random(0).shuffle(files)
    images, noise = [Image.open(file).convert("RGB") for file in files[:600]], np.random.default_rng(0)

    def noisy(image: Image.Image, deviation: float) -> Image.Image:
        return recompressed(pixels_to_image(np.array(image) + noise.normal(0, deviation, (*image.size, 3))), 90)

    for size in (2, 5, 7, 12, 20, 40):
        originals = [image.resize((96, 96), Image.Resampling.BICUBIC) for image in images[: 960 // size]]
        groups = groups_of([noisy(image, 4) for image in originals for _ in range(size)])
        joined = (groups.view(-1, size) == groups.view(-1, size).mode(dim=1).values[:, None]).sum(dim=1)
        print(f"groups of {size}: {int(joined[joined > 1].sum())} of {len(groups)} noisy copies found")
    for kind, change in CHANGES.items():
        groups = groups_of([*images, *map(change, images[:400])])
        print(f"{kind}: {int((groups[600:] == groups[:400]).sum())} of 400 found")
    frames = [noisy(frame, 3) for image in images[:24] for frame in film(image, noise)]
    groups, film_of, chosen = groups_of(frames), torch.arange(1440) // 60, torch.randperm(1440) < 288
    found, true = (int(torch.isin(each[chosen], each[~chosen]).sum()) for each in (groups, film_of))
    print(f"24 films of 60 frames: {found} test frames have near-duplicates in training, in truth {true}")
    digits = [
        pixels_to_image(16 * pixels).resize((32, 32), Image.Resampling.BICUBIC) for pixels in load_digits().images
    ]
    drawings = [Image.fromarray(item) for part in load_data("demo").parts.values() for item in part.items]
    for name, alike in (("digits", digits), ("drawings", drawings)):
        groups = groups_of(alike)
        print(f"{int((groups.bincount()[groups] > 1).sum())} of {len(alike):,} {name} are reported as near-duplicates")


def groups_of(images: list[Image.Image]) -> torch.Tensor:
    """The group of each image, by near-duplicates (images,)."""
    pixels = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
    return components(len(images), near_duplicates(torch.stack([thumbnail(image) for image in pixels]))[0])


def film(image: Image.Image, noise: np.random.Generator) -> list[Image.Image]:
    """60 frames of 120x120 pixels: a camera drifts over an image of 160x160."""
    places = (20 + noise.normal(0, 0.7, (60, 2)).cumsum(axis=0)).clip(0, 40).astype(int)
    scene = image.resize((160, 160), Image.Resampling.BICUBIC)
    return [scene.crop((x, y, x + 120, y + 120)) for x, y in places.tolist()]


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def cropped(image: Image.Image, edge: int) -> Image.Image:
    """Without `edge` pixels at each side, enlarged again."""
    return image.crop((edge, edge, image.width - edge, image.height - edge)).resize(image.size)


def pixels_to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


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
                cropped(image.convert("RGB"), image.width // 16).save(place, "JPEG", quality=95)
            else:
                shutil.copy(path, place)
        if kind == LABEL_ERROR:
            path.unlink()
        planted[kind].add(str(place))
    return planted


if __name__ == "__main__":
    run_script(main)
