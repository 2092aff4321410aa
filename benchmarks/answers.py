"""How fast inference.py starts, and how fast it goes through a folder.

    python benchmarks/answers.py --data cifar10-images --checkpoint runs/cifar10-images/checkpoints/mobilenet_v2.pt

Prints the processor time of `python inference.py IMAGE` and of its imports, as multiples of what
`import torch, torchvision.models` takes, and the rate of `inference.py FOLDER` as a share of that of feature extraction
on the same images. Each is measured in turn, several times; the figures are medians.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Images, find_images, run_script
from models import load_checkpoint, pick_device
from train_utils import cached_features

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of images")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    files = list(find_images(args.data, Counter()))[: args.images]
    command = [sys.executable, ROOT / "inference.py", "--checkpoint", args.checkpoint, "--format", "csv"]
    commands = {
        "import torch, torchvision.models": [sys.executable, "-c", "import torch, torchvision.models"],
        "import inference": [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import inference"],
        "inference.py IMAGE": [*command, files[0]],
    }
    seconds = {name: [] for name in (*commands, "one", "folder", "features")}
    for _ in range(args.turns):
        for name, words in commands.items():
            seconds[name].append(processor_seconds(words))
    model, device = load_checkpoint(args.checkpoint), pick_device()
    for _ in range(min(3, args.turns)):
        for name, its in (("one", files[:1]), ("folder", files)):
            start = time.perf_counter()
            paths = "\n".join(map(str, its)).encode()
            subprocess.run(
                [*command, "-"], input=paths, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
            )
            seconds[name].append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as scratch:
            images = Images(files, torch.zeros(len(files), dtype=torch.int64))
            seconds["features"].append(cached_features(model, images, Path(scratch), device).seconds)
    middle = {name: median(its) for name, its in seconds.items()}
    for name in commands:
        share = middle[name] / middle["import torch, torchvision.models"]
        print(f"{name:34} {middle[name]:6.2f} s of processor time, {share:.2f}")
    whole = {"features": middle["features"], "folder": middle["folder"]}
    whole["folder, without the start"] = middle["folder"] - middle["one"]
    for name, its in whole.items():
        print(f"{name:34} {len(files) / its:6.0f} images/s, {middle['features'] / its:.2f} of feature extraction")
    return 0


def processor_seconds(command: list) -> float:
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    run_script(main)
