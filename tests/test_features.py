"""Features are computed once, kept in files, and never stale."""

import shutil
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conftest import QUICK, ROOT, SMALL, checkpoints, draw, finish, limited_files, repeatable, results, same, start

from data import load_data
from engine import features
from engine.features import Features, extract_features
from models import TransferModel

NAME = "mobilenet_v3_small"


def of_small(folder: Path) -> dict:
    return {row["model"]: row for row in results(folder)}[NAME]


def test_a_second_run_is_identical_and_only_reads_the_features(train, trained, photos):
    first, state = repeatable(trained)[NAME], checkpoints(trained)
    seconds = of_small(trained)["seconds"]["features"]
    files = {path: path.stat().st_mtime_ns for path in (trained / "data").rglob("*")}
    assert train(photos, "--seeds", 2)[0] == 0
    assert of_small(trained)["features"] == {"computed": 0, "cached": True}
    assert repeatable(trained)[NAME] | {"data": first["data"]} == first and same(checkpoints(trained), state)
    assert {path: path.stat().st_mtime_ns for path in (trained / "data").rglob("*")} == files
    assert of_small(trained)["seconds"]["features"] == seconds


@pytest.mark.parametrize(("size", "decoder"), [(48, PIL.__version__), (32, "0.1")])
def test_features_belong_to_the_size_and_the_decoder(train, known, photos, monkeypatch, size, decoder):
    """Those of another precision are in test_results.py."""
    monkeypatch.setattr(PIL, "__version__", decoder)
    assert train(photos, "--image-size", size)[0] == 0
    assert of_small(known)["features"] == {"computed": 60, "cached": False}


def test_damaged_features_are_computed_again(train, trained, photos):
    for file in (trained / "data" / "features").glob(f"{NAME}*.features"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    first = repeatable(trained)[NAME]
    code, _, err = train(photos, "--seeds", 2)
    assert code == 0 and err.count("\n") == 1 and "1 images' records are damaged" in err
    assert repeatable(trained)[NAME] | {"data": first["data"]} == first


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_an_interrupted_extraction_resumes(train, compared, photos):
    """A disk that is full in the middle leaves whole records and the beginning of another. The models are the same."""
    [file] = (compared / "data" / "features").glob(f"{NAME}*.features")
    first, state, size = repeatable(compared)[NAME], checkpoints(compared), file.stat().st_size // 78
    shutil.rmtree(compared / "data" / "features")
    with limited_files(30 * size + 100):
        assert train(photos, "--seeds", 2)[0] == 2
    written = file.stat().st_size // size
    assert 10 < written <= 30
    assert train(photos, "--seeds", 2)[0] == 0
    row = of_small(compared)
    assert file.stat().st_size == 78 * size and 60 > row["features"]["computed"] > 0
    assert repeatable(compared)[NAME] | {"data": first["data"]} == first and same(checkpoints(compared), state)
    content, data = file.read_bytes(), load_data(str(photos), compared / "data")
    records = [content[i * size : (i + 1) * size] for i in range(78)]
    seconds = {record[:32].decode(): np.frombuffer(record[32:36], "<f4")[0] for record in records}
    of_both = sum(seconds[image] for image in data.train.ids + data.val.ids)  # in both runs
    assert row["seconds"]["features"] == pytest.approx(of_both) and of_both > 0


def test_only_new_images_are_computed(train, trained, photos):
    """An image that is there again, under whatever name, is known."""
    image = photos / "train" / "red" / "0.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:50])
    assert train(photos, "--output", "one")[0] == 1 and of_small(trained / "one")["features"]["computed"] == 0
    draw(image, (200, 40, 40), seed=99)
    image.with_name("again.png").write_bytes(whole)
    assert train(photos, "--output", "two")[0] == 0
    assert of_small(trained / "two")["features"] == {"computed": 1, "cached": False}


def test_many_images_are_kept_in_half_precision(photos, tmp_path, monkeypatch):
    """Also where fewer were kept in full precision before: those are not computed again."""
    data, model = load_data(str(photos)), TransferModel(NAME, "ab", 32, pretrained=False)

    def extract(images, folder):
        return extract_features(model, {"all": images}, tmp_path / folder, torch.device("cpu"))["all"]

    few, single = data.test.subset(torch.arange(10)), extract(data.test, "single").features
    extract(few, "mixed")
    monkeypatch.setattr(features, "HALF_PRECISION_ABOVE", 17)
    mixed, half = extract(data.test, "mixed"), extract(data.test, "half").features
    rows = torch.arange(18)
    assert mixed.computed == 8 and half[rows].dtype == torch.float16 and single[rows].dtype == torch.float32
    for other in (mixed.features, half):
        assert torch.allclose(other[rows].float(), single[rows], rtol=1e-3, atol=1e-4)
    assert mixed.features[rows[:10]].equal(single[rows[:10]])


def test_two_runs_share_a_cache(photos, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    folders = [tmp_path / "a", tmp_path / "b"]
    command = (ROOT / "main_train.py", "--data", photos, *SMALL, *QUICK, "--output")
    runs = [start(*command, folder, cwd=tmp_path) for folder in folders]
    for code, _, err in map(finish, runs):
        assert code == 0 and {*err.splitlines()} <= {"waiting for another run that uses data/features"}  # for each part
    assert repeatable(folders[0]) == repeatable(folders[1])
    assert same(checkpoints(folders[0]), checkpoints(folders[1]))
    assert len(list((tmp_path / "data" / "features").glob("*.features"))) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_features_of_several_files_are_read_by_place():
    table = torch.randn(10, 3)
    whole = Features.in_memory(table)
    places = torch.tensor([[i % 2, i // 2] for i in range(10)])
    split = Features([table[::2], table[1::2]], places)
    chosen = torch.tensor([7, 0, 3, 3])
    assert len(split) == len(whole) == 10 and split.width == whole.width == 3
    assert split[chosen].equal(table[chosen]) and whole[chosen].equal(table[chosen])
    assert torch.cat([*split.blocks()]).equal(table)
