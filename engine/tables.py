"""How does a table become labelled images? Which files do its rows name? (What its columns mean is in columns.py.)"""

import csv
import io
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mode

import torch

from engine.columns import UNLABELLED, Column, Find, Roles, find_roles, named_files
from engine.console import count_of, printable, some
from engine.folders import (
    DESCRIPTIONS,
    class_folders,
    describes,
    find_images,
    is_number,
    look_alikes,
    name_below,
    part_of,
    words_of,
)
from engine.images import Images, is_image_extension, is_image_file

TABLES = (".csv", ".tsv", ".tab", ".txt")
Source = tuple[tuple[str, ...], dict[str, Images], list[str]]  # classes, images by part, notes for the user


def read_table(table: Path, columns: Sequence[str] | None = None, known: Sequence[str] = ()) -> Source:
    """Reads a table of image files and labels. Raises OSError or ValueError if a guess could be wrong.

    `columns` are its image and its label column (1, 2... without a header), `known` the classes, if not to be found.
    """
    text = _read_text(table)
    files = _Files(table)
    try:
        cells, odd = _columns(text, files.find)
        roles = find_roles(cells, columns, known, files.find)
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from error
    found, skipped = _match(table, roles, files)
    notes, root = [f"{table.name}: {roles.summary}"], files.root
    if odd:
        notes[0] += f"; {count_of(odd, 'row')} with another number of columns not used"
    tops = {file: part_of(words_of(name_below(root, file).partition("/")[0])) for file in found}
    if "parts" not in roles.used and {"train"} < {*tops.values()} <= {"train", "val", "test"}:
        found = {file: (tops[file], *rest) for file, (_, *rest) in found.items()}
        notes.append("the folders of the images say which part they belong to")
    labelled = {label for part, label, _ in found.values() if part == "train"}
    trained = known or _classes(table, labelled, notes, skipped)
    classes, parts, images = {name: i for i, name in enumerate(trained)}, defaultdict(list), {}
    for file, (part, label, group) in sorted(found.items(), key=lambda each: str(each[0])):
        if label in classes:
            parts[part].append((file, classes[label], name_below(root, file), group))
        else:
            skipped[f"of a class that the training images lack, {printable(label)!r}"].append(file.name)
    for part, members in parts.items():
        items, labels, names, groups = map(list, zip(*members, strict=True))
        images[part] = Images(items, torch.tensor(labels), names, groups if "groups" in roles.used else None)
    notes += _not_used(table, skipped)
    if unnamed := len(files.images - found.keys()):
        notes.append(f"{count_of(unnamed, 'other image')} below {root} not used")
    return tuple(classes), images, notes


def _match(table: Path, roles: Roles, files: "_Files") -> tuple[dict[Path, tuple[str, str, str]], dict[str, list[str]]]:
    """The part, label and group of each file that the rows name, and the images of the rows not used, by reason."""
    meanings, found, skipped, spellings = defaultdict(list), {}, defaultdict(list), {}
    for value, label, part, group in zip(roles.images, roles.labels, roles.parts, roles.groups, strict=True):
        named = files.find(value, part if "parts" in roles.used else part_of(words_of(table.stem)))
        if part not in ("train", "val", "test"):
            skipped[f"of the part {printable(part)!r}"].append(value)
        elif not named:
            skipped["whose file is missing"].append(value)
        elif len(named) > 1:
            raise ValueError(f"{table}: {value!r} may be {named[0]} or {named[1]}: give its whole path")
        elif label in UNLABELLED:
            skipped[f"without a label{' in the test part' if part == 'test' else ''}"].append(value)
        else:
            same = re.sub(r"^0+(?=\d)|\.0+$", "", group.casefold())  # "012" is "12.0"
            meanings[named[0]].append((part, label, "" if group in UNLABELLED else spellings.setdefault(same, group)))
    for file, (first, *others) in meanings.items():
        if any(other[:2] != first[:2] for other in others):
            skipped["that give one file two labels or parts, of which none is taken"] += [file.name] * (1 + len(others))
            continue
        found[file] = first
        if others:
            again = "that repeat another" + ", in another group" * (len({first, *others}) > 1)
            skipped[again] += [file.name] * len(others)
    return found, skipped


def _not_used(table: Path, skipped: dict[str, list[str]]) -> list[str]:
    """A note on the rows that are not used, by reason, if there are any."""
    count = count_of(sum(map(len, skipped.values())), "row")
    reasons = ", ".join(f"{len(values)} {why} ({some(values)})" for why, values in skipped.items())
    return [f"{count} of {table.name} not used: {reasons}"] if skipped else []


def _classes(table: Path, names: set[str], notes: list[str], skipped: dict[str, list[str]]) -> list[str]:
    """The labels as classes: numbers in their order, other names in that of the alphabet. Notes what looks odd."""
    if len(names) < 2:
        given = f"one class only, {next(iter(names))!r}" if names else "no labelled training image"
        reasons = [*notes, *_not_used(table, skipped)]
        raise ValueError("; ".join([f"{table} has {given}: a classifier needs two classes or more", *reasons]))
    for name in sorted(names):
        pieces = [piece for piece in re.split(r"[|;,\s\[\]'\"]+", name) if piece]
        listed = name[0] + name[-1] in ("[]", "{}") or name.replace(" ", "").isdecimal()
        if "|" in name or (len(pieces) > 1 and (listed or {*pieces} <= names)):
            raise ValueError(f"{table}: {name!r} is several labels; this project gives an image one label")
    notes += look_alikes(sorted(names))
    return sorted(sorted(names), key=float if all(map(is_number, names)) else str)


class _Files:
    """The image files that a table may name: those below its folder, or beside annotations/ if that is its folder."""

    def __init__(self, table: Path):
        self.folder = table.parent
        self.root = self.folder.parent if set() < words_of(self.folder.name) <= DESCRIPTIONS else self.folder
        images = [p for p in self.root.iterdir() if p.is_file() and is_image_file(str(p), p.suffix.lower())]
        for folder in class_folders(self.root)[0].values():
            images += find_images(folder)[0]
        masks = {path for path in images if any(map(describes, map(words_of, self._folders(path))))}
        self.images = {*images} - masks or masks
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for path in sorted(self.images, key=str):
            self.by_name[_key(path.name)].append(path)
            self.by_stem[_key(path.stem)].append(path)

    def find(self, value: str, part: str | None = None) -> list[Path]:
        """The files that a value may mean, with or without an extension; of several, those in the folder of a part."""
        path = value.replace("\\", "/")
        if value and os.path.isfile(direct := os.path.normpath(self.folder / path)):
            return [Path(direct)]
        *folders, name = [_key(step) for step in path.split("/") if step not in ("", ".", "..")] or [""]
        found = self.by_name.get(name) or self.by_stem.get(name, [])
        elsewhere = path.startswith(("/", "..")) or path[1:2] == ":" or "://" in path  # there its last folders count
        least = 0 if elsewhere else len(folders)
        for count in range(len(folders), least - 1, -1):
            end = folders[len(folders) - count :]
            if fitting := [p for p in found if [*map(_key, p.parts[-1 - count : -1])] == end]:
                break
        if len(fitting) > 1:
            words = {p: [*map(words_of, self._folders(p))] for p in fitting}
            fitting = [p for p in fitting if not DESCRIPTIONS & set().union(*words[p])] or fitting
            fitting = [p for p in fitting if part in map(part_of, words[p])] or fitting
            fitting = [p for p in fitting if p.name == path.split("/")[-1]] or fitting  # not in the other case
        return fitting

    def _folders(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.root).parts[:-1]


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _read_text(table: Path) -> str:
    """The text of a table in UTF-8, or in UTF-16 with its mark, without the comments at its beginning."""
    if not table.exists():
        raise FileNotFoundError(f"no table {table}")
    if table.suffix.lower() not in TABLES:
        raise ValueError(f"{table} is no folder and no table: if it is an archive, unpack it, or save a table as CSV")
    content = table.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8: save it as CSV in UTF-8") from error
    return re.sub(r"\A(#.*\n){2,}", "", text)  # one such line may be a header


def _parse(text: str, delimiter: str) -> tuple[list[Column], int]:
    """The columns of the rows of the most frequent width, if that is two or more, and the number of other rows."""
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        rows = map(str.split, text.splitlines()) if delimiter == " " else rows
        rows = [cells for row in rows if any(cells := [cell.strip() for cell in row])]
    except csv.Error:
        rows = []
    width = mode(map(len, rows or [[]]))
    fitting = [row for row in rows if len(row) == width > 1]
    columns = [Column(str(i), cells) for i, cells in enumerate(zip(*fitting, strict=True), 1)]
    return columns, len(rows) - len(fitting)


def _columns(text: str, find: Find) -> tuple[list[Column], int]:
    """The columns, separated by what names most files, and the number of rows of another width."""
    readings = [_parse(text, delimiter) for delimiter in (",", "\t", ";", " ")]
    columns, odd = max(readings, key=lambda r: max((len({*files}) for files in named_files(r[0], find)), default=-1))
    files = any(find(column.cells[0]) or is_image_extension(Path(column.cells[0]).suffix) for column in columns)
    if not files and not any(c.cells[0] and c.cells[0] in c.cells[1:] for c in columns):  # the first row is a header
        columns = [Column(c.cells[0].lstrip("# ") or c.name, c.cells[1:]) for c in columns]
    if not any(column.cells for column in columns):
        raise ValueError("no table: it needs a column of image files and one of labels")
    return columns, odd
