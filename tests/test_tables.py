"""Labels from a table: which columns count, which files they name, and which rows are not used."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import COLORS, draw, results

import inference
import main_train
from data import load_data

NAMES = [f"{i:03x}" for i in range(30)]
LABELS = [sorted(COLORS)[i % 3] for i in range(30)]
ROWS = list(zip(NAMES, LABELS, strict=True))


@pytest.fixture
def pets(tmp_path) -> Path:
    """pets/train/*.png, 30 images without labels, and pets/test/*.png, 6 of other names."""
    for i, (name, label) in enumerate(ROWS):
        draw(tmp_path / "pets" / "train" / f"{name}.png", COLORS[label], seed=i)
    for i in range(6):
        draw(tmp_path / "pets" / "test" / f"t{i}.png", COLORS[LABELS[i]], seed=50 + i)
    return tmp_path / "pets"


def write(path: Path, *rows: tuple, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def labels_of(data) -> dict[str, str]:
    """The label of each image, by the name of its file without the extension."""
    return {
        Path(name).stem: data.classes[label]
        for images in data.parts.values()
        for name, label in zip(images.names, images.labels.tolist(), strict=True)
    }


def test_train_classify_evaluate_and_explain_by_a_table(run, train, pets, tmp_path):
    """As in competitions: a table of names without extensions beside train/, and unlabelled images in test/."""
    rows = [(*row, "a b"[i % 2]) for i, row in enumerate(ROWS)]
    table = write(pets / "labels [1].csv", ("id", "kind", "note"), *rows)
    code, _, err = train(table)
    assert code == 2 and all(name in err for name in ("'id'", "'kind'", "'note'", "--columns"))
    code, out, err = train(table, "--columns", "id", "kind", "--epochs", 20)
    assert (code, err) == (0, "") and "6 other images" in out
    [row] = results(tmp_path)
    assert (row["data"], row["columns"], row["classes"]) == (str(table), ["id", "kind"], sorted(COLORS))
    split = json.loads((tmp_path / "checkpoints" / f"split-{row['split']}.json").read_text())
    assert sum(len(split[part]) for part in ("train", "val", "test")) == 30
    assert all(name.startswith("train/") for name in split["test"])

    code, out, _ = run(inference)
    shown = [line.split(": ")[0] for line in out.splitlines()[:-1]]
    assert code == 0 and {Path(path).stem for path in shown} == {Path(name).stem for name in split["test"]}
    rows = [(f"t{i}", LABELS[i]) for i in range(6)]
    more = write(pets / "more.csv", ("id", "kind"), *rows, ("t9", "red"), ("000", "x"))
    code, out, err = run(inference, more, "--evaluate")
    assert code == 0 and " of 6 images right" in out and "missing (t9)" in err and "'x' (000.png)" in err

    pets.rename(tmp_path / "moved")
    code, out, err = run(inference)
    assert (code, out) == (2, "") and str(table) in err and "--data" in err
    code, out, err = run(inference, "--data", tmp_path / "moved" / table.name)
    assert code == 0 and len(out.splitlines()) == len(split["test"]) + 1 and "gone" not in err


def test_the_folder_names_the_command_that_reads_its_table(train, pets):
    (pets.parent / "my pets").mkdir()
    folder = pets.rename(pets.parent / "my pets" / "pets")
    write(folder / "train.csv", ("id", "breed"), *ROWS)
    write(folder / "submission.csv", ("id", "breed"), *[(f"t{i}", "blue") for i in range(6)])
    code, _, err = train(folder)
    assert code == 2 and err.count("\n") == 1
    assert err.endswith(f"python main_train.py --data '{folder / 'train.csv'}'\n")
    assert main_train.parse_args(["--data", str(folder / "train.csv")]).output == Path("runs/pets")


def test_folders_of_images_beside_a_table_are_no_classes(tmp_path):
    for folder, names in (("images_part_1", NAMES[:15]), ("images_part_2", NAMES[15:])):
        for name in names:
            draw(tmp_path / "scans" / folder / f"{name}.png", (0, 0, 0), seed=int(name, 16))
    assert load_data(str(tmp_path / "scans")).classes == ("images_part_1", "images_part_2")
    table = write(tmp_path / "scans" / "labels.csv", ("id", "dx"), *ROWS)
    with pytest.raises(ValueError, match=r"seem to be no classes; .*--data .*labels\.csv"):
        load_data(str(tmp_path / "scans"))
    assert labels_of(load_data(str(table))) == dict(ROWS)
    write(table, ("id", "dx"), *[(name, "ab"[i // 15]) for i, name in enumerate(NAMES)])  # says what the folders say
    assert len(load_data(str(tmp_path / "scans")).classes) == 2


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-16"), (" ", "utf-8")]
)
@pytest.mark.parametrize("header", [True, False])
def test_kinds_of_tables(pets, delimiter, encoding, header):
    rows = [("name", "category")] * header + ROWS
    table = write(pets / "labels.txt", *rows, delimiter=delimiter, encoding=encoding)
    data = load_data(str(table))
    assert labels_of(data) == dict(ROWS) and data.classes == tuple(sorted(COLORS))


@pytest.mark.parametrize(
    "path",
    [
        *("train/{}.png", "./train/{}", r"D:\somebody\pets\train\{}.png", "../input/train/{}.PNG"),
        *("gs://bucket/pets/train/{}.png", "https://example.org/train/{}.png"),
    ],
)
def test_paths_of_other_systems(pets, path):
    for name in NAMES:
        draw(pets / "test" / f"{name}.png", (0, 0, 0), seed=1)  # the folder decides
    table = write(pets / "labels.csv", ("path", "label"), *[(path.format(name), label) for name, label in ROWS])
    data = load_data(str(table))
    assert labels_of(data) == dict(ROWS) and all(name.startswith("train/") for name in data.test.names)


def test_a_column_of_numbers_is_not_taken_for_file_names(tmp_path):
    """As pandas writes it: the first column counts the rows, and a file of that name exists, too."""
    order = [7 * i % 30 for i in range(30)]
    for i in range(30):
        draw(tmp_path / "images" / f"{i}.png", (0, 0, 0), seed=i)
    rows = [(i, f"{name}.png", "ab"[name % 2]) for i, name in enumerate(order)]
    data = load_data(str(write(tmp_path / "labels.csv", ("", "image", "label"), *rows)))
    assert labels_of(data) == {str(name): "ab"[name % 2] for name in order}
    with pytest.raises(ValueError, match=r"several columns may name the images. Its columns: '1' \(0\), '2' \(0.png\)"):
        load_data(str(write(tmp_path / "labels.csv", *rows)))


def test_names_that_differ_in_case_only(tmp_path):
    names = [f"{letter}{i}.png" for letter in "aA" for i in range(15)]
    for seed, name in enumerate(names):
        draw(tmp_path / "images" / name, (9, 9, 9), seed=seed)
    if len([*(tmp_path / "images").iterdir()]) < len(names):
        pytest.skip("this file system does not distinguish case")
    labels = {name: "xy"[name[0] == "A"] for name in names}
    data = load_data(str(write(tmp_path / "labels.csv", ("file", "label"), *labels.items())))
    assert labels_of(data) == {name.removesuffix(".png"): label for name, label in labels.items()}


def test_equal_names_in_two_folders(pets):
    for name in NAMES:
        draw(pets / "test" / f"{name}.png", (0, 0, 0), seed=1)
    table = write(pets / "labels.csv", ("id", "label"), *ROWS)
    with pytest.raises(ValueError, match=r"'000' may be .*test.000\.png or .*train.000\.png"):
        load_data(str(table))
    assert labels_of(load_data(str(table.rename(pets / "train_labels.csv")))) == dict(ROWS)
    rows = [(*row, part) for part in ("Train", "testing") for row in ROWS]
    data = load_data(str(write(pets / "labels.csv", ("id", "label", "subset"), *rows)))
    assert len(data.test) == 30 and all(name.startswith("test/") for name in data.test.names)
    rows = [(f"{part}/{name}.png", label) for part in ("train", "test") for name, label in ROWS]
    assert len(load_data(str(write(pets / "labels.csv", ("file", "label"), *rows))).test) == 30


def test_rows_that_are_not_used_are_named(pets):
    rows = [*ROWS, ("gone", "red"), ROWS[3], ("001", "red"), ("002", "N/A"), ("t0", "NA"), ("t1", "purple")]
    rows.append(("005", "a", "b"))
    rows = [(*row, "test" if row[0][0] == "t" else "train") if len(row) == 2 else (*row, "train") for row in rows]
    data = load_data(str(write(pets / "labels.csv", ("id", "label", "split"), *rows)))
    notes = "\n".join(data.notes)
    assert labels_of(data) == {name: label for name, label in ROWS if name != "001"}
    reasons = "missing (gone)", "repeat another (003.png)", "none is taken (001.png, 001.png)", "a label (002)"
    reasons += "in the test part (t0)", "lack, 'purple' (t1.png)", "1 row with another number of columns"
    for text in ("7 rows of labels.csv not used", *reasons):
        assert text in notes


def test_parts_and_groups(pets):
    parts = ["train"] * 18 + ["valid"] * 6 + ["test"] * 6
    rows = [(i, *row, parts[i], i, f"p{i // 2}", 30 + i) for i, row in enumerate(ROWS)]
    header = ("", "image", "diagnosis", "split", "fold", "Patient ID", "Patient Age")
    data = load_data(str(write(pets / "labels.csv", header, *rows)))
    assert [len(images) for images in data.parts.values()] == [18, 6, 6]
    groups = dict(zip(NAMES, (f"p{i // 2}" for i in range(30)), strict=True))
    for images in data.parts.values():
        assert images.groups == [groups[Path(name).stem] for name in images.names]
        assert images.subset(torch.tensor([2, 0])).groups == [images.groups[2], images.groups[0]]


@pytest.mark.parametrize(
    ("header", "columns", "sizes"),
    [
        (("split",), ["001"], "'split' should say train, val or test, not 0, 1"),
        (("partition",), ["0012"], (16, 7, 7)),  # as in CelebA
        (("Usage",), [["Training", "Training", "PublicTest", "PrivateTest", "Training"]], (None, None, 12)),
        (("set",), [["train", "train", "dev", "test"]], (16, 7, 7)),
        (("cohort",), [["Train set", "Train set", "Internal test", "External test"]], (None, None, 14)),
        (("source", "split"), [["train"], ["train", "train", "test", "val"]], (16, 7, 7)),
        (("source",), [["train"]], (None, None, 6)),
        (("original_split", "split"), [["train"], ["train", "train", "test", "val"]], (16, 7, 7)),
        (("subset", "split"), ["XY", ["train", "train", "test", "val"]], (16, 7, 7)),
        (("test1", "test2"), ["01", "001"], (None, None, 6)),  # blood tests, perhaps
        (("origin",), [["train set", "test set", "web"]], (None, None, 6)),
        (("comment",), [["train", *14 * [""], "test", *14 * [""]]], (None, None, 6)),
        (("old_split", "new_split"), [["train"], ["train", "test", "val"]], "rename all but one"),
    ],
)
def test_which_column_says_the_part(pets, header, columns, sizes):
    rows = [(*row, *(values[i % len(values)] for values in columns)) for i, row in enumerate(ROWS)]
    table = str(write(pets / "labels.csv", ("id", "label", *header), *rows))
    if isinstance(sizes, str):
        with pytest.raises(ValueError, match=sizes):
            load_data(table)
    else:
        found = [len(images) for images in load_data(table).parts.values()]
        assert all(size in (None, count) for size, count in zip(sizes, found, strict=True)) and sum(found) == 30


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ({"is_test": "test"}, (None, None, 6)),
        ({"test": "test"}, (None, None, 6)),
        ({"in_training_set": "train"}, (None, None, 12)),
        ({"is_valid": "val"}, (None, 6, None)),
        ({"Is Train": "train"}, (None, None, 12)),
        ({"is_train": "train", "is_val": "val"}, (18, 6, 6)),
    ],
)
def test_parts_by_flags(pets, flags, sizes):
    parts = ["train"] * 18 + ["val"] * 6 + ["test"] * 6
    rows = [(*row, *(str(parts[i] == part) for part in flags.values())) for i, row in enumerate(ROWS)]
    data = load_data(str(write(pets / "labels.csv", ("id", "label", *flags), *rows)))
    found = [len(images) for images in data.parts.values()]
    assert all(size in (None, count) for size, count in zip(sizes, found, strict=True)) and sum(found) == 30


@pytest.mark.parametrize("name", ["lesion_id", "CaseID", "StudyInstanceUID", "pid", "Patient No.", "slide"])
def test_other_names_of_groups(pets, name):
    rows = [(*row, f"g{i // 2}", i, i % 5) for i, row in enumerate(ROWS)]
    table = write(pets / "labels.csv", ("id", "label", name, "patient", "fold"), *rows)
    data = load_data(str(table))
    groups = [{f"g{int(Path(item).stem, 16) // 2}" for item in images.items} for images in data.parts.values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 15
    assert "not used: 'patient', 'fold'" in data.notes[0] and repr(name) in data.notes[0]


def test_a_patient_of_two_spellings_is_one_group(pets):
    long = 1234567890123456789  # as a float, it would be its neighbour
    spellings = [f"{i // 4}" if i % 2 else f"0{i // 4}.0" for i in range(12)] + [
        f"{long + i // 2}" for i in range(12, 30)
    ]
    rows = [(*row, spelling) for row, spelling in zip(ROWS, spellings, strict=True)]
    data = load_data(str(write(pets / "labels.csv", ("id", "label", "patient"), *rows, (*ROWS[3], "9"))))
    assert sum(len({*images.groups}) for images in data.parts.values()) == 12
    assert "1 that repeat another, in another group" in "\n".join(data.notes)


def test_a_class_of_classes_is_no_group(pets):
    kinds = {"blue": "cold", "green": "cold", "red": "warm"}
    rows = [(*row, kinds.get(row[1], "cold")) for row in ROWS]
    data = load_data(str(write(pets / "labels.csv", ("id", "label", "group"), *rows)))
    assert "not used: 'group'" in data.notes[0] and len({*data.test.groups}) == len(data.test)


def test_a_person_that_is_a_class_is_no_group(pets):
    people = {"blue": 7, "green": 8, "red": 9}
    rows = [(*row, people[row[1]]) for row in ROWS]
    data = load_data(str(write(pets / "labels.csv", ("id", "label", "person_id"), *rows)))
    assert "not used: 'person_id'" in data.notes[0] and len({*data.test.groups}) == len(data.test)


def test_spellings_of_a_patient(pets):
    names = ["007", "7", "7.0", "Ann", "ann", "1.1", "1.10", "10"]
    rows = [(*row, names[i // 3] if i < 24 else f"x{i}") for i, row in enumerate(ROWS)]
    data = load_data(str(write(pets / "labels.csv", ("id", "label", "patient"), *rows)))
    assert any("11 groups" in note for note in data.notes)


def test_identical_images_without_a_patient_stay_together(pets):
    for i in range(12, 30):  # six images, each of them three times
        (pets / "train" / f"{NAMES[i]}.png").write_bytes((pets / "train" / f"{NAMES[12 + i % 6]}.png").read_bytes())
    labels = {name: LABELS[12 + i % 6 if i > 11 else i] for i, name in enumerate(NAMES)}
    rows = [(name, label, f"p{i // 2}" if i < 12 else "") for i, (name, label) in enumerate(labels.items())]
    data = load_data(str(write(pets / "labels.csv", ("id", "label", "patient"), *rows)))
    where = {}
    for part, images in data.parts.items():
        for identity in images.ids:
            where.setdefault(identity, {*()}).add(part)
    assert len(where) == 18 and all(len(parts) == 1 for parts in where.values())
    assert any("6 groups, held out as a whole; 18 images in no group" in note for note in data.notes)


def test_what_a_label_is(pets):
    def classes(header: tuple, *columns: list) -> tuple[str, ...]:
        return load_data(str(write(pets / "labels.csv", header, *zip(NAMES, *columns, strict=True)))).classes

    numbers, flags = [[10, 2, 1][i % 3] for i in range(30)], [[int(i % 3 == k) for i in range(30)] for k in range(3)]
    assert classes(("id", "level"), numbers) == ("1", "2", "10")
    assert classes(("id", "class_id", "class_name"), numbers, LABELS) == tuple(sorted(COLORS))  # they mean the same
    assert classes(("id", "Roi.Y1", "ClassId"), list("1234567890") * 3, numbers) == ("1", "2", "10")  # as in GTSRB
    places = [[i / 7 for i in range(30)]] * 2
    assert classes(("id", "x1", "x2", "site", "y"), *places, list("nns") * 10, LABELS) == tuple(sorted(COLORS))
    assert classes(("id", "x", "y", "kind"), list("12345") * 6, list("54321") * 6, LABELS) == tuple(sorted(COLORS))
    assert classes(("image", "MEL", "NV", "BCC", "sex"), *flags, list("mf") * 15) == ("BCC", "MEL", "NV")
    assert classes(("id", "food_group"), LABELS) == classes(("id", "object"), LABELS) == tuple(sorted(COLORS))
    assert classes(("tile", "x", "y", "result"), numbers, [i // 6 for i in range(30)], LABELS) == tuple(sorted(COLORS))
    assert classes(("image", "fold", "grade"), [i // 6 for i in range(30)], LABELS) == tuple(sorted(COLORS))
    assert classes(("image", "car", "train", "bus"), *flags) == ("bus", "car", "train")
    for marks in ("01", ("False", "True"), ("no", "Yes"), ("0.0", "1.0")):
        marked = [[marks[flag] for flag in column] for column in flags]
        assert classes(("image", "MEL", "NV", "BCC"), *marked) == ("BCC", "MEL", "NV")
        others = [marks[not flag] for flag in flags[0]]
        assert classes(("image", "cat", "dog"), [marks[flag] for flag in flags[0]], others) == ("cat", "dog")
    for header, columns, reason in (
        (("image", "cat", "dog", "bird"), [flags[0], flags[0], flags[2]], "several labels"),
        (("image", "Finding Labels"), [["a", "b", "a|b"] * 10], "several labels"),
        (("image", "tags"), [["a", "b", "a b"] * 10], "several labels"),
        (("image", "price"), [[i / 7 for i in range(30)]], "'price'"),
        (("image", "label"), [["red"] * 30], "one class only"),
        (("image", "object", "color"), [["cup", "jar"] * 15, LABELS], "several columns may be the label"),
        (
            ("image", "quality_class", "blur", "glare"),
            [list("123") * 10, flags[0], [1 - x for x in flags[0]]],
            "several",
        ),
        (("image", "kind", "male", "female"), [LABELS, flags[0], [1 - x for x in flags[0]]], "several columns may be"),
        (("image", "note"), [[""] * 30], "no labelled training image"),
        (("image", "kfold"), [numbers], "no column repeats"),
        (("image", "class_confidence", "grade"), [["high", "low"] * 15, LABELS], "several columns may be"),
        (("image", "choice"), [["a", "b", '{"choices": ["a", "b"]}'] * 10], "several labels"),
        (("image", "attribute_ids"), [["51", "7 9", "51 79"] * 10], "several labels"),
    ):
        with pytest.raises(ValueError, match=reason):
            classes(header, *columns)
    before = load_data(str(write(pets / "labels.csv", ("id", "label"), *ROWS))).content
    assert load_data(str(write(pets / "labels.csv", ("id", "label"), ("000", "red"), *ROWS[1:]))).content != before


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("pets.zip", b"PK", "unpack it"),
        ("pets.tar.gz", b"", "unpack it"),
        ("labels.xlsx", b"PK", "save a table as CSV"),
        ("labels.csv", "é,1\n".encode("latin-1"), "UTF-8"),
        ("labels.csv", b"", "no table"),
        ("labels.csv", bytes(range(128)), "labels.csv"),
        ("labels.csv", b"a.png,x\nb.png,y\nc.png,x\nd.png,y\n", "no column names image files"),
        ("labels.csv", None, "no table"),
    ],
)
def test_what_is_no_table(train, tmp_path, name, content, reason):
    (tmp_path / "x").mkdir()
    if content is not None:
        (tmp_path / "x" / name).write_bytes(content)
    code, _, err = train(tmp_path / "x" / name)
    assert code == 2 and reason in err and err.count("\n") == 1


def test_masks_of_the_names_in_the_table(tmp_path):
    for i, name in enumerate(NAMES):
        for folder in ("images", "lung_masks"):
            draw(tmp_path / "x" / folder / f"{name}.png", (9, 9, 9), seed=i)
    data = load_data(str(write(tmp_path / "x" / "labels.csv", ("id", "label"), *ROWS)))
    assert all(name.startswith("images/") for images in data.parts.values() for name in images.names)


def test_lists_beside_masks(tmp_path):
    """As in Oxford-IIIT Pet: a list with comments in annotations/, images in images/, masks of the same names."""
    for i, (name, label) in enumerate(ROWS):
        draw(tmp_path / "images" / f"{label}_{name}.jpg", COLORS[label], seed=i)
        draw(tmp_path / "annotations" / "trimaps" / f"{label}_{name}.png", (0, 0, 0), seed=i)
    lines = [f"{label}_{name} {i % 3 + 1} {i % 2}" for i, (name, label) in enumerate(ROWS)]
    table = tmp_path / "annotations" / "list.txt"
    table.write_text("\n".join(["#Image CLASS KIND", "#comment", *lines]))
    with pytest.raises(ValueError, match=r"'1' \(blue_000\), '2' \(1\), '3' \(0\)"):
        load_data(str(table))
    data = load_data(str(table), columns=("1", "2"))
    assert data.classes == ("1", "2", "3") and all(name.startswith("images/") for name in data.train.names)


def test_a_table_without_a_usable_row_says_why(train, tmp_path):
    rows = []
    for i in range(4):
        draw(tmp_path / "images" / f"{i}.png", (9, 9, 9), seed=i)
        rows += [f"{i}.png,cat", f"{i}.png,dog"]
    (tmp_path / "two.csv").write_text("\n".join(["image,label", *rows]))
    code, _, err = train(tmp_path / "two.csv")
    assert code == 2 and "8 rows of two.csv not used" in err and err.count("\n") == 1
