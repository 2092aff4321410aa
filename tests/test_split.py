"""The split of a run is stored, and used by whoever asks later which images were in which part."""

import json
from pathlib import Path

from conftest import QUICK, SMALL, draw, results

import inference
import main_train
from data import load_split


def test_the_split_outlives_a_change_of_the_folder(run, photos, tmp_path):
    for part in photos.iterdir():
        for image in part.rglob("*.png"):
            target = tmp_path / "pets" / image.parent.name / f"{part.name}_{image.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            image.rename(target)
    pets = tmp_path / "pets"
    assert run(main_train, "--data", pets, *SMALL, *QUICK)[0] == 0
    [row] = results(tmp_path)
    file = tmp_path / "checkpoints" / f"split-{row['split']}.json"
    tested = json.loads(file.read_text())["test"]
    assert len(tested) == row["test_images"]

    draw(pets / "blue" / "a new one.png", (1, 2, 3), seed=9)
    gone, changed = list(tested)[:2]
    (pets / gone).unlink()
    draw(pets / changed, (1, 2, 3), seed=8)
    data = load_split(str(pets), tmp_path, file)
    assert set(data.test.names) == set(tested) - {gone}
    code, out, err = run(inference, "--explain", "why.png")
    shown = [line.split(": ")[0] for line in out.splitlines()[:-1]]
    assert code == 0 and len(shown) == 12 and {str(Path(path).relative_to(pets)) for path in shown} <= set(tested)
    for note in ("1 of 15 test images of the run are gone", "1 of 15 test images have changed since the run"):
        assert err.count(note) == 1
    file.unlink()
    code, _, err = run(inference)
    assert code == 2 and file.name in err and err.count("\n") == 1


def test_explanations_show_training_images_only(run, photos, tmp_path, replace):
    shown = []
    read = replace(
        "read_for_plot",
        lambda captioned, *args: (shown.extend(captioned := list(captioned)), read(captioned, *args))[1],
    )
    assert run(main_train, "--data", photos, *SMALL, *QUICK, "--limit", 30)[0] == 0
    shown.clear()
    code, _, _ = run(inference, photos / "test" / "red" / "0.png", "--explain", "why.png")
    [row] = results(tmp_path)
    trained = json.loads((tmp_path / "checkpoints" / f"split-{row['split']}.json").read_text())["train"]
    paths = {str(item.relative_to(photos)) for item, _ in shown if isinstance(item, Path) and "train" in item.parts}
    assert code == 0 and len(paths) == 5 and paths <= set(trained)


def test_the_given_validation_images_may_be_the_test_images(run, photos, tmp_path):
    """As in public data sets that have train/ and val/ only, for which others report the accuracy on val/."""
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK, "--test-split", "val")
    assert code == 2 and "without test images" in err and err.count("\n") == 1
    (photos / "test").rename(photos / "val")
    code, out, _ = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 0 and "--test-split val" in out
    assert run(main_train, "--data", photos, *SMALL, *QUICK, "--test-split", "val", "--output", "other")[0] == 0
    for folder, part in ((tmp_path, "val"), (tmp_path / "other", "test")):
        [row] = results(folder)
        split = json.loads((folder / "checkpoints" / f"split-{row['split']}.json").read_text())
        assert len(split[part]) == 18 and all(name.startswith("val/") for name in split[part])
        assert not any(name.startswith("val/") for other in split.keys() - {part} for name in split[other])
