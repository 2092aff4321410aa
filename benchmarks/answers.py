"""How fast inference.py starts, and how fast it classifies a folder.

    python benchmarks/answers.py --data cifar10-images --checkpoint runs/cifar10-images/checkpoints/mobilenet_v2.pt

Prints the processor time of `python inference.py IMAGE` and of its imports, as multiples of what
`import torch, torchvision.models` takes, and the rate of `inference.py FOLDER` as a share of that of feature extraction
on the same images. The measurements take turns; the figures are medians.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from common import ROOT, arguments, extraction_seconds

from engine.console import run_script
from engine.folders import find_images
from models import load_checkpoint

IMPORT = "import torch, torchvision.models"


def main() -> int:
    args = arguments(__doc__, data=Path, checkpoint=Path, images=5000, turns=5)
    files, model = find_images(args.data)[0][: args.images], load_checkpoint(args.checkpoint)
    command = [sys.executable, ROOT / "inference.py", "--checkpoint", args.checkpoint, "--format", "csv"]
    commands = {
        IMPORT: [sys.executable, "-c", IMPORT],
        "import inference": [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import inference"],
        "inference.py IMAGE": [*command, files[0]],
    }
    seconds = defaultdict(list)
    for _ in range(args.turns):
        for name, words in commands.items():
            before = os.times()
            subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
            after = os.times()
            seconds[name].append(sum(after[2:4]) - sum(before[2:4]))  # user and system time of child processes
    for _ in range(min(3, args.turns)):
        for name, some in (("one", files[:1]), ("folder", files)):
            paths, start = "\n".join(map(str, some)).encode(), time.perf_counter()
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run([*command, "-"], input=paths, check=True, **quiet)
            seconds[name].append(time.perf_counter() - start)
        seconds["features"].append(extraction_seconds(model, files))
    middle = {name: median(values) for name, values in seconds.items()}
    for name in commands:
        print(f"{name:34} {middle[name]:6.2f} s of processor time, {middle[name] / middle[IMPORT]:.2f}")
    middle["folder, without the start"] = middle["folder"] - middle["one"]
    for name in ("features", "folder", "folder, without the start"):
        rate, share = len(files) / middle[name], middle["features"] / middle[name]
        print(f"{name:34} {rate:6.0f} images/s, {share:.2f} of feature extraction")
    return 0


if __name__ == "__main__":
    run_script(main)
