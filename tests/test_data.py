import errno
import hashlib
import http.server
import io
import pickle
import shutil
import sys
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from data import ImageError, find_images, load_data, locked, preprocess, read_image, run_script

NORMAL = {"image_size": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def pixel(path) -> list[int]:
    return read_image(path).float().mean(dim=(1, 2)).round().int().tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 16, 3), dtype=np.uint8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a viewer's own one takes back
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    assert torch.equal(
        read_image(tmp_path / "image.png", crop=False), torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    )


def test_every_kind_of_image_becomes_rgb(tmp_path):
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
    draw(tmp_path / "small.png", (90, 120, 30), seed=0, size=(24, 18))
    draw(tmp_path / "large.png", (90, 120, 30), seed=1, size=(300, 150))
    torchvisions = v2.Compose([
        v2.Resize((64, 64)), v2.ToDtype(torch.float32, scale=True), v2.Normalize(NORMAL["mean"], NORMAL["std"])
    ])  # fmt: skip
    for crop in (False, True):
        names = ("small", "large")
        ours = preprocess([read_image(tmp_path / f"{name}.png", 64, crop) for name in names], NORMAL)
        whole = [read_image(tmp_path / f"{name}.png", 1000, crop=False) for name in names]
        expected = [v2.functional.center_crop(image, min(image.shape[1:])) if crop else image for image in whole]
        difference = ours - torch.stack([torchvisions(image) for image in expected])
        assert difference.abs().max() < 1.6 / 255 / 0.22  # they round to uint8 in between, and Pillow twice


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"BM", b"II*\0"])
def test_broken_photos_raise_one_known_error(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.png"):
        read_image(path)


def test_the_split_is_seeded_and_complete(photos):
    first, again, other = (load_data(str(photos), seed=seed) for seed in (0, 0, 1))
    assert first.train.items == again.train.items and first.val.items == again.val.items
    assert first.val.items != other.val.items
    assert sorted(first.train.items + first.val.items) == sorted((photos / "train").rglob("*.png"))
    assert len(first.val) == 12


def test_a_val_folder_is_the_validation_set(photos):
    for name in ("blue", "green", "red"):
        draw(photos / "val" / name / "a.png", (0, 0, 0), seed=5)
    data = load_data(str(photos))
    assert [path.parent.parent.name for path in data.val.items] == ["val"] * 3
    assert len(data.train) == 60


@pytest.mark.parametrize("seed", range(20))
def test_every_class_has_images_in_every_part(tmp_path, seed):
    counts = [1, 2, 3, 3, 3, 4, 7, 10]
    for i, count in enumerate(counts):
        for part, images in (("train", count), ("test", 1)):
            for j in range(images):
                draw(tmp_path / part / f"class{i}" / f"{j}.png", (9, 9, 9), seed=j, size=(2, 2))
    data = load_data(str(tmp_path), seed=seed)
    assert data.train.labels.bincount().tolist() == [1, 1, 2, 2, 2, 3, 6, 8]
    assert data.val.labels.bincount().tolist() == [0, 1, 1, 1, 1, 1, 1, 2]


def test_limit_is_balanced_and_seeded_and_in_proportion(photos):
    data = load_data(str(photos), limit=20)
    assert sorted((data.train.labels.bincount() + data.val.labels.bincount()).tolist()) == [6, 7, 7]
    assert data.test.labels.bincount().tolist() == [2, 2, 2]  # a third, too
    assert data.train.items == load_data(str(photos), limit=20).train.items
    with pytest.raises(ValueError, match="--limit"):
        load_data(str(photos), limit=2)


def test_labels_go_by_name(photos):
    for image in (photos / "test" / "blue").iterdir():
        image.unlink()
    (photos / "test" / "blue").rmdir()
    (photos / "train" / ".ipynb_checkpoints").mkdir()
    draw(photos / "train" / ".ipynb_checkpoints" / "x.png", (0, 0, 0), seed=0)
    data = load_data(str(photos))
    assert data.classes == ("blue", "green", "red")
    assert all(
        data.classes[label] == path.parent.name for label, path in zip(data.test.labels, data.test.items, strict=True)
    )


def test_ids_follow_the_images_and_the_content_does_not_follow_the_place(photos, tmp_path):
    data = load_data(str(photos))
    before = data.train.ids()
    assert before == load_data(str(photos)).train.ids() and len(set(before)) == len(before)
    draw(data.train.items[3], (1, 2, 3), seed=77)
    changed = load_data(str(photos))
    assert [a != b for a, b in zip(before, changed.train.ids(), strict=True)] == [i == 3 for i in range(len(before))]
    shutil.copytree(photos, tmp_path / "copy")
    copied = load_data(str(tmp_path / "copy"))
    assert copied.content == changed.content and copied.train.ids() != changed.train.ids()
    draw(tmp_path / "copy" / "train" / "red" / "another.png", (1, 2, 3), seed=78)
    assert load_data(str(tmp_path / "copy")).content != changed.content
    data.train.items[3].unlink()
    assert len(data.train.ids()) == len(before)  # a file that is gone costs nothing here


def test_no_file_starts_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    for name in ("x.jpg", "x.eps"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match="not an image"):
            read_image(tmp_path / name)
    unused = Counter()
    assert [path.name for path in find_images(tmp_path, unused)] == ["x.jpg"] and unused == {".eps": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_a_lock_that_is_held_is_not_one_that_is_missing(tmp_path, monkeypatch, capsys):
    with locked(tmp_path / "lock", wait=False), pytest.raises(OSError, match="another run"):
        with locked(tmp_path / "lock", wait=False):
            pass

    def missing(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", missing)
    for wait in (True, False):
        with locked(tmp_path / "lock", wait=wait):
            assert "No locks available" in capsys.readouterr().err


def test_find_images_survives_links_that_go_round(photos):
    (photos / "train" / "red" / "loop").symlink_to(photos)
    assert len(list(find_images(photos, Counter()))) == 78


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A CIFAR-10 of twelve photos, packed as the real one is."""

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
    assert data.classes[:2] == ("plane", "car") and len(data.train) + len(data.val) == len(data.test) == 12
    assert read_image(data.train.items[0]).shape == (3, 32, 32)


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


def test_a_slow_download_is_not_cut_off(archive, tmp_path, monkeypatch):
    """A server that pauses for seconds is slow, not gone."""

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = archive.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:1000])
            self.wfile.flush()
            time.sleep(5.5)
            self.wfile.write(content[1000:])

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    root = tmp_path / "data"
    with pytest.raises(SystemExit) as left:
        run_script(lambda: len(load_data("cifar10", root).test))
    server.shutdown()
    assert left.value.code == 12  # images
