import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from data import ImageError, find_images, load_data, map_batches, preprocess, read_image

NORMAL = {"image_size": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CPU = torch.device("cpu")


def pixel(path) -> list[int]:
    return read_image(path).float().mean(dim=(1, 2)).round().int().tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 16, 3), dtype=np.uint8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a viewer's own one takes back
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "picture.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "picture.png"), torch.from_numpy(np.array(upright)).permute(2, 0, 1))


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    half = Image.new("L", (8, 8), 128)
    half.save(tmp_path / "grey.png")
    half.convert("1").save(tmp_path / "one_bit.png")
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "16_bit.png")
    Image.new("RGB", (8, 8), (200, 100, 50)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("RGB", (8, 8), (200, 100, 50)).quantize().save(tmp_path / "palette.gif")
    Image.new("RGBA", (8, 8), (200, 100, 50, 0)).save(tmp_path / "transparent.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey_transparent.png")
    Image.new("P", (8, 8), 0).save(tmp_path / "palette_transparent.png", transparency=0)
    assert pixel(tmp_path / "grey.png") == [128] * 3
    assert pixel(tmp_path / "16_bit.png") == [128] * 3
    assert np.allclose(pixel(tmp_path / "cmyk.jpg"), [200, 100, 50], atol=6)
    assert np.allclose(pixel(tmp_path / "palette.gif"), [200, 100, 50], atol=1)
    for name in ("transparent", "grey_transparent", "palette_transparent"):
        assert pixel(tmp_path / f"{name}.png") == [255] * 3
    assert read_image(tmp_path / "one_bit.png").shape == (3, 8, 8)


def test_preprocess_resizes_and_normalises_as_torchvision_does(tmp_path):
    draw(tmp_path / "small.png", (90, 120, 30), seed=0, size=(24, 17))
    draw(tmp_path / "large.png", (90, 120, 30), seed=1, size=(300, 150))
    torchvisions = v2.Compose([
        v2.Resize((64, 64)), v2.ToDtype(torch.float32, scale=True), v2.Normalize(NORMAL["mean"], NORMAL["std"])
    ])  # fmt: skip
    images = [read_image(tmp_path / "small.png", 64), read_image(tmp_path / "large.png", 64)]
    ours = preprocess(images, **NORMAL)
    for row, name in zip(ours, ("small", "large"), strict=True):
        expected = torchvisions(read_image(tmp_path / f"{name}.png", 1000))
        assert (row - expected).abs().max() < 1.6 / 255 / 0.22  # they round to uint8 in between, and Pillow twice


def test_map_batches_keeps_order_and_names_what_it_cannot_read(tmp_path):
    paths = []
    for i in range(30):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (4, 4), (i, 0, 0)).save(paths[-1])
    paths[7].write_bytes(b"not a picture")
    paths[8].write_bytes(paths[9].read_bytes()[:50])
    paths[20].unlink()
    for size in (1, 3, 64):
        values, broken = [], []
        for items, outputs, errors in map_batches(lambda images: torch.stack(images)[:, 0, 0, 0], paths, CPU, size):
            values += outputs.tolist()
            broken += [str(errors[i]).startswith(str(items[i])) for i in errors]
        assert values == [i for i in range(30) if i not in (7, 8, 20)]
        assert broken == [True] * 3


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"BM", b"II*\0"])
def test_broken_pictures_raise_one_known_error(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.png"):
        read_image(path)


def test_the_split_is_seeded_and_complete(pictures):
    first, again, other = (load_data(str(pictures), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train, again.train) and torch.equal(first.val, again.val)
    assert not torch.equal(first.val, other.val)
    assert sorted(torch.cat([first.train, first.val]).tolist()) == list(range(60))
    assert len(first.val) == 12


def test_a_val_folder_is_the_validation_set(pictures):
    for name in ("blue", "green", "red"):
        draw(pictures / "val" / name / "a.png", (0, 0, 0), seed=5)
    data = load_data(str(pictures))
    assert [data.images.items[i].parent.parent.name for i in data.val] == ["val"] * 3
    assert len(data.train) == 60


def test_limit_is_balanced_and_seeded(pictures):
    data = load_data(str(pictures), limit=9)
    assert data.images.labels.bincount().tolist() == [3, 3, 3]
    assert data.test.labels.bincount().tolist() == [3, 3, 3]
    assert data.images.items == load_data(str(pictures), limit=9).images.items
    with pytest.raises(ValueError, match="--limit"):
        load_data(str(pictures), limit=2)


def test_labels_go_by_name(pictures):
    for picture in (pictures / "test" / "blue").iterdir():
        picture.unlink()
    (pictures / "test" / "blue").rmdir()
    (pictures / "train" / ".ipynb_checkpoints").mkdir()
    draw(pictures / "train" / ".ipynb_checkpoints" / "x.png", (0, 0, 0), seed=0)
    data = load_data(str(pictures))
    assert data.classes == ("blue", "green", "red")
    assert all(
        data.classes[label] == path.parent.name for label, path in zip(data.test.labels, data.test.items, strict=True)
    )


def test_the_fingerprint_follows_the_pictures(pictures):
    before = load_data(str(pictures)).images.fingerprint()
    assert before == load_data(str(pictures)).images.fingerprint()
    draw(pictures / "train" / "red" / "3.png", (1, 2, 3), seed=77)
    assert before != load_data(str(pictures)).images.fingerprint()


def test_find_images_survives_links_that_go_round(pictures):
    (pictures / "train" / "red" / "loop").symlink_to(pictures)
    assert len(list(find_images(pictures))) == 78


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A CIFAR-10 of twelve pictures, packed as the real one is."""

    def member(name, content):
        content = pickle.dumps(content)
        entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
        return [name, hashlib.md5(content).hexdigest()]

    file = tmp_path / "cifar-10-python.tar.gz"
    random = np.random.default_rng(0)
    with tarfile.open(file, "w:gz") as tar:
        parts = [
            member(name, {"data": random.integers(0, 256, (12, 3072), dtype=np.uint8), "labels": [*range(10), 0, 1]})
            for name in ("data_batch_1", "test_batch")
        ]
        meta = member("batches.meta", {"label_names": ["airplane", "automobile"]})
    monkeypatch.setattr(CIFAR10, "train_list", parts[:1])
    monkeypatch.setattr(CIFAR10, "test_list", parts[1:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    return file


def test_cifar10_from_an_archive_put_there_by_hand(archive, tmp_path):
    root, whole = tmp_path / "data", archive.read_bytes()
    root.mkdir()
    for wrong in (b"", whole[:500], b"<html>busy</html>"):
        (root / archive.name).write_bytes(wrong)
        with pytest.raises(OSError, match="not the right file"):
            load_data("cifar10", root)
        assert {path.name for path in root.iterdir()} == {archive.name, ".lock"}
    (root / archive.name).write_bytes(whole)
    data = load_data("cifar10", root)
    assert data.classes[:2] == ("plane", "car") and len(data.images) == len(data.test) == 12
    assert read_image(data.images.items[0]).shape == (3, 32, 32)


def test_a_cifar10_file_with_a_payload_runs_nothing(archive, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / archive.name).write_bytes(archive.read_bytes())
    load_data("cifar10", root)
    (root / archive.name).unlink()
    payload = b"cbuiltins\nopen\n(V" + str(tmp_path / "canary").encode() + b"\nVw\ntR."
    (root / CIFAR10.base_folder / "test_batch").write_bytes(payload)
    with pytest.raises(OSError, match="--demo"):
        load_data("cifar10", root)
    assert not (tmp_path / "canary").exists()
