"""What is compared, is compared on the same images; what is missing is named; nothing is replaced without a word."""

from pathlib import Path

import torch
from conftest import QUICK, SMALL, results

import main_train
from engine.metrics import class_scores, classification_metrics


def test_classes_without_test_images_do_not_count():
    labels = torch.tensor([0, 0, 1, 1])
    scores = class_scores(torch.tensor([0, 0, 1, 0]), labels, 4)
    assert scores["per_class"]["recall"] == [1.0, 0.5, None, None] and scores["macro"]["recall"] == 0.75
    logits = torch.nn.functional.one_hot(labels, 4).float()
    assert classification_metrics(logits, labels, 1.0)["macro"]["f1"] == 1


def test_a_class_without_test_images(run, photos):
    for image in (photos / "test" / "red").iterdir():
        image.unlink()
    code, out, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    [row] = results(Path())
    assert (code, err) == (0, "") and "no test image of 'red'" in out  # none was there, so none was unreadable
    shown = [recall for recall in row["per_class"]["recall"] if recall is not None]
    assert len(shown) == 2 and f"{min(shown):.2%}" in out and f"{row['macro']['f1']:.3f}" in out


def test_a_detector_that_fails_is_not_forgotten(run, photos, replace):
    def fail(*args):
        raise RuntimeError("no detector today")

    replace("fit_unfamiliarity", fail)
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 1 and "no detector today" in err


def test_no_checkpoint_is_replaced_without_a_word(run, photos, tmp_path):
    command = ("--data", photos, *SMALL, *QUICK)
    assert run(main_train, *command)[0] == 0
    file = tmp_path / "checkpoints" / "mobilenet_v3_small.pt"
    values = torch.load(file, weights_only=True)
    torch.save({**values, "schema": 1}, file)
    assert "will be replaced" in run(main_train, *command)[1]
    values["origin"] |= {"data": "elsewhere", "content": "other"}
    torch.save({**values, "schema": 1}, file)
    code, _, err = run(main_train, *command)
    assert code == 2 and "of other data" in err
    file.write_bytes(b"oops")
    code, out, _ = run(main_train, *command)
    assert code == 0 and "cannot be read" in out and "will be replaced" in out
    (photos / "train" / "red" / "0.png").unlink()
    (photos / "train" / "red" / "0b.png").write_bytes((photos / "train" / "red" / "1.png").read_bytes())
    code, out, _ = run(main_train, *command)
    assert code == 0 and "on other images at the same place" in out
