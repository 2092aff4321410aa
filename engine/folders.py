"""How does a folder become labelled images? Which files below it are images, of which class, in which part?"""

import os
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import torch

from engine.console import count_of, printable
from engine.images import Images, has_few_colors, is_image_file, unread_format

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
EXPECTED_TREE = """
    {root}/<class>/*.jpg          one folder for each class; the folder's name is the label
or
    {root}/train/<class>/*.jpg    training images
    {root}/test/<class>/*.jpg     test images of the same classes; if missing, 20% of train/ is held out
    {root}/val/<class>/*.jpg      validation images; if missing, 20% of the other training images are held out"""
SYSTEM_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
# what main_train.py and inference.py leave in a folder
OUTPUTS = (".lock", "checkpoints/.lock", "*/checkpoints/.lock", "results.json", "features/*.*", "*_wrong.csv")
# folders that describe images for detection or segmentation, and folders of such images
DESCRIPTIONS = {"annotation", "annotations", "annots", "bboxes", "gt", "groundtruth", "json", "label", "labels", "mask"}
DESCRIPTIONS |= {"masks", "segmentation", "segmentations", "trimap", "trimaps", "xml", "xmls"}
PHOTOS = {"image", "images", "img", "imgs", "frames", "jpeg", "jpegimages", "jpg", "photos", "pictures", "rgb"}
ORIGINALS = PHOTOS | {"original", "originals", "photo", "raw"}  # in a class folder; elsewhere the others may be classes
FEW = 16  # shades of a mask; more may be a photograph
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}


def read_folder(source: Path, grouped: bool = False) -> tuple[tuple[str, ...], dict[str, Images], list[str]]:
    """The classes of an image folder, its parts, and notes: which files are not used, and why.

    If all class folders hold the same folders, it must be known that these are `grouped`, as patients or films.
    Raises FileNotFoundError if there is no folder, ValueError if it is not a data set.
    """
    expected = f"a data set looks like this:{EXPECTED_TREE.format(root=source)}"
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source}; {expected}")
    root, skipped, (folders, beside) = source, Counter(), class_folders(source)
    _refuse_descriptions(root, folders)
    if len(folders) == 1 and not _part_folders(source, folders):  # an unpacked archive, perhaps
        [inner] = folders.values()
        if class_folders(inner)[0]:
            root, skipped, (folders, beside) = inner, beside, class_folders(inner)
            _refuse_descriptions(root, folders)
    if part_folders := _part_folders(root, folders):
        skipped += beside
        for name, folder in folders.items():
            if folder not in part_folders.values():
                skipped[f"in {printable(name)}/"] += _count_files(folder)
        if "train" not in part_folders:
            raise ValueError(f"no train/ in {root}; {expected}")
    part_folders = {part: _unnested(folder) for part, folder in part_folders.items()} or {"train": root}
    train = part_folders["train"]
    class_paths, beside = class_folders(train)
    _refuse_descriptions(train, class_paths)
    class_paths = {n: path for n, path in class_paths.items() if len(class_paths) < 3 or not _is_unlabelled(path)}
    classes = tuple(class_paths)
    if not classes:  # perhaps of files that no class folder can consist of, such as DICOM's
        raise ValueError(f"no class folders in {train}{_unused(find_images(train)[1])}; {expected}")
    if len(classes) == 1:
        raise ValueError(f"{train} has one class only, {classes[0]!r}: a classifier needs two or more{_unused(beside)}")
    parts, notes = {}, [*look_alikes(classes), *_same_folders(train, [*class_paths.values()], grouped)]
    for part, folder in part_folders.items():
        inside = class_folders(folder)[0]
        if len(inside) < 2 and not inside.keys() & classes:
            images, more = find_images(folder)
            advice = f"not used. python inference.py {shlex.quote(str(folder))} classifies them"
            notes.append(f"{folder} has no folder of a class: its {count_of(len(images), 'image')} are {advice}")
        else:
            parts[part], more = labelled_images(folder, classes, source)
        skipped += more
    notes += _tables_beside({source, root, train})
    return classes, parts, [not_used(skipped), *notes] if skipped.total() else notes


def _tables_beside(folders: set[Path]) -> list[str]:
    """A note on tables in these folders."""
    tables = sorted(str(p) for folder in folders for p in folder.iterdir() if p.suffix.lower() in (".csv", ".tsv"))
    advice = "the folders are taken for the classes. If a table says more, such as the parts, use it as --data"
    return [f"{printable(', '.join(tables[:3]))} not read: {advice}"] if tables else []


def look_alikes(classes: Iterable[str]) -> list[str]:
    """A note if names of classes differ in case or space alone, or are the same number ("1", "01", "1.0")."""
    alike = defaultdict(list)
    for name in classes:
        plain = " ".join(unicodedata.normalize("NFC", name).casefold().split())
        alike[Decimal(plain) if is_number(plain) else plain].append(printable(name))
    found = [" and ".join(names) for names in alike.values() if len(names) > 1]
    return [f"classes that look the same: {', '.join(found)}"] if found else []


def is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", text) is not None


def _unused(skipped: Counter[str]) -> str:
    """The end of an error's message, if there are files that are not used."""
    return f"; {not_used(skipped)}" if skipped else ""


def _part_folders(root: Path, folders: dict[str, Path]) -> dict[str, Path]:
    """The folders that hold a part of the data set: train, val, test.

    Without class folders in it, a "train" among several other names is a class. Names such as "test_set" count if there
    are training and other images.
    """
    words = {name: words_of(name) for name in folders}
    named = [name for name in folders if part_of(words[name])]
    with_classes = [name for name in named if _has_folders(folders[name])]
    exact = {}
    for part, spellings in SPLITS.items():
        found = [name for name in named if name.lower() in spellings]
        if len(found) > 1:
            raise ValueError(f"{root} has both {found[0]}/ and {found[1]}/: keep one of them")
        if found:
            exact[part] = found[0]
    if any(name in with_classes for name in exact.values()):
        chosen = {part: name for part, name in exact.items() if part == "train" or name in with_classes}
    elif exact:
        chosen = exact if len(folders) - len(named) < 2 else {}
    else:
        containing = {part: [n for n in with_classes if words[n] & {*spellings}] for part, spellings in SPLITS.items()}
        chosen = {part: names[0] for part, names in containing.items() if len(names) == 1}
        if len(named) == len(folders) > 1 and not with_classes:  # as train_images/ and test_images/
            chosen = {part_of(words[name]): name for name in reversed(named)}
        chosen = chosen if "train" in chosen and len(chosen) > 1 else {}
    return {part: folders[name] for part, name in chosen.items()}


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not _is_hidden(entry.name) for entry in entries)


def _is_unlabelled(folder: Path) -> bool:
    """Whether a folder beside two or more others is no class but images without a label."""
    if folder.name.lower() not in ("unlabeled", "unlabelled") or _has_folders(folder):
        return False
    return folder.name.lower()[2:] not in map(str.lower, os.listdir(folder.parent))  # "labeled" may be a class, too


def _unnested(folder: Path) -> Path:
    """The folder itself, or the only one in it if that has the same name, as in seg_train/seg_train/<class>."""
    inner = folder / folder.name
    return inner if inner.is_dir() and list(class_folders(folder)[0].values()) == [inner] else folder


def _same_folders(root: Path, folders: list[Path], grouped: bool) -> list[str]:
    """A note if class folders hold folders of their own.

    Raises ValueError if these may be the real classes and nobody has said that they are groups, or are a copy.
    """
    inner, outer = [{*class_folders(folder)[0]} for folder in folders], {folder.name for folder in folders}
    twice = [f for f, names in zip(folders, inner, strict=True) if len(names) > 1 and names == outer - {f.name}]
    if twice:
        raise ValueError(f"{twice[0]} holds folders of the same names as {root}: if it is a copy, move it away")
    counts = Counter(name for names in inner for name in names)
    shared = sorted(name for name, count in counts.items() if count > 1)
    if len(shared) < 2 or 2 * len(shared) <= len(counts) or not all(names & {*shared} for names in inner):
        if 2 * sum(len(names) > 1 for names in inner) < len(folders):
            return []
        return [f"the folders in {root} hold folders, as {min(counts)}: the outer ones are the classes"]
    images = ((folder, path) for folder in folders for path in _without_descriptions(folder, find_images(folder)[0]))
    steps = {path.relative_to(folder).parts[0] for folder, path in images if path.parent != folder}
    if len(steps) == 1:  # such as images/, beside masks/ of the same names
        return []
    same = f"the folders in {root} hold the same folders ({', '.join(shared[:5])})"
    if grouped:
        return [f"{same}: the outer ones are the classes"]
    patterns = dict.fromkeys(re.sub("[0-9]+", "[0-9]+", re.escape(name)) for name in sorted(counts))
    groups = shlex.quote(f"/({'|'.join(patterns)})/")
    advice = "if either are parts of the data set, call them train, val and test; if patients or films, use --groups"
    raise ValueError(f"{same}: {advice} {groups}")


def _refuse_descriptions(root: Path, folders: dict[str, Path]) -> None:
    """Raises ValueError if the folders are not classes, but images and what describes them: boxes or masks.

    Such a pair has telling names, and the files of both have the same names, or the description is text.
    """
    with os.scandir(root) as entries:  # also folders without images
        beside = [Path(entry.path) for entry in entries if entry.is_dir() and words_of(entry.name) & DESCRIPTIONS]
    telling = set().union(PHOTOS, DESCRIPTIONS, *SPLITS.values())
    others = [name for name in folders if not words_of(name) & telling]
    pictures = [path for name, path in folders.items() if words_of(name) & PHOTOS and path not in beside]
    if len(folders) == 2 and all(has_few_colors(p, FEW) for folder in beside for p in find_images(folder)[0][:9]):
        pictures += [folders[n] for n in others if _has_folders(folders[n])]  # CUB/images/cat/1.jpg, masks/cat/1.png
    for images in pictures if beside and len(others) < 2 else ():  # photos, masks, sketches and icons are classes
        if images.name not in others and not all(part_of(words_of(name)) for name in class_folders(images)[0]):
            continue  # as images/cat/1.jpg
        described = {path.stem.lower() for path in find_images(images)[0]}
        for folder in beside:
            files = [Path(name) for *_, names in os.walk(folder) for name in names]
            is_text = 2 * sum(file.suffix.lower() in (".txt", ".xml", ".json", ".csv") for file in files) > len(files)
            stems = {file.stem.lower() for file in files}
            stems |= {re.sub("[_-][a-z]+$", "", stem) for stem in stems}  # as 1_mask.png
            if is_text or 2 * len(described & stems) > len(described):
                task = "detection" if is_text else "segmentation"
                raise ValueError(
                    f"{root} seems to be made for {task}: {folder.name}/ describes the images in {images.name}/. This "
                    "project classifies whole images: it needs a folder for each class, or a table of labels"
                )


def describes(words: frozenset[str]) -> bool:
    """Whether a folder holds no images but what describes them: "masks", "train_masks", not "with_mask"."""
    return bool(words & DESCRIPTIONS) and not any(word for word in words - DESCRIPTIONS - PHOTOS if not part_of({word}))


@lru_cache
def words_of(name: str) -> frozenset[str]:
    """The words of a name, in lower case: "seg_train", "TrainImages"."""
    return frozenset(re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower()))


def part_of(words: Iterable[str]) -> str | None:
    """The part of a data set that one of the words names."""
    return next((part for part, spellings in SPLITS.items() if not {*spellings}.isdisjoint(words)), None)


def class_folders(folder: Path) -> tuple[dict[str, Path], Counter[str]]:
    """The visible folders with images in `folder` by name, sorted, and how many files are not used, by reason.

    Names are composed Unicode (NFC); a Mac decomposes those of files.
    """
    folders, skipped = {}, Counter()
    for entry in os.scandir(folder):
        if not os.path.isdir(entry.path):  # or a link to one
            skipped["beside the class folders"] += 1
        elif _is_hidden(entry.name):
            skipped["in hidden folders"] += _count_files(entry.path)
        elif any(next(Path(entry.path).glob(pattern), None) for pattern in OUTPUTS):
            skipped["in folders that main_train.py has made"] += _count_files(entry.path)
        elif not _holds_images(entry.path):
            skipped[f"folder without images ({printable(entry.name)}/)"] += 1
        else:
            name = unicodedata.normalize("NFC", entry.name)
            if name in folders:
                raise ValueError(f"{folder} has two folders whose names look the same: {name}")
            folders[name] = Path(entry.path)
    return dict(sorted(folders.items())), skipped


def labelled_images(folder: Path, classes: tuple[str, ...], source: Path) -> tuple[Images, Counter[str]]:
    """The images in the class folders of `folder`, named by their paths below `source`, and how many files are unused.

    Classes may be missing, others are not used. Raises ValueError if both is so: one may be misspelt.
    """
    folders, skipped = class_folders(folder)
    unknown, lacking = sorted(folders.keys() - set(classes)), [name for name in classes if name not in folders]
    for name in [name for name in unknown if _is_unlabelled(folders[name])]:
        unknown.remove(name)
        skipped[f"without a label ({printable(name)})"] += _count_files(folders[name])
    if unknown and lacking:
        inside = [str(path) for path in folders.values() if class_folders(path)[0].keys() & set(classes)]
        advice = f"the class folders are in {inside[0]}" if inside else "rename it, or move it away"
        unknown, lacking = (", ".join(map(printable, names[:5])) for names in (unknown, lacking))
        raise ValueError(f"{folder} has what is no class of the training images, {unknown}, but no {lacking}: {advice}")
    for name in unknown:
        skipped[f"of a class that the training images lack ({printable(name)})"] += _count_files(folders[name])
    items, labels = [], []
    for label, name in enumerate(classes):
        if name in folders:
            found, more = find_images(folders[name])
            images = _without_descriptions(folders[name], found)
            more["masks or other descriptions of images"] += len(found) - len(images)
            items += images
            labels += [label] * len(images)
            skipped += more
    return Images(items, torch.tensor(labels, dtype=torch.int64), [name_below(source, item) for item in items]), skipped


def _without_descriptions(folder: Path, images: list[Path]) -> list[Path]:
    """The images of a class but for those that describe others.

    1.png or 1_mask.png beside 1.jpg, masks/1.png beside images/1.png.
    """
    ends, plain, photographs, named, beside = "|".join(DESCRIPTIONS), set(), set(), {}, {}
    for path in images:
        steps, name = path.parts[len(folder.parts) : -1], path.stem.lower()
        whole = re.sub(rf"[ _.-]+({ends})([ _-]?\d+)?$", "", name)
        apart = any(set() < words_of(step) <= DESCRIPTIONS for step in steps)
        key = (*(step for step in steps if not set() < words_of(step) <= ORIGINALS | DESCRIPTIONS), whole)
        if apart or whole != name:
            named[path] = key
            continue
        plain.add(key)
        if path.suffix.lower() in (".jpg", ".jpeg"):
            photographs.add(key)
        elif path.suffix.lower() == ".png":
            beside[path] = key
    masks = {path for path, key in named.items() if key in plain and has_few_colors(path)}
    masks |= {path for path, key in beside.items() if key in photographs and has_few_colors(path, FEW)}
    return [path for path in images if path not in masks]


def name_below(source: Path, item: Path) -> str:
    """The path of a file below a folder, the same on every system."""
    return unicodedata.normalize("NFC", str(item).removeprefix(f"{source}{os.sep}")).replace(os.sep, "/")


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
        elif entry.is_symlink() and entry.is_dir():
            skipped["linked folders"] += 1
        elif entry.is_dir() and _is_hidden(entry.name):
            skipped["in hidden folders"] += _count_files(entry.path)
        elif entry.is_dir():
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


def _holds_images(folder: str) -> bool:
    """Whether an image lies below the folder, be it one that needs a package. Stops at the first one."""
    inner = []
    with suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir(follow_symlinks=False):
                inner += [] if _is_hidden(entry.name) else [entry.path]
            elif extension in PLUGINS or is_image_file(entry.path, extension):
                return True
    return any(map(_holds_images, inner))


def _count_files(path: str | Path) -> int:
    return sum(len(names) for *_, names in os.walk(path)) if os.path.isdir(path) else 1
