"""How images are split, and CIFAR-10."""

import hashlib
import http.server
import io
import pickle
import shutil
import socket
import tarfile
import threading

import numpy as np
import pytest
from conftest import draw
from torchvision.datasets import CIFAR10

from data import load_data
from engine.console import run_script
from engine.images import read_image


def test_the_split_is_seeded_and_complete(photos):
    first, again, other = (load_data(str(photos), seed=seed) for seed in (0, 0, 1))
    assert first.train.items == again.train.items and first.val.items == again.val.items
    assert first.val.items != other.val.items
    assert sorted(first.train.items + first.val.items) == sorted((photos / "train").rglob("*.png"))
    assert len(first.val) == 12
    assert first.train.paths() == list(map(str, first.train.items))
    assert first.train.names == [str(path.relative_to(photos)) for path in first.train.items]


def test_every_class_has_images_in_every_part(tmp_path):
    counts = [1, 2, 3, 3, 3, 4, 7, 10]
    for i, count in enumerate(counts):
        for part, images in (("train", count), ("test", 1)):
            for j in range(images):
                draw(tmp_path / part / f"class{i}" / f"{j}.png", (9, 9, 9), seed=20 * i + j, size=(9, 9))
    for seed in range(20):
        data = load_data(str(tmp_path), seed=seed)
        assert data.train.labels.bincount().tolist() == [1, 1, 2, 2, 2, 3, 6, 8]
        assert data.val.labels.bincount().tolist() == [0, 1, 1, 1, 1, 1, 1, 2]


def test_limit_is_balanced_seeded_and_proportional(photos):
    data = load_data(str(photos), limit=20)
    assert sorted((data.train.labels.bincount() + data.val.labels.bincount()).tolist()) == [6, 7, 7]
    assert data.test.labels.bincount().tolist() == [2, 2, 2]  # a third, too
    assert data.train.items == load_data(str(photos), limit=20).train.items
    with pytest.raises(ValueError, match="--limit"):
        load_data(str(photos), limit=2)


def test_missing_test_images_are_held_out(photos, tmp_path):
    for i, (part, name) in enumerate([("train", "blue"), ("train", "red"), ("test", "green")]):
        shutil.copytree(photos / part / name, tmp_path / "pets" / "unpacked" / f"{name}{i}")
    (tmp_path / "pets" / "__MACOSX").mkdir()
    data = load_data(str(tmp_path / "pets"))
    assert data.classes == ("blue0", "green2", "red1")
    parts = [part.labels.bincount().tolist() for part in (data.train, data.val, data.test)]
    assert parts == [[13, 4, 13], [3, 1, 3], [4, 1, 4]]
    assert len({*data.train.items, *data.val.items, *data.test.items}) == 46
    assert "held out at random" in data.notes[0]
    assert data.test.items == load_data(str(tmp_path / "pets")).test.items


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


def test_cifar10_from_a_downloaded_archive(archive, tmp_path):
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


def test_code_in_cifar10_is_not_executed(archive, tmp_path):
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


def test_a_download_may_pause_for_seconds(archive, tmp_path, monkeypatch):
    """A server that does so is slow, not gone."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(archive.stat().st_size))
            self.end_headers()
            self.wfile.write(archive.read_bytes())

        def log_message(self, *args):
            pass

    def patience() -> int:
        assert len(load_data("cifar10", tmp_path / "data").test) == 12
        return int(socket.getdefaulttimeout())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    with pytest.raises(SystemExit) as left:
        run_script(patience)
    server.shutdown()
    assert left.value.code >= 20  # seconds
