"""How does a table become labelled images? Which column names the files, which ones the labels, parts and groups?"""

import csv
import io
import os
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path

import torch

from engine.console import count_of, printable
from engine.folders import (
    DESCRIPTIONS,
    PICTURES,
    Images,
    class_folders,
    find_images,
    name_below,
    part_of,
    read_folder,
    words_of,
)
from engine.images import is_image_extension, is_image_file

TABLES = (".csv", ".tsv", ".tab", ".txt")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
# words in the names of columns
IMAGE = {"file", "filename", "filenames", "filepath", "filepaths", "id", "image", "images", "img", "path", "photo"}
LABEL = {"breed", "category", "class", "classes", "classname", "cultivar", "diagnosis", "disease", "dx", "finding"}
LABEL |= {"genus", "label", "labels", "species", "target", "variety", "y"}
SPLIT = {"split", "subset", "partition"}
GROUP = ("patient", "subject", "group", "object")  # the first that there is

Source = tuple[tuple[str, ...], dict[str, Images], list[str]]  # classes, images by part, notes for the user


def read_source(source: Path, columns: Sequence[str] | None = None) -> Source:
    """Reads an image folder or a table. Raises OSError or ValueError if it is neither."""
    if source.is_file() or (source.suffix.lower() in TABLES and not source.is_dir()):
        return read_table(source, columns)
    if columns:
        raise ValueError(f"--columns is for a table; {source} is none")
    try:
        classes, parts, notes = read_folder(source)
    except ValueError as error:
        reason = str(error).partition("; a data set looks like this")[0]
        if tables := _tables_in(source):
            raise ValueError(f"{reason}; {_advice(tables[0])}") from error
        raise
    if all(words_of(name) & PICTURES for name in classes):  # as images_1/ and images_2/, or cat_images/ and dog_images/
        for table in _tables_in(source):
            images = Images.joined(read_table(table)[1].values())
            if len({*zip(map(os.path.dirname, images.names), images.labels.tolist(), strict=True)}) > len(classes):
                raise ValueError(f"the folders in {source} seem to be no classes; {_advice(table)}")
    return classes, parts, notes


def _advice(table: Path) -> str:
    return f"{table.name} may hold the labels: python main_train.py --data {shlex.quote(str(table))}"


def _tables_in(folder: Path) -> list[Path]:
    """The tables in a folder, or in a folder in it, that give labels to images; those of test images come last."""
    found, patterns = [], ("*.csv", "*.tsv", "*.txt", "*/*.csv", "*/*.tsv")
    for path in islice((path for pattern in patterns for path in sorted(folder.glob(pattern))), 8):
        with suppress(OSError, ValueError):
            read_table(path)
            found.append(path)
    return sorted(found, key=lambda table: part_of(words_of(name_below(folder, table))) in ("val", "test"))


def read_table(table: Path, columns: Sequence[str] | None = None, known: Sequence[str] = ()) -> Source:
    """Reads a table that names image files and their labels.

    `columns` are the names of its image column and its label column, which are otherwise found; without a header they
    are called 1, 2, 3... `known` are the classes, otherwise those of its training images.
    Raises OSError or ValueError if it cannot be read, or if a guess could be wrong.
    """
    rows = _Table(table, columns, known)
    found, skipped = _match(rows)
    notes, root = [rows.summary()], rows.files.root
    tops = {file: part_of(words_of(name_below(root, file).partition("/")[0])) for file in found}
    if rows.split is None and len({*tops.values()}) > 1 and {"train"} <= {*tops.values()} <= {"train", "val", "test"}:
        found = {file: (tops[file], *rest) for file, (_, *rest) in found.items()}
        notes.append("the folders of the images say which part they belong to")
    trained = known or _classes(table, {label for part, label, _ in found.values() if part == "train"}, notes)
    classes, parts = {name: i for i, name in enumerate(trained)}, defaultdict(list)
    for file, (part, label, group) in sorted(found.items(), key=lambda each: str(each[0])):
        if label in classes:
            parts[part].append((file, classes[label], name_below(root, file), group))
        else:
            skipped[f"of a class that the training images lack, {printable(label)!r}"].append(file.name)
    images = {}
    for part, members in parts.items():
        items, labels, names, groups = map(list, zip(*members, strict=True))
        images[part] = Images(items, torch.tensor(labels), names, groups if rows.group is not None else None)
    if skipped:
        count = count_of(sum(map(len, skipped.values())), "row")
        reasons = ", ".join(f"{len(values)} {why} ({_some(values)})" for why, values in skipped.items())
        notes.append(f"{count} of {table.name} not used: {reasons}")
    if unnamed := len(rows.files.images - found.keys()):
        notes.append(f"{count_of(unnamed, 'other image')} below {root} not used")
    return tuple(classes), images, notes


def labelled_rows(table: Path, classes: tuple[str, ...], columns: Sequence[str] | None) -> tuple[Images, list[str]]:
    """The images of a table that have one of these classes, and notes. If the table has a test part, only that.

    `columns` are those of the table that was used for training, which count if this one has them, too.
    """
    _, parts, notes = read_table(table, columns, classes)
    if not parts:
        raise ValueError("; ".join([f"{table} has no image of a class that the model knows", *notes]))
    if "test" in parts:
        notes.append(f"only the test part of {table.name} is used")
    return parts["test"] if "test" in parts else Images.joined(parts.values()), notes


def _match(rows: "_Table") -> tuple[dict[Path, tuple[str, str, str]], dict[str, list[str]]]:
    """The part, label and group of each file that the rows name, and what is in the rows that are not used, by reason.

    A row without a group is a group of its own.
    """
    meanings, skipped = defaultdict(list), defaultdict(list)
    for value, label, part, group in zip(rows.values, rows.labels, rows.parts, rows.groups, strict=True):
        files = rows.files.find(value, part if rows.split is not None else part_of(words_of(rows.path.stem)))
        if part not in ("train", "val", "test"):
            skipped[f"of the part {printable(part)!r}"].append(value)
        elif not files:
            skipped["whose file is missing"].append(value)
        elif len(files) > 1:
            raise ValueError(f"{rows.path}: {value!r} may be {files[0]} or {files[1]}: name its folder, too")
        elif label.lower() in ("", "nan"):
            skipped[f"without a label{' in the test part' if part == 'test' else ''}"].append(value)
        else:
            meanings[files[0]].append((part, label, group or value))
    for file, several in meanings.items():
        if len({meaning[:2] for meaning in several}) > 1:
            skipped["that give one file two labels or parts, of which none is taken"] += [file.name] * len(several)
        elif len(several) > 1:
            skipped["that repeat another"] += [file.name] * (len(several) - 1)
    return {f: several[0] for f, several in meanings.items() if len({one[:2] for one in several}) == 1}, skipped


def _classes(table: Path, names: set[str], notes: list[str]) -> list[str]:
    """The labels as classes: numbers in their order, other names in that of the alphabet. Notes what looks odd."""
    if len(names) < 2:
        given = f"one class only, {next(iter(names))!r}" if names else "no labelled training image"
        raise ValueError("; ".join([f"{table} has {given}: a classifier needs two classes or more", *notes]))
    for name in names:
        pieces = [piece for piece in re.split(r"[|;,\s\[\]'\"]+", name) if piece]
        if "|" in name or (len(pieces) > 1 and {*pieces} <= names):
            raise ValueError(f"{table}: {name!r} is several labels; this project gives an image one label")
    spellings = defaultdict(set)
    for name in names:
        spellings[float(name) if _is_number(name) else name.casefold()].add(name)
    if alike := [" and ".join(sorted(each)) for each in spellings.values() if len(each) > 1]:
        notes.append(f"classes that look the same: {', '.join(alike)}")
    return sorted(names, key=(lambda name: (float(name), name)) if all(map(_is_number, names)) else str)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", text) is not None


def _some(values: Sequence[str], count: int = 3) -> str:
    """The first values, for a message."""
    return ", ".join(map(printable, values[:count])) + (", ..." if len(values) > count else "")


class _Files:
    """The image files that a table may name: those below its folder."""

    def __init__(self, table: Path):
        self.folder = table.parent
        self.root = self.folder.parent if set() < words_of(self.folder.name) <= DESCRIPTIONS else self.folder
        loose = [Path(entry.path) for entry in os.scandir(self.root) if entry.is_file()]
        images = [path for path in loose if is_image_file(str(path), path.suffix.lower())]
        for folder in class_folders(self.root)[0].values():
            images += find_images(folder)[0]
        self.images = {path for path in images if not self._describes(path)} or {*images}
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for path in sorted(self.images, key=str):
            self.by_name[_key(path.name)].append(path)
            self.by_stem[_key(path.stem)].append(path)

    def _describes(self, path: Path) -> bool:
        """Whether the image is a mask, as in annotations/trimaps."""
        return any(words_of(folder) & DESCRIPTIONS for folder in path.relative_to(self.root).parts[:-1])

    def find(self, value: str, part: str | None = None) -> list[Path]:
        """The files that a value of the table may mean. Its folders count, its extension may be missing.

        Of equal names in several folders, `part` decides: "train" means the one in train/ or train_images/.
        """
        path = value.replace("\\", "/")
        if value and os.path.isfile(direct := os.path.normpath(self.folder / path)):
            return [Path(direct)]
        steps = [_key(step) for step in path.split("/") if step not in ("", ".", "..")][::-1]
        found = (self.by_name.get(steps[0]) or self.by_stem.get(steps[0]) or []) if steps else []
        shared = [1 + _shared(steps[1:], [*map(_key, path.parts[-2::-1])]) for path in found]
        elsewhere = path.startswith(("/", "..")) or path[1:2] == ":"  # of another machine: its last folders count
        needed = max(shared, default=0) if elsewhere else len(steps)
        found = [path for path, length in zip(found, shared, strict=True) if length >= needed]
        if len(found) > 1:
            inside = [{part_of(words_of(step)) for step in path.relative_to(self.root).parts[:-1]} for path in found]
            found = [path for path, parts in zip(found, inside, strict=True) if part in parts] or found
        return found


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """How many elements at the beginning are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class _Table:
    """The rows of a table, and what its columns mean. Columns are numbers from 0, their names those of the header."""

    def __init__(self, path: Path, columns: Sequence[str] | None, known: Sequence[str]):
        text = _read_text(path)
        self.path, self.files, self.known = path, _Files(path), {*known}
        self.rows, self.names, self.odd, most = [], [], 0, 0  # `odd` rows have another number of columns
        for delimiter in (",", "\t", ";", " "):  # the right one is the one that shows the most file names
            rows = _parse(text, delimiter)
            width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
            fitting = [row for row in rows if len(row) == width]
            found = max((len({*self._named(fitting, column)} - {None}) for column in range(width)), default=0)
            if width > 1 and (found > most or not self.rows):
                self.rows, self.odd, most = fitting, len(rows) - len(fitting), found
        self._take_header()
        if not self.rows:
            raise ValueError(f"{path} is no table: it needs a column of image files and one of labels")
        if known and not {*(columns or ())} <= {*self.names}:
            columns = None
        self.image, label = map(self._column, columns) if columns else (self._image_column(), None)
        self.split = self._split_column([c for c in range(len(self.names)) if c not in (self.image, label)])
        others = [c for c in range(len(self.names)) if c not in (self.image, self.split)]
        self.labels, self.label = self._labels(others) if label is None else (self._values(label), self.names[label])
        keys = {re.sub("[^a-z]", "", self.names[c].lower()): c for c in others if self.names[c] != self.label}
        self.group = next(
            (keys[name + end] for name in GROUP for end in ("", "id", "name") if name + end in keys), None
        )
        self.values = self._values(self.image)
        self.groups = [""] * len(self.rows) if self.group is None else self._values(self.group)
        self.parts = ["train"] * len(self.rows)
        if self.split is not None:
            self.parts = [part_of({value.lower()}) or value for value in self._values(self.split)]

    def summary(self) -> str:
        """Which columns are used."""
        used = {"images": self.names[self.image], "labels": self.label}
        used |= {what: self.names[c] for what, c in (("parts", self.split), ("groups", self.group)) if c is not None}
        odd = f"; {count_of(self.odd, 'row')} with another number of columns not used" if self.odd else ""
        return f"{self.path.name}: {', '.join(f'{what} from {name!r}' for what, name in used.items())}{odd}"

    def _values(self, column: int) -> list[str]:
        return [row[column] for row in self.rows]

    def _named(self, rows: list[list[str]], column: int) -> list[Path | None]:
        """The files that a sample of a column's values names."""
        found = (self.files.find(row[column]) for row in rows[:: max(1, len(rows) // 500)])
        return [files[0] if files else None for files in found]

    def _take_header(self) -> None:
        """The first row is a header if it names no image and no value of it is repeated in its column."""
        first, *rest = self.rows or [[]]
        files = any(self.files.find(cell) or is_image_extension(Path(cell).suffix) for cell in first)
        if files or any(cell and cell in {row[i] for row in rest} for i, cell in enumerate(first)):
            self.names = [str(i + 1) for i in range(len(first))]
        else:
            self.names, self.rows = [cell.lstrip("# ") or str(i + 1) for i, cell in enumerate(first)], rest

    def _column(self, name: str) -> int:
        if self.names.count(name) != 1:
            raise self._unclear(f"--columns: no column {name!r}")
        return self.names.index(name)

    def _image_column(self) -> int:
        named = [self._named(self.rows, column) for column in range(len(self.names))]
        counts = [len({*files} - {None}) for files in named]
        most = max(counts)
        if not most:
            raise self._unclear(f"no column names image files below {self.files.root}")
        rivals = [column for column, count in enumerate(counts) if 2 * count > most]
        if any(named[column] != named[rivals[0]] for column in rivals):
            rivals = [column for column in rivals if words_of(self.names[column]) & IMAGE]
            if len(rivals) != 1:
                raise self._unclear("several columns may name the images")
        return rivals[0]

    def _split_column(self, others: list[int]) -> int | None:
        for column in others:
            values = {value.lower() for value in self._values(column)} - {""}
            known = {part_of({value}) for value in values}
            named = words_of(self.names[column]) & SPLIT
            if (known and None not in known) or ("train" in known and named):
                return column
            if named and values:
                where, some = f"{self.path}: {self.names[column]!r}", _some(sorted(values))
                raise ValueError(f"{where} should say train, val or test, not {some}: correct it or rename the column")
        return None

    def _labels(self, others: list[int]) -> tuple[list[str], str]:
        """The label of each row, and the name of its column."""
        values = {column: self._values(column) for column in others}
        candidates = [c for c in others if 2 * len({*values[c]}) <= len(self.rows) or self.known & {*values[c]}]
        candidates = [c for c in candidates if self.known & {*values[c]}] or candidates
        named = [c for c in candidates if words_of(self.names[c]) & LABEL]
        exact = [c for c in named if self.names[c].lower() in LABEL]
        plain = [c for c in candidates if not words_of(self.names[c]) & {*GROUP} and len({*values[c]}) > 1]
        flags = [c for c in others if {*values[c]} <= {"0", "1", "0.0", "1.0"}]
        if not named and len(flags) > 1:
            marked = [[self.names[c] for c in flags if float(row[c])] for row in self.rows]
            if all(len(names) == 1 for names in marked):
                return [name for [name] in marked], f"{self.names[flags[0]]} to {self.names[flags[-1]]}"
            raise self._unclear("an image has several labels, or none; this project needs one for each")
        chosen = named or plain or candidates
        if len(chosen) > 1 and all(_same_meaning(values[chosen[0]], values[c]) for c in chosen):  # a number and a name
            chosen = [min(chosen, key=lambda c: all(map(_is_number, values[c])))]
        elif len(chosen) > 1 and len(exact) == 1:
            chosen = exact
        if len(chosen) == 1:
            return values[chosen[0]], self.names[chosen[0]]
        raise self._unclear("several columns may be the label" if chosen else "no column repeats a few labels")

    def _unclear(self, reason: str) -> ValueError:
        columns = [f"{name!r} ({printable(cell[:30])})" for name, cell in zip(self.names, self.rows[0], strict=True)]
        return ValueError(
            f"{self.path}: {reason}. Its columns: {_some(columns, 12)}. --columns IMAGE LABEL names the right ones"
        )


def _same_meaning(a: list[str], b: list[str]) -> bool:
    """Whether two columns stand for each other, one to one."""
    return len({*a}) == len({*b}) == len({*zip(a, b, strict=True)})


def _read_text(table: Path) -> str:
    """The text of a table in UTF-8, or in UTF-16 with its mark."""
    if not table.exists():
        raise FileNotFoundError(f"no table {table}")
    if table.name.lower().endswith(ARCHIVES):
        raise ValueError(f"{table} is an archive: unpack it, and use the folder")
    if table.suffix.lower() not in TABLES:
        raise ValueError(f"{table} is no folder and no table: save a table as CSV, with the ending .csv")
    content = table.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8: save it as CSV in UTF-8") from error
    lines = text.splitlines(keepends=True)
    comments = list(takewhile(lambda line: line.startswith("#"), lines))  # one such line may be a header
    return "".join(lines[len(comments) :]) if len(comments) > 1 else text


def _parse(text: str, delimiter: str) -> list[list[str]]:
    """The rows with any content, as cells without spaces around them. Empty if this is not the delimiter."""
    if delimiter == " ":
        return [cells for line in text.splitlines() if (cells := line.split())]
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        return [cells for row in rows if any(cells := [cell.strip() for cell in row])]
    except csv.Error:
        return []
