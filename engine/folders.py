"""How does a folder become labelled images? Which files below it are images, of which class, in which part?"""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.console import count_of, printable
from engine.images import is_image_file, unread_format

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
EXPECTED_TREE = """
    {root}/<class>/*.jpg          one folder for each class; the folder's name is the label
or
    {root}/train/<class>/*.jpg    training images
    {root}/test/<class>/*.jpg     test images of the same classes; if missing, 20% of train/ is held out
    {root}/val/<class>/*.jpg      validation images; if missing, 20% of the other training images are held out"""
SYSTEM_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
OUTPUTS = (".lock", "checkpoints/.lock", "*/checkpoints/.lock", "results.json", "features/*.features", "*_wrong.csv")
ENDS = 65_536  # bytes at the beginning and at the end of a compressed file, which identify it
UNCOMPRESSED = (".bmp", ".dib", ".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff")  # read as a whole
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}


@dataclass
class Images:
    """N images, as files or as one uint8 array (N, H, W, 3), and their labels, int64 (N,)."""

    items: list[Path] | np.ndarray
    labels: Tensor
    names: list[str]  # the path below the data set's folder, or the part and the number: "test 17"

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, indices: Tensor) -> "Images":
        chosen = indices.numpy()
        items = self.items[chosen] if isinstance(self.items, np.ndarray) else [self.items[i] for i in chosen]
        return Images(items, self.labels[indices], [self.names[i] for i in chosen])

    @classmethod
    def joined(cls, parts: Iterable["Images"]) -> "Images":
        parts = list(parts)
        items = [item for part in parts for item in part.items]
        return cls(items, torch.cat([part.labels for part in parts]), [name for part in parts for name in part.names])

    def paths(self) -> list[str]:
        """For each image the path of its file, or its name."""
        return [
            str(item) if isinstance(item, Path) else name for item, name in zip(self.items, self.names, strict=True)
        ]

    @cached_property
    def ids(self) -> list[str]:
        """For each image a hash of its pixels, or of its file. It follows the image, wherever the file is."""
        return [hashlib.blake2b(_identity(item), digest_size=16).hexdigest() for item in self.items]


def _identity(item: Path | np.ndarray) -> bytes | np.ndarray:
    if isinstance(item, np.ndarray):
        return np.ascontiguousarray(item)
    with suppress(OSError):  # the file is gone; reading it will raise an ImageError
        if item.is_file():  # opening a pipe would block
            with item.open("rb") as file:
                if item.suffix.lower() in UNCOMPRESSED:
                    return file.read()
                size, content = os.fstat(file.fileno()).st_size, file.read(ENDS)
                file.seek(max(ENDS, size - ENDS))
                return content + file.read(ENDS) + str(size).encode()
    return os.fsencode(item)


def read_folder(source: Path) -> tuple[tuple[str, ...], dict[str, Images], Counter[str]]:
    """The classes of an image folder, its parts, and how many files are not used, by reason."""
    expected = f"a data set looks like this:{EXPECTED_TREE.format(root=source)}"
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source}; {expected}")
    root, skipped, (folders, beside) = source, Counter(), class_folders(source)
    if len(folders) == 1 and not _part_folders(source, folders):  # an unpacked archive, perhaps
        [inner] = folders.values()
        if class_folders(inner)[0]:
            root, skipped, (folders, beside) = inner, beside, class_folders(inner)
    if part_folders := _part_folders(root, folders):
        skipped += beside
        for name, folder in folders.items():
            if folder not in part_folders.values():
                skipped[f"in {printable(name)}/"] += _count_files(folder)
        if "train" not in part_folders:
            raise ValueError(f"no train/ in {root}; {expected}")
    part_folders = {part: _unnested(folder) for part, folder in part_folders.items()} or {"train": root}
    class_paths = class_folders(part_folders["train"])[0]
    classes = tuple(class_paths)
    if not classes:
        raise ValueError(f"no class folders in {part_folders['train']}; {expected}")
    if len(classes) == 1:
        raise ValueError(f"{part_folders['train']} has one class only, {classes[0]!r}: a classifier needs two or more")
    _refuse_nested_classes(part_folders["train"], list(class_paths.values()))
    parts = {}
    for part, folder in part_folders.items():
        parts[part], more = labelled_images(folder, classes, source)
        skipped += more
    return classes, parts, skipped


def _part_folders(root: Path, folders: dict[str, Path]) -> dict[str, Path]:
    """The folders that hold a part of the data set: train, val, test.

    They hold class folders; without any, a "train" among several other names is a class. Names such as "test_set" or
    "seg_train" count if there are training and other images.
    """
    words = {name: {*re.split("[^a-z]+", name.lower())} for name in folders}
    named = [name for name in folders if any(words[name] & {*spellings} for spellings in SPLITS.values())]
    with_classes = [name for name in named if _has_folders(folders[name])]
    exact, similar = {}, {}
    for part, spellings in SPLITS.items():
        found = [name for name in named if name.lower() in spellings]
        if len(found) > 1:
            raise ValueError(f"{root} has both {found[0]}/ and {found[1]}/: keep one of them")
        containing = [name for name in with_classes if words[name] & {*spellings}]
        if found:
            exact[part] = found[0]
        if len(containing) == 1:
            similar[part] = containing[0]
    if any(name in with_classes for name in exact.values()):
        exact = {part: name for part, name in exact.items() if part == "train" or name in with_classes}
    elif exact and len(folders) - len(named) > 1:
        return {}
    chosen = exact or (similar if "train" in similar and len(similar) > 1 else {})
    return {part: folders[name] for part, name in chosen.items()}


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not _is_hidden(entry.name) for entry in entries)


def _unnested(folder: Path) -> Path:
    """The folder itself, or the only one in it if that has the same name, as in seg_train/seg_train/<class>."""
    inner = folder / folder.name
    return inner if inner.is_dir() and list(class_folders(folder)[0].values()) == [inner] else folder


def _refuse_nested_classes(root: Path, folders: list[Path]) -> None:
    """Raises ValueError if all class folders hold folders of the same names, which may be the real classes."""
    if _has_folders(folders[0]):
        inner = [sorted(class_folders(folder)[0]) for folder in folders]
        if len(inner[0]) > 1 and all(names == inner[0] for names in inner):
            raise ValueError(
                f"the folders in {root} all hold the same folders ({', '.join(inner[0][:5])}): "
                "if they are parts of the data set, call them train, val and test"
            )


def class_folders(folder: Path) -> tuple[dict[str, Path], Counter[str]]:
    """The visible folders in `folder` by name, sorted, and how many files lie beside them, by reason.

    Names are composed Unicode (NFC); a Mac decomposes those of files.
    """
    folders, skipped = {}, Counter()
    for entry in os.scandir(folder):
        if not os.path.isdir(entry.path):  # or a link to one
            skipped["beside the class folders"] += 1
        elif _is_hidden(entry.name):
            skipped["in hidden folders"] += _count_files(entry.path)
        elif _is_output(Path(entry.path)):
            skipped["in folders that main_train.py has made"] += _count_files(entry.path)
        else:
            name = unicodedata.normalize("NFC", entry.name)
            if name in folders:
                raise ValueError(f"{folder} has two folders whose names look the same: {name}")
            folders[name] = Path(entry.path)
    return dict(sorted(folders.items())), skipped


def labelled_images(folder: Path, classes: tuple[str, ...], source: Path) -> tuple[Images, Counter[str]]:
    """The images in the class folders of `folder`, named by their paths below `source`, and how many files are unused.

    A class may be missing. Raises ValueError if `folder` holds any other class.
    """
    folders, skipped = class_folders(folder)
    if unknown := ", ".join(sorted(folders.keys() - set(classes))):
        lacking = f"{folder} has a class that the training images lack: {unknown}"
        raise ValueError(f"{lacking}; rename it, or add it to the training images")
    items, labels = [], []
    for label, name in enumerate(classes):
        if name in folders:
            found, more = find_images(folders[name])
            items += found
            labels += [label] * len(found)
            skipped += more
    names = [unicodedata.normalize("NFC", str(item).removeprefix(f"{source}{os.sep}")) for item in items]
    return Images(items, torch.tensor(labels, dtype=torch.int64), names), skipped


def find_images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images below `folder`, sorted, and how many files are not used, by reason."""
    images, skipped = [], Counter()
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return [], Counter({"folders that cannot be opened": 1})
    for entry in entries:
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.is_symlink() and not os.path.exists(entry.path):
            skipped["links to nothing"] += 1
        elif entry.is_symlink() and os.path.isdir(entry.path):
            skipped["linked folders"] += 1
        elif entry.is_dir(follow_symlinks=False) and _is_hidden(entry.name):
            skipped["in hidden folders"] += _count_files(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            found, more = find_images(Path(entry.path))
            images += found
            skipped += more
        elif entry.name.startswith("."):
            skipped["hidden"] += 1
        elif is_image_file(entry.path, extension):
            images.append(Path(entry.path))
        else:
            hint = f" (pip install {PLUGINS[extension]})" if extension in PLUGINS else unread_format(entry.path)
            skipped[(printable(extension) or "without extension") + hint] += 1
    return images, skipped


def not_used(skipped: Counter[str]) -> str:
    """A line about the files that are not used."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common() if count)
    return f"{count_of(skipped.total(), 'file')} not used: {reasons}"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _is_output(folder: Path) -> bool:
    """Whether main_train.py or inference.py has made the folder, beside the class folders."""
    return any(next(folder.glob(pattern), None) for pattern in OUTPUTS)


def _count_files(path: str | Path) -> int:
    return sum(len(names) for *_, names in os.walk(path)) if os.path.isdir(path) else 1
