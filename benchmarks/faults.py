"""Plants near-duplicates and label errors in a folder of images and counts those that main_train.py finds.

    python benchmarks/faults.py --data cifar10-images

Takes 500 training and 100 test images of each class. Puts 60 of the training images into the test set as well (20 as
they are, 20 recompressed, 20 cropped), 20 into another class, and moves 100 (2 %) to another class.
"""

import json
import random
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from common import arguments
from PIL import Image

import main_train
from data import CIFAR10_SIZE
from engine.console import run_script

LABEL_ERROR, CONFLICT = "label error", "duplicate with another label"
KINDS = [*["exact duplicate", "recompressed near-duplicate", "cropped near-duplicate"] * 20]
KINDS += [CONFLICT] * 20 + [LABEL_ERROR] * 100


def main() -> int:
    args = arguments(__doc__, data=Path, model="mobilenet_v2")
    with tempfile.TemporaryDirectory() as scratch:
        planted = plant(args.data, Path(scratch, "images"))
        where = ["--data", f"{scratch}/images", "--output", scratch, "--cache", scratch]
        code = main_train.main([*where, "--models", args.model, "--image-size", str(CIFAR10_SIZE)])
        report = json.loads(Path(scratch, "plots", "data.json").read_text())
    duplicates = {image["path"] for pair in report["near_duplicates"] for image in pair["images"]}
    errors = {image["path"] for image in report["label_errors"]}
    for kind, paths in planted.items():
        found = paths & (errors if kind == LABEL_ERROR else duplicates)
        print(f"{kind}: {len(found)} of {len(paths)} found")
    tested = {path for path in duplicates if "/test/" in path}
    wrong, both = planted[LABEL_ERROR] | planted[CONFLICT], set().union(*planted.values())
    print(f"{len(tested & both)} of {len(tested)} test images reported as near-duplicates are planted")
    print(f"{len(errors & wrong)} of {len(errors)} reported label errors are planted")
    return code


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
