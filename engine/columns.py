"""Which columns of a table name the images, their labels, parts and groups?"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.console import printable, some
from engine.folders import SPLITS, is_number, part_of, words_of

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

Find = Callable[[str], list[Path]]


class Unclear(ValueError):
    """Columns may mean several things, or nothing."""


@dataclass(eq=False)
class Column:
    """A column of a table: its name, and a value for each row."""

    name: str
    cells: Sequence[str]

    @cached_property
    def words(self) -> frozenset[str]:
        return words_of(self.name)

    @cached_property
    def letters(self) -> str:
        return re.sub("[^a-z]", "", self.name.lower())

    @cached_property
    def values(self) -> set[str]:
        return {*self.cells}

    @cached_property
    def is_numeric(self) -> bool:
        values = self.values - UNLABELLED
        return bool(values) and all(map(is_number, values))

    @cached_property
    def flags(self) -> list[bool]:
        """Whether each row is marked, [] if the values are not 0 and 1, or the like."""
        return [cell.lower() in YES for cell in self.cells] if {*map(str.lower, self.values)} <= YES | NO else []


@dataclass
class Roles:
    """What each row of a table says."""

    images: Sequence[str]
    labels: Sequence[str]
    parts: Sequence[str]
    groups: Sequence[str]
    used: dict[str, str]  # from which columns: "images", "labels" and, if there are any, "parts" and "groups"
    summary: str  # the same for the user, and which columns are not used


def find_roles(columns: list[Column], chosen: Sequence[str] | None, known: Sequence[str], find: Find) -> Roles:
    """The roles of the columns. Raises ValueError if they may be others.

    `chosen` are the names of the image and the label column, `known` the classes, both if they are known. `find` gives
    the files that a value may mean.
    """
    names = [column.name for column in columns]
    if known and not {*(chosen or ())} <= {*names}:
        chosen = None  # it was meant for another table
    try:
        for name in chosen or ():
            if names.count(name) != 1:
                raise Unclear(f"--columns: no column {name!r}")
        image, label = [columns[names.index(n)] for n in chosen] if chosen else (_image_column(columns, find), None)
        free = [column for column in columns if column not in (image, label)]
        split, parts = _parts(free, len(image.cells), labelled=any(column.words & LABEL for column in columns))
        free = [column for column in free if column not in split]
        named, labels = ([label], label.cells) if label else _labels(free, {*known})
    except Unclear as error:
        shown = [f"{column.name!r} ({printable(column.cells[0][:30])})" for column in columns]
        advice = "--columns IMAGE LABEL names the right ones"
        raise ValueError(f"{error}. Its columns: {some(shown, 12)}. {advice}") from error
    free = [column for column in free if column not in named]
    group, groups = _groups(free, labels)
    free = [column for column in free if column not in group and any(column.cells)]
    roles = {"images": [image], "labels": named, "parts": split, "groups": group}
    ends = {role: dict.fromkeys((each[0].name, each[-1].name)) for role, each in roles.items() if each}
    used = {role: " to ".join(each) for role, each in ends.items()}
    summary = ", ".join(f"{role} from {name!r}" for role, name in used.items())
    if split and split[0].values - UNLABELLED == {*NUMBERS}:
        summary += "; 0, 1 and 2 are taken for train, val and test"
    if free:
        summary += f"; columns not used: {some([repr(column.name) for column in free], 8)}"
    return Roles(image.cells, labels, parts, groups, used, summary)


def named_files(columns: Sequence[Column], find: Find) -> list[list[Path]]:
    """The files that a sample of each column's values names."""
    samples = (column.cells[:: max(1, len(column.cells) // 500)] for column in columns)
    return [[path for value in sample for path in find(value)[:1]] for sample in samples]


def _image_column(columns: Sequence[Column], find: Find) -> Column:
    files = dict(zip(columns, named_files(columns, find), strict=True))
    most = max(len({*paths}) for paths in files.values())
    if not most:
        raise Unclear("no column names image files below its folder")
    rivals = [column for column, paths in files.items() if 2 * len({*paths}) > most]
    if any(files[column] != files[rivals[0]] for column in rivals):
        rivals = [column for column in rivals if column.words & IMAGE]
        if len(rivals) != 1:
            raise Unclear("several columns may name the images")
    return rivals[0]


def _parts(columns: Sequence[Column], rows: int, labelled: bool) -> tuple[list[Column], Sequence[str]]:
    """The columns that say in which part each row is, and the parts. `labelled`: a column is called label."""
    found, refused = defaultdict(list), []
    for column in [column for column in columns if not column.words & LABEL]:
        values, named = column.values - UNLABELLED, bool(column.words & SPLIT)
        known = NUMBERS if named and values == {*NUMBERS} else {value: _part_in(value) for value in values}
        parts, only_parts = {*known.values()} - {None}, bool(values) and None not in known.values()
        # a column that is called split may have other values, whose rows are not used; any other column only two parts
        says_part = only_parts and len(parts) > 1 and values == column.values
        if named:
            says_part = only_parts or "train" in parts
        if says_part:
            # the best name counts: "split", then "original_split", then any other
            rank = (column.name.lower() not in SPLIT) + (not named)
            found[rank].append((column, [known.get(value) or value for value in column.cells]))
        elif named and values:
            refused.append(f"{column.name!r} should say train, val or test, not {some(sorted(values))}")
    if found:
        (column, parts), *others = found[min(found)]
        if any(rival != parts for _, rival in others):
            raise Unclear("several columns may say which part an image is in: rename all but one")
        return [column], parts
    if refused:
        raise ValueError(f"{refused[0]}: correct it or rename the column")
    # "is_test"; "test" alone may be a class, unless another column is the label
    alone = SPLITS if labelled else ()
    named = [c for c in columns if c.flags and (c.words & {"is", "in"} or c.name.lower() in alone)]
    flags = {column: part for column in named if (part := part_of(column.words))}
    rest = "test" if "train" in flags.values() else "train"
    return [*flags], [next((p for c, p in flags.items() if c.flags[row]), rest) for row in range(rows)]


def _part_in(value: str) -> str | None:
    """The part that a cell names: "train", "Testing", "PublicTest"."""
    words = words_of(value) - {"public", "private", "internal", "external", "set", "data", "images"}
    return "val" if words == {"dev"} else part_of(words) if len(words) == 1 else None


def _labels(columns: Sequence[Column], known: set[str]) -> tuple[list[Column], Sequence[str]]:
    """The columns of the label, several if each is a class that is marked by 0 and 1, and the label of each row."""
    places = [c for c in columns if c.name.lower() in ("x", "y") and c.is_numeric]  # where tiles or boxes are
    columns = [c for c in columns if c not in places or len(places) == 1]
    columns = [c for c in columns if c.words & LABEL or not c.words & NEVER]
    repeated = [c for c in columns if 2 * len(c.values) <= len(c.cells)]
    candidates = [c for c in columns if known & c.values] or repeated
    exact = [c for c in candidates if c.name.lower() in (*LABEL, "y")]
    named = [c for c in candidates if c in exact or (c.words & LABEL and not c.words & ABOUT)]
    of_group = [c for c in candidates if c.letters in {*GROUP} - {*VAGUE} or "patient" in c.words]
    plain = [c for c in candidates if c not in of_group and len(c.values) > 1]
    marks = [c for c in columns if c.flags]
    rivals = [c for c in plain if not c.flags and not c.is_numeric]
    if not named and not any(c.words & LABEL for c in candidates) and len(marks) > (2 if rivals else 1):
        marked = [[c.name for c in marks if c.flags[row]] for row in range(len(marks[0].cells))]
        if any(len(names) != 1 for names in marked):
            raise Unclear("an image has several labels, or none; this project needs one for each")
        return marks, [name for [name] in marked]
    chosen = named or plain or candidates
    pairs = [{*zip(chosen[0].cells, c.cells, strict=True)} for c in chosen]
    if all(len(chosen[0].values) == len(c.values) == len(both) for c, both in zip(chosen, pairs, strict=True)):
        chosen = sorted(chosen, key=lambda c: c.is_numeric)[:1]  # a name before its number
    elif len(exact) == 1:
        chosen = exact
    if len(chosen) != 1:
        raise Unclear("several columns may be the label" if chosen else "no column repeats a few labels")
    return chosen, chosen[0].cells


def _groups(columns: Sequence[Column], labels: Sequence[str]) -> tuple[list[Column], Sequence[str]]:
    """The column of groups, if there is one, and the groups. A "group" of whole classes may be a class of classes."""
    named = {column.letters: column for column in reversed(columns) if len(column.values) < len(labels)}
    for name in filter(named.__contains__, GROUP):
        of_classes = len({*zip(labels, named[name].cells, strict=True)}) == len({*labels})  # as animals are, of cats
        if not (of_classes and name in VAGUE):
            return [named[name]], named[name].cells
    return [], [""] * len(labels)
