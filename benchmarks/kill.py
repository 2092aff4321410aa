"""Kills main_train.py at random moments, runs it again, and compares with a run that was never killed.

    python benchmarks/kill.py --points 200          half an hour on two cores

The same weights, bit for bit, and the same results.json, times aside, or it stops and says at which point.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import trange

ROOT = Path(__file__).parent.parent
IMPORTS = 2  # seconds in which nothing happens yet
COMMAND = ["--demo", "--models", "mobilenet_v3_small", "--limit", "200", "--epochs", "3", "--fine-tune", "2"]
COMMAND += ["--device", "cpu"]


def start(folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, ROOT / "main_train.py", *COMMAND]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)


def finish(folder: Path) -> tuple[dict, dict]:
    """Runs to the end. Returns the tensors of the checkpoints and the results without their times."""
    if start(folder).wait() != 0:
        sys.exit(f"the run in {folder} failed")
    leftovers = [str(path) for path in folder.rglob("*.part")]
    if leftovers:
        sys.exit(f"left behind: {leftovers}")
    tensors = {
        (file.name, name): tensor
        for file in (folder / "demo" / "checkpoints").glob("*.pt")
        for name, tensor in torch.load(file, weights_only=True)["state_dict"].items()
    }
    results = json.loads((folder / "demo" / "plots" / "results.json").read_text())
    for run in results["runs"]:
        for key in ("seconds", "features", "images_per_second", "date", "command", "commit", "checkpoint_bytes"):
            del run[key]
        for epoch in run["history"]:
            del epoch["seconds"]
    return tensors, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    killed = 0
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        tensors, results = finish(Path(scratch, "reference"))
        duration = time.monotonic() - started
        for point in trange(args.points, desc="killed", disable=None):
            folder = Path(scratch, str(point))
            moment = moments.uniform(IMPORTS, duration)
            process = start(folder)
            time.sleep(moment)
            process.kill()
            killed += process.wait() != 0
            again, its_results = finish(folder)
            if again.keys() != tensors.keys() or not all(torch.equal(again[key], tensors[key]) for key in tensors):
                sys.exit(f"other weights after a kill at {moment:.2f} s (point {point})")
            if its_results != results:
                sys.exit(f"other results after a kill at {moment:.2f} s (point {point})")
    print(f"{args.points} runs, {killed} killed before their end, all finished with the same weights and results")


if __name__ == "__main__":
    main()
