"""How does a table become labelled images? Which column names the files, which ones the labels, parts and groups?"""

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

from engine.console import count_of, printable
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
# words in the names of columns
IMAGE = {"file", "filename", "filenames", "filepath", "filepaths", "id", "image", "images", "img", "path", "photo"}
LABEL = {"breed", "category", "class", "classes", "classname", "cultivar", "diagnosis", "disease", "dx", "finding"}
LABEL |= {"genus", "label", "labels", "species", "target", "variety"}
ABOUT = {"confidence", "pred", "predicted", "prediction", "quality", "score", "source"}  # with LABEL: no label itself
NEVER = {"fold", "folds", "height", "kfold", "width"}  # repeat few values, but are no labels
SPLIT = {"split", "subset", "partition"}
NUMBERS = {"0": "train", "1": "val", "2": "test"}  # as in CelebA, Waterbirds and WILDS
GROUP = [name + end for name in ("patient", "subject", "group", "object") for end in ("", "id", "name")]
GROUP += ["patientno", "patientnr", "patientnumber", "idpatient", "pid", "donorid", "video", "slide", "wsi"]
GROUP += [name + "id" for name in ("individual", "lesion", "specimen", "case", "study", "slide", "person", "animal")]
GROUP += ["studyinstanceuid", *(name + "id" for name in ("video", "clip", "sequence", "seq", "series", "scene"))]
# may be a label, or one or several classes
VAGUE = ("group", "groupid", "groupname", "object", "objectid", "objectname", "personid", "animalid")
YES, NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}
UNLABELLED = {"", "nan", "NaN", "NAN", "NA", "N/A", "n/a", "#N/A", "<NA>"}  # "na", "none", "?" and "-" may be classes

Source = tuple[tuple[str, ...], dict[str, Images], list[str]]  # classes, images by part, notes for the user


def read_table(table: Path, columns: Sequence[str] | None = None, known: Sequence[str] = ()) -> Source:
    """Reads a table of image files and labels. Raises OSError or ValueError if a guess could be wrong.

    `columns` are its image and its label column (1, 2... without a header), `known` the classes, if not to be found.
    """
    rows = _Table(table, columns, known)
    found, skipped = _match(rows)
    notes, root = [rows.summary], rows.files.root
    tops = {file: part_of(words_of(name_below(root, file).partition("/")[0])) for file in found}
    if "parts" not in rows.used and {"train"} < {*tops.values()} <= {"train", "val", "test"}:
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
        images[part] = Images(items, torch.tensor(labels), names, groups if "groups" in rows.used else None)
    notes += _not_used(table, skipped)
    if unnamed := len(rows.files.images - found.keys()):
        notes.append(f"{count_of(unnamed, 'other image')} below {root} not used")
    return tuple(classes), images, notes


def _match(rows: "_Table") -> tuple[dict[Path, tuple[str, str, str]], dict[str, list[str]]]:
    """The part, label and group of each file that the rows name, and the images of the rows not used, by reason."""
    meanings, found, skipped, spellings = defaultdict(list), {}, defaultdict(list), {}
    for value, label, part, group in rows.rows:
        files = rows.files.find(value, part if "parts" in rows.used else part_of(words_of(rows.path.stem)))
        if part not in ("train", "val", "test"):
            skipped[f"of the part {printable(part)!r}"].append(value)
        elif not files:
            skipped["whose file is missing"].append(value)
        elif len(files) > 1:
            raise ValueError(f"{rows.path}: {value!r} may be {files[0]} or {files[1]}: give its whole path")
        elif label in UNLABELLED:
            skipped[f"without a label{' in the test part' if part == 'test' else ''}"].append(value)
        else:
            same = re.sub(r"^0+(?=\d)|\.0+$", "", group.casefold())  # "012" is "12.0"
            meanings[files[0]].append((part, label, "" if group in UNLABELLED else spellings.setdefault(same, group)))
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
    reasons = ", ".join(f"{len(values)} {why} ({_some(values)})" for why, values in skipped.items())
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


def _some(values: Sequence[str], count: int = 3) -> str:
    """The first values, for a message."""
    return ", ".join(map(printable, values[:count])) + (", ..." if len(values) > count else "")


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
        ends = [folders[start:] for start in range(len(folders) + 1 if elsewhere else 1)]
        fitting = ([p for p in found if [*map(_key, p.parts[-1 - len(end) : -1])] == end] for end in ends)
        found = next(filter(None, fitting), [])
        if len(found) > 1:
            found = [p for p in found if not DESCRIPTIONS & set().union(*map(words_of, self._folders(p)))] or found
            found = [path for path in found if part in map(part_of, map(words_of, self._folders(path)))] or found
            found = [file for file in found if file.name == path.split("/")[-1]] or found  # not in the other case
        return found

    def _folders(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.root).parts[:-1]


def _part_in(value: str) -> str | None:
    """The part that a cell names: "train", "Testing", "PublicTest"."""
    words = words_of(value) - {"public", "private", "set", "data", "images"}
    return "val" if words == {"dev"} else part_of(words) if len(words) == 1 else None


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class _Table:
    """The rows of a table, each as image, label, part and group, and the names of the columns that say so (`used`)."""

    def __init__(self, path: Path, columns: Sequence[str] | None, known: Sequence[str]):
        text = _read_text(path)
        self.path, self.files, self.known = path, _Files(path), {*known}
        readings = [_parse(text, delimiter) for delimiter in (",", "\t", ";", " ")]  # the right one names most files
        self.cells, odd = max(readings, key=lambda r: max((len({*files}) for files in self._named(r[0])), default=-1))
        files = any(self.files.find(first) or is_image_extension(Path(first).suffix) for first, *_ in self.cells)
        self.names = [str(i + 1) for i in range(len(self.cells))]
        if not files and not any(first and first in rest for first, *rest in self.cells):  # the first row is a header
            self.names = [column[0].lstrip("# ") or name for column, name in zip(self.cells, self.names, strict=True)]
            self.cells = [column[1:] for column in self.cells]
        if not any(self.cells):
            raise ValueError(f"{path} is no table: it needs a column of image files and one of labels")
        if known and not {*(columns or ())} <= {*self.names}:
            columns = None
        for name in columns or ():
            if self.names.count(name) != 1:
                raise self._unclear(f"--columns: no column {name!r}")
        image, label = map(self.names.index, columns) if columns else (self._image_column(), None)
        free = [c for c in range(len(self.names)) if c not in (image, label)]
        split, parts = self._parts(free)
        free = [c for c in free if c not in split]
        labels, named = self._labels(free) if label is None else (self.cells[label], [label])
        free = [c for c in free if c not in named]
        group = self._group(free, labels)
        used = {"images": [image], "labels": named, "parts": split, "groups": group}
        ends = {what: dict.fromkeys((each[0], each[-1])) for what, each in used.items() if each}
        self.used = {what: " to ".join(self.names[c] for c in each) for what, each in ends.items()}
        others = [repr(self.names[c]) for c in free if c not in group and any(self.cells[c])]
        self.summary = f"{path.name}: " + ", ".join(f"{what} from {name!r}" for what, name in self.used.items())
        if split and {*self.cells[split[0]]} - UNLABELLED == {*NUMBERS}:
            self.summary += "; 0, 1 and 2 are taken for train, val and test"
        self.summary += f"; columns not used: {_some(others, 8)}" if others else ""
        self.summary += f"; {count_of(odd, 'row')} with another number of columns not used" if odd else ""
        groups = self.cells[group[0]] if group else [""] * len(labels)
        self.rows = [*zip(self.cells[image], labels, parts, groups, strict=True)]

    def _named(self, columns: list[tuple[str, ...]]) -> list[list[Path]]:
        """The files that a sample of each column's values names."""
        samples = (values[:: max(1, len(values) // 500)] for values in columns)
        return [[path for value in sample for path in self.files.find(value)[:1]] for sample in samples]

    def _image_column(self) -> int:
        named = self._named(self.cells)
        if not any(named):
            raise self._unclear(f"no column names image files below {self.files.root}")
        counts = [len({*files}) for files in named]
        rivals = [column for column, count in enumerate(counts) if 2 * count > max(counts)]
        if any(named[column] != named[rivals[0]] for column in rivals):
            rivals = [column for column in rivals if words_of(self.names[column]) & IMAGE]
            if len(rivals) != 1:
                raise self._unclear("several columns may name the images")
        return rivals[0]

    def _squeezed(self, column: int) -> str:
        """The letters of a column's name: "patientid"."""
        return re.sub("[^a-z]", "", self.names[column].lower())

    def _parts(self, columns: list[int]) -> tuple[list[int], list[str]]:
        """The columns that say in which part each row is, such as "split" or "is_test", and what they say."""
        found, refused = defaultdict(list), []
        for column in [c for c in columns if not words_of(self.names[c]) & LABEL]:
            values, named = {*self.cells[column]} - UNLABELLED, bool(words_of(self.names[column]) & SPLIT)
            known = NUMBERS if named and values == {*NUMBERS} else {value: _part_in(value) for value in values}
            parts = {*known.values()} - {None}
            says_part = parts and None not in known.values()
            if named:
                says_part = says_part or "train" in parts  # rows of other parts are not used
            else:
                says_part = says_part and len(parts) > 1 and values == {*self.cells[column]}
            if says_part:
                # the best name counts: "split", then "original_split", then any other
                rank = (self.names[column].lower() not in SPLIT) + (not named)
                found[rank].append((column, [known.get(value) or value for value in self.cells[column]]))
            elif named and values:
                refused.append((column, values))
        if found:
            (column, parts), *others = found[min(found)]
            if any(rival != parts for _, rival in others):
                raise self._unclear("several columns may say which part an image is in: rename all but one")
            return [column], parts
        if refused:
            column, values = refused[0]
            where, some = f"{self.path}: {self.names[column]!r}", _some(sorted(values))
            raise ValueError(f"{where} should say train, val or test, not {some}: correct it or rename the column")
        words = {c: words_of(self.names[c]) for c in columns if {v.lower() for v in self.cells[c]} <= YES | NO}
        alone = {"train", "val", "test"} if any(words_of(name) & LABEL for name in self.names) else {*()}  # or a class
        words = {c: each for c, each in words.items() if each & {"is", "in"} or self.names[c].lower() in alone}
        flags = {c: part for c, each in words.items() if (part := part_of(each))}
        parts = ["test" if "train" in flags.values() else "train"] * len(self.cells[0])
        for column in reversed(flags):  # the first one counts
            parts = [flags[column] if v.lower() in YES else p for v, p in zip(self.cells[column], parts, strict=True)]
        return [*flags], parts

    def _labels(self, columns: list[int]) -> tuple[Sequence[str], list[int]]:
        """The label of each row, and the columns that it is from: several if each is a class, marked by 0 and 1."""
        words = {c: words_of(self.names[c]) for c in columns}
        places = [c for c in columns if self.names[c].lower() in ("x", "y") and all(map(is_number, self.cells[c]))]
        never = places if len(places) > 1 else []  # of tiles or boxes
        columns = [c for c in columns if c not in never and (words[c] & LABEL or not words[c] & NEVER)]
        values = {c: {*self.cells[c]} for c in columns}
        repeated = [c for c in columns if 2 * len(values[c]) <= len(self.cells[c])]
        candidates = [c for c in columns if self.known & values[c]] or repeated
        exact = [c for c in candidates if self.names[c].lower() in (*LABEL, "y")]
        named = [c for c in candidates if c in exact or (words[c] & LABEL and not words[c] & ABOUT)]
        clear = {*GROUP} - {*VAGUE}
        of_group = [c for c in candidates if self._squeezed(c) in clear or "patient" in words[c]]
        plain = [c for c in candidates if c not in of_group and len(values[c]) > 1]
        flags = [c for c in columns if {*map(str.lower, values[c])} <= YES | NO]
        rivals = [c for c in plain if c not in flags and not all(map(is_number, values[c] - UNLABELLED))]
        about = any(words[c] & LABEL for c in candidates)
        if not named and not about and len(flags) > (2 if rivals else 1):
            rows = range(len(self.cells[0]))
            marked = [[c for c in flags if self.cells[c][row].lower() in YES] for row in rows]
            if any(len(each) != 1 for each in marked):
                raise self._unclear("an image has several labels, or none; this project needs one for each")
            return [self.names[c] for [c] in marked], flags
        chosen = named or plain or candidates
        pairs = [{*zip(self.cells[chosen[0]], self.cells[c], strict=True)} for c in chosen]
        if all(len(values[chosen[0]]) == len(values[c]) == len(both) for c, both in zip(chosen, pairs, strict=True)):
            chosen = sorted(chosen, key=lambda c: all(map(is_number, values[c])))[:1]  # a name before its number
        elif len(exact) == 1:
            chosen = exact
        if len(chosen) == 1:
            return self.cells[chosen[0]], chosen
        raise self._unclear("several columns may be the label" if chosen else "no column repeats a few labels")

    def _group(self, columns: list[int], labels: Sequence[str]) -> list[int]:
        """The column of groups, if there is one. A "group" of whole classes is their name or a class of classes."""
        named = {self._squeezed(c): c for c in reversed(columns) if len({*self.cells[c]}) < len(labels)}
        for name in filter(named.__contains__, GROUP):
            groups = self.cells[named[name]]
            whole = len({*zip(labels, groups, strict=True)}) == len({*labels}) >= len({*groups})
            if not (whole and name in VAGUE):
                return [named[name]]
        return []

    def _unclear(self, reason: str) -> ValueError:
        columns = [f"{name!r} ({printable(cells[0][:30])})" for name, cells in zip(self.names, self.cells, strict=True)]
        advice = f"Its columns: {_some(columns, 12)}. --columns IMAGE LABEL names the right ones"
        return ValueError(f"{self.path}: {reason}. {advice}")


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


def _parse(text: str, delimiter: str) -> tuple[list[tuple[str, ...]], int]:
    """The columns of the rows of the most frequent width, if that is two or more, and the number of other rows."""
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        rows = map(str.split, text.splitlines()) if delimiter == " " else rows
        rows = [cells for row in rows if any(cells := [cell.strip() for cell in row])]
    except csv.Error:
        rows = []
    width = mode(map(len, rows or [[]]))
    fitting = [row for row in rows if len(row) == width > 1]
    return [*zip(*fitting, strict=True)], len(rows) - len(fitting)
