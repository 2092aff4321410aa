"""Training, from images to answers."""

import csv
import json
import re
import shutil
import time

import pytest
from conftest import QUICK, ROOT, SMALL, draw, finish, repeatable, results, share_right, start

import inference
import main_train
from models import load_checkpoint


def test_training_evaluation_and_inference_agree(run, answers, plots, photos, tmp_path):
    models = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
    code, out, err = run(main_train, "--data", photos, "--models", *models, *QUICK)
    assert (code, err) == (0, "")
    rows = repeatable(tmp_path)
    assert list(rows) == list(models)
    for name, row in rows.items():
        assert name in out
        assert row["test_interval"][0] <= row["test_accuracy"] <= row["test_interval"][1]
        assert sum(count for *_, count in row["confusion"]) == row["test_images"] == 18
        right = sum(count for true, taken, count in row["confusion"] if true == taken)
        assert right / 18 == pytest.approx(row["test_accuracy"])
    kinds, drawn = ("", "_confusion", "_reliability"), {file.stem for file in (tmp_path / "plots").glob("*.png")}
    plots = {f"{plot}{kind}" for plot in ("mobilenet", "mobilenet_large", "mobilenet_small") for kind in kinds}
    assert {name for name in drawn if not name.endswith("_mistakes")} == {"comparison", *plots}  # mistakes: if any
    assert rows["mobilenet_v2"]["test_accuracy"] > 0.6  # three colours, told apart even by random features

    records = answers(photos / "test")
    rows["ensemble"] = json.loads((tmp_path / "plots" / "results.json").read_text())["ensemble"]
    for name, row in rows.items():
        its = [one for record in records for one in (record, *record["models"]) if one["model"] == name]
        assert len(its) == 18 and share_right(its) == pytest.approx(row["test_accuracy"])
    assert len(answers(photos / "test", "--no-ensemble")) == 3 * 18
    code, out, err = run(inference)
    assert code == 0 and (tmp_path / "plots" / "predictions.png").exists() and len(out.splitlines()) == 12 + 1
    assert out.splitlines()[-1] == f"{out.count(' - right')} of 12 right"

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
    records = answers(photos / "test", "--checkpoint", one, "checkpoints/*v2.pt")
    assert {record["model"] for record in records} == {"mobilenet_v2"}  # no ensemble of a model with itself
    other = shutil.copy(one, tmp_path)
    assert run(inference, photos / "test", "--evaluate", "--checkpoint", one, other)[0] == 2  # the records would mix
    (photos / "test" / "blue").rename(photos / "test" / "violet")
    code, out, err = run(inference, photos / "test", "--evaluate")
    assert code == 2 and "violet" in err


def test_unreadable_images_are_named_and_left_out(run, photos, tmp_path):
    (photos / "train" / "red" / "3.png").write_bytes(b"oops")
    (photos / "test" / "blue" / "2.png").write_bytes(b"")
    for _ in range(2):  # computed, and from the cache
        code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
        assert code == 1 and "red/3.png" in err and "blue/2.png" in err and "2 images" in err
        row = repeatable(tmp_path)["mobilenet_v3_small"]
        assert row["train_images"] + row["val_images"] == 59 and row["test_images"] == 17


def test_a_class_without_a_readable_image(run, photos):
    for image in (photos / "test" / "red").iterdir():
        image.write_bytes(b"oops")
    code, out, _ = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 1 and "no test image of 'red'" in out
    for image in (photos / "train" / "red").iterdir():
        image.write_bytes(b"oops")
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 2 and "no training image of 'red'" in err and "0.png: not an image" in err


def test_the_failure_of_one_model_does_not_end_the_run(run, photos, tmp_path):
    code, _, err = run(main_train, "--data", photos, "--models", "vgg16", "mobilenet_v3_small", *QUICK)
    assert code == 1 and list(repeatable(tmp_path)) == ["mobilenet_v3_small"]
    assert "vgg16-397923af.pth" in err and "checkpoints" in err and "--demo" in err and err.count("error:") == 1
    started = time.monotonic()
    code, _, err = run(main_train, *SMALL)
    assert code == 2 and "cifar-10-python.tar.gz" in err and "--data" in err and "--demo" in err
    assert time.monotonic() - started < 20 and err.count("\n") == 1
    assert list((tmp_path / "data").glob("*cifar*")) == []


def test_a_failing_plot_costs_no_result(run, plots, photos, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("nothing works today")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    code, out, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 1 and err.count("nothing works today (visualization.py, line ") == err.count("\n") == 2
    assert "mobilenet_v3_small" in out and results(tmp_path)[0]["test_accuracy"] >= 0
    assert load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small.pt").predict(photos / "test/red/0.png")


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
    if how == "misspelt class":
        (photos / "test" / "blue").rename(photos / "test" / "bleu")
        return photos, "bleu"
    if how == "too few":
        for image in photos.glob("train/*/*.png"):
            if image.stem != "0":
                image.unlink()
        return photos, "too few"


@pytest.mark.parametrize("how", ["no folder", "no train", "one class", "misspelt class", "too few"])
def test_a_folder_that_is_no_data_set(run, photos, how):
    folder, expected = break_tree(photos, how)
    code, _, err = run(main_train, "--data", folder, *SMALL)
    assert code == 2 and err.startswith("error: ") and expected in err


@pytest.mark.parametrize("how", ["two images in all", "all the same", "noise"])
def test_uninformative_images_give_finite_results(run, plots, photos, how):
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


def test_own_images_get_an_output_folder_of_their_own(run, photos, tmp_path, capsys):
    assert main_train.main(["--data", f"{photos}/", *SMALL, *map(str, QUICK)]) == 0
    out, err = capsys.readouterr()
    assert not err and not (tmp_path / "plots").exists()
    assert (tmp_path / "runs" / "photos" / "checkpoints" / "mobilenet_v3_small.pt").exists()
    *_, last = out.splitlines()
    command = last.split("next: python ")[1].replace("IMAGE...", f"{photos}/test/red/0.png").split()
    code, out, _ = run(inference, *command[1:])
    assert command[0] == "inference.py" and code == 0 and "red" in out


def test_nothing_is_written_outside_of_output_and_cache(run, photos, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK, "--output", "../out", "--cache", "../cache")
    assert (code, err) == (0, "") and sorted(tmp_path.rglob("*")) == before
    assert {path.name for path in (tmp_path.parent / "out").iterdir()} == {"checkpoints", "plots"}


def test_the_demo_and_a_closed_pipe(tmp_path):
    code, out, err = finish(start(ROOT / "main_train.py", "--demo", *SMALL, cwd=tmp_path))
    assert (code, err) == (0, "") and "not the models" in out
    assert int(re.search(r"(\d+) test images? ha(s|ve) near-duplicates", out)[1]) < 4  # few of 200 shapes look the same
    assert all(row["test_accuracy"] > 0.5 for row in repeatable(tmp_path / "demo").values())  # by chance a third
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    files = (tmp_path / "demo" / "checkpoints").glob("*.pt")
    reader = start(ROOT / "inference.py", "--checkpoint", *files, cwd=tmp_path)
    reader.stdout.readline()
    reader.stdout.close()
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
