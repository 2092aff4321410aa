"""The real scripts, on small photos and random weights."""

import csv
import errno
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, draw
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import inference
import main_train
import models
import train_utils
import visualization
from data import locked, run_script
from models import TransferModel, load_checkpoint, save_checkpoint

QUICK = ("--image-size", 32, "--epochs", 3)
SMALL = ("--models", "mobilenet_v3_small")


def results(folder):
    """results.json without what may differ from run to run, such as times."""
    rows = json.loads((folder / "plots" / "results.json").read_text())["runs"]
    for row in rows:
        for key in ("seconds", "features", "images_per_second", "date", "command", "commit", "checkpoint_bytes"):
            del row[key]
        for epoch in row["history"]:
            del epoch["seconds"]
    return {row["model"]: row for row in rows}


def checkpoints(folder):
    files = sorted((folder / "checkpoints").glob("*.pt"))
    return {file.name: torch.load(file, weights_only=True)["state_dict"] for file in files}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[m][key], b[m][key]) for m in a for key in a[m])


def test_the_whole_job(run, photos, tmp_path):
    models = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
    code, out, err = run(main_train, "--data", photos, "--models", *models, *QUICK)
    assert (code, err) == (0, "")
    rows = results(tmp_path)
    assert list(rows) == list(models)
    for name, row in rows.items():
        assert name in out
        assert row["test_interval"][0] <= row["test_accuracy"] <= row["test_interval"][1]
        assert np.sum(row["confusion_matrix"]) == row["test_images"] == 18
        assert np.trace(row["confusion_matrix"]) / 18 == pytest.approx(row["test_accuracy"])
    suffixes = ("", "_confusion", "_reliability")
    plots = {
        "comparison",
        *(f"{p}{s}" for p in ("mobilenet", "mobilenet_large", "mobilenet_small") for s in suffixes),
    }
    drawn = {file.stem for file in (tmp_path / "plots").glob("*.png")}
    assert {name for name in drawn if not name.endswith("_mistakes")} == plots  # there may be none
    assert rows["mobilenet_v2"]["test_accuracy"] > 0.6  # three colours, told apart even by random features

    # predict agrees with evaluate
    code, out, err = run(inference, photos / "test", "--format", "json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(records) == 18
    rows["ensemble"] = json.loads((tmp_path / "plots" / "results.json").read_text())["ensemble"]
    for name, row in rows.items():
        answers = [one for r in records for one in (r, *r["models"]) if one["model"] == name]
        right = [answer["label"] == answer["path"].split("/")[-2] for answer in answers]
        assert len(right) == 18 and np.mean(right) == pytest.approx(row["test_accuracy"])
    code, out, err = run(inference, photos / "test", "--format", "json", "--no-ensemble")
    assert code == 0 and len(out.splitlines()) == 3 * 18
    code, out, err = run(inference)
    assert code == 0 and (tmp_path / "plots" / "predictions.png").exists() and len(out.splitlines()) == 12 + 1
    assert out.splitlines()[-1] == f"{out.count(' - right')} of 12 right"

    # a labelled folder: the same figures
    (photos / "test" / "blue").rename(tmp_path / "elsewhere")
    (photos / "test" / "blue").symlink_to(tmp_path / "elsewhere")  # which training reads, too
    code, out, err = run(inference, photos / "test", "--evaluate", "--output", "judged")
    assert (code, err) == (0, "") and "blue" in out
    for name, row in rows.items():
        assert f"\n{name}: {row['test_accuracy']:.2%} of 18 images right" in out
        wrong = list(csv.DictReader((tmp_path / "judged" / f"{name}_wrong.csv").read_text().splitlines()))
        assert len(wrong) == round(18 * (1 - row["test_accuracy"])) and all(w["true"] != w["label"] for w in wrong)
        assert (tmp_path / "judged" / f"{name}_confusion.png").exists()
    one = "checkpoints/mobilenet_v2.pt"
    assert run(inference, photos / "test", "--evaluate", "--checkpoint", one, one)[0] == 2  # their answers would mix
    (photos / "test" / "blue").rename(photos / "test" / "violet")
    code, out, err = run(inference, photos / "test", "--evaluate")
    assert code == 2 and "violet" in err


def test_a_second_run_uses_the_features_and_repeats_to_the_last_digit(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    first, state = results(tmp_path), checkpoints(tmp_path)
    code, out, _ = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 0 and "(cached)" in out and "checkpoints/mobilenet_v3_small.pt, made on" in out
    assert results(tmp_path) == first and same(checkpoints(tmp_path), state)
    shutil.rmtree(tmp_path / "data")
    code, out, _ = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert "(cached)" not in out
    assert results(tmp_path) == first and same(checkpoints(tmp_path), state)


def test_stale_features_are_never_read_and_damaged_ones_rebuilt(run, photos, tmp_path):
    command = ("--data", photos, *SMALL, *QUICK)
    run(main_train, *command)
    first = results(tmp_path)
    for change in (("--image-size", 48), ("--precision", "bf16"), ("--models", "mobilenet_v2")):
        assert "(cached)" not in run(main_train, *command, "--output", "other" + change[0], *change)[1]
    draw(photos / "train" / "red" / "0.png", (0, 0, 255), seed=9)
    assert "(cached)" not in run(main_train, *command)[1]
    changed = results(tmp_path)["mobilenet_v3_small"]
    assert changed["val_loss"] != first["mobilenet_v3_small"]["val_loss"]
    damaged = list((tmp_path / "data" / "features").glob("mobilenet_v3_small*"))
    for file in damaged:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    code, out, err = run(main_train, *command)
    assert code == 0 and "(cached)" not in out and err.count("1 images' features are damaged") == 1
    assert results(tmp_path)["mobilenet_v3_small"] == changed


def test_a_pass_cut_off_goes_on_where_it_was(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("models.CPU_BATCH", 8)
    (photos / "train" / "red" / "3.png").write_bytes(b"oops")
    command = ("--data", photos, *SMALL, *QUICK)
    run(main_train, *command)
    expected, state = results(tmp_path), checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "data")
    whole = train_utils.run_images

    def interrupted(*args, **kwargs):
        for i, batch in enumerate(whole(*args, **kwargs)):
            if i == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(train_utils, "run_images", interrupted)
    assert run(main_train, *command)[0] == 130
    monkeypatch.setattr(train_utils, "run_images", whole)
    [file] = (tmp_path / "data" / "features").glob("*.features")
    file.write_bytes(file.read_bytes()[:-5])  # killed while it wrote
    code, out, _ = run(main_train, *command)
    assert code == 1 and " of 48 images have their features" in out
    assert results(tmp_path) == expected and same(checkpoints(tmp_path), state)


def test_images_that_are_added_are_the_only_ones_computed(run, photos, tmp_path, monkeypatch):
    """Nor does another split, a part of the images, or an unreadable one that has come back, cost more."""
    whole, computed = train_utils.run_images, []

    def counted(models, items, *args, **kwargs):
        for batch in whole(models, items, *args, **kwargs):
            computed.append(len(batch[0]) - len(batch[2]))
            yield batch

    command, file = ("--data", photos, *SMALL, *QUICK, "--precision", "fp32"), photos / "train" / "red" / "0.png"
    monkeypatch.setattr(train_utils, "run_images", counted)
    monkeypatch.setattr(train_utils, "cost", lambda *args: {})
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: broken() if path == file else read(path))

    def broken():
        raise OSError(errno.EIO, "Input/output error")

    code, _, err = run(main_train, *command)
    assert code == 1 and "Input/output error" in err and sum(computed) == 77
    monkeypatch.setattr(Path, "read_bytes", read)
    assert run(main_train, *command)[0] == 0 and sum(computed) == 78
    draw(photos / "train" / "red" / "new.png", (200, 40, 40), seed=99)
    assert run(main_train, *command)[0] == 0 and sum(computed) == 79
    assert run(main_train, *command, "--limit", 30, "--output", "part")[0] == 0 and sum(computed) == 79


def test_fine_tuning_goes_on_where_it_was(run, photos, tmp_path, monkeypatch):
    (photos / "train" / "red" / "3.png").write_bytes(b"oops")
    names = ["mobilenet_v3_small", "mobilenet_v3_large"]
    command = ("--data", photos, *SMALL, *QUICK, "--fine-tune", 2, "--views", 2, "--seeds", 2, "--models", *names)
    code, out, _ = run(main_train, *command)
    assert code == 1 and "mobilenet_v3_small_finetuned: test accuracy" in out
    expected, state = results(tmp_path), checkpoints(tmp_path)
    assert list(expected) == [f"{name}{tuned}" for name in names for tuned in ("", "_finetuned")]
    assert len(expected["mobilenet_v3_small"]["accuracy_by_seed"]["test"]) == 2

    frozen, tuned = state["mobilenet_v3_small.pt"], state["mobilenet_v3_small_finetuned.pt"]
    for key in frozen:  # weights move, statistics don't
        statistics = "running" in key or "num_batches" in key or "standardize" in key
        assert torch.equal(frozen[key], tuned[key]) == statistics, key
    out = run(
        inference, photos / "test", "--checkpoint", "checkpoints/mobilenet_v3_small_finetuned.pt", "--format", "json"
    )[1]
    right = [record["label"] == record["path"].split("/")[-2] for record in map(json.loads, out.splitlines())]
    assert np.mean(right) == pytest.approx(expected["mobilenet_v3_small_finetuned"]["test_accuracy"])
    model = load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small_finetuned.pt")
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(images), model(images.flip(3)), atol=1e-5)

    (tmp_path / "checkpoints" / "mobilenet_v3_small_finetuned.pt").unlink()
    whole, epochs = train_utils.train_one_epoch, []
    first, second = 2 * 3 + 2, 2 * 3 + 1  # two classifiers and two epochs of fine-tuning, of the second model only one

    def interrupted(*args):
        epochs.append(0)
        if len(epochs) == first + second + 1:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(train_utils, "train_one_epoch", interrupted)
    assert run(main_train, *command)[0] == 130
    epochs.clear()
    code, out, _ = run(main_train, *command)
    assert code == 1 and "continuing after 2 of 2 epochs" in out and "continuing after 1 of 2 epochs" in out
    assert len(epochs) == 2 * (2 * 3) + 1
    monkeypatch.setattr(train_utils, "train_one_epoch", whole)
    assert results(tmp_path) == expected and same(checkpoints(tmp_path), state)
    assert not list(tmp_path.rglob("*.resume"))

    assert run(main_train, *command, "--fine-tune-lr", 1e-30)[0] == 1  # at which nothing moves
    state = checkpoints(tmp_path)
    frozen, tuned = state["mobilenet_v3_small.pt"], state["mobilenet_v3_small_finetuned.pt"]
    assert all(torch.allclose(frozen[key], tuned[key], rtol=0, atol=1e-20) for key in frozen)


def test_broken_photos_are_named_and_left_out(run, photos, tmp_path):
    (photos / "train" / "red" / "3.png").write_bytes(b"oops")
    (photos / "test" / "blue" / "2.png").write_bytes(b"")
    for _ in range(2):  # computed, and from the cache
        code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
        assert code == 1 and "red/3.png" in err and "blue/2.png" in err and "2 images" in err
        row = results(tmp_path)["mobilenet_v3_small"]
        assert row["train_images"] + row["val_images"] == 59 and row["test_images"] == 17


def test_one_model_fails_and_the_others_go_on(run, photos, tmp_path):
    code, _, err = run(main_train, "--data", photos, "--models", "vgg16", "mobilenet_v3_small", *QUICK)
    assert code == 1 and list(results(tmp_path)) == ["mobilenet_v3_small"]
    assert "vgg16-397923af.pth" in err and "checkpoints" in err and "--demo" in err and err.count("error:") == 1
    started = time.monotonic()
    code, _, err = run(main_train, *SMALL)
    assert code == 2 and "cifar-10-python.tar.gz" in err and "--data" in err and "--demo" in err
    assert time.monotonic() - started < 5 and err.count("\n") == 1
    assert list((tmp_path / "data").glob("*cifar*")) == []


def test_a_loss_that_is_no_number_stops_one_model(run, photos, tmp_path, monkeypatch):
    epochs = []
    whole = train_utils.train_one_epoch

    def diverges(*args):
        epochs.append(0)
        return (float("nan"), 0.1) if len(epochs) == 3 else whole(*args)

    monkeypatch.setattr(train_utils, "train_one_epoch", diverges)
    code, _, err = run(main_train, "--data", photos, "--models", "mobilenet_v3_small", "mobilenet_v2", *QUICK)
    assert code == 1 and "mobilenet_v3_small classifier: the loss is nan in training" in err
    assert "in epoch 3, at a learning rate of" in err
    rows = results(tmp_path)
    assert [len(row["history"]) for row in rows.values()] == [2, 3]
    metrics = load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small.pt").metrics
    assert metrics["val_loss"] == rows["mobilenet_v3_small"]["val_loss"]


def test_out_of_memory_halves_the_batch(run, photos, tmp_path, monkeypatch):
    command = ("--data", photos, *SMALL, *QUICK, "--precision", "fp32")
    run(main_train, *command)
    expected = results(tmp_path)["mobilenet_v3_small"]
    question = (photos / "test", "--format", "json", "--precision", "fp32")
    answers = [json.loads(line) for line in run(inference, *question)[1].splitlines()]
    shutil.rmtree(tmp_path / "data")
    whole, room = models.preprocess, 4

    def greedy(images, *args, **kwargs):
        if len(images) > room:
            raise torch.OutOfMemoryError("no room")
        return whole(images, *args, **kwargs)

    monkeypatch.setattr(models, "preprocess", greedy)
    code, out, err = run(inference, *question)
    assert code == 0 and "batches of 4" in err
    for line, answer in zip(out.splitlines(), answers, strict=True):
        assert json.loads(line)["probability"] == pytest.approx(answer["probability"], abs=1e-4)
    code, _, err = run(main_train, *command)
    assert code == 0 and "batches of 4" in err
    assert results(tmp_path)["mobilenet_v3_small"]["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
    room = 0
    code, _, err = run(inference, *question)
    assert code == 2 and err.splitlines()[-1] == "error: no room"


def test_two_runs_do_not_share_an_output_folder(run, photos, tmp_path):
    with locked(tmp_path / "checkpoints" / ".lock", wait=False):
        code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 2 and "another run" in err
    assert run(main_train, "--data", photos, *SMALL, *QUICK)[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_no_room_leaves_what_was_there(run, photos, tmp_path):
    import resource

    command = ("--data", photos, *SMALL, *QUICK)
    run(main_train, *command)
    checkpoint = tmp_path / "checkpoints" / "mobilenet_v3_small.pt"
    before = checkpoint.read_bytes()
    process = subprocess.Popen(
        [sys.executable, ROOT / "main_train.py", *map(str, command), "--seed", "1"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )
    _, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err
    assert str(checkpoint.relative_to(tmp_path)) in err and "MB are free" in err
    assert checkpoint.read_bytes() == before and not list(tmp_path.rglob("*.part"))


def test_models_keep_each_others_rows(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    run(main_train, "--data", photos, "--models", "mobilenet_v2", *QUICK)
    run(main_train, "--data", photos, *SMALL, *QUICK, "--epochs", 1)
    rows = results(tmp_path)
    assert list(rows) == ["mobilenet_v3_small", "mobilenet_v2"]
    assert [len(row["history"]) for row in rows.values()] == [1, 3]


def test_a_run_does_not_replace_a_model_of_other_or_more_data(run, photos, tmp_path):
    command = ("--data", photos, *SMALL, *QUICK)
    run(main_train, *command)
    before, state = results(tmp_path), checkpoints(tmp_path)
    shutil.copytree(photos, tmp_path / "pets")
    (tmp_path / "pets" / "train" / "red").rename(tmp_path / "pets" / "train" / "cat")
    (tmp_path / "pets" / "test" / "red").rename(tmp_path / "pets" / "test" / "cat")
    shutil.copytree(photos, tmp_path / "others")
    draw(tmp_path / "others" / "train" / "red" / "0.png", (200, 50, 40), seed=9, size=(30, 30))
    for change in (
        ("--limit", 30),
        ("--image-size", 48),
        ("--data", tmp_path / "pets"),
        ("--data", tmp_path / "others"),
    ):
        code, _, err = run(main_train, *command, *change)
        assert code == 2 and err.count("\n") == 1
        assert "checkpoints/mobilenet_v3_small.pt was trained on 48 images of 3 classes at 32 pixels" in err
        assert results(tmp_path) == before and same(checkpoints(tmp_path), state)
    run(main_train, *command, "--models", "mobilenet_v2", "--limit", 30)  # another model: its own row, another table
    code, out, _ = run(main_train, *command, "--data", f"{photos}/")
    assert code == 0 and "mobilenet_v2" not in out and list(results(tmp_path)) == ["mobilenet_v3_small", "mobilenet_v2"]
    shutil.copytree(photos, tmp_path / "copy")  # the same data at another place
    assert run(main_train, *command, "--data", tmp_path / "copy")[0] == 0


def test_unequal_classes(run, photos, tmp_path):
    """Each class of 20, 4 and 1 images for training counts the same with --class-weights."""
    for name, count in (("green", 4), ("red", 1)):
        for image in sorted((photos / "train" / name).iterdir())[count:]:
            image.unlink()
    for image in sorted((photos / "test" / "red").iterdir())[1:]:
        image.unlink()
    command = ("--data", photos, "--models", "mobilenet_v2", *QUICK)
    code, out, err = run(main_train, *command)
    header, row = out.split("\n\n")[1].splitlines()
    assert (code, err) == (0, "") and "macro F1  worst recall" in header and "no validation image of 'red'" in out
    [plain] = results_rows(tmp_path)
    assert f"{plain['macro']['f1']:.3f}" in row and f"{min(plain['per_class']['recall']):.2%}" in row
    code, out, err = run(main_train, *command, "--class-weights", "--output", "weighted")
    [weighted] = results_rows(tmp_path / "weighted")
    assert (code, err) == (0, "") and weighted["recipe"]["class_weights"] and not plain["recipe"]["class_weights"]
    plain, weighted = ([epoch["train_loss"] for epoch in row["history"]] for row in (plain, weighted))
    assert plain != weighted


@pytest.mark.parametrize("how", ["two images in all", "all the same", "noise"])
def test_data_that_teach_nothing_give_a_sensible_answer(run, photos, how):
    for label, name in enumerate(("blue", "green", "red")):
        for i, image in enumerate(sorted((photos / "train" / name).iterdir())):
            if how == "two images in all" and i > 1:
                image.unlink()
            elif how == "all the same":
                shutil.copy(photos / "test" / "red" / "0.png", image)
            elif how == "noise":
                draw(image, (90, 90, 90), seed=100 * label + i)
    code, out, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert (code, err) == (0, "") and "nan" not in out
    assert run(inference, photos / "test")[0] == 0


def test_own_images_get_an_output_folder_of_their_own(photos, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    process = start(ROOT / "main_train.py", "--data", f"{photos}/", *SMALL, *QUICK, cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "") and not (tmp_path / "plots").exists()
    assert (tmp_path / "runs" / "photos" / "checkpoints" / "mobilenet_v3_small.pt").exists()
    *_, last = out.splitlines()
    command = last.split("next: python ")[1].replace("IMAGE...", f"{photos}/test/red/0.png").split()
    answer = start(ROOT / command[0], *command[1:], cwd=tmp_path)
    assert "red" in answer.communicate()[0] and answer.returncode == 0


def test_nothing_is_written_outside_of_output_and_cache(run, photos, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK, "--output", "../out", "--cache", "../cache")
    assert (code, err) == (0, "") and sorted(tmp_path.rglob("*")) == before
    assert {path.name for path in (tmp_path.parent / "out").iterdir()} == {"checkpoints", "plots"}


def test_a_class_of_which_nothing_can_be_read(run, photos):
    for image in (photos / "test" / "red").iterdir():
        image.write_bytes(b"oops")
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 1 and "no test image of 'red' can be read" in err
    for image in (photos / "train" / "red").iterdir():
        image.write_bytes(b"oops")
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 2 and "no training image of 'red' can be read" in err


def test_copies_and_doubtful_labels_are_found(run, photos, tmp_path, monkeypatch):
    """In a folder with planted ones."""
    red, blue = photos / "train" / "red", photos / "train" / "blue"
    for i in (1, 2, 3):
        shutil.copy(red / f"{i}.png", photos / "test" / "red" / f"copy{i}.png")
    shutil.copy(blue / "5.png", photos / "train" / "green" / "blue5.png")
    (red / "7.png").rename(blue / "red7.png")
    command = ("--data", photos, "--models", "mobilenet_v2", *QUICK, "--precision", "fp32")
    code, out, err = run(main_train, *command)  # random weights, whose bf16 features are too coarse
    assert (code, err) == (0, "") and "3 test images seem to have copies (test accuracy without them: " in out
    report = json.loads((tmp_path / "plots" / "data.json").read_text())
    copies = {tuple(sorted(Path(image["path"]).name for image in pair["images"])) for pair in report["copies"]}
    assert copies == {("1.png", "copy1.png"), ("2.png", "copy2.png"), ("3.png", "copy3.png"), ("5.png", "blue5.png")}
    assert "1 copies have two labels" in out
    doubtful = {(Path(image["path"]).name, image["label"], image["rather"]) for image in report["doubtful_labels"]}
    assert ("red7.png", "blue", "red") in doubtful and len(doubtful) < 12
    assert (tmp_path / "plots" / "mobilenet_data.png").exists()
    monkeypatch.setattr(train_utils, "COMPARED", 50)
    out = run(main_train, *command)[1]
    report = json.loads((tmp_path / "plots" / "data.json").read_text())
    assert "too many images to look for copies" in out and report["copies"] is None


def test_files_that_vanish_cost_themselves(run, photos, tmp_path, monkeypatch):
    whole = main_train.fine_tune

    def after_a_cat_walked_over_the_keyboard(frozen, *args):
        for part in (frozen.data.train, frozen.data.val, frozen.data.test):
            part.items[1].unlink()
        return whole(frozen, *args)

    monkeypatch.setattr(main_train, "fine_tune", after_a_cat_walked_over_the_keyboard)
    err = run(main_train, "--data", photos, *SMALL, *QUICK, "--fine-tune", 1)[2]
    assert "error" not in err and err.count("left out") >= 2
    frozen, tuned = results_rows(tmp_path)
    assert tuned["test_images"] == frozen["test_images"] - 1 and 0 <= tuned["test_accuracy"] <= 1


def test_a_notebook(photos, weights, tmp_path, monkeypatch):
    """Where stdout is not a stream that could be reconfigured."""
    monkeypatch.setenv("TORCH_HOME", str(weights))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    command = ["--data", str(photos), *SMALL, "--image-size", "32", "--epochs", "1", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        run_script(lambda: main_train.main([*command, "--cache", str(tmp_path)]))
    assert left.value.code == 0 and "mobilenet_v3_small" in sys.stdout.getvalue()


def break_tree(photos, how):
    if how == "no folder":
        return photos / "nowhere", "nowhere"
    if how == "no train":
        shutil.rmtree(photos / "train")
        return photos, "train/<class>/"
    if how == "one class":
        shutil.rmtree(photos / "train" / "red")
        shutil.rmtree(photos / "train" / "blue")
        return photos, "one class"
    if how == "class only in test":
        draw(photos / "test" / "violet" / "1.png", (0, 0, 0), seed=1)
        return photos, "violet"
    if how == "empty class":
        (photos / "train" / "violet").mkdir()
        return photos, "violet"
    if how == "too few":
        for image in photos.glob("train/*/*.png"):
            if image.stem != "0":
                image.unlink()
        return photos, "too few"


@pytest.mark.parametrize("how", ["no folder", "no train", "one class", "class only in test", "empty class", "too few"])
def test_a_folder_that_is_no_data_set(run, photos, how):
    folder, expected = break_tree(photos, how)
    code, _, err = run(main_train, "--data", folder, *SMALL)
    assert code == 2 and err.startswith("error: ") and expected in err


@pytest.mark.parametrize(
    ("script", "args", "expected"),
    [
        (main_train, ["--models", "resnet"], "resnet50"),
        (main_train, ["--device", "tpu"], "mps"),
        (main_train, ["--epochs", "0"], "positive"),
        (main_train, ["--lr", "nan"], "--lr"),
        (main_train, ["--fine-tune-lr", "inf"], "--fine-tune-lr"),
        (main_train, ["--seed", "-1"], "--seed"),
        (main_train, ["--device", "cuda"], "--device auto"),
        (inference, ["x.png", "--threshold", "80"], "below 1"),
        (inference, ["x.png"], "main_train.py"),
        (inference, ["x.png", "--checkpoint", "none.pt"], "none.pt"),
    ],
)
def test_wrong_usage(run, script, args, expected):
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("there is a GPU here")
    code, _, err = run(script, *args)
    assert code == 2 and expected in err


def test_the_report_page_is_whole(run, photos, tmp_path):
    photos = photos.rename(tmp_path / "<b>&pets")
    run(main_train, "--data", photos, "--models", "mobilenet_v2", "mobilenet_v3_small", *QUICK)
    page = (tmp_path / "plots" / "report.html").read_text()
    for name, row in results(tmp_path).items():
        assert f"<td>{name}</td>" in page and f"<td>{row['test_accuracy']:.2%}</td>" in page
    drawn = list((tmp_path / "plots").glob("*.png"))
    assert page.count("src=") == page.count("data:image/png;base64,") == len(drawn)  # nothing from elsewhere
    assert "http" not in page and "$" not in page and escape(str(photos)) in page and "<b>" not in page


def test_what_else_lies_in_checkpoints(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    (tmp_path / "checkpoints" / "foreign.pt").write_bytes(b"not ours")
    photo = photos / "test" / "red" / "0.png"
    code, out, err = run(inference, photo)
    assert code == 1 and ".png: " in out and "foreign.pt" in err and err.count("\n") == 1
    assert run(inference, photo, "--checkpoint", "checkpoints/foreign.pt")[0] == 2
    code, out, err = run(inference, "--checkpoint", "checkpoints/mobilenet_v3_small.pt", photo)
    assert code == 0 and len(out.splitlines()) == 1


def test_the_ways_to_name_images(run, photos, tmp_path, monkeypatch):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    files = sorted(map(str, (photos / "test").rglob("*.png")), reverse=True)

    def paths(*args):
        code, out, _ = run(inference, *args, "--format", "json")
        return [json.loads(line)["path"] for line in out.splitlines()] if code == 0 else code

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


def test_models_of_other_classes_answer_alone(run, photos, tmp_path):
    for name, classes in (("mobilenet_v3_small", "abc"), ("mobilenet_v2", "xy")):
        save_checkpoint(tmp_path / "checkpoints" / f"{name}.pt", TransferModel(name, classes, 64, pretrained=False), {})
    photo = next(photos.rglob("*.png"))
    code, out, err = run(inference, photo)
    assert (
        code == 0
        and len(out.splitlines()) == 2
        and err == ("the models do not have the same classes: each answers alone\n")
    )
    assert run(inference, photo, "--ensemble")[0] == 2


def test_what_decided_and_which_training_images_are_alike(run, photos, tmp_path, monkeypatch):
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
    assert texts.count("what decided") == 2 and "red, 1.00" in texts  # the image itself is in the training set
    assert len(texts) == 2 * (1 + 1 + 5)
    shutil.rmtree(tmp_path / "data")
    code, _, err = run(*command)
    assert code == 0 and "features are not in data/features" in err and len(texts) == 2 * 2
    photos.rename(tmp_path / "moved")
    code, _, err = run(inference, tmp_path / "moved" / "test" / "red" / "0.png", "--explain", "moved.png")
    assert code == 0 and str(photos) in err and (tmp_path / "moved.png").exists()


def test_an_exported_model_answers_as_the_checkpoint(run, photos, tmp_path, monkeypatch):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    code, out, err = run(inference, "--export", "exported.pt2")
    assert (code, err) == (0, "") and "(B, 3, 32, 32)" in out
    extra = {"classes": ""}
    exported = torch.export.load(tmp_path / "exported.pt2", extra_files=extra).module()
    model = load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small.pt")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    classes = json.loads(extra["classes"])
    for count in (1, 5):
        found = exported(torch.from_numpy(images[:count]).permute(0, 3, 1, 2))
        for row, record in zip(found, model.predict(list(images[:count])), strict=True):
            expected = {guess["label"]: guess["probability"] for guess in record["top"]}
            assert dict(zip(classes, row.tolist(), strict=True)) == pytest.approx(expected, abs=1e-4)
    for name in ("model.txt", "model.onnx"):
        if name.endswith("onnx") and importlib.util.find_spec("onnxscript"):
            continue
        code, _, err = run(inference, "--export", name)
        assert code == 2 and name in err and len(err.splitlines()) == 1 and not (tmp_path / name).exists()
    monkeypatch.setattr("torch.allclose", lambda *args, **kwargs: False)
    code, _, err = run(inference, "--export", "other.pt2")
    assert code == 2 and "differ" in err and not (tmp_path / "other.pt2").exists()


def test_foreign_and_doubtful_images_are_marked(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    random = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / "foreign" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)

    def share(folder):
        out = run(inference, folder, "--format", "json", "--threshold", 0.5)[1]
        records = [json.loads(line) for line in out.splitlines()]
        assert all(record["unsure"] == (record["probability"] < 0.5) for record in records)
        return np.mean([record["unfamiliar"] for record in records])

    assert share(tmp_path / "foreign") > 0.9 and share(photos / "test") < 0.5
    assert ", unfamiliar" in run(inference, tmp_path / "foreign")[1]


def test_inference_reports_each_file(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    folder = tmp_path / "mixed"
    shutil.copytree(photos / "test" / "red", folder)
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (folder / "text.jpg").write_text("hello")
    (folder / "notes.txt").write_text("not a image, and not named like one")
    code, out, err = run(inference, folder, "gone.png", "--format", "json", "--top-k", 2)
    records = {record["path"]: record for record in map(json.loads, out.splitlines())}
    assert code == 1 and len(records) == 6 + 2 + 1
    assert sorted(path.split("/")[-1] for path in records if "error" in records[path]) == [
        "broken.png", "gone.png", "text.jpg"
    ]  # fmt: skip
    good = records[str(folder / "0.png")]
    assert len(good["top"]) == 2 and good["label"] == good["top"][0]["label"] in ("blue", "green", "red")
    assert good["probability"] == good["top"][0]["probability"] >= good["top"][1]["probability"]
    code, out, err = run(inference, folder, "--format", "csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 1 and len(rows) == 8 and sum(bool(row["error"]) for row in rows) == 2
    code, out, err = run(inference, "gone.png")
    assert code == 2 and "gone.png" in err


@pytest.mark.skipif(sys.platform == "win32", reason="names and files that Windows doesn't have")
def test_a_folder_of_everything(run, photos, tmp_path):
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
    assert (
        code == 1
        and err == "2 files not used: 1 links to nothing, 1 linked folders\n"
        and len(out.splitlines()) == len(good) + len(bad)
    )
    assert all("label" in records[name] for name in good)
    assert all(name in records[name]["error"] for name in bad)


def test_predictions_do_not_depend_on_the_company(run, photos, monkeypatch):
    """Nor on the order of the files, the batch they share, or the number of threads."""
    monkeypatch.setattr(models, "CPU_BATCH", 4)
    assert run(main_train, "--data", photos, *SMALL, *QUICK)[0] == 0
    files = sorted((photos / "test").rglob("*.png"))
    threads = torch.get_num_threads()
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 1e-2)):

        def answers(files, precision=precision):
            code, out, _ = run(inference, *files, "--format", "json", "--precision", precision)
            assert code == 0
            return {record["path"]: record for record in map(json.loads, out.splitlines())}

        together = answers(files)
        others = [answers(files[::-1])] + [answers([file]) for file in files[::5]]
        for count in (1, 3):
            torch.set_num_threads(count)
            others.append(answers(files))
        torch.set_num_threads(threads)
        for path, record in [pair for other in others for pair in other.items()]:
            assert record["probability"] == pytest.approx(together[path]["probability"], abs=tolerance)
            assert precision == "bf16" or record["label"] == together[path]["label"]


def start(*args, cwd):
    command = [sys.executable, *map(str, args)]
    # a process started in the background ignores SIGINT, and so would its children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_demo_and_a_pipe_that_closes(tmp_path):
    deep = ("mobilenet_v3_large", "mobilenet_v3_small")
    demo = start(ROOT / "main_train.py", "--demo", "--models", *deep, cwd=tmp_path)
    out, err = demo.communicate()
    assert (demo.returncode, err) == (0, "") and "not the models" in out
    assert all(row["test_accuracy"] > 0.5 for row in results(tmp_path / "demo").values())  # by chance a third
    assert all(row["images_per_second"]["best"] > 0 for row in results_rows(tmp_path / "demo"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    files = (tmp_path / "demo" / "checkpoints").glob("*.pt")
    reader = start(ROOT / "inference.py", "--checkpoint", *files, cwd=tmp_path)
    reader.stdout.readline()
    reader.stdout.close()
    err = reader.stderr.read()
    assert reader.wait() == 0 and "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
def test_two_processes_are_as_one(photos, weights, tmp_path, monkeypatch):
    """Under torchrun: the same features, results and answers, in order. Fine-tuning is the same up to rounding."""
    monkeypatch.setenv("TORCH_HOME", str(weights))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (photos / "train" / "red" / "broken.png").write_bytes(b"oops")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    features, rows, state, answers = [], [], [], []
    for number, runner in enumerate(((), two)):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = (ROOT / "main_train.py", "--data", photos, *SMALL, *QUICK, "--fine-tune", 1, "--output", ".")
        done = subprocess.run([sys.executable, *runner, *map(str, command)], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout.count("test accuracy") == 2, done.stderr
        assert done.stderr.count("left out: ") == 1
        [file] = (folder / "data" / "features").glob("*.features")
        content, size = file.read_bytes(), file.stat().st_size // 78
        records = [content[i * size : (i + 1) * size] for i in range(78)]
        features.append({record[:32]: record[40:] for record in records})  # without seconds and checksum
        rows.append(results(folder))
        state.append(checkpoints(folder))
        frozen = "checkpoints/mobilenet_v3_small.pt"
        command = (ROOT / "inference.py", photos / "train", "--format", "csv", "--checkpoint", frozen)
        done = subprocess.run([sys.executable, *runner, *map(str, command)], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout.count("\n") == 1 + 61, done.stderr
        answers.append(done.stdout)
    assert len(features[0]) == 78 and features[0] == features[1]
    one, two = (
        [run.pop(f"mobilenet_v3_small_finetuned{end}") for run in runs] for runs, end in ((rows, ""), (state, ".pt"))
    )
    for a, b in zip(one[0]["history"], one[1]["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert all(torch.allclose(two[0][key], two[1][key], atol=1e-3) for key in two[0])
    assert rows[0] == rows[1] and same(*state) and answers[0] == answers[1]


def test_answers_do_not_import_the_compiler(tmp_path):
    save_checkpoint(tmp_path / "x.pt", TransferModel("mobilenet_v3_small", ("a", "b"), 64, pretrained=False), {})
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import inference\n"
        "assert inference.main(['x.png', '--checkpoint', 'x.pt']) == 0 and 'torch._dynamo' not in sys.modules\n"
        "from torchvision.ops.roi_align import is_compile_supported\n"
        "import torch._dynamo\n"
        "assert is_compile_supported('cpu') == torch._dynamo.utils.is_compile_supported('cpu')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_machine_without_the_images_is_noticed_at_the_start(photos, tmp_path):
    script = tmp_path / "blind.py"  # main_train.py, whose second process sees no files
    script.write_text(
        f"import os, runpy, sys, pathlib\nsys.path.insert(0, {str(ROOT)!r})\n"
        "if os.environ['RANK'] == '1':\n    pathlib.Path.exists = lambda path: False\n"
        f"runpy.run_path({str(ROOT / 'main_train.py')!r}, run_name='__main__')\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), "--data", str(photos)]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode and "every machine needs the images" in done.stderr and "features" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_quietly(tmp_path, photos, signum, code):
    process = start(ROOT / "main_train.py", "--demo", "--epochs", 100000, cwd=tmp_path)
    process.stdout.readline()  # the data are loaded
    time.sleep(1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in err


def test_features_of_many_images_take_half_the_space(run, photos, tmp_path, monkeypatch):
    sizes, losses = [], []
    for large in (100, 10):
        monkeypatch.setattr(train_utils, "LARGE", large)
        command = ("--data", photos, *SMALL, *QUICK, "--output", str(large), "--cache", str(large))
        assert run(main_train, *command)[0] == 0
        sizes.append(sum(file.stat().st_size for file in tmp_path.glob(f"{large}/features/*.features")))
        losses.append(results(tmp_path / str(large))["mobilenet_v3_small"]["test_loss"])
    assert sizes[1] < 0.52 * sizes[0] and losses[1] == pytest.approx(losses[0], rel=0.05)


def test_two_runs_fill_the_same_cache(photos, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    folders = [tmp_path / "a", tmp_path / "b"]
    command = (ROOT / "main_train.py", "--data", photos, *SMALL, *QUICK, "--output")
    runs = [start(*command, folder, cwd=tmp_path) for folder in folders]
    assert [(process.communicate()[1], process.returncode) for process in runs] == [("", 0)] * 2
    assert results(folders[0]) == results(folders[1])
    assert same(checkpoints(folders[0]), checkpoints(folders[1]))
    assert len(list((tmp_path / "data" / "features").glob("*.features"))) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_killed_anywhere_finished_anyway():
    """A few of the points that benchmarks/kill.py can try."""
    process = start(ROOT / "benchmarks" / "kill.py", "--points", 2, cwd=ROOT)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "the same weights and results" in out


NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "--net", "sh", "-ec"]


def own_mounts_work() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*NAMESPACE, "mount -t tmpfs x /mnt"]).returncode == 0


@pytest.mark.skipif(not own_mounts_work(), reason="needs a system that lets users mount")
def test_full_disk_read_only_folder_no_home_no_network(photos, weights, tmp_path, monkeypatch):
    """On real file systems, without a network, from a warm cache of weights."""

    def namespace(script, *args):
        command = [sys.executable, ROOT / "main_train.py", "--data", photos, *QUICK, "--models", *args]
        process = subprocess.run(
            [*NAMESPACE, script, "sh", *map(str, command)], cwd=tmp_path, text=True, capture_output=True
        )
        assert "Traceback" not in process.stderr
        return process.returncode, process.stderr

    monkeypatch.setenv("TORCH_HOME", str(weights))
    for folder in ("out", "data"):
        (tmp_path / folder).mkdir()
    # the first checkpoint finds room, the second doesn't; then there is more
    two = ("mobilenet_v3_small", "mobilenet_v2", "--output", "out")
    script = """
        mount -t tmpfs -o size=12m x out
        "$@" || code=$?
        test $(ls -A out/checkpoints | wc -l) = 2  # the lock and one checkpoint
        cat out/plots/results.json >seen
        exit $code"""
    code, err = namespace(script, *two)
    assert code == 1 and "out/checkpoints/mobilenet_v2.pt" in err and "MB are free" in err
    assert [row["model"] for row in json.loads((tmp_path / "seen").read_text())["runs"]] == ["mobilenet_v3_small"]
    shutil.rmtree(tmp_path / "data" / "features")
    script = 'mount -t tmpfs -o size=64k x data; "$@" || code=$?; mount -o remount,size=9m data; "$@"; exit $code'
    code, err = namespace(script, *two[:1])
    assert code == 2 and "data/features/mobilenet_v3_small" in err and "No space left" in err and err.count("\n") == 1
    assert (tmp_path / "runs" / "photos" / "checkpoints" / "mobilenet_v3_small.pt").exists()
    before = checkpoints(tmp_path / "runs" / "photos")

    code, err = namespace('mount --bind . .; mount -o remount,ro,bind .; cd .; cd "$PWD"; "$@"', *two[:1])
    assert code == 2 and "Read-only file system" in err and err.count("\n") == 1
    assert same(checkpoints(tmp_path / "runs" / "photos"), before)

    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert namespace('"$@"', *two[:1])[0] == 0
    monkeypatch.delenv("TORCH_HOME")
    code, err = namespace('"$@"', *two[:1])
    assert code == 2 and "/proc/nowhere" in err.splitlines()[-1]  # matplotlib says a word about it first


def test_inference_reads_a_checkpoint_that_save_checkpoint_was_given_no_metrics_for(run, photos, tmp_path):
    save_checkpoint(tmp_path / "own.pt", TransferModel("mobilenet_v3_small", "ab", 64, pretrained=False), {})
    code, out, _ = run(inference, next(photos.rglob("*.png")), "--checkpoint", tmp_path / "own.pt")
    assert code == 0 and ".png: " in out


def test_a_run_says_where_its_numbers_come_from(run, photos, tmp_path):
    for cached in (False, True):
        run(main_train, "--data", photos, *SMALL, *QUICK, "--fine-tune", 1, "--precision", "bf16", "--device", "cpu")
        frozen, tuned = json.loads((tmp_path / "plots" / "results.json").read_text())["runs"]
        for row in (frozen, tuned):
            assert row["date"][:2] == "20" and row["device"] and row["versions"]["torch"] == str(torch.__version__)
            assert row["command"].startswith("main_train.py --") and "--fine-tune 1" in row["command"]
            assert row["features"]["cached"] is cached and row["features"]["computed"] == (0 if cached else 60)
            assert row["recipe"]["batch_size"] == (32 if row["fine_tuned"] else 512)
        assert frozen["precision"]["features"] == "bf16"
        assert tuned["precision"] == {"features": "fp32", "training": "fp32"}
        assert tuned["multiply_adds"] == frozen["multiply_adds"]  # of one pass, whatever the number of views


def test_a_model_answers_in_the_precision_of_its_training(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK, "--precision", "bf16", "--device", "cpu")
    [row] = results_rows(tmp_path)
    records = [json.loads(line) for line in run(inference, photos / "test", "--format", "json")[1].splitlines()]
    right = [record["label"] == record["path"].split("/")[-2] for record in records]
    assert np.mean(right) == pytest.approx(row["test_accuracy"])
    model = load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small.pt")
    answers = model.predict([record["path"] for record in records])
    fp32 = run(inference, photos / "test", "--format", "json", "--precision", "fp32")[1].splitlines()
    difference = np.array(
        [[a["probability"], json.loads(line)["probability"]] for a, line in zip(answers, fp32, strict=True)]
    )
    expected = np.array([record["probability"] for record in records])
    assert np.allclose(difference[:, 0], expected, atol=0.02)  # the plain model, not its fast copy
    assert model.features[0][0].weight.dtype == torch.float32 and not np.array_equal(difference[:, 1], expected)


def test_the_time_of_a_resumed_pass_is_the_sum_of_its_parts(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("models.CPU_BATCH", 8)
    whole = train_utils.run_images

    def slow(*args, interrupted=True, **kwargs):
        for i, batch in enumerate(whole(*args, **kwargs)):
            if interrupted and i == 5:
                raise KeyboardInterrupt
            time.sleep(0.3)
            yield batch

    monkeypatch.setattr(train_utils, "run_images", slow)
    assert run(main_train, "--data", photos, *SMALL, *QUICK)[0] == 130
    monkeypatch.setattr(train_utils, "run_images", whole)
    run(main_train, "--data", photos, *SMALL, *QUICK)
    row = json.loads((tmp_path / "plots" / "results.json").read_text())["runs"][0]
    assert 1 < row["seconds"]["features"] < 6


def test_a_plot_or_a_benchmark_never_costs_a_result(run, photos, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("nothing works today")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    monkeypatch.setattr("train_utils.FlopCounterMode", broken)
    code, out, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 1 and err.count("nothing works today") == 3 == len(err.splitlines())
    assert "mobilenet_v3_small" in out and results_rows(tmp_path)[0]["test_accuracy"] >= 0
    assert load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small.pt").predict(photos / "test/red/0.png")


def results_rows(folder):
    return json.loads((folder / "plots" / "results.json").read_text())["runs"]


@pytest.mark.parametrize("schema", [1, 2])  # of another version, or edited by hand
def test_results_that_cannot_be_read_are_kept_aside(run, photos, tmp_path, schema):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "results.json").write_text(f'{{"schema": {schema}, "runs": [{{"model": "x"}}]}}')
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 0 and "results.json.old" in err and '"x"' in (tmp_path / "plots" / "results.json.old").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="names that only Linux allows")
def test_names_are_data(run, photos, tmp_path):
    """Class names with mathtext, escape sequences, foreign scripts, and bytes that are no text."""
    names = ["Ba$$in_{x}", "\x1b[31mred", os.fsdecode(b"caf\xe9"), "犬" * 50, "😀"]
    for part in ("train", "test"):
        for old, new in zip(("blue", "green", "red"), names[:3], strict=True):
            (photos / part / old).rename(photos / part / new)
        for name in names[3:]:
            shutil.copytree(photos / part / names[0], photos / part / name)
    code, out, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert (code, err) == (0, "")
    code, out, err = run(inference, photos / "test")
    assert code == 0 and len(out.splitlines()) == 30 and "Ba$$in_{x} " in out
    assert "\x1b" not in out + err
    code, out, _ = run(inference, photos / "test", "--format", "json")
    assert {guess["label"] for line in out.splitlines() for guess in json.loads(line)["top"]} <= set(names)
    assert run(inference)[0] == 0


def test_a_plot_of_a_thousand_classes_is_bounded(tmp_path):
    matrix = np.diag(np.full(1000, 9))
    matrix[3, 7] = 5
    figure = visualization.plot_confusion("x", matrix.tolist(), [f"class {i}" for i in range(1000)])
    figure.savefig(tmp_path / "x.png", dpi=visualization.DPI)
    width, height = Image.open(tmp_path / "x.png").size
    assert max(width, height) < 2500
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert {text for text in texts if "taken for" in text} == {"class 3 taken for class 7"}


def names_for_the_demo() -> list[str]:
    """Every model of torchvision with fewer than 4 million parameters, and the smallest of each family."""
    families = {}
    for name in torchvision.models.list_models(torchvision.models, exclude="vgg*"):  # a default of the demo
        size = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        families.setdefault(torchvision.models.get_model_builder(name).__module__, []).append((size, name))
    return sorted(name for family in families.values() for size, name in family if size < 4e6 or size == min(family)[0])


NAMES = names_for_the_demo()


@pytest.mark.parametrize("names", [NAMES[::2], NAMES[1::2]])
def test_every_backbone_goes_through_the_demo(run, tmp_path, monkeypatch, names):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)  # seen in other tests
    code, out, err = run(main_train, "--demo", "--limit", 8, "--epochs", 1, "--views", 1, "--models", *names)
    assert (code, err) == (0, "")
    assert [row["model"] for row in results_rows(tmp_path / "demo")] == names
    checkpoints = [tmp_path / "demo" / "checkpoints" / f"{name}.pt" for name in names]
    code, out, err = run(inference, "--checkpoint", *checkpoints[::8])
    assert code == 0 and len(out.splitlines()) == 12 + 1
