"""Is it an image folder or a table? What main_train.py trains on, and what inference.py --evaluate compares with."""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from engine.folders import PHOTOS, labelled_images, name_below, not_used, part_of, read_folder, words_of
from engine.groups import matched_groups
from engine.images import Images
from engine.tables import TABLES, Source, read_table


def read_source(source: Path, columns: Sequence[str] | None = None, grouped: bool = False) -> Source:
    """Reads an image folder or a table. Raises OSError or ValueError if it is neither."""
    if source.is_file() or (source.suffix.lower() in TABLES and not source.is_dir()):
        return read_table(source, columns)
    if columns:
        raise ValueError(f"--columns is for a table; {source} is none")
    try:
        classes, parts, notes = read_folder(source, grouped)
    except ValueError as error:
        for advice, _ in _tables_in(source):
            raise ValueError(f"{str(error).partition('; a data set looks like this')[0]}; {advice}") from error
        raise
    if all(words_of(name) & PHOTOS for name in classes):  # as images_1/ and images_2/, or cat_images/ and dog_images/
        for advice, images in _tables_in(source):
            if len({*zip(map(os.path.dirname, images.names), images.labels.tolist(), strict=True)}) > len(classes):
                raise ValueError(f"the folders in {source} seem to be no classes; {advice}")
    return classes, parts, notes


def _tables_in(folder: Path) -> Iterator[tuple[str, Images]]:
    """How to use each table in a folder, or in a folder in it, and its images; tables of test images come last."""
    patterns = ("*.csv", "*.tsv", "*.txt", "*/*.csv", "*/*.tsv")
    tables = islice((table for pattern in patterns for table in sorted(folder.glob(pattern))), 8)
    for table in sorted(tables, key=lambda table: part_of(words_of(name_below(folder, table))) in ("val", "test")):
        with suppress(OSError, ValueError):
            images = Images.joined(read_table(table)[1].values())
            yield f"{table.name} may hold the labels: python main_train.py --data {shlex.quote(str(table))}", images


def read_labelled(
    source: Path, classes: tuple[str, ...], columns: Sequence[str] | None, groups: str | None
) -> tuple[Images, list[str]]:
    """The images of these classes in a folder or a table, or in the table's test part if it has one, and notes.

    `columns` and `groups` are those of the training, which count if they fit. Raises OSError or ValueError.
    """
    if source.is_dir():
        images, skipped = labelled_images(source, classes, source)
        notes = [not_used(skipped)] if skipped.total() else []
    else:
        _, parts, notes = read_table(source, columns, classes)
        if not parts:
            raise ValueError("; ".join([f"{source} has no image of a class that the model knows", *notes]))
        images = parts.get("test") or Images.joined(parts.values())
        if "test" in parts:
            notes.append(f"only the test part of {source.name} is used")
    if groups and len(images):
        try:
            images.groups = matched_groups(images.names, groups)
        except ValueError as error:
            notes.append(f"{error}: intervals are those of {'the groups of the table' if images.groups else 'images'}")
    return images, notes
