"""Plants copies and wrong labels in a folder of images and counts those that main_train.py finds.

    python benchmarks/faults.py --data cifar10-images

Takes 500 training and 100 test images of each class. Puts 60 of the training images into the test set as well (20 as
they are, 20 recompressed, 20 cropped), 20 into another class, and moves 100 (2 %) to another class.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import main_train
from data import CIFAR10_SIZE, run_script


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/<class>/ and test/<class>/")
    parser.add_argument("--model", default="mobilenet_v2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        planted = plant(args.data, Path(scratch, "images"))
        where = ["--data", f"{scratch}/images", "--output", scratch]
        code = main_train.main([*where, "--models", args.model, "--image-size", str(CIFAR10_SIZE)])
        report = json.loads(Path(scratch, "plots", "data.json").read_text())
    copies = {image["path"] for pair in report["copies"] for image in pair["images"]}
    doubtful = {image["path"] for image in report["doubtful_labels"]}
    for kind, paths in planted.items():
        found = doubtful if kind == "wrong label" else copies
        print(f"{kind}: {sum(path in found for path in paths)} of {len(paths)} found")
    tested = {path for path in copies if "/test/" in path}
    print(f"{sum('copy_' in path for path in tested)} of {len(tested)} test images called copies are planted")
    wrong = {*planted["wrong label"], *planted["copy with another label"]}
    print(f"{len(doubtful & wrong)} of {len(doubtful)} labels called doubtful are planted")
    return code


def plant(source: Path, target: Path) -> dict[str, list[str]]:
    """Makes the folder. Returns the paths of the planted images, by kind."""
    draw, classes = random.Random(0), sorted(folder.name for folder in (source / "train").iterdir())
    for part, count in (("train", 500), ("test", 100)):
        for name in classes:
            (target / part / name).mkdir(parents=True)
            for path in sorted((source / part / name).iterdir())[:count]:
                shutil.copy(path, target / part / name / path.name)
    images = sorted((target / "train").rglob("*.*"))
    draw.shuffle(images)
    planted = {
        "copy": [],
        "recompressed copy": [],
        "cropped copy": [],
        "copy with another label": [],
        "wrong label": [],
    }
    for i, path in enumerate(images[:180]):
        other = target / "train" / draw.choice([name for name in classes if name != path.parent.name])
        if i < 60:
            kind, image = list(planted)[i % 3], Image.open(path).convert("RGB")
            place, (width, height) = target / "test" / path.parent.name / f"copy_{path.stem}.jpg", image.size
            if kind == "copy":
                shutil.copy(path, place)
            elif kind == "recompressed copy":
                image.save(place, quality=60)
            else:
                edge = width // 16
                image.crop((edge, edge, width - edge, height - edge)).resize((width, height)).save(place, quality=95)
        elif i < 80:
            kind, place = "copy with another label", other / f"two_{path.name}"
            shutil.copy(path, place)
        else:
            kind, place = "wrong label", other / f"wrong_{path.parent.name}_{path.name}"
            path.rename(place)
        planted[kind].append(str(place))
    return planted


if __name__ == "__main__":
    run_script(main)
