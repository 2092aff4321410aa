"""Kills main_train.py at random moments, runs it again, and compares with a run that was never killed.

    python benchmarks/kill.py --points 200          half an hour on two cores
    python benchmarks/kill.py --processes 2         under torchrun, where one of the processes is killed

The weights must be the same, bit for bit, and so must results.json, except for times. If they differ, it stops and says
at which moment it had killed the run.
"""

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

from common import ROOT, arguments
from tqdm import trange

from engine.console import run_script
from engine.files import content_hash, load_tensors

IMPORTS = 2  # seconds in which nothing happens yet
COMMAND = "--demo --models mobilenet_v3_small --image-size 32 --limit 100 --epochs 2 --fine-tune 2 --device cpu".split()
VARYING = ("seconds", "features", "images_per_second", "date", "command", "commit", "checkpoint_bytes")


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


def finish(folder: Path, processes: int) -> tuple[dict[str, str], list[dict]]:
    """Runs to the end. Returns a hash of each model's weights, and the results without their times."""
    if start(folder, processes).wait() != 0:
        sys.exit(f"the run in {folder} failed")
    if leftovers := [str(path) for path in folder.rglob("*.part")]:
        sys.exit(f"left behind: {leftovers}")
    contents = {file.name: load_tensors(file) for file in (folder / "demo" / "checkpoints").glob("*.pt")}
    weights = {name: content_hash(each["state_dict"] | each["unfamiliarity"]) for name, each in contents.items()}
    results = json.loads((folder / "demo" / "plots" / "results.json").read_text())
    rows = [*results["runs"], results["ensemble"]]
    for row in rows:
        for varying in (row, *row.get("history", ())):
            for key in VARYING:
                varying.pop(key, None)
    return weights, rows


def main() -> int:
    args, killed = arguments(__doc__, points=200, processes=1, seed=0), 0
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        expected = finish(Path(scratch, "reference"), args.processes)
        duration = time.monotonic() - started
        for point in trange(args.points, desc="killed", disable=None):
            folder, moment = Path(scratch, str(point)), moments.uniform(IMPORTS, duration)
            process = start(folder, args.processes)
            time.sleep(moment)
            kill(process, moments)
            killed += process.wait() != 0
            for what, one, other in zip(("weights", "results"), finish(folder, args.processes), expected, strict=True):
                if one != other:
                    sys.exit(f"other {what} after a kill at {moment:.2f} s (point {point})")
            shutil.rmtree(folder)
    print(f"{args.points} runs, {killed} killed before their end, all finished with the same weights and results")
    return 0


if __name__ == "__main__":
    run_script(main)
