"""Which images and models inference.py takes, and what it prints and draws."""

import csv
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, SMALL, draw
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import inference
import main_train
from models import TransferModel, save_checkpoint


def test_foreign_files_in_checkpoints_are_skipped(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    (tmp_path / "checkpoints" / "foreign.pt").write_bytes(b"not ours")
    photo = photos / "test" / "red" / "0.png"
    code, out, err = run(inference, photo)
    assert code == 1 and ".png: " in out and "foreign.pt" in err and err.count("\n") == 1
    assert run(inference, photo, "--checkpoint", "checkpoints/foreign.pt")[0] == 2
    code, out, err = run(inference, "--checkpoint", "checkpoints/mobilenet_v3_small.pt", photo)
    assert code == 0 and len(out.splitlines()) == 1


def test_paths_folders_patterns_and_standard_input(run, answers, photos, monkeypatch):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    files = sorted(map(str, (photos / "test").rglob("*.png")), reverse=True)

    def paths(*args):
        return [record["path"] for record in answers(*args)]

    assert paths(*files) == files  # in their order
    assert paths(f"{photos}/test/*/*.png") == files[::-1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(files)))
    assert paths("-") == files
    monkeypatch.setattr(sys, "stdin", io.StringIO("\0".join(files)))
    assert paths("-", "-0") == files
    assert sorted(paths(f"{photos}/test/**")) == sorted(files)  # each once
    (photos / "test" / "red" / "gone.png").symlink_to("nowhere.png")
    code, _, err = run(inference, photos / "test" / "red" / "gone.png")
    assert code == 2 and "No such file" in err
    code, _, err = run(inference, files[0], "--checkpoint", "checkpoints")
    assert code == 2 and ".pt" in err
    code, _, err = run(inference, "https://example.org/cat.jpg")
    assert code == 2 and "download" in err
    assert run(inference, files[0], "--evaluate")[0] == 2
    code, out, err = run(inference, photos / "test", "--evaluate", "--format", "json")
    assert (code, out) == (2, "") and "MODEL_wrong.csv" in err


def test_the_command_that_training_prints_and_folders_with_brackets(run, photos, tmp_path):
    output = tmp_path / "my runs [v2]"
    code, out, _ = run(main_train, "--data", photos, *SMALL, *QUICK, "--output", output)
    command = out.splitlines()[-1].partition("next: python ")[2]
    assert code == 0 and shlex.split(command) == [
        *("inference.py", "--checkpoint", str(output / "checkpoints" / "mobilenet_v3_small.pt"), "IMAGE...")
    ]
    photo = photos / "test" / "red" / "0.png"
    for pattern in (output / "checkpoints" / "*.pt", "my runs [v2]/*/mobilenet_v[34]_*.pt", "my*/checkpoints/*.pt"):
        code, out, err = run(inference, photo, "--checkpoint", pattern)
        assert code == 0 and len(out.splitlines()) == 1, err
    code, out, _ = run(
        inference, f"{output}/../photos/test/**/[01].png", "--checkpoint", output / "checkpoints" / "*.pt"
    )
    assert code == 0 and len(out.splitlines()) == 6


def test_data_that_has_moved(run, photos, tmp_path):
    """Also to another system: Windows writes the names of the split with backslashes."""
    for part in (photos / "test").iterdir():
        part.rename(photos / f"{part.name}")
    shutil.rmtree(photos / "train")
    (photos / "test").rmdir()
    assert run(main_train, "--data", photos, *SMALL, *QUICK)[0] == 0
    before = run(inference)
    photos.rename(tmp_path / "elsewhere")
    code, out, err = run(inference)
    assert (code, out) == (2, "") and str(photos) in err and "--data" in err and err.count("\n") == 1
    assert run(inference, "--data", "elsewhere")[1].replace("elsewhere", str(photos)) == before[1]
    [split] = (tmp_path / "checkpoints").glob("split-*.json")
    split.write_text(split.read_text().replace("/", "\\\\"))
    code, out, err = run(inference, "--data", "elsewhere", "--explain", "why.png")
    assert out.replace("elsewhere", str(photos)) == before[1] and "gone" not in err and "changed" not in err


def test_evaluate_names_the_folder_that_it_takes(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    code, out, err = run(inference, photos, "--evaluate")
    assert (code, out) == (2, "") and str(photos / "test") in err and err.count("\n") == 1
    (photos / "test" / "violet").mkdir()
    shutil.copy(photos / "test" / "red" / "0.png", photos / "test" / "violet" / "0.png")
    code, out, err = run(inference, photos / "test", "--evaluate")
    assert code == 0 and " of 18 images" in out and "violet" in err


def test_models_with_different_classes_are_no_ensemble(run, photos, tmp_path):
    for name, classes in (("mobilenet_v3_small", "abc"), ("mobilenet_v2", "xy")):
        save_checkpoint(tmp_path / "checkpoints" / f"{name}.pt", TransferModel(name, classes, 64, pretrained=False), {})
    photo = next(photos.rglob("*.png"))
    code, out, err = run(inference, photo)
    assert (code, err) == (0, "the models have different classes: no ensemble\n") and len(out.splitlines()) == 2
    assert run(inference, photo, "--ensemble")[0] == 2


def test_a_checkpoint_needs_no_metrics(run, photos, tmp_path):
    save_checkpoint(tmp_path / "own.pt", TransferModel("mobilenet_v3_small", "ab", 64, pretrained=False), {})
    code, out, _ = run(inference, next(photos.rglob("*.png")), "--checkpoint", tmp_path / "own.pt")
    assert code == 0 and ".png: " in out


def test_explain_draws_heat_maps_and_similar_training_images(run, plots, photos, tmp_path, monkeypatch):
    texts, saved = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        texts[:] = [text.get_text() for text in figure.findobj(Text) if text.get_text()]
        saved(figure, *args, **kwargs)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    run(main_train, "--data", photos, "--models", "mobilenet_v3_small", "mobilenet_v3_large", *QUICK)
    image = photos / "train" / "red" / "0.png"
    command = (inference, image, photos / "test" / "red" / "0.png", "--explain", "why.png")
    code, _, err = run(*command)
    assert code == 0 and "why.png explains" in err and (tmp_path / "why.png").exists()
    assert texts.count("what decided it") == 2 and "red, 1.00" in texts  # the image itself is in the training set
    assert len(texts) == 2 * (1 + 1 + 5)
    shutil.rmtree(tmp_path / "data")
    code, _, err = run(*command)
    assert code == 0 and "features are not in data/features" in err and len(texts) == 2 * 2
    photos.rename(tmp_path / "moved")
    code, _, err = run(inference, tmp_path / "moved" / "test" / "red" / "0.png", "--explain", "moved.png")
    assert code == 0 and str(photos) in err and (tmp_path / "moved.png").exists()


def test_every_file_gets_a_record(run, photos, tmp_path, monkeypatch):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    folder = tmp_path / "mixed"
    shutil.copytree(photos / "test" / "red", folder)
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (folder / "text.jpg").write_text("hello")
    (folder / "notes.txt").write_text("not a image, and not named like one")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'x' * 5000}.png"))  # longer than a name may be
    code, out, err = run(inference, folder, "gone.png", "-", "--format", "json", "--top-k", 2)
    records = {record["path"]: record for record in map(json.loads, out.splitlines())}
    assert code == 1 and len(records) == 6 + 2 + 2
    failed = sorted(Path(path).name for path in records if "error" in records[path] and len(path) < 4096)
    assert failed == ["broken.png", "gone.png", "text.jpg"]
    good = records[str(folder / "0.png")]
    assert len(good["top"]) == 2 and good["label"] == good["top"][0]["label"] in ("blue", "green", "red")
    assert good["probability"] == good["top"][0]["probability"] >= good["top"][1]["probability"]
    code, out, err = run(inference, folder, "--format", "csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 1 and len(rows) == 8 and sum(bool(row["error"]) for row in rows) == 2 and "\r" not in out
    code, out, err = run(inference, "gone.png")
    assert code == 2 and "gone.png" in err


@pytest.mark.skipif(sys.platform == "win32", reason="names and files that Windows doesn't have")
def test_unusual_names_formats_and_files(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    folder = tmp_path / "everything"
    good = ["new\nline.png", "-dash.png", "émoji😀.png", "1x1.png", "1x10000.png", "animated.gif", "cmyk.jpg", "16.png"]
    draw(folder / good[0], (9, 99, 9), seed=0)
    for name in good[1:3]:
        shutil.copy(folder / good[0], folder / name)
    Image.new("RGB", (1, 1)).save(folder / "1x1.png")
    Image.new("RGB", (1, 10000)).save(folder / "1x10000.png")
    Image.new("L", (9, 9)).save(folder / "animated.gif", save_all=True, append_images=[Image.new("L", (9, 9), 255)])
    Image.new("CMYK", (9, 9)).save(folder / "cmyk.jpg")
    Image.fromarray(np.ones((9, 9), np.uint16)).save(folder / "16.png")
    bad = ["pipe.png", "zero.png", "text.png", "cut.png", "bomb.png"]
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "round").symlink_to(".")
    (folder / "zero.png").touch()
    (folder / "text.png").write_text("hello")
    (folder / "cut.png").write_bytes((folder / good[0]).read_bytes()[:200])
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    code, out, err = run(inference, folder, "--format", "json")
    records = {record["path"].split("/")[-1]: record for record in map(json.loads, out.splitlines())}
    assert (code, err) == (1, "2 files not used: 1 links to nothing, 1 linked folders\n")
    assert len(out.splitlines()) == len(good) + len(bad)
    assert all("label" in records[name] for name in good)
    assert all(name in records[name]["error"] for name in bad)
