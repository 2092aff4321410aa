"""results.json, and which models a run may replace."""

import shutil

import pytest
import torch
from conftest import QUICK, SMALL, checkpoints, draw, repeatable, results, same

import main_train


def test_runs_keep_the_rows_of_other_models(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    run(main_train, "--data", photos, "--models", "mobilenet_v2", *QUICK)
    run(main_train, "--data", photos, *SMALL, *QUICK, "--epochs", 1)
    rows = repeatable(tmp_path)
    assert list(rows) == ["mobilenet_v3_small", "mobilenet_v2"]
    assert [len(row["history"]) for row in rows.values()] == [1, 3]


def test_a_run_does_not_replace_a_model_of_other_or_more_data(run, photos, tmp_path):
    command = ("--data", photos, *SMALL, *QUICK)
    run(main_train, *command)
    before, state = repeatable(tmp_path), checkpoints(tmp_path)
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
        assert repeatable(tmp_path) == before and same(checkpoints(tmp_path), state)
    run(main_train, *command, "--models", "mobilenet_v2", "--limit", 30)  # another model: its own row, another table
    code, out, _ = run(main_train, *command, "--data", f"{photos}/")
    assert code == 0 and "mobilenet_v2" not in out
    assert list(repeatable(tmp_path)) == ["mobilenet_v3_small", "mobilenet_v2"]
    shutil.copytree(photos, tmp_path / "copy")  # the same data at another place
    assert run(main_train, *command, "--data", tmp_path / "copy")[0] == 0


@pytest.mark.parametrize("schema", [2, 3])  # of another version, or of this one without the keys of a row
def test_unusable_results_are_moved_aside(run, photos, tmp_path, schema):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "results.json").write_text(f'{{"schema": {schema}, "runs": [{{"model": "x"}}]}}')
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 0 and "results.json.old" in err and '"x"' in (tmp_path / "plots" / "results.json.old").read_text()


def test_a_row_contains_its_provenance(run, photos, tmp_path, fine_tuning_helps):
    for cached in (False, True):
        run(main_train, "--data", photos, *SMALL, *QUICK, "--fine-tune", 1, "--precision", "bf16", "--device", "cpu")
        frozen, tuned = results(tmp_path)
        for row in (frozen, tuned):
            assert row["date"][:2] == "20" and row["device"] and row["versions"]["torch"] == str(torch.__version__)
            assert row["command"].startswith("main_train.py --") and "--fine-tune 1" in row["command"]
            assert row["features"]["cached"] is cached and row["features"]["computed"] == (0 if cached else 60)
            assert row["recipe"]["batch_size"] == (32 if row["fine_tuned"] else 512)
        assert frozen["precision"]["features"] == "bf16"
        assert tuned["precision"] == {"features": "fp32", "training": "fp32"}


def test_class_weights_and_unequal_classes(run, photos, tmp_path):
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
    [plain] = results(tmp_path)
    assert f"{plain['macro']['f1']:.3f}" in row and f"{min(plain['per_class']['recall']):.2%}" in row
    code, out, err = run(main_train, *command, "--class-weights", "--output", "weighted")
    [weighted] = results(tmp_path / "weighted")
    assert (code, err) == (0, "") and weighted["recipe"]["class_weights"] and not plain["recipe"]["class_weights"]
    plain, weighted = ([epoch["train_loss"] for epoch in row["history"]] for row in (plain, weighted))
    assert plain != weighted
