"""What the README promises is what the repository holds."""

import argparse
import json
import re
import runpy
import shlex
import shutil
import sys
from base64 import b64decode
from statistics import mean, stdev

import pytest
from conftest import ROOT, draw

import inference
import main_train
import models
from engine.metrics import paired_difference

PAGES = {ROOT: (ROOT / "README.md").read_text(encoding="utf-8")}
PAGES[ROOT / "benchmarks"] = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
README = "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python ")]
SNIPPETS = [block for kind, block in BLOCKS if kind == "python"]


def accuracy(run: dict, part: str = "test") -> float:
    return mean(run["accuracy_by_seed"][part])


def rows(run: dict, best: dict) -> tuple[str, str]:
    """Those of a run in the tables of the two pages."""
    label, seeds = run["label"], run["accuracy_by_seed"]["test"]
    low, high = run["test_interval"]
    margin = 100 * paired_difference(run["correct"], best["correct"], run["test_groups"])[1]
    change = "best" if run is best else f"{100 * (accuracy(run) - accuracy(best)):+.1f} ± {margin:.1f}"
    trained, total = (run["parameters"][key] / 1e6 for key in ("trainable", "total"))
    ece, rate = run["calibration"], run["images_per_second"]
    return (
        f"| {label} | {run['image_size']} | {run['val_loss']:.3f} | {accuracy(run, 'val'):.2%} "
        f"| {accuracy(run):.2%} ± {50 * (high - low):.1f} | {change} | {sum(run['seconds'].values()):.0f} s "
        f"| {trained:.2f} / {total:.2f} million |",
        f"| {label} | {f'{100 * stdev(seeds):.2f}' if len(seeds) > 1 else ''} | {run['top2_accuracy']:.2%} "
        f"| {run['macro']['f1']:.3f} | {ece['before']['ece']:.1%} → {ece['after']['ece']:.1%} "
        f"| {run['multiply_adds'] / 1e6:.0f} million | {rate['one']:.0f} / {rate['best']:.0f} "
        f"| {run['checkpoint_bytes'] / 1e6:.1f} MB |",
    )


def test_the_tables_are_the_results():
    runs = json.loads((ROOT / "plots" / "report" / "results.json").read_text())["runs"]
    assert runs
    page = (ROOT / "plots" / "report" / "report.html").read_text()
    for plot, content in re.findall(r'alt="(\w+)" src="data:image/png;base64,([^"]+)"', page):
        assert b64decode(content) == (ROOT / "plots" / "report" / f"{plot}.png").read_bytes(), plot
    assert len(re.findall(r"million \|$", PAGES[ROOT], re.MULTILINE)) == len(runs)  # no row without its figures
    best = max((run for run in runs if not run["fine_tuned"]), key=lambda run: accuracy(run, "val"))
    for run in runs:
        for row in rows(run, best):
            assert row in README
    read = re.sub(r"^```.*?^```", "", PAGES[ROOT], flags=re.MULTILINE | re.DOTALL)
    assert sum(any(map(str.isalpha, word)) for word in read.split()) < 1500  # short enough to be read to its end


def test_links_and_files_are_there():
    headings = {line.strip("# ").lower().replace(" ", "-") for line in README.splitlines() if line.startswith("## ")}
    for folder, page in PAGES.items():
        for target in re.findall(r'src="([^"]+)"|\]\(((?!http|#)[^)]+)\)', page):
            file, _, heading = "".join(target).partition("#")
            assert (folder / file).exists() and heading in {"", *headings}, target
    cells = re.findall(r"^\| (`.*?) \|", CONTRIBUTING, re.MULTILINE)
    files = [file for cell in cells for file in re.findall(r"`(\w+\.py)`", cell)]
    assert sorted(files) == sorted(file.name for file in ROOT.glob("*.py"))


@pytest.fixture
def home(photos, tmp_path):
    """A folder with all that the README's lines speak of, and a trained model."""
    for name in ("pets", "cifar10-images"):
        shutil.copytree(photos, tmp_path / name)
    shutil.copytree(photos / "test", tmp_path / "more_pets")
    for path in ("cat.jpg", "holiday/a.jpg", "photos/b.jpg"):
        draw(tmp_path / path, (40, 60, 200), seed=0)
    model = models.TransferModel("squeezenet1_1", ("blue", "green", "red"), 64, pretrained=False)  # exported quickly
    folders = ("checkpoints", "runs/pets/checkpoints", "runs/cifar10-images/checkpoints")
    paths = [f"{folder}/mobilenet_v2.pt" for folder in folders]
    for path in (*paths, "at128/checkpoints/mobilenet_v2_finetuned.pt"):
        models.save_checkpoint(tmp_path / path, model, {"data": str(photos)})
    model = models.TransferModel("mobilenet_v3_small", model.classes, 64, pretrained=False)
    path = tmp_path / "runs" / "cifar10-images" / "checkpoints" / "mobilenet_v3_large_levels.pt"
    models.save_checkpoint(path, model, {"data": str(photos)})
    return tmp_path


def test_every_snippet_runs(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    assert len(SNIPPETS) == 1
    for snippet in SNIPPETS:
        exec(snippet, {})
        out = capsys.readouterr().out
        assert "'label': " in out or "tensor([[" in out


@pytest.mark.parametrize("command", sorted({line for line in COMMANDS if line.startswith("python benchmarks/")}))
def test_every_benchmark_takes_its_arguments(command, monkeypatch):
    whole = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def parse_args(parser):
        whole(parser)
        raise Parsed

    _, script, *args = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *args])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def of_scripts(*scripts: str) -> list[str]:
    return sorted({line for line in COMMANDS if line.split()[1] in scripts})


@pytest.mark.parametrize("command", of_scripts("inference.py"))
def test_every_question_is_answered(run, home, command):
    _, _, *args = shlex.split(command.split(">")[0])
    assert run(inference, *args)[0] == 0


@pytest.mark.parametrize("command", of_scripts("main_train.py"))
def test_every_training_takes_its_arguments(home, command, monkeypatch):
    monkeypatch.chdir(home)
    given = main_train.parse_args(shlex.split(command)[2:])
    assert given.data in ("cifar10", "demo") or (home / given.data).is_dir()


def test_the_help_holds_every_command_of_the_docstrings_and_defaults(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more_pets").mkdir()
    for script in (main_train, inference):
        lines = [line.strip().split("   ")[0] for line in script.__doc__.splitlines()]
        commands = [shlex.split(line.split(">")[0])[2:] for line in lines if line.startswith("python ")]
        assert len(commands) > 4
        for command in commands:
            script.parse_args(command)
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        out = capsys.readouterr().out
        assert lines[2] in out and re.search(r"\(default: \d\)", out) and "(default: False)" not in out
