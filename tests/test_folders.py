"""Which files below a folder are images, of which class, in which part."""

import importlib.util
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import torch
from conftest import ROOT, draw, finish, start
from PIL import Image

import main_train
from data import load_data, load_split
from engine.folders import find_images
from engine.images import Images


@pytest.mark.parametrize(
    "parts",
    [
        ("training_set", "val_set", "test_set"),
        ("seg_train/seg_train", "seg_val/seg_val", "seg_test/seg_test"),
        ("asl_train", "asl_validation", "asl_test"),
        ("Training", "Validation", "TEST"),
    ],
)
def test_part_folders_have_several_spellings(photos, parts):
    for name in ("blue", "green", "red"):
        draw(photos / "val" / name / "a.png", (0, 0, 0), seed=5)
    for part, name in zip(("train", "val", "test"), parts, strict=True):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / part).rename(photos / name)
    data = load_data(str(photos))
    assert data.classes == ("blue", "green", "red") and data.notes == ()
    assert (len(data.train), len(data.val), len(data.test)) == (60, 3, 18)


def test_unused_files_are_counted_by_reason(photos):
    red = photos / "train" / "red"
    shutil.copy(red / "0.png", red / "no_extension")
    shutil.copy(red / "0.png", red / "x.jpg_1280x")
    for name in ("a.mp4", "b.mp4", "notes.txt", ".DS_Store", "empty"):
        (red / name).write_bytes(b"" if name == "empty" else b"\0\0\0\x18ftypmp42")
    for folder in (".thumbnails", "@eaDir", "deeper"):
        draw(red / folder / "x.png", (200, 50, 40), seed=1)
    for part in ("train", "test"):
        draw(photos / part / "loose.png", (0, 0, 0), seed=1)
    for folder in ("more", "train/.ipynb_checkpoints"):
        draw(photos / folder / "x.png", (0, 0, 0), seed=1)
    shutil.rmtree(photos / "test" / "green")
    data = load_data(str(photos))
    assert len(data.train) + len(data.val) == 63  # 60, two by their content, one deeper
    assert data.notes[0].startswith("11 files not used: ")
    for reason in (
        *("2 .mp4", "1 .txt", "1 hidden", "1 without extension", "3 in hidden folders"),
        *("2 beside the class folders", "1 in more/"),
    ):
        assert reason in data.notes[0]
    assert data.classes == ("blue", "green", "red") and data.notes[1:] == ("no test image of 'green'",)
    for part in data.parts.values():
        labels = [name.split("/")[1] for name in part.names]
        assert [data.classes[label] for label in part.labels] == labels


@pytest.mark.parametrize(("extension", "package"), [(".heic", "pillow-heif"), (".jxl", "pillow-jxl-plugin")])
def test_a_class_of_files_that_cannot_be_read_names_the_package_that_can(photos, extension, package):
    if importlib.util.find_spec(package.replace("-", "_").removesuffix("_plugin")):
        pytest.skip(f"{package} is installed")
    for image in (photos / "train" / "green").iterdir():
        image.unlink()
        image.with_suffix(extension).write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=rf"no training image of 'green'.*20 \{extension} \(pip install {package}\)"):
        load_data(str(photos))


@pytest.mark.skipif(sys.platform == "win32", reason="links and permissions")
def test_links_are_followed_to_files_only(photos):
    red = photos / "train" / "red"
    (red / "gone.png").symlink_to("nowhere.png")
    (red / "round").symlink_to(photos)
    (red / "one.png").symlink_to(photos / "test" / "red" / "0.png")
    (red / "loop.png").symlink_to("loop.png")
    data = load_data(str(photos))
    assert data.notes[0] == "3 files not used: 2 links to nothing, 1 linked folders"
    assert red / "one.png" in data.train.items + data.val.items and len(find_images(photos)[0]) == 79


def test_ids_and_content_follow_the_images(photos, tmp_path):
    data = load_data(str(photos))
    before = data.train.ids
    assert before == load_data(str(photos)).train.ids and len(set(before)) == len(before)
    draw(data.train.items[3], (1, 2, 3), seed=77)
    changed = load_data(str(photos))
    assert [a != b for a, b in zip(before, changed.train.ids, strict=True)] == [i == 3 for i in range(len(before))]
    shutil.copytree(photos, tmp_path / "copy")
    copied = load_data(str(tmp_path / "copy"))
    assert copied.content == changed.content and copied.train.ids == changed.train.ids
    draw(tmp_path / "copy" / "train" / "red" / "another.png", (1, 2, 3), seed=78)
    assert load_data(str(tmp_path / "copy")).content != changed.content
    data = load_data(str(photos))
    data.train.items[3].unlink()
    assert len(data.train.ids) == len(before)  # a file that is gone costs nothing here

    scan = np.zeros((1024, 1024), np.uint8)  # with black borders
    for name in ("a.bmp", "b.tif", "c.png"):
        for i in range(2):
            scan[512, 512] = 99 * i
            Image.fromarray(scan).save(tmp_path / f"{i}{name}")
        ids = Images([tmp_path / f"{i}{name}" for i in range(2)], torch.zeros(2), ["", ""]).ids
        assert len(set(ids)) == 2, name


def test_parts_with_other_names_are_no_classes(photos):
    for part, name in (("train", "one"), ("test", "two")):
        (photos / part).rename(photos / name)
    with pytest.raises(ValueError, match="call them train, val and test"):
        load_data(str(photos))


@pytest.mark.parametrize("layout", ["{class}", "train/{class}"])
def test_a_class_may_have_the_name_of_a_part(tmp_path, layout):
    for name in ("bus", "car", "train"):
        for i in range(4):
            draw(tmp_path / "vehicles" / layout.format(**{"class": name}) / f"{i}.png", (9, 99, 9), seed=i)
    assert load_data(str(tmp_path / "vehicles")).classes == ("bus", "car", "train")


def test_names_that_look_the_same_are_the_same(photos, monkeypatch):
    for part, form in (("train", "NFC"), ("test", "NFD")):
        (photos / part / "blue").rename(photos / part / unicodedata.normalize(form, "café"))
    data = load_data(str(photos))
    assert data.classes == ("café", "green", "red") and len(data.test) == 18
    monkeypatch.setenv("HOME", str(photos.parent))
    assert main_train.parse_args(["--data=~/photos"]).data == str(photos)


@pytest.mark.parametrize("layout", ["{}.png", "test/{}.png", "unknown/{}.png", "images/{}.png"])
def test_unlabelled_test_images_are_counted(photos, layout):
    files = sorted((photos / "test").rglob("*.png"))
    for i, image in enumerate(files):
        target = photos / "later" / layout.format(i)
        target.parent.mkdir(parents=True, exist_ok=True)
        image.rename(target)
    shutil.rmtree(photos / "test")
    (photos / "later").rename(photos / "test")
    data = load_data(str(photos))
    assert (len(data.test), len(data.train) + len(data.val)) == (12, 48) and "18" in data.notes[0]
    assert layout == "{}.png" or "python inference.py" in data.notes[0]


def test_other_classes_of_the_test_images(photos):
    """A class that training lacks is left out; a misspelt one is an error."""
    (photos / "test" / "unknown").mkdir()
    shutil.copy(photos / "test" / "red" / "0.png", photos / "test" / "unknown" / "0.png")
    data = load_data(str(photos))
    assert len(data.test) == 18 and data.notes[0].endswith("1 of a class that the training images lack (unknown)")
    (photos / "test" / "green").rename(photos / "test" / "Greens")
    with pytest.raises(ValueError, match="no class of the training images, Greens, unknown, but no green: rename it"):
        load_data(str(photos))


def test_folders_without_images_are_no_classes(photos):
    for folder, name in (("train/models", "x.pth"), ("test/models", "y.pth"), ("train/empty", ".keep"), ("logs", "z")):
        (photos / folder).mkdir()
        (photos / folder / name).write_bytes(b"1")
    data = load_data(str(photos))
    assert data.classes == ("blue", "green", "red") and len(data.test) == 18
    assert all(data.notes[0].count(f"folder without images ({name}/)") == 1 for name in ("models", "empty", "logs"))
    shutil.rmtree(photos / "train" / "green")
    shutil.rmtree(photos / "train" / "red")
    with pytest.raises(ValueError, match=r"one class only, 'blue'.*without images \(models/\)"):
        load_data(str(photos))


DETECTION = {
    "YOLO": ("{part}/images/{i}.png", "{part}/labels/{i}.txt"),
    "YOLO by kind": ("images/{part}/{i}.png", "labels/{part}/{i}.txt"),
    "VOC": ("JPEGImages/{i}.png", "Annotations/{i}.xml"),
    "COCO": ("images/{i}.png", "annotations/instances.json"),
    "masks": ("images/{i}.png", "masks/{i}.png"),
    "named masks": ("train_images/{i}.png", "train_masks/{i}_mask.png"),
    "trimaps": ("images/{i}.png", "annotations/trimaps/{i}.png"),
    "folders of parts": ("train_images/{i}.png", "test_images/{i}.png"),
    "COCO's parts": ("train2017/{i}.png", "val2017/{i}.png"),
}


@pytest.mark.parametrize("layout", DETECTION.values(), ids=DETECTION)
def test_folders_of_images_and_descriptions_are_no_classes(train, tmp_path, layout):
    for part in ("train", "val"):
        for i in range(12):
            for name in layout:
                file = tmp_path / "x" / name.format(part=part, i=f"{part[0]}{i}")
                draw(file if file.suffix == ".png" else file.with_name("z.png"), (9, 99, 9), seed=i)
                if file.suffix != ".png":
                    file.with_name("z.png").rename(file)
    code, _, err = train(tmp_path / "x")
    assert code == 2 and ("seems to be made for" in err or "no class folders" in err)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}.jpg", "{}_mask.png"),
        ("a ({}).png", "a ({})_mask_1.png"),
        ("{}.png", "{}-GT.png"),
        ("{}.png", "masks/{}.png"),
        ("images/{}.png", "masks/{}.png"),
        ("{}.jpg", "{}.png"),
        ("photo/{}.png", "mask/{}.png"),
        ("patient1/raw/{}.png", "patient1/mask/{}.png"),
        ("original/patient1/{}.png", "mask/patient1/{}.png"),
    ],
)
def test_masks_in_class_folders_are_no_images(tmp_path, image, mask):
    for i, color in enumerate(("red", "blue") * 5):
        for name in (image, mask):
            draw(tmp_path / "scans" / color / name.format(i), (9, 9, 9), seed=i)
        mask_file = tmp_path / "scans" / color / mask.format(i)
        Image.open(mask_file).convert("1").save(mask_file)
    for name in ("face_mask.png", "3.png", "3_mask.png"):  # photographs of masks, in many colors
        draw(tmp_path / "scans" / "red" / name, (9, 9, 9), seed=11 + len(name))
    data = load_data(str(tmp_path / "scans"))
    names = [name for images in data.parts.values() for name in images.names]
    assert len(names) == 13 and sum("mask" in name or "GT" in name for name in names) == 2
    assert data.notes[0].startswith("10 files not used: 10 masks")


def test_classes_inside_folders_of_years_or_patients_are_refused(tmp_path):
    for year, names in (("2019", ("cat", "dog")), ("2020", ("cat", "dog", "ship")), ("2021", ("dog",))):
        for name in names:
            draw(tmp_path / "pets" / year / name / "0.png", (9, 9, 9), seed=0)
    with pytest.raises(ValueError, match="cat, dog"):
        load_data(str(tmp_path / "pets"))


@pytest.mark.parametrize("folders", [[f"cam{i}" for i in range(8)], ["Ann", "Bob", "C. D.", "Eva"]])
@pytest.mark.parametrize("root", ["", "train"])
def test_the_advised_groups_are_the_folders_in_class_folders(tmp_path, folders, root):
    places = [(name, inner) for name in ("cat", "dog") for inner in folders]
    for seed, (name, inner) in enumerate(places):
        for i in range(3):
            draw(tmp_path / "pets" / root / name / inner / f"{i}.png", (9, 9, 9), seed=3 * seed + i)
    with pytest.raises(ValueError, match="if patients or films, use --groups '") as error:
        load_data(str(tmp_path / "pets"))
    [_, advised, _] = str(error.value).split("'")
    data = load_data(str(tmp_path / "pets"), groups=advised)
    inside = [{name.split("/")[-2] for name in images.names} for images in data.parts.values()]
    assert data.classes == ("cat", "dog") and sorted(name for names in inside for name in names) == folders
    data.save_split(tmp_path / "split.json")
    assert load_split(str(tmp_path / "pets"), tmp_path, tmp_path / "split.json").test.names == data.test.names


@pytest.mark.parametrize(("one", "other"), [("Blue", "blue"), ("1", "01"), ("1.0", "1"), ("a  b", "a b")])
def test_classes_of_two_spellings_are_told(photos, one, other):
    (photos / "train" / "red").rename(photos / "train" / one)
    (photos / "train" / "blue").rename(photos / "train" / other)
    shutil.rmtree(photos / "test")
    alike = " and ".join(sorted((one, other)))
    assert any(f"look the same: {alike}" in note for note in load_data(str(photos)).notes)


def test_grey_photographs_of_one_name_and_two_formats(tmp_path):
    for seed in range(24):
        for name in (f"{'ab'[seed % 2]}/{seed}.{extension}" for extension in ("jpg", "png")):
            draw(tmp_path / "x" / name, (128, 128, 128), seed)
            Image.open(tmp_path / "x" / name).convert("L").save(tmp_path / "x" / name)
    assert sum(map(len, load_data(str(tmp_path / "x")).parts.values())) == 48


def test_numbered_sessions_are_no_copy_of_the_classes(tmp_path):
    for seed, name in enumerate(["1/1", "1/2", "1/3", "2/4", "2/5"] * 3):
        draw(tmp_path / "x" / name / f"{seed}.png", (9, 9, 9), seed)
    data = load_data(str(tmp_path / "x"))
    assert data.classes == ("1", "2") and "the outer ones are the classes" in data.notes[0]


def test_unlabelled_images_are_no_class(photos):
    for part, name in (("train", "unlabeled"), ("test", "Unlabelled")):
        shutil.copytree(photos / part / "red", photos / part / name)
    shutil.rmtree(photos / "test" / "blue")
    data = load_data(str(photos))
    assert data.classes == ("blue", "green", "red") and len(data.train) + len(data.val) == 60 and len(data.test) == 12
    assert "20 without a label (unlabeled)" in data.notes[0] and "6 without a label (Unlabelled)" in data.notes[0]
    shutil.copytree(photos / "train" / "red", photos / "train" / "unlabelled" / "red")
    assert load_data(str(photos / "train")).classes == ("blue", "green", "red", "unlabelled")
    shutil.rmtree(photos / "train" / "unlabelled")
    (photos / "train" / "blue").rename(photos / "train" / "Labeled")  # perhaps bottles
    assert load_data(str(photos / "train")).classes == ("Labeled", "green", "red", "unlabeled")
    for name in ("Labeled", "green"):
        shutil.rmtree(photos / "train" / name)
    assert load_data(str(photos / "train")).classes == ("red", "unlabeled")


def test_class_folders_twice_or_beside_masks_are_refused(train, tmp_path):
    """As in archives that hold their folders again, and as in CUB: masks beside the folder of the class folders."""
    for i in range(20):
        name = f"{('cat', 'dog')[i % 2]}/{i}.png"
        draw(tmp_path / "pets" / name, (9, 99, 9), seed=i)
        draw(tmp_path / "birds" / "photos of 2011" / name, (9, 99, 9), seed=i)
        draw(tmp_path / "birds" / "segmentations" / name, (9, 99, 9), seed=i)
        mask = tmp_path / "birds" / "segmentations" / name
        Image.open(mask).convert("1").save(mask)
    (tmp_path / "birds" / "photos of 2011").rename(tmp_path / "birds" / "2011")
    shutil.copytree(tmp_path / "pets", tmp_path / "pets" / "pets")
    for folder, reason in (("pets", "if it is a copy"), ("birds", "made for segmentation")):
        code, _, err = train(tmp_path / folder)
        assert code == 2 and reason in err and err.count("\n") == 1


def test_a_table_beside_the_classes_and_folders_inside_are_told(tmp_path):
    for i in range(20):
        draw(tmp_path / "x" / ("lung", "skin")[i % 2] / f"kind {i % 4}" / f"{i}.png", (9, 99, 9), seed=i)
    assert "kind 0: the outer ones are the classes" in "\n".join(load_data(str(tmp_path / "x")).notes)
    (tmp_path / "x" / "parts.csv").write_text("image,split\n0.png,test\n")
    assert "parts.csv not read" in "\n".join(load_data(str(tmp_path / "x")).notes)


def test_classes_may_have_such_names(tmp_path):
    """Folders that only look like descriptions of images, and descriptions beside real class folders."""
    for name in ("mask", "no mask"):
        for i in range(5):
            draw(tmp_path / "faces" / name / f"{i}.png", (9, 99, 9), seed=i)
    assert load_data(str(tmp_path / "faces")).classes == ("mask", "no mask")
    kinds = [
        ("icons", "masks", "photos", "sketches"),
        ("mask", "photo", "print"),
        ("cooked", "raw"),
        ("fake", "original"),
    ]
    for names in kinds:
        for name in names:
            shutil.copytree(tmp_path / "faces" / "mask", tmp_path / names[0] / name)
        assert load_data(str(tmp_path / names[0])).classes == names
    for name in ("akita", "pug"):
        for i in range(5):
            draw(tmp_path / "dogs" / "Images" / name / f"{i}.png", (9, 99, 9), seed=i)
            (tmp_path / "dogs" / "Annotation" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "dogs" / "Annotation" / name / f"{i}").write_text("<annotation>")
    data = load_data(str(tmp_path / "dogs"))
    assert data.classes == ("akita", "pug") and "without images (Annotation/)" in data.notes[0]


@pytest.mark.parametrize("output", [".", "runs/photos"])
def test_own_output_is_not_read_as_input(training, photos, output):
    before = load_data(str(photos / "train"))
    shutil.copytree(training / "my runs [v2]", photos / "train" / output, dirs_exist_ok=True)
    shutil.copytree(training / "data", photos / "train" / "data")
    after = load_data(str(photos / "train"))
    assert (after.classes, after.content) == (before.classes, before.content)


def test_extensions_are_known_in_a_fresh_process(tmp_path):
    (tmp_path / "0.jpg").touch()
    found = f"from engine.folders import find_images, Path; print(*find_images(Path({str(tmp_path)!r}))[0])"
    assert finish(start("-c", found, cwd=ROOT)) == (0, f"{tmp_path / '0.jpg'}\n", "")


def test_a_folder_of_files_of_another_kind_names_it(train, tmp_path):
    (tmp_path / "scans").mkdir()
    for i in range(3):
        (tmp_path / "scans" / f"{i}.dcm").write_bytes(bytes(128) + b"DICM" + bytes(300))
    code, _, err = train(tmp_path / "scans")
    assert code == 2 and "3 .dcm (a DICOM file" in err
