"""Kills main_train.py at random moments, runs it again, and compares with a run that was never killed.

    python benchmarks/kill.py --points 200          half an hour on two cores
    python benchmarks/kill.py --processes 2         under torchrun, where one of the processes is killed

The weights must be the same, bit for bit, and so must results.json, except for times. If they differ, it stops and says
at which moment it had killed the run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import trange

ROOT = Path(__file__).parent.parent
IMPORTS = 2  # seconds in which nothing happens yet
COMMAND = "--demo --models mobilenet_v3_small --limit 200 --epochs 3 --fine-tune 2 --device cpu".split()


def start(folder: Path, processes: int) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, ROOT / "main_train.py", *COMMAND]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)


def kill(process: subprocess.Popen, moments: random.Random) -> None:
    """Kills the process, or one of those that torchrun has started. There may be none yet, or none any more."""
    victims = [process.pid]
    if "torch.distributed.run" in process.args:
        victims = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if victims:
        os.kill(int(moments.choice(victims)), signal.SIGKILL)


def finish(folder: Path, processes: int) -> tuple[dict, dict]:
    """Runs to the end. Returns the tensors of the checkpoints and the results without their times."""
    if start(folder, processes).wait() != 0:
        sys.exit(f"the run in {folder} failed")
    leftovers = [str(path) for path in folder.rglob("*.part")]
    if leftovers:
        sys.exit(f"left behind: {leftovers}")
    tensors = {
        (file.name, name): tensor
        for file in (folder / "demo" / "checkpoints").glob("*.pt")
        for name, tensor in torch.load(file, weights_only=True)["state_dict"].items()
    }
    results = json.loads((folder / "demo" / "plots" / "results.json").read_text())["runs"]
    for run in results:
        for key in ("seconds", "features", "images_per_second", "date", "command", "commit", "checkpoint_bytes"):
            del run[key]
        for epoch in run["history"]:
            del epoch["seconds"]
    return tensors, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments, killed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        tensors, results = finish(Path(scratch, "reference"), args.processes)
        duration = time.monotonic() - started
        for point in trange(args.points, desc="killed", disable=None):
            folder, moment = Path(scratch, str(point)), moments.uniform(IMPORTS, duration)
            process = start(folder, args.processes)
            time.sleep(moment)
            kill(process, moments)
            killed += process.wait() != 0
            tensors_again, results_again = finish(folder, args.processes)
            same = tensors.keys() == tensors_again.keys()
            if not same or not all(torch.equal(tensors[key], tensors_again[key]) for key in tensors):
                sys.exit(f"other weights after a kill at {moment:.2f} s (point {point})")
            if results != results_again:
                sys.exit(f"other results after a kill at {moment:.2f} s (point {point})")
            shutil.rmtree(folder)
    print(f"{args.points} runs, {killed} killed before their end, all finished with the same weights and results")


if __name__ == "__main__":
    main()
