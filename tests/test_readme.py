"""What the README promises is what the repository holds."""

import json
import re
from statistics import mean, stdev

from conftest import ROOT

import main_train

README = (ROOT / "README.md").read_text()


def rows(run: dict) -> tuple[str, str]:
    """Those of a run in the README's two tables."""
    label = main_train.appearance(run["model"])[0]
    val, test = (run["accuracy_by_seed"][part] for part in ("val", "test"))
    spread = f" ± {100 * stdev(test):.2f}" if len(test) > 1 else ""
    trained, total = (run["parameters"][key] / 1e6 for key in ("trainable", "total"))
    ece, rate = run["calibration"], run["images_per_second"]
    return (
        f"| {label} | {run['val_loss']:.3f} | {mean(val):.2%} | {mean(test):.2%}{spread} "
        f"| {run['seconds']['total']:.0f} s | {trained:.2f} / {total:.2f} million |",
        f"| {label} | {run['top2_accuracy']:.2%} | {run['macro']['f1']:.3f} "
        f"| {ece['before']['ece']:.1%} → {ece['after']['ece']:.1%} | {run['multiply_adds'] / 1e6:.0f} million "
        f"| {rate['one']:.0f} / {rate['best']:.0f} | {run['checkpoint_bytes'] / 1e6:.1f} MB |",
    )


def test_the_tables_are_the_results():
    runs = json.loads((ROOT / "plots" / "results.json").read_text())["runs"]
    assert runs
    for run in runs:
        for row in rows(run):
            assert row in README


def test_photos_and_files_are_there():
    for target in re.findall(r'src="([^"]+)"|\]\(((?!http|#)[^)]+)\)', README):
        assert (ROOT / "".join(target)).exists(), target
    for name in re.findall(r"^\| `([a-z_]+\.py)`", README, re.MULTILINE):
        assert (ROOT / name).exists()


def test_every_command_parses():
    for command in re.findall(r"python main_train\.py((?: [^\s#`]+)*)", README):
        assert main_train.parse_args(command.split())
