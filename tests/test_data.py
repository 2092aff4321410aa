import errno
import hashlib
import http.server
import io
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, draw
from PIL import Image, ImageCms
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from data import (
    ImageError,
    Progress,
    available_cpus,
    find_images,
    load_data,
    locked,
    preprocess,
    read_image,
    run_script,
)

NORMAL = {"image_size": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


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


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        *(("float", 0, 1), ("float", 0, 255), ("float", -1, 1), ("ct", -1000, 3000), ("32 bits", 0, 200000)),
        *(("16 bits", 0, 255), ("16 bits", 0, 4095), ("16 bits", 0, 65535)),
    ],
)
def test_no_range_of_pixels_comes_out_black(tmp_path, kind, low, high):
    values = np.linspace(low, high, 64).reshape(8, 8)
    values = values.astype({"float": np.float32, "ct": np.int32, "32 bits": np.int32}.get(kind, np.uint16))
    if kind == "float":
        values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "x.tif")
    pixels = read_image(tmp_path / "x.tif")[0].float().flatten()
    assert pixels[1:].diff().min() >= 0 and pixels[-1] == 255 and abs(pixels.mean() - 127) < 4


def test_an_embedded_profile_is_converted_and_a_damaged_one_ignored(tmp_path):
    swapped = bytearray(SRGB)  # red and blue change places
    tags = {bytes(SRGB[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(SRGB[128:132], "big"), 12)}
    for tag, other in ((b"rXYZ", b"bXYZ"), (b"bXYZ", b"rXYZ")):
        swapped[tags[tag] + 4 : tags[tag] + 12] = SRGB[tags[other] + 4 : tags[other] + 12]
    for name, profile in (("srgb", SRGB), ("swapped", bytes(swapped)), ("damaged", SRGB[:200])):
        for mode in ("RGB", "RGBA", "L"):
            image = Image.new("RGB", (8, 8), (200, 100, 50)).convert(mode)
            image.save(tmp_path / f"{name}_{mode}.png", icc_profile=profile)
    for name, expected in (("srgb", [200, 100, 50]), ("swapped", [50, 100, 200]), ("damaged", [200, 100, 50])):
        for mode in ("RGB", "RGBA"):
            assert np.allclose(pixel(tmp_path / f"{name}_{mode}.png"), expected, atol=1)
        assert pixel(tmp_path / f"{name}_L.png") == [124] * 3  # a profile of another kind of image


def test_damaged_metadata_cost_the_metadata(tmp_path):
    image = Image.new("RGB", (8, 8), (100, 50, 25))
    image.save(tmp_path / "x.png", exif=b"Exif\0\0II*\0" + bytes(range(1, 60)))
    image.save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=100)
    assert np.allclose([pixel(tmp_path / name) for name in ("x.png", "x.jpg")], [100, 50, 25], atol=3)


def test_large_images_are_refused_by_the_memory_they_take(tmp_path):
    Image.new("L", (12000, 12000), 90).save(tmp_path / "baseline.jpg")  # decoded at an eighth
    Image.new("RGB", (6000, 5000), (90, 90, 90)).save(tmp_path / "30_megapixels.png", compress_level=1)
    Image.new("L", (9000, 9000), 90).save(tmp_path / "progressive.jpg", progressive=True)
    Image.new("1", (10000, 10000)).save(tmp_path / "bomb.png")
    Image.new("L", (5000, 4000), 90).save(tmp_path / "20_megapixels.jp2")
    for name in ("baseline.jpg", "30_megapixels.png"):
        assert pixel(tmp_path / name) == [90] * 3
    for name in ("progressive.jpg", "bomb.png", "20_megapixels.jp2"):
        with pytest.raises(ImageError, match="MB of memory"):
            read_image(tmp_path / name)


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


def test_augmentation_moves_an_image_mirrors_it_and_blanks_a_square():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    [plain] = preprocess([image], NORMAL)
    draws = torch.tensor([[0.5, 0.5, 0.9, 0.25, 0.75], [0.999, 0.5, 0.1, 0.0, 0.0]])
    still, moved = preprocess([image, image], NORMAL, draws=draws)
    expected = plain.clone()
    expected[:, 8:24, 40:56] = 0
    assert still.equal(expected)
    expected = F.pad(plain, (0, 0, 0, 8), mode="reflect")[:, 8:].flip(2)
    expected[:, :8, :8] = 0
    assert moved.equal(expected)


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
    assert data.classes == ("blue", "green", "red") and "no test image of 'blue'" in data.notes
    assert all(
        data.classes[label] == path.parent.name for label, path in zip(data.test.labels, data.test.items, strict=True)
    )


def test_class_folders_without_a_split_are_enough(photos, tmp_path):
    for i, (part, name) in enumerate([("train", "blue"), ("train", "red"), ("test", "green")]):
        shutil.copytree(photos / part / name, tmp_path / "pets" / "unpacked" / f"{name}{i}")
    (tmp_path / "pets" / "__MACOSX").mkdir()
    data = load_data(str(tmp_path / "pets"))
    assert data.classes == ("blue0", "green2", "red1")
    parts = [part.labels.bincount().tolist() for part in (data.train, data.val, data.test)]
    assert parts == [[13, 4, 13], [3, 1, 3], [4, 1, 4]]
    assert len({*data.train.items, *data.val.items, *data.test.items}) == 46
    assert "held out for testing" in data.notes[0]
    assert data.test.items == load_data(str(tmp_path / "pets")).test.items


def test_parts_go_by_many_names(photos):
    for name in ("blue", "green", "red"):
        draw(photos / "Validation" / name / "a.png", (0, 0, 0), seed=5)
    (photos / "train").rename(photos / "Training")
    (photos / "test").rename(photos / "TEST")
    data = load_data(str(photos))
    assert (len(data.train), len(data.val), len(data.test), data.notes) == (60, 3, 18, ())
    (photos / "TEST").rename(photos / "holdout")
    data = load_data(str(photos))
    assert data.notes[0] == "18 files not used: 18 in holdout/" and len(data.test) == 12


def test_what_is_not_used_is_counted_and_why(photos):
    red = photos / "train" / "red"
    shutil.copy(red / "0.png", red / "no_extension")
    shutil.copy(red / "0.png", red / "x.jpg_1280x")
    for name in ("a.heic", "b.heic", "c.jxl", "video.mp4", "notes.txt", ".DS_Store", "empty"):
        (red / name).write_bytes(b"" if name == "empty" else b"\0\0\0\x18ftypheic")
    for folder in (".thumbnails", "@eaDir", "deeper"):
        draw(red / folder / "x.png", (200, 50, 40), seed=1)
    for part in ("train", "test"):
        draw(photos / part / "loose.png", (0, 0, 0), seed=1)
    draw(photos / "more" / "x.png", (0, 0, 0), seed=1)
    shutil.rmtree(photos / "test" / "green")
    data = load_data(str(photos))
    assert len(data.train) + len(data.val) == 63  # 60, two by their content, one deeper
    assert data.notes[0].startswith("12 files not used: ")
    for reason in (
        *("2 .heic (pip install pillow-heif)", "1 .jxl (pip install pillow-jxl-plugin)", "1 .mp4", "1 .txt"),
        *("1 hidden", "1 without extension", "2 in hidden folders", "2 beside the class folders", "1 in more/"),
    ):
        assert reason in data.notes[0]
    assert data.notes[1:] == ("no test image of 'green'",)
    for image in (photos / "train" / "green").iterdir():
        image.unlink()
        image.with_suffix(".heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"no training image of 'green'.*22 \.heic \(pip install pillow-heif\)"):
        load_data(str(photos))


@pytest.mark.skipif(sys.platform == "win32", reason="links and permissions")
def test_links_and_closed_folders_are_counted(photos):
    red = photos / "train" / "red"
    (red / "gone.png").symlink_to("nowhere.png")
    (red / "round").symlink_to(photos)
    (red / "one.png").symlink_to(photos / "test" / "red" / "0.png")
    (red / "loop.png").symlink_to("loop.png")
    data = load_data(str(photos))
    assert data.notes == ("3 files not used: 2 links to nothing, 1 linked folders",) and red / "one.png" in (
        data.train.items + data.val.items
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


def test_the_first_image_is_named_even_if_it_is_empty(tmp_path):
    (tmp_path / "0.jpg").touch()
    found = f"from data import find_images, Path, Counter; print(*find_images(Path({str(tmp_path)!r}), Counter()))"
    done = subprocess.run([sys.executable, "-c", found], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "0.jpg"), done.stderr


def test_a_log_gets_a_line_now_and_then_and_a_short_run_none(capsys):
    bar = Progress(100, "photos", done=10)
    bar.update(5)
    bar.close()
    assert capsys.readouterr() == ("", "")
    bar = Progress(100, "photos", done=10)
    bar.mininterval = bar.due = 0
    bar.update(5)
    bar.update(5)
    bar.close()
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"photos: 15 of 100 images, .* passed, .* left\n", err)


def test_a_container_is_not_its_machine(tmp_path):
    cpus = available_cpus(tmp_path / "none")
    for quota, expected in (("max 100000", cpus), ("100000 100000", 1), ("150000 100000", min(2, cpus)), ("?", cpus)):
        (tmp_path / "cpu.max").write_text(quota)
        assert available_cpus(tmp_path / "cpu.max") == expected


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


def test_arrays_are_images_only_if_their_pixels_are_bytes():
    random = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    for array in (random, random[..., 0], random[..., 2::-1]):  # with transparency, grey, BGR turned into RGB
        assert read_image(array).shape == (3, 8, 8)
    assert read_image(random[..., 2::-1]).equal(torch.from_numpy(random[..., 2::-1].copy()).permute(2, 0, 1))
    with pytest.raises(ImageError, match=r"^image: "):
        read_image(random[..., :3] / np.float32(255))
