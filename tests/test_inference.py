"""Which images and models inference.py takes, and what it prints and draws."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import draw, move_data
from PIL import Image

import inference
from models import TransferModel, save_checkpoint


def test_foreign_files_in_checkpoints_are_skipped(run, trained, photos):
    (trained / "checkpoints" / "foreign.pt").write_bytes(b"not ours")
    photo = photos / "test" / "red" / "0.png"
    code, out, err = run(inference, photo)
    assert code == 1 and len(out.splitlines()) == 1 and "foreign.pt" in err and err.count("\n") == 1
    assert run(inference, photo, "--checkpoint", "checkpoints/foreign.pt")[0] == 2
    code, out, _ = run(inference, "--checkpoint", "checkpoints/mobilenet_v3_small.pt", photo)
    assert code == 0 and len(out.splitlines()) == 1


@pytest.fixture
def paths(answers):
    """The paths that inference.py finds."""
    return lambda *args: [record["path"] for record in answers(*args)]


def test_paths_folders_and_patterns(paths, trained, photos):
    files = sorted(map(str, (photos / "test").rglob("*.png")), reverse=True)
    assert paths(*files) == files  # in their order
    assert paths(f"{photos}/test/*/*.png") == files[::-1]
    assert sorted(paths(f"{photos}/test/**")) == sorted(files)  # each once
    photos.rename(photos.parent / "my [v2] photos")
    assert len(paths(f"{trained}/data/../my [v2] photos/test/**/[01].png")) == 6


@pytest.mark.parametrize(("separator", "options"), [("\n", ["-"]), ("\0", ["-", "-0"])])
def test_paths_from_standard_input(paths, trained, photos, monkeypatch, separator, options):
    files = [*map(str, (photos / "test").rglob("*.png"))]
    monkeypatch.setattr(sys, "stdin", io.StringIO(separator.join(files)))
    assert paths(*options) == files


@pytest.mark.parametrize("pattern", ["*.pt", "[m]obilenet_v[34]_*.pt"])
def test_checkpoints_by_patterns_in_folders_with_brackets(paths, training, photos, pattern):
    for folder in (training / "my runs [v2]", training / "my*"):
        assert len(paths(photos / "test/red/0.png", "--checkpoint", folder / "checkpoints" / pattern)) == 1


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["photos/test/red/gone.png"], "No such file"),
        (["photos/test/red/0.png", "--checkpoint", "checkpoints"], ".pt"),
        (["https://example.org/cat.jpg"], "download"),
        (["photos/test/red/0.png", "--evaluate"], "one folder"),
        (["photos/test", "--evaluate", "--format", "json"], "MODEL_wrong.csv"),
        (["photos", "--evaluate"], "photos/test"),
        (["photos/other", "--evaluate"], "violet"),
    ],
)
def test_what_cannot_be_classified_or_evaluated(run, trained, photos, args, hint):
    (photos / "test" / "red" / "gone.png").symlink_to("nowhere.png")
    draw(photos / "other" / "violet" / "0.png", (9, 9, 9), seed=0)
    code, out, err = run(inference, *args)
    assert (code, out) == (2, "") and hint in err.splitlines()[-1]


def test_evaluate_leaves_out_classes_that_the_model_lacks(run, trained, photos):
    shutil.copytree(photos / "test" / "red", photos / "test" / "violet")
    code, out, err = run(inference, photos / "test", "--evaluate")
    assert code == 0 and " of 18 images" in out and "violet" in err


def test_evaluate_tells_how_many_images_were_trained_on(run, trained, photos, tmp_path):
    shutil.copytree(photos / "test", tmp_path / "more")
    for i in range(5):
        shutil.copy(photos / "train" / "red" / f"{i}.png", tmp_path / "more" / "red" / f"renamed{i}.png")
    for folder, count in ((photos / "test", ""), (tmp_path / "more", "5 of 23"), (photos / "train", "60 of 60")):
        code, _, err = run(inference, folder, "--evaluate")
        assert code == 0 and (f"{count} images were used for training" in err if count else "training" not in err)


def test_data_that_has_moved(run, trained, photos):
    """Also to another system: Windows writes the names of the split with backslashes."""
    move_data(trained / "checkpoints" / "mobilenet_v3_small.pt", photos)
    before = run(inference)
    photos.rename(trained / "elsewhere")
    code, out, err = run(inference)
    assert (code, out) == (2, "") and str(photos) in err and "--data" in err and err.count("\n") == 1
    assert run(inference, "--data", "elsewhere")[1].replace("elsewhere", str(photos)) == before[1]
    [split] = (trained / "checkpoints").glob("split-*.json")
    split.write_text(split.read_text().replace("/", "\\\\"))
    code, out, err = run(inference, "--data", "elsewhere", "--explain", "why.png")
    assert out.replace("elsewhere", str(photos)) == before[1] and "gone" not in err and "changed" not in err


def test_models_with_different_classes_are_no_ensemble(run, photos, tmp_path):
    for name, classes in (("mobilenet_v3_small", "abc"), ("mobilenet_v2", "xy")):
        save_checkpoint(tmp_path / "checkpoints" / f"{name}.pt", TransferModel(name, classes, 64, pretrained=False), {})
    photo = next(photos.rglob("*.png"))
    code, out, err = run(inference, photo)
    assert code == 0 and err.count("\n") == 1 and len(out.splitlines()) == 2
    assert run(inference, photo, "--ensemble")[0] == 2


def test_explain_draws_heat_maps_and_similar_training_images(run, compared, photos, texts):
    (compared / "checkpoints" / "mobilenet_v2.pt").unlink()
    command = (inference, photos / "train" / "red" / "0.png", photos / "test" / "red" / "0.png", "--explain", "why.png")
    code, _, err = run(*command)
    assert code == 0 and (compared / "why.png").exists() and err.count("\n") == 1
    assert texts.count("what decided it") == 2 and "red, 1.00" in texts  # the image itself is in the training set
    assert len(texts) == 2 * (1 + 1 + 5)
    code, _, err = run(*command, "--data", "moved")
    assert code == 0 and "moved" in err and len(texts) == 2 * 2
    shutil.rmtree(compared / "data")
    code, _, err = run(*command)
    assert code == 0 and "features are not in data/features" in err and len(texts) == 2 * 2


def test_explanations_show_training_images_only(run, trained, photos, texts):
    """An image that a classifier was trained on is most similar to itself, one of the validation images is not."""
    [split] = (trained / "checkpoints").glob("split-*.json")
    for part, shown in (("train", 4), ("val", 0)):
        images = [photos / name for name in json.loads(split.read_text())[part]][:4]
        assert run(inference, *images, "--explain", "why.png")[0] == 0
        assert sum(text.endswith(", 1.00") for text in texts) == shown


@pytest.mark.skipif(sys.platform == "win32", reason="names and files that Windows doesn't have")
def test_every_file_gets_a_record(run, trained, monkeypatch):
    folder = trained / "everything"
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
    (folder / "notes.txt").write_text("not an image, and not named like one")
    (folder / "cut.png").write_bytes((folder / good[0]).read_bytes()[:200])
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    missing = "gone.png", f"{'x' * 5000}.png"  # longer than a name may be
    monkeypatch.setattr(sys, "stdin", io.StringIO(missing[1]))
    code, out, err = run(inference, folder, missing[0], "-", "--format", "json", "--top-k", 2)
    records = {record["path"].split("/")[-1]: record for record in map(json.loads, out.splitlines())}
    assert code == 1 and err.startswith("3 files not used") and err.count("\n") == 1
    assert len(out.splitlines()) == len(records) and {*records} == {*good, *bad, *missing}
    assert all(name in records[name]["error"] for name in bad) and all("error" in records[name] for name in missing)
    for record in map(records.get, good):
        first, second = record["top"]
        assert record["label"] == first["label"] in ("blue", "green", "red")
        assert record["probability"] == first["probability"] >= second["probability"]
    code, out, _ = run(inference, folder, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert code == 1 and len(rows) == len(good + bad) and "\r" not in out
    assert {Path(row["path"]).name for row in rows if row["error"]} == {*bad}
    code, _, err = run(inference, "gone.png")
    assert code == 2 and "gone.png" in err
