"""Which images belong together, so that they stay on one side of a split: near-duplicates, patients, films?"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from engine.console import count_of
from engine.distributed import gather, is_first
from engine.files import atomic_write
from engine.folders import Images
from engine.records import Features

SIDE = 16
LARGEST = 0.2  # of a class; larger groups of near-duplicates cannot be held out
Pair = tuple[int, int, float]  # two images, and the correlation of their pixels


def draw(seed: object, name: str) -> int:
    """A random number that follows from a seed and a name."""
    text = f"{seed} {name}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def assign_groups(images: Images, pattern: str | None, pairs: list[Pair] | None) -> tuple[list[str], list[str]]:
    """The name of each image's group, and remarks for the user.

    Those images belong together whose names give the same match of the regular expression `pattern`, or of its first
    parentheses if it has any, or which have the same group in `images.groups`. Without both, near-duplicates belong
    together. An image that is alone has its hash as the name of its group, so identical images are never alone.
    Raises ValueError if the pattern matches no image.
    """
    if pattern is None and images.groups is None:
        return _groups_of_copies(images, pairs or [])
    names = images.groups
    if pattern is not None:
        found = [re.search(pattern, name.replace("\\", "/")) for name in images.names]
        names = [match and match[1 if match.re.groups else 0] for match in found]
        if not any(names):
            raise ValueError(f"--groups {pattern} matches no path of an image, such as {images.names[0]}")
    alone = sum(not name for name in names)
    rest = f"; {count_of(alone, 'image')} in no group" if alone else ""
    remarks = [f"{count_of(len({*names} - {None, ''}), 'group')}, each on one side of the split{rest}"]
    return [name or identity for name, identity in zip(names, images.ids, strict=True)], remarks


def _groups_of_copies(images: Images, pairs: list[Pair]) -> tuple[list[str], list[str]]:
    groups, labels, first, large = list(images.ids), images.labels.tolist(), {}, 0
    identical = [(first.setdefault(identity, i), i) for i, identity in enumerate(images.ids)]
    sizes = Counter(labels)
    for members in components(len(images), [*identical, *((i, j) for i, j, _ in pairs)]):
        counts = Counter(labels[i] for i in members)
        too_large = any(count > max(2, LARGEST * sizes[label]) for label, count in counts.items())
        large += too_large
        name = min(images.ids[i] for i in members)
        for i in members:
            groups[i] = f"{images.ids[i]} {images.names[i]}" if too_large else name
    remarks = []
    if large:
        remarks.append(
            f"{count_of(large, 'group')} of near-duplicates with more than a fifth of a class: split at random, so the "
            "test accuracy will be too high; if they show the same object, film or patient, name it: --groups"
        )
    return groups, remarks


def find_near_duplicates(ids: list[str], thumbnails: Features, folder: Path) -> list[Pair] | None:
    """`near_duplicates`, kept in `folder` for the next run with the same images."""
    digest = hashlib.sha256("".join(ids).encode()).hexdigest()[:16]
    file = folder / f"near-duplicates-1-{digest}.json"
    try:
        return [tuple(pair) for pair in json.loads(file.read_text())]
    except (OSError, ValueError):  # not there, or damaged
        pass
    pairs = gather(near_duplicates(thumbnails[torch.arange(len(ids))]) if is_first() else None)[0]
    if is_first() and pairs is not None:
        with atomic_write(file) as stream:
            stream.write(json.dumps(pairs).encode())
    return pairs


# to be replaced by the branch `dup`
def thumbnail(image: Tensor) -> Tensor:
    import torch.nn.functional as F

    return (
        F.interpolate(image[None].float().mean(1, keepdim=True), (SIDE, SIDE), mode="bilinear", antialias=True)[0]
        .round()
        .to(torch.uint8)
    )


def near_duplicates(thumbnails: Tensor) -> list[Pair] | None:
    x = thumbnails.float().flatten(1)
    x = torch.nn.functional.normalize(x - x.mean(1, keepdim=True))
    c = (x @ x.T).triu(1)
    return [(i, j, float(c[i, j])) for i, j in (c > 0.98).nonzero().tolist()]


def components(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    parent = list(range(count))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        parent[root(i)] = root(j)
    groups = {}
    for i in range(count):
        groups.setdefault(root(i), []).append(i)
    return [g for g in groups.values() if len(g) > 1]
