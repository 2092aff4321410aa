"""What is compared, is compared on the same images; nothing is replaced without a word."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICK, SMALL, THREE, checkpoints, draw, repeatable, same
from PIL import Image, ImageOps

import main_train
from models import load_checkpoint, save_checkpoint


@pytest.mark.parametrize("damaged", [False, True])
def test_an_old_or_a_damaged_checkpoint_is_replaced(run, trained, photos, damaged):
    file = trained / "checkpoints" / "mobilenet_v3_small.pt"
    torch.save(torch.load(file, weights_only=True) | {"schema": 1}, file)
    file.write_bytes(file.read_bytes()[: 999 if damaged else None])
    code, out, _ = run(main_train, "--data", photos, *SMALL, *QUICK)
    said = "cannot be read" if damaged else "mobilenet_v3_small.pt, trained on 48 images"
    assert code == 0 and said in out and "will be replaced" in out and load_checkpoint(file)


def fewer(photos: Path) -> None:
    for i in range(3):
        (photos / "train" / "red" / f"{i}.png").unlink()


def another(photos: Path) -> None:
    draw(photos / "train" / "red" / "0.png", (200, 50, 40), seed=9, size=(30, 30))


@pytest.mark.parametrize("change", [fewer, another])
def test_a_data_set_may_change_at_its_place(run, trained, photos, change):
    """As when its label errors are deleted."""
    move_data(trained / "checkpoints" / "mobilenet_v3_small.pt", photos)
    change(photos)
    code, out, _ = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 0 and "on other images at the same place" in out


def test_models_of_images_that_changed_but_not_in_size_are_not_compared(run, photos, tmp_path):
    """As when bitmaps are written anew: their names and their sizes stay."""
    for image in [*photos.rglob("*.png")]:
        Image.open(image).save(image.with_suffix(".bmp"))
        image.unlink()
    for part in ("val", "test"):
        shutil.copytree(photos / "train", photos / part, dirs_exist_ok=True)
    split = ("--data", photos, *SMALL, *QUICK)
    assert run(main_train, *split)[0] == 0
    for image in photos.rglob("test/*/*.bmp"):
        ImageOps.invert(Image.open(image)).save(image)
    code, out, _ = run(main_train, *split, "--models", "mobilenet_v3_large")
    assert code == 0 and "difference" not in out and len([*(tmp_path / "checkpoints").glob("split-*.json")]) == 2


def move_data(file: Path, photos: Path) -> None:
    """Makes a checkpoint of the shared training one of a training on `photos`."""
    model = load_checkpoint(file)
    save_checkpoint(file, model, {**model.origin, "data": str(photos)})


def much_less(photos: Path) -> None:
    for image in [*photos.glob("train/*/1*.png"), *photos.glob("train/*/[2-5].png")]:
        image.unlink()


def other_class(photos: Path) -> None:
    for part in ("train", "test"):
        (photos / part / "red").rename(photos / part / "cat")


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (much_less, []),
        (other_class, []),
        (fewer, ["--limit", 40]),
        (lambda photos: None, ["--limit", 30]),
        (lambda photos: None, ["--image-size", 48]),
    ],
)
def test_a_model_of_more_or_other_images_is_not_replaced(run, trained, photos, change, options):
    move_data(trained / "checkpoints" / "mobilenet_v3_small.pt", photos)
    change(photos)
    before, state = repeatable(trained), checkpoints(trained)
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK, *options)
    assert code == 2 and err.count("\n") == 1
    assert "checkpoints/mobilenet_v3_small.pt was trained on 48 images of 3 classes at 32 pixels" in err
    assert repeatable(trained) == before and same(checkpoints(trained), state)


def test_a_model_of_another_place_is_not_replaced(run, trained, photos):
    another(photos)
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 2 and "of other data" in err


def test_a_copy_of_the_images_is_the_same_data_set(run, compared, photos):
    """Rows of other models stay, and are compared, in whatever order they were trained."""
    code, out, _ = run(main_train, "--data", f"{photos}/", *SMALL, *QUICK, "--epochs", 1)
    rows = repeatable(compared)
    assert code == 0 and "mobilenet_v2" in out and list(rows) == list(THREE)
    assert [len(row["history"]) for row in rows.values()] == [3, 3, 1]


def test_models_of_other_images_are_not_compared(run, known, compared, photos):
    code, out, _ = run(main_train, "--data", photos, "--models", "efficientnet_b0", *QUICK, "--limit", 30)
    assert code == 0 and "mobilenet_v2" not in out and list(repeatable(compared)) == [*THREE, "efficientnet_b0"]
