"""What a test accuracy is worth where images belong together: frames of films, and pictures of patients.

    python benchmarks/groups.py --data cifar10-images

Makes both sets from images of four classes of CIFAR-10, enlarged: a camera that drifts over six scenes of each class,
60 frames each, with noise and slow changes of light; and six patients of each class, ten pictures each, cropped, turned
and mirrored. Shows the test accuracy that main_train.py shows, by default and with --groups, the accuracy of the same
model on 100 new films or patients of each class, a picture each, and how often the 95% interval of the first holds the
second. For comparison: a split of single images at random, which is what other tools do. Means of several sets.
"""

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from common import arguments, print_header, print_row
from PIL import Image, ImageEnhance

import main_train
from engine.console import run_script
from models import load_checkpoint

CLASSES, SCENES, NEW = ("bird", "cat", "deer", "dog"), 6, 100
BICUBIC = Image.Resampling.BICUBIC
Random = np.random.Generator


def film(image: Image.Image, frames: int, random: Random) -> Iterator[Image.Image]:
    scene, place = image.resize((160, 160), BICUBIC), np.array([20.0, 20.0])
    for number in range(frames):
        place = np.clip(place + random.normal(0, 0.7, 2), 0, 40)
        x, y = place.astype(int).tolist()
        light = 1 + 0.05 * np.sin(number / 15)
        pixels = light * np.asarray(scene.crop((x, y, x + 120, y + 120)), float) + random.normal(0, 3, (120, 120, 3))
        yield Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def patient(image: Image.Image, pictures: int, random: Random) -> Iterator[Image.Image]:
    scene = image.resize((200, 200), BICUBIC)
    for _ in range(pictures):
        side = int(random.integers(110, 170))
        x, y = random.integers(0, 200 - side, 2).tolist()
        picture = scene.rotate(random.uniform(-20, 20), BICUBIC).crop((x, y, x + side, y + side))
        picture = ImageEnhance.Brightness(picture.resize((128, 128), BICUBIC)).enhance(random.uniform(0.7, 1.3))
        yield picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else picture


def make(source: Path, folder: Path, kind: Callable, pictures: int, seed: int) -> None:
    """Writes folder/known/CLASS/SCENE_NUMBER.jpg and folder/new/CLASS/SCENE.jpg."""
    random = np.random.default_rng(seed)
    for name in CLASSES:
        files = random.permutation(sorted((source / "train" / name).iterdir()))[: SCENES + NEW]
        for part in ("known", "new"):
            (folder / part / name).mkdir(parents=True)
        for number, file in enumerate(files):
            known = number < SCENES
            made = kind(Image.open(file).convert("RGB"), pictures if known else 1, random)
            for i, picture in enumerate(made):
                path = f"known/{name}/{name}{number}_{i:02}.jpg" if known else f"new/{name}/{number}.jpg"
                picture.save(folder / path, quality=90)


def at_random(folder: Path, target: Path) -> None:
    """Copies the images into train/ and test/, a fifth of each class at random."""
    order = np.random.default_rng(1)
    for name in CLASSES:
        files = order.permutation(sorted((folder / name).iterdir()))
        for i, file in enumerate(files):
            to = target / ("test" if i < len(files) / 5 else "train") / name
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)


def shown_and_true(folder: Path, new: Path, model: str, size: int, *more: str) -> tuple[float, float, bool]:
    """The test accuracy that a run shows, that of its model on new images, and whether the 95% interval holds it."""
    with tempfile.TemporaryDirectory() as output:
        where = ["--data", str(folder), "--output", output, "--cache", str(folder.parent / "cache")]
        main_train.main([*where, "--models", model, "--image-size", str(size), *more])
        [row] = json.loads(Path(output, "plots", "results.json").read_text())["runs"]
        files = sorted(new.rglob("*.jpg"))
        answers = load_checkpoint(Path(output, "checkpoints", f"{model}.pt")).predict(files)
    true = np.mean([answer["label"] == file.parent.name for answer, file in zip(answers, files, strict=True)])
    low, high = row["test_interval"]
    return row["test_accuracy"], float(true), low <= true <= high


def main() -> int:
    args = arguments(__doc__, data=Path, model="mobilenet_v2", image_size=96, sets=5)
    found = defaultdict(list)
    for kind, pictures in ((film, 60), (patient, 10)):
        for seed in range(args.sets):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                make(args.data, folder, kind, pictures, seed)
                at_random(folder / "known", folder / "random")
                for split, images, more in (
                    ("single images at random", "random", ()),
                    ("by default", "known", ()),
                    ("`--groups`", "known", ("--groups", "([a-z]+[0-9]+)_")),
                ):
                    row = shown_and_true(folder / images, folder / "new", args.model, args.image_size, *more)
                    found[f"{kind.__name__}s", split].append(row)
    print_header("images", "split", "test accuracy", "on new ones", "intervals that hold it", texts=2)
    for (images, split), rows in found.items():
        shown, true, held = (np.array(column) for column in zip(*rows, strict=True))
        print_row(images, split, f"{shown.mean():.1%}", f"{true.mean():.1%}", f"{held.sum()} of {len(held)}")
    return 0


if __name__ == "__main__":
    run_script(main)
