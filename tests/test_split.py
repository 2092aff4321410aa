"""Which images are in which part: what belongs together stays together, and a split stays as it is."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import draw, results
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

import inference
from data import load_data, load_split, trained_on


def test_the_split_outlives_a_change_of_the_folder(run, train, photos, tmp_path):
    for part in photos.iterdir():
        for image in part.rglob("*.png"):
            target = tmp_path / "pets" / image.parent.name / f"{part.name}_{image.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            image.rename(target)
    pets = tmp_path / "pets"
    assert train(pets)[0] == 0
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


def test_the_given_validation_images_may_be_the_test_images(train, known, photos):
    """As in public data sets that have train/ and val/ only, for which others report the accuracy on val/."""
    with pytest.raises(ValueError, match="without test images"):
        load_data(str(photos), test_split="val")
    (photos / "test").rename(photos / "val")
    data = load_data(str(photos))
    assert any("--test-split val" in note for note in data.notes)
    assert (
        {name.split("/")[0] for name in data.val.names} == {"val"} != {name.split("/")[0] for name in data.test.names}
    )
    assert train(photos, "--test-split", "val")[0] == 0
    [row] = results(known)
    split = json.loads((known / "checkpoints" / f"split-{row['split']}.json").read_text())
    assert len(split["test"]) == 18 and all(name.startswith("val/") for name in split["test"])
    assert not any(name.startswith("val/") for other in ("train", "val") for name in split[other])


def folder_of(path: Path, names: Iterable[str], size: tuple[int, int] = (16, 16)) -> Path:
    """Images of noise, each of its own."""
    for seed, name in enumerate(names):
        draw(path / name, (128, 128, 128), seed, size)
    return path


def split_of(folder: Path, **options) -> dict[str, set[str]]:
    data = load_data(str(folder), folder.parent / "cache", **options)
    return {part: set(images.names) for part, images in data.parts.items()}


def test_an_image_more_moves_at_most_one_other(tmp_path):
    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(60)]
    folder = folder_of(tmp_path / "pets", names)
    before = split_of(folder)
    assert [len(part) for part in before.values()] == [76, 20, 24]
    for seed in range(1000, 1010):
        draw(folder / "cat" / "new.png", (128, 128, 128), seed)
        after = split_of(folder)
        assert sum(name not in after[part] for part, each in before.items() for name in each) <= 1
    (folder / "cat" / "7.png").rename(folder / "cat" / "renamed.png")
    moved = {name.replace("renamed", "7") for name in split_of(folder)["test"]} ^ after["test"]
    assert not moved


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_classes_keep_their_shares(tmp_path, seed):
    """Of random groups, which may have several classes, about as well as scikit-learn, which tries more splits."""
    random = np.random.default_rng(seed)
    groups = [f"g{number}_" for number, size in enumerate(random.integers(1, 9, 40)) for _ in range(size)]
    labels = [random.choice(["a", "b", "c"], p=[0.5, 0.3, 0.2]) for _ in groups]
    names = [f"{label}/{group}{i}.png" for i, (label, group) in enumerate(zip(labels, groups, strict=True))]
    split = split_of(folder_of(tmp_path / "set", names, (8, 8)), groups="g[0-9]+", seed=seed)
    assert sum(map(len, split.values())) == len(names)
    parts = [{name.split("/")[1].split("_")[0] for name in part} for part in split.values()]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]

    def deviation(tested: set[str]) -> float:
        return max(abs(sum(n[0] == c for n in tested) / labels.count(c) - 0.2) for c in "abc")

    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(names, labels, groups)
    theirs = [deviation({names[i] for i in test}) for _, test in folds]
    assert deviation(split["test"]) <= max(np.median(theirs), 0.05)


def test_groups_by_name(run, train, tmp_path):
    names = [f"{name}/{name}{film}_{i}.png" for name in ("cat", "dog") for film in range(6) for i in range(5)]
    folder = folder_of(tmp_path / "films", names)
    code, out, _ = train(folder, "--groups", "([a-z]+[0-9])_")
    assert code == 0 and "12 groups" in out and " 2 groups" in out
    [row] = results(tmp_path)
    stored = json.loads((tmp_path / "checkpoints" / f"split-{row['split']}.json").read_text())
    assert {*stored["groups"]["test"]}.isdisjoint(stored["groups"]["train"] + stored["groups"]["val"])
    assert len(row["test_groups"]) == row["test_images"] == 10 and len({*row["test_groups"]}) == 2
    low, high = row["test_interval"]
    assert high - low > 0.7  # two groups say little
    judged = folder_of(tmp_path / "judged", [next(iter(stored["train"]))])  # another frame of a film
    code, out, err = run(inference, judged, "--evaluate")
    assert code == 0 and "1 of 1 image, or others of their groups" in err
    shutil.rmtree(judged)
    for name in stored["test"]:
        (judged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, judged / name)
    code, out, err = run(inference, judged, "--evaluate")
    assert code == 0 and f"95% interval {low:.1%}-{high:.1%}" in out and "training" not in err
    for pattern, message in (("film", "matches"), ("^[a-z]+", "one group"), ("(", "regular expression")):
        code, _, err = train(folder, "--groups", pattern, "--output", "other")
        assert code == 2 and message in err


def test_identical_and_similar_images_stay_together(tmp_path):
    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(40)]
    folder, random = folder_of(tmp_path / "pets", names, (48, 48)), np.random.default_rng(0)
    for i in range(20):
        pixels = np.asarray(Image.open(folder / "cat" / f"{i}.png").resize((12, 12)).resize((96, 96)), float)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "cat" / f"{i}.png")
        noisy = Image.fromarray((pixels + random.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))
        noisy.save(folder / "cat" / f"copy{i}.jpg")
        shutil.copy(folder / "dog" / f"{i}.png", folder / "dog" / f"copy{i}.png")
    data = load_data(str(folder), tmp_path / "cache")
    stems = [{name.replace("copy", "").split(".")[0] for name in part.names} for part in data.parts.values()]
    assert not stems[0] & stems[1] | stems[0] & stems[2] | stems[1] & stems[2]
    assert len(data.similar[0]) >= 40
    shutil.move(folder, tmp_path / "train")
    (tmp_path / "given").mkdir()
    shutil.move(tmp_path / "train", tmp_path / "given" / "train")
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / "given" / "test" / name).parent.mkdir(parents=True)
        shutil.copy(tmp_path / "given" / "train" / name, tmp_path / "given" / "test" / name)
    assert any("2 identical" in note for note in load_data(str(tmp_path / "given"), tmp_path / "cache").notes)


@pytest.mark.parametrize(
    "copy",
    [
        *("{}_aug1.png", "{}-rotated-90.png", "{}_rot_-90.png", "flipped_{}.png", "{}.jpg"),
        *("{} copy.png", "{} - Copy (2).png", "{}_png.rf.aa.jpg"),
    ],
)
def test_copies_that_are_named_so_stay_together(tmp_path, copy):
    """They look quite different, as after strong augmentation."""
    original, first = ("{}_png.rf.ff.jpg", ord("A")) if ".rf." in copy else ("{}.png", 100)
    stems = [chr(first + i) if first < 100 else first + i for i in range(15)]  # Roboflow's may have no digit
    names = [f"{c}/{each.format(stem)}" for c in ("cat", "dog") for stem in stems for each in (original, copy)]
    data = load_data(str(folder_of(tmp_path / "pets", names)), tmp_path / "cache")
    sides = [{name[:3] + re.search(r"1\d\d|[A-O]", name)[0] for name in part.names} for part in data.parts.values()]
    assert sum(map(len, sides)) == 30 and all(sides)


@pytest.mark.parametrize(("name", "count"), [("covid19_resized_{:04}", 24), ("img ({})", 9), ("images ({})", 9)])
def test_many_names_with_one_beginning_are_no_copies(tmp_path, name, count):
    names = [f"{label}/{name.format(i)}.png" for label in ("cat", "dog") for i in range(count)]
    names += [f"{label}/images.png" for label in ("cat", "dog")]  # the first download of a browser
    data = load_data(str(folder_of(tmp_path / "pets", names)), tmp_path / "cache")
    assert data.identity["test_groups"] is None and "near-duplicates" not in "\n".join(data.notes)


def test_numbers_instead_of_extensions_are_no_copies(tmp_path):
    folder = folder_of(tmp_path / "pets", [f"{name}/scan.{i:03}.png" for name in ("cat", "dog") for i in range(20)])
    for image in folder.rglob("*.png"):
        image.rename(image.with_suffix(""))
    data = load_data(str(folder), tmp_path / "cache")
    assert data.identity["test_groups"] is None and "near-duplicates" not in "\n".join(data.notes)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("{0}/patient{0}{1}/{2}.png", True),
        ("{0}/film{1}_{2}.png", True),
        ("{0}/film{1}_{2}.jp2", True),
        ("{0}/{2}{1}.jp2", False),
        ("{0}/{1}{2}_left.png {0}/{1}{2}_right.png", True),
        ("{0}/slide{1}_x{2}_y9.png", True),
        ("{0}/patient{0}{1}/study1/{2}_front.png", True),
        ("{0}/{1}{2}_png.rf.aa.png {0}/{1}{2}_png.rf.bb.png", False),  # copies, which stay together anyway
        ("{0}/{2}{1}.png", False),
        ("{0}12/{0}12_{1}{2}.png", False),
    ],
)
def test_names_in_series_are_told(tmp_path, pattern, told):
    names = [pattern.format(name, i, k) for name in ("cat", "dog") for i in range(6) for k in range(4)]
    folder = folder_of(tmp_path / "pets", " ".join(names).split())
    notes = "\n".join(load_data(str(folder), tmp_path / "cache").notes)
    assert told == ("begin alike" in notes)
    if told:
        advised = re.search("--groups '(.*)'", notes)[1]
        data = load_data(str(folder), tmp_path / "cache", groups=advised)
        assert any(note.startswith(("6 groups", "12 groups", "24 groups")) for note in data.notes)


def test_two_files_of_one_hash_are_refused(train, tmp_path, monkeypatch):
    """Whatever makes a hash of different files the same."""

    class Same:
        def __init__(self, *args, digest_size):
            self.size = digest_size

        def update(self, content):
            pass

        def digest(self):
            return bytes(self.size)

        def hexdigest(self):
            return self.digest().hex()

    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)]
    folder = folder_of(tmp_path / "pets", names)
    monkeypatch.setattr(hashlib, "blake2b", Same)
    code, _, err = train(folder)
    assert code == 2 and "0.png" in err and "1.png" in err and err.count("\n") == 1


def test_limit_keeps_the_natural_shares_of_test_images(tmp_path):
    names = [f"{name}/{i}.png" for name, count in (("cat", 100), ("dog", 10)) for i in range(count)]
    data = load_data(str(folder_of(tmp_path / "pets", names, (8, 8))), tmp_path / "cache", limit=16)
    assert data.test.labels.bincount().tolist() == [4, 1]  # there are 20 and 2
    assert (data.train.labels.bincount() + data.val.labels.bincount()).tolist() == [8, 8]


def test_evaluated_images_of_groups_in_training_are_told(tmp_path):
    names = [f"{name}/p{patient}_{i}.png" for name in ("cat", "dog") for patient in range(10) for i in range(2)]
    data = load_data(str(folder_of(tmp_path / "pets", names)), tmp_path / "cache", groups="p[0-9]")
    files = [tmp_path / f"split-{i}.json" for i in range(4)]
    for file in files[:2]:
        data.save_split(file)
    tested, [known, *_] = data.test, data.train.groups
    assert trained_on(files[:1], tested) == []
    tested.groups = [known, *tested.groups[1:]]  # as a table may say
    [remark] = trained_on(files[:2], tested)
    assert f"1 of {len(tested)} images" in remark and "group" in remark
    stored = json.loads(files[0].read_text())
    stored["groups"]["train"][0] = tested.ids[0]  # the name of a group of near-duplicates
    files[0].write_text(json.dumps(stored))
    tested.groups = None
    assert trained_on(files[:1], tested) == []
    [missing] = trained_on(files[2:], tested)  # two models without the file
    assert str(tmp_path) in missing and "not known" in missing
