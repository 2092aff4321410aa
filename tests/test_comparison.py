"""What is compared, is compared on the same images; nothing is replaced without a word."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import THREE, checkpoints, draw, move_data, repeatable, same
from PIL import Image, ImageOps

from models import load_checkpoint


@pytest.mark.parametrize("damaged", [False, True])  # or of an earlier version
def test_old_or_damaged_files_are_replaced(train, trained, photos, damaged):
    file, rows = trained / "checkpoints" / "mobilenet_v3_small.pt", trained / "plots" / "results.json"
    torch.save(torch.load(file, weights_only=True) | {"schema": 1}, file)
    rows.write_text(rows.read_text().replace('"schema": 4', '"schema": 3'))
    for each in (file, rows) if damaged else ():
        each.write_bytes(each.read_bytes()[:999])
    before = rows.read_text()
    code, out, _ = train(photos)
    assert code == 0 and ("cannot be read" if damaged else "trained on 48 images") in out and load_checkpoint(file)
    assert rows.with_name("results.json.old").read_text() == before and list(repeatable(trained)) == [
        "mobilenet_v3_small"
    ]


def fewer(photos: Path) -> None:
    for i in range(3):
        (photos / "train" / "red" / f"{i}.png").unlink()


def test_a_data_set_may_change_at_its_place(train, trained, photos):
    """As when its label errors are deleted."""
    move_data(trained / "checkpoints" / "mobilenet_v3_small.pt", photos)
    fewer(photos)
    code, out, _ = train(photos)
    assert code == 0 and "on other images at the same place" in out


def test_models_of_images_that_changed_but_not_in_size_are_not_compared(train, photos, tmp_path):
    """As when bitmaps are written anew: their names and their sizes stay."""
    for image in [*photos.rglob("*.png")]:
        Image.open(image).save(image.with_suffix(".bmp"))
        image.unlink()
    for part in ("val", "test"):
        shutil.copytree(photos / "train", photos / part, dirs_exist_ok=True)
    assert train(photos)[0] == 0
    for image in photos.rglob("test/*/*.bmp"):
        ImageOps.invert(Image.open(image)).save(image)
    code, out, _ = train(photos, "--models", "mobilenet_v3_large")
    assert code == 0 and "difference" not in out and len([*(tmp_path / "checkpoints").glob("split-*.json")]) == 2


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
def test_a_model_of_more_or_other_images_is_not_replaced(train, trained, photos, change, options):
    move_data(trained / "checkpoints" / "mobilenet_v3_small.pt", photos)
    change(photos)
    before, state = repeatable(trained), checkpoints(trained)
    code, _, err = train(photos, *options)
    assert code == 2 and err.count("\n") == 1
    assert all(text in err for text in ("checkpoints/mobilenet_v3_small.pt", "48 images", "3 classes", "32 pixels"))
    assert repeatable(trained) == before and same(checkpoints(trained), state)


def test_a_model_of_another_place_is_not_replaced(train, trained, photos):
    draw(photos / "train" / "red" / "0.png", (200, 50, 40), seed=9, size=(30, 30))
    code, _, err = train(photos)
    assert code == 2 and "of other data" in err


def test_a_copy_of_the_images_is_the_same_data_set(train, compared, photos):
    """Rows of other models stay, and are compared, in whatever order they were trained."""
    code, out, _ = train(f"{photos}/", "--epochs", 1)
    rows = repeatable(compared)
    assert code == 0 and "mobilenet_v2" in out and list(rows) == list(THREE)
    assert [len(row["history"]) for row in rows.values()] == [3, 3, 1]


def test_models_of_other_images_are_not_compared(train, compared, photos):
    code, out, _ = train(photos, "--models", "efficientnet_b0", "--limit", 30)
    assert code == 0 and "mobilenet_v2" not in out and list(repeatable(compared)) == [*THREE, "efficientnet_b0"]
