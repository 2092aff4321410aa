"""Training, from images to answers."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, THREE, draw, finish, repeatable, results, share_right, start

import inference
import main_train
from models import load_checkpoint


def test_three_models_are_trained_and_compared(training):
    """Rows, plots and files of the run that the other tests copy."""
    assert (training / "code").read_text() == "0" and (training / "err").read_text() == ""
    output, rows = training / "my runs [v2]", repeatable(training / "my runs [v2]")
    assert list(rows) == list(THREE) and all(name in (training / "out").read_text() for name in rows)
    for row in rows.values():
        assert row["test_interval"][0] <= row["test_accuracy"] <= row["test_interval"][1]
        assert sum(count for *_, count in row["confusion"]) == row["test_images"] == 18
        right = sum(count for true, taken, count in row["confusion"] if true == taken)
        assert right / 18 == pytest.approx(row["test_accuracy"])
        assert len(row["accuracy_by_seed"]["test"]) == 2
    assert rows["mobilenet_v2"]["test_accuracy"] > 0.6  # three colours, told apart even by random features
    kinds, drawn = ("", "_confusion", "_reliability"), {file.stem for file in (output / "plots").glob("*.png")}
    plots = {f"{plot}{kind}" for plot in ("mobilenet", "mobilenet_large", "mobilenet_small") for kind in kinds}
    assert {name for name in drawn if not name.endswith("_mistakes")} == {"comparison", *plots}  # mistakes: if any
    assert {path.name for path in output.iterdir()} == {"checkpoints", "plots"} and not [*(training / "cwd").iterdir()]
    *_, last = (training / "out").read_text().splitlines()
    words = shlex.split(last.partition("next: python ")[2])
    assert words[:2] + words[3:] == ["inference.py", "--checkpoint", "IMAGE..."] and load_checkpoint(words[2])


def test_inference_agrees_with_the_results(answers, compared, photos):
    rows, records = repeatable(compared), answers(photos / "test")
    rows["ensemble"] = json.loads((compared / "plots" / "results.json").read_text())["ensemble"]
    for name, row in rows.items():
        its = [one for record in records for one in (record, *record["models"]) if one["model"] == name]
        assert len(its) == 18 and share_right(its) == pytest.approx(row["test_accuracy"])
    assert len(answers(photos / "test", "--no-ensemble")) == 3 * 18
    one = "checkpoints/mobilenet_v2.pt"
    records = answers(photos / "test", "--checkpoint", one, "checkpoints/*v2.pt")
    assert {record["model"] for record in records} == {"mobilenet_v2"}  # no ensemble of a model with itself


def test_inference_alone_shows_a_sample_of_the_test_images(run, compared):
    code, out, _ = run(inference)
    assert code == 0 and (compared / "plots" / "predictions.png").exists() and len(out.splitlines()) == 12 + 1
    assert out.splitlines()[-1] == f"{out.count(' - right')} of 12 right"


def test_evaluation_agrees_with_the_results(run, compared, photos):
    (photos / "test" / "blue").rename(compared / "elsewhere")
    (photos / "test" / "blue").symlink_to(compared / "elsewhere")  # which training reads, too
    code, out, err = run(inference, photos / "test", "--evaluate", "--output", "judged")
    assert (code, err) == (0, "") and "blue" in out
    for name, row in repeatable(compared).items():
        assert f"\n{name}: {row['test_accuracy']:.2%} of 18 images right" in out
        wrong = list(csv.DictReader((compared / "judged" / f"{name}_wrong.csv").read_text().splitlines()))
        assert len(wrong) == round(18 * (1 - row["test_accuracy"])) and all(w["true"] != w["label"] for w in wrong)
        assert (compared / "judged" / f"{name}_confusion.png").exists()
    one = "checkpoints/mobilenet_v2.pt"
    other = shutil.copy(one, compared)
    assert run(inference, photos / "test", "--evaluate", "--checkpoint", one, other)[0] == 2  # the records would mix
    assert f"order: {one}, {other}\n" in run(inference, photos / "test" / "red", "--checkpoint", one, other)[2]


@pytest.mark.parametrize("broken", [True, False])  # or not there
def test_a_class_without_a_test_image(train, known, photos, broken):
    """Images that cannot be read are named and left out."""
    for image in (photos / "train" / "red" / "3.png", *(photos / "test" / "red").iterdir()):
        image.write_bytes(b"oops" if image.stem != "2" else b"") if broken else image.unlink()
    code, out, err = train(photos)
    assert code == broken and "no test image of 'red'" in out
    assert ("red/3.png" in err) == ("red/2.png" in err) == ("7 images" in err) == broken
    [row] = results(known)
    assert row["train_images"] + row["val_images"] == 59 and row["test_images"] == 12
    shown = [recall for recall in row["per_class"]["recall"] if recall is not None]
    assert len(shown) == 2 and f"{min(shown):.2%}" in out and f"{row['macro']['f1']:.3f}" in out
    code, _, err = train(photos, "--image-size", 64)  # nothing is trained: it would replace a model
    assert code == 2 and ("red/3.png" in err) == broken


def test_a_class_without_a_readable_training_image(train, photos):
    for image in (photos / "train" / "red").iterdir():
        image.write_bytes(b"oops")
    code, _, err = train(photos)
    assert code == 2 and "no training image of 'red'" in err and "0.png: not an image" in err


def test_cifar10_without_a_network(run, tmp_path):
    code, _, err = run(main_train, *SMALL)
    assert code == 2 and "cifar-10-python.tar.gz" in err and "--data" in err and "--demo" in err
    assert err.count("\n") == 1 and list((tmp_path / "data").glob("*cifar*")) == []


def test_a_failing_plot_costs_no_result(train, known, photos):
    for name in ("mobilenet_small.png", "comparison.png"):  # there are folders in their places
        (known / "plots" / name / "x").mkdir(parents=True)
    code, out, err = train(photos)
    assert code == 1 and err.count("error:") == err.count("\n") and "mobilenet_v3_small" in out
    assert "mobilenet_small.png" in err and "comparison.png" in err
    assert load_checkpoint(known / "checkpoints" / "mobilenet_v3_small.pt").predict(photos / "test/red/0.png")
    assert results(known)[0]["test_accuracy"] >= 0


BROKEN = {  # what the error speaks of, and what has happened
    "nowhere": lambda photos: photos.rename(photos.with_name("elsewhere")),
    "train/<class>/": lambda photos: shutil.rmtree(photos / "train"),
    "too few": lambda photos: [image.unlink() for image in photos.glob("train/*/*.png") if image.stem != "0"],
}


@pytest.mark.parametrize("expected", BROKEN)
def test_a_folder_that_is_no_data_set(train, photos, expected):
    BROKEN[expected](folder := photos.rename(photos.with_name("nowhere")))
    code, _, err = train(folder)
    assert code == 2 and err.startswith("error: ") and expected in err


@pytest.mark.parametrize("how", ["two images in all", "all the same", "noise"])
def test_uninformative_images_give_finite_results(run, train, photos, how):
    for label, name in enumerate(("blue", "green", "red")):
        for i, image in enumerate(sorted((photos / "train" / name).iterdir())):
            if how == "two images in all" and i > 1:
                image.unlink()
            elif how == "all the same":
                shutil.copy(photos / "test" / "red" / "0.png", image)
            elif how == "noise":
                draw(image, (90, 90, 90), seed=100 * label + i)
    code, out, err = train(photos)
    assert (code, err) == (0, "") and "nan" not in out
    assert run(inference, photos / "test")[0] == 0


def test_own_images_get_an_output_folder_of_their_own(photos):
    for part in ("", "/"):
        assert main_train.parse_args(["--data", f"{photos}{part}"]).output == Path("runs/photos")


def test_the_demo(tmp_path):
    code, out, err = finish(start(ROOT / "main_train.py", "--demo", *SMALL, cwd=tmp_path))
    assert (code, err) == (0, "") and "not the models" in out
    assert int(re.search(r"(\d+) test images? ha(s|ve) near-duplicates", out)[1]) < 4  # few of 200 shapes look the same
    assert all(row["test_accuracy"] > 0.5 for row in repeatable(tmp_path / "demo").values())  # by chance a third
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    files = (tmp_path / "demo" / "checkpoints").glob("*.pt")
    reader = start(ROOT / "inference.py", "--checkpoint", *files, cwd=tmp_path)
    reader.stdout.readline()
    reader.stdout.close()  # as in `inference.py | head -1`
    err = reader.stderr.read()
    assert reader.wait() == 0 and "Traceback" not in err


# large images only, no last linear layer, auxiliary classifiers, no sequence of layers
UNLIKE = ["alexnet", "squeezenet1_1", "googlenet", "shufflenet_v2_x0_5"]


def test_unlike_backbones_run_in_the_demo(run, tmp_path):
    size = ("--image-size", 32, "--views", 1)
    code, out, err = run(main_train, "--demo", "--limit", 8, "--epochs", 1, *size, "--models", *UNLIKE)
    assert (code, err) == (0, "") and "alexnet does not accept 32-pixel images" in out and "using 224\n" in out
    assert [row["model"] for row in results(tmp_path / "demo")] == UNLIKE
    code, out, err = run(inference, "--checkpoint", *(tmp_path / "demo" / "checkpoints").glob("*.pt"))
    assert code == 0 and out.splitlines()[-1].endswith(f"of {len(out.splitlines()) - 1} right")


def test_a_killed_run_ends_with_the_same_weights():
    """One of the moments that benchmarks/kill.py can try."""
    code, out, err = finish(start(ROOT / "benchmarks" / "kill.py", "--points", 1, cwd=ROOT))
    assert code == 0 and "the same weights and results" in out, err
