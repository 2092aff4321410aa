"""The rows of results.json."""

import pytest
import torch
from conftest import results, share_right

from models import load_checkpoint


def test_a_row_and_a_checkpoint_say_how_they_were_made(train, answers, known, photos, fine_tuning_helps):
    assert train(photos, "--fine-tune", 1, "--precision", "bf16", "--device", "cpu")[0] == 0
    frozen, tuned = results(known)
    for row in (frozen, tuned):
        assert row["date"][:2] == "20" and row["device"] and row["versions"]["torch"] == str(torch.__version__)
        assert row["command"].startswith("main_train.py --") and "--fine-tune 1" in row["command"]
        assert row["features"] == {"computed": 60, "cached": False}  # those that are known are fp32
        assert row["recipe"]["batch_size"] == (32 if row["fine_tuned"] else 512)
    assert frozen["precision"]["features"] == "bf16"
    assert tuned["precision"] == {"features": "fp32", "training": "fp32"}

    file = known / "checkpoints" / "mobilenet_v3_small.pt"  # answers in the precision of its training
    records, fp32 = (answers(photos / "test", "--checkpoint", file, *more) for more in ((), ("--precision", "fp32")))
    assert share_right(records) == pytest.approx(frozen["test_accuracy"])
    assert [record["probability"] for record in records] != [record["probability"] for record in fp32]
    assert load_checkpoint(file).precision == "bf16"


def test_class_weights_and_unequal_classes(train, known, photos, tmp_path):
    """Each class of 20, 4 and 1 images for training counts the same with --class-weights."""
    for name, count in (("green", 4), ("red", 1)):
        for image in sorted((photos / "train" / name).iterdir())[count:]:
            image.unlink()
    for image in sorted((photos / "test" / "red").iterdir())[1:]:
        image.unlink()
    code, out, err = train(photos)
    assert (code, err) == (0, "") and "macro F1" in out and "no validation image of 'red'" in out
    [plain] = results(tmp_path)
    code, out, err = train(photos, "--class-weights", "--output", "weighted")
    [weighted] = results(tmp_path / "weighted")
    assert (code, err) == (0, "") and weighted["recipe"]["class_weights"] and not plain["recipe"]["class_weights"]
    plain, weighted = ([epoch["train_loss"] for epoch in row["history"]] for row in (plain, weighted))
    assert plain != weighted
