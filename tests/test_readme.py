"""What the README promises is what the repository holds."""

import json
import re

from conftest import ROOT

import main_train
from models import BACKBONES

README = (ROOT / "README.md").read_text()


def test_the_table_is_the_results():
    runs = json.loads((ROOT / "plots" / "results.json").read_text())["runs"]
    assert runs
    for run in runs:
        trained, total = (run["parameters"][key] / 1e6 for key in ("trainable", "total"))
        row = (
            f"| {BACKBONES[run['model']].label} | {run['val_loss']:.3f} | {run['val_accuracy']:.2%} "
            f"| {run['test_accuracy']:.2%} | {run['seconds']['total']:.0f} s | {trained:.2f} / {total:.2f} million |"
        )
        assert row in README


def test_pictures_and_files_are_there():
    for target in re.findall(r'src="([^"]+)"|\]\(((?!http|#)[^)]+)\)', README):
        assert (ROOT / "".join(target)).exists(), target
    for name in re.findall(r"^\| `([a-z_]+\.py)`", README, re.MULTILINE):
        assert (ROOT / name).exists()


def test_every_command_parses():
    for command in re.findall(r"python main_train\.py((?: [^\s#`]+)*)", README):
        assert main_train.parse_args(command.split())
