"""How does a file that somebody brings become the weights of a backbone?

Trainers nest the tensors differently and put prefixes before their names. So every dictionary of the file is tried,
with every prefix under which a tensor of the backbone occurs: one of them must give the backbone all of its tensors.
"""

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.console import printable
from engine.files import load_tensors
from engine.formats import library

ADVICE = "where it was made, save the state dict alone: torch.save(model.state_dict(), FILE)"
FOREIGN = {  # how files begin that people take for weights
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run git lfs pull",
    b"<": "a web page, not weights: download the file itself",
    b"{": "text, not weights",
    b"\x89hdf": "a file of HDF5, as Keras writes: PyTorch cannot read it",
    b"\x1f\x8b": "compressed: unpack it first",
}
# names that DDP, torch.compile, FSDP and activation checkpointing put before others
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGED = re.compile(r"(?<![a-z])(ema|averaged?|avg|swa|teacher)(?![a-z])", re.IGNORECASE)


class Fit(NamedTuple):
    """Tensors of a file that are those of the backbone."""

    place: str  # in the file: the keys of the dictionary, and the prefix
    tensors: dict[str, Tensor]  # by the backbone's names
    left_out: set[str]  # other modules beside them
    averaged: bool  # over the steps of a training (EMA), which is usually more accurate


def is_file(weights: str) -> bool:
    """Whether weights are named by a file, not by a name of torchvision's."""
    return bool(re.search(r"[./\\]", weights))


def load_weights(
    file: Path, own: dict[str, Tensor], heads: set[str], convert: Callable[[dict], dict] | None, backbone: str
) -> str:
    """Copies the tensors of a file into `own`, the backbone's by name. Returns which ones were taken, or "".

    `heads` are modules of the classifier, which the file may hold or not; `convert` adapts names and shapes, as timm
    does for the files of others. Nothing in the file is executed.
    Raises OSError if the file cannot be read, ValueError if it holds no such tensors. The message is one line.
    """
    content, foremost = _read(file)
    needed = _weights_among({_clean(name): tensor for name, tensor in own.items()})
    found = list(_dictionaries(content, "", set()))
    if not found:
        raise ValueError(f"{file} holds {foremost or 'no tensors'}: {ADVICE}")
    fits = _find(found, needed, heads, convert)
    if not fits:
        raise ValueError(f"{file} does not fit {backbone}: {_misfit(found, needed)}")
    best = next((fit for fit in fits if fit.averaged), fits[0])
    try:
        with torch.no_grad():
            for name, tensor in needed.items():
                given = best.tensors[name]
                if not given.is_floating_point() or not tensor.copy_(given).isfinite().all():
                    raise ValueError(f"{file}: values of {name} ({given.dtype}) are not finite floating-point numbers")
    except (RuntimeError, NotImplementedError) as error:  # sparse or without content
        raise ValueError(f"{file}: {name} is a tensor without plain values; {ADVICE}") from error
    others = [fit.place or "top" for fit in fits if fit is not best]
    words = [best.place, "averaged (EMA)" if others and best.averaged else ""]
    for word, places in (("not", others), ("without", sorted(best.left_out))):
        words.append(f"{word} {', '.join(places[:3])}" if places else "")
    return printable(", ".join(filter(None, words)))


# -------------------------------------------------------------------------------------------------- the search


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _top(name: str) -> str:
    return name.partition(".")[0]


def _weights_among(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without counters and indices, which need not agree."""
    names = [name for name in tensors if not name.endswith("num_batches_tracked")]
    return {name: tensors[name] for name in names if tensors[name].is_floating_point()}


def _dictionaries(content: object, place: str, seen: set[int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary or list of tensors in a file, however deep: its place, and its tensors by name."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, dict) or id(content) in seen:
        return
    seen.add(id(content))
    entries = list(dict.items(content))  # the file may have replaced the method
    if tensors := {_clean(str(key)): value for key, value in entries if isinstance(value, Tensor)}:
        yield place, tensors
    for key, value in entries:
        yield from _dictionaries(value, f"{place}.{key}".lstrip("."), seen)


def _find(found: list, needed: dict[str, Tensor], heads: set[str], convert: Callable | None) -> list[Fit]:
    """All places that fit: by names, else by names of which `convert` knows the prefix, else by their order."""

    def fits_below(prefixes: Callable, rename: Callable, how: str = "") -> Iterator[Fit]:
        for place, tensors in found:
            matched = []
            for prefix in prefixes(tensors):
                if how and any(map(prefix.startswith, matched)):
                    continue  # the order fits below longer prefixes, too
                candidate = _below(tensors, prefix)
                with suppress(Exception):  # a conversion raises anything for a file that it was not made for
                    renamed = rename(dict(candidate))
                    candidate = {name: tensor for name, tensor in renamed.items() if isinstance(tensor, Tensor)}
                missing, unknown, left_out = _compare(candidate, needed, heads)
                if not missing and not unknown:
                    where = f"{place}.{prefix}".strip(".")
                    averaged = bool(AVERAGED.search(where)) or "n_averaged" in tensors
                    yield Fit(f"{where} {how}".strip(), candidate, left_out, averaged)
                    matched.append(prefix)

    def named(tensors: dict) -> list[str]:
        return _prefixes(tensors, needed)

    def numbered(tensors: dict) -> list[str]:
        if any(not _compare(_below(tensors, prefix), needed, set())[0] for prefix in named(tensors)):
            return []  # all names fit: something else does not
        return ["", *dict.fromkeys(".".join(name.split(".")[:depth]) + "." for depth in (1, 2) for name in tensors)]

    convert = convert or dict
    fits = list(fits_below(named, convert)) or list(fits_below(lambda tensors: [""], convert))
    return fits or list(fits_below(numbered, lambda tensors: _by_order(tensors, needed), "by their order"))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _prefixes(tensors: dict[str, Tensor], needed: dict[str, Tensor]) -> list[str]:
    """What stands before the names of the backbone's tensors."""
    starts = [(name, match.end()) for name in tensors for match in re.finditer(r"^|\.", name)]
    return list(dict.fromkeys(name[:start] for name, start in starts if name[start:] in needed))


def _by_order(tensors: dict[str, Tensor], needed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbered tensors, as of nn.Sequential(*model.children()), by the backbone's names, if they have its shapes.

    The ends of the names, such as weight and bias, must agree, too. What follows is a head, if in other modules.
    """
    names, count = list(_weights_among(tensors)), len(needed)
    tops, pairs = [_top(name) for name in names], list(zip(needed, names, strict=False))
    numbered = all(top.isdigit() for top in tops) and not {*tops[:count]} & {*tops[count:]}
    alike = all(own.rpartition(".")[2] == name.rpartition(".")[2] for own, name in pairs)
    return {own: tensors[name] for own, name in pairs} if numbered and alike else {}


def _compare(tensors: dict, needed: dict, heads: set[str]) -> tuple[list[str], list[str], set[str]]:
    """The backbone's tensors that are missing or of another shape, unknown ones, and modules that may be left out.

    Other modules at the top with a matrix, such as projections, are taken for heads. A further block, or a parameter
    without a module, would change what the backbone computes: it is unknown.
    """
    missing = [name for name, own in needed.items() if name not in tensors or tensors[name].shape != own.shape]
    tops = {_top(name) for name in needed}
    heads = tuple(f"{head}." for head in heads | ({_top(head) for head in heads} - tops))
    matrices = {_top(name) for name, tensor in tensors.items() if "." in name and tensor.dim() > 1} - tops
    others = [name for name in _weights_among(tensors) if name not in needed and not name.startswith(heads)]
    unknown = sorted(name for name in others if _top(name) not in matrices)
    return missing, unknown, {_top(name) for name in others} & matrices


def _misfit(found: list, needed: dict[str, Tensor]) -> str:
    """How the tensors of a file, where they fit best, differ from the backbone's."""
    tries = [_below(tensors, prefix) for _, tensors in found for prefix in ["", *_prefixes(tensors, needed)]]
    best = min(tries, key=lambda tensors: len(_compare(tensors, needed, set())[0]))
    missing, unknown, _ = _compare(best, needed, set())
    unfit = [name for name in missing if name in best] + unknown or list(best)

    def shown(names: list[str], tensors: dict[str, Tensor]) -> str:
        return ", ".join(f"{printable(name[:80])} {tuple(tensors[name].shape)}" for name in names[:3])

    counts = f"{len(missing)} tensors of {len(needed)} are missing or of another shape, {len(unknown)} are unknown"
    return f"{counts}; the file has {shown(unfit, best)}, the backbone {shown(missing or list(needed), needed)}"


# ------------------------------------------------------------------------------------------------- the reading


class _Nothing:
    """Stands for a function or class that a file names: makes an empty dictionary, which the file may fill."""

    def __new__(cls, *args: object) -> OrderedDict:
        return OrderedDict()


class _Ignored:
    """The same for numpy's, which get their content by __setstate__."""

    def __init__(self, *args: object):
        pass

    __setstate__ = __init__


def _read(file: Path) -> tuple[object, str]:
    """What a file holds, without its objects, and what it holds besides tensors, see `_foremost`."""
    try:
        with file.open("rb") as stream:
            start = stream.read(1024)
    except OSError as error:
        raise OSError(f"{file} cannot be loaded: {error.strerror or error}") from error
    of_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size
    for beginning, what in FOREIGN.items():
        if not of_safetensors and start.lstrip().lower().startswith(beginning):
            raise ValueError(f"{file} is {what}")
    foremost, safetensors = "", library("safetensors.torch", str(file)) if of_safetensors else None
    try:
        if safetensors:
            return safetensors.load_file(file), ""
        names = _named(file)
        foremost = _foremost(names)
        stand_ins = [(_Ignored if name.startswith("numpy.") else _Nothing, name) for name in names]
        with torch.serialization.safe_globals(stand_ins), file.open("rb") as stream:
            if zipfile.is_zipfile(file):
                return load_tensors(file), foremost
            return torch.load(stream, map_location="cpu", weights_only=True), foremost
    except Exception as error:  # whatever torch raises; its message advises to execute what is in the file
        what = f"holds {foremost}: {ADVICE}" if foremost else "is damaged, or not of PyTorch or safetensors"
        raise ValueError(f"{file} {what}") from error


def _named(file: Path) -> list[str]:
    """The functions and classes that a file of torch.save names, the outermost first. None of them is imported."""
    with file.open("rb") as stream:
        pickles = [stream] * 4  # in the old format, a number, a version and a description come first
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(stream)
            entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            pickles = [archive.open(entry) for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
        steps = (step for each in pickles for step in pickletools.genops(each))
        found = [argument.split(" ") for code, argument, _ in steps if code.name == "GLOBAL"]
    names = [NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)) for module, name in found]
    return list(dict.fromkeys(map(".".join, names)))


def _foremost(names: list[str]) -> str:
    """What a file holds besides tensors: a whole model, or other objects. "" if there are none."""
    of_tensors = re.compile(r"torch\._.*|torch\.\w+|torch\.nn\.parameter\.Parameter|collections\..*|_codecs\.encode")
    names = [name for name in names if not of_tensors.fullmatch(name)]
    if any(name.startswith("__torch__.") for name in names):
        return "a TorchScript program, of which torch.jit.load(FILE).state_dict() is needed"
    if any(name.startswith("torch.nn.modules.") for name in names):
        return f"a whole model ({printable(names[0])}), no state dict"
    return ", ".join(map(printable, names[:3]))
