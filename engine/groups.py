"""Which images belong together? Those that --groups or a table names; else near-duplicates, found without a model.

A group stays on one side of a split (data.py). Near-duplicates, identical files included, that are a large part of a
class are no group. Of sets of many images, only identical files are found, and copies that are named so.

An image is described by the 8x8 lowest frequencies of its thumbnail (a discrete cosine transform), each divided by its
standard deviation over the set, so that what all images share counts little, and by contrast, brightness and color. Two
images are compared as they are, with one of them mirrored or turned, and with the margins of one cut off.

Near-duplicates are more similar than any two of these images would be by chance. What chance does is read from random
pairs: their similarity is extrapolated from the upper fifth and twentieth to the largest of all comparisons. Pairs
inside a group are not random, so groups may be large; where all images look alike, as drawings do, the bound is high.
"""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.console import Progress, count_of
from engine.distributed import is_first, of_first
from engine.files import explain_write_error
from engine.images import Images

MAX_GROUP_SHARE = 0.2  # groups of near-duplicates with a larger share of a class could not be held out
COMPARED = 100_000  # more images than this would take minutes
SIZE = 24  # pixels on each side of a thumbnail
# brightness and two differences of color from red, green and blue (ITU-R BT.601)
YCBCR = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))
FREQUENCIES = 8  # in each direction
MARGINS = (0.025, 0.05, 0.075, 0.1)  # cut off at each side: crops of 95, 90, 85 and 80%
APPEARANCE = (0.1, 0.1, 0.05, 0.05)  # the weights of contrast, brightness and both differences of color in a similarity
NOISE_VARIANCE = 0.001  # added to the variances of the frequencies, whose sum is at most 1: noise is not amplified
LEAST_BOUND, LARGEST_BOUND = 0.925, 0.99999  # the least and the largest bound
CHANCE_IMAGES = 2000  # the pairs of so many random images tell what chance does
NEIGHBOURS = 8  # so many most similar images of each, in each tile, are enough to connect a group
TILE = 2048  # images: so many rows and columns of similarities fit in a processor's cache

# what is added to the name of an image for a changed copy: 1_aug2.png, rot90_1.png, 1_jpg.rf.0a1b2c.jpg (Roboflow)
WORDS = "(?:aug|augmented|augmentation|blur|blurred|copy|crop|cropped|[hv]?flip|flipped|mirror|mirrored|noise|noisy|"
WORDS += "resized|rot|rotate|rotated|rotation|scaled|shift|shifted|small|thumb|thumbnail|zoom|zoomed)"
CHANGES = r"(?:_(?:jpe?g|png|bmp|tiff?|webp))?\.rf\.\w+$|"
CHANGES += rf"(?<![^/])(?:{WORDS}\d*[ _.-]+)+(?=[^/]+$)|"
CHANGES += rf"(?:[ _.-]+{WORDS}(?:[ _-]?(?:-?\d+|\(\d+\)|[hv]|lr|ud))?)+$"
# an outer folder, patient12/study1/3_front.jpg, or what precedes the last two numbers, number or word of a name, if it
# has another number: slide12_x64_y32.png, film12_3.jpg, 12_left.jpg
SERIES = (r"([^/]*\d)/(?:.*/)?[^/]*$", r"([^/]*\d[^/]*?)[_-](?:x_?)?\d+[_-](?:y_?)?\d+\.\w+$")
SERIES += (r"([^/]*\d[^/]*\D)\d+[^\d/]*\.\w+$", r"([^/]*\d[ _.-])[a-zA-Z]+\.\w+$")

MAX_COPIES = 20  # more names like "covid19_crop_0001" are not copies of one image, but images of their own

Pairs = list[tuple[int, int, float]]  # two images, i < j, and their similarity
Similar = tuple[Pairs, Pairs]  # near-duplicates, and images that are alike by chance


def draw(seed: object, name: str) -> int:
    """A random number that follows from a seed and a name."""
    text = f"{seed} {name}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def assign_groups(images: Images, pool: Tensor, pattern: str | None, pairs: Pairs) -> tuple[list[str], list[str]]:
    """The name of each image's group, and remarks for the user.

    A group is what the regular expression `pattern`, or its first parentheses, matches in the names, else that of
    `images.groups`, else near-duplicates. An image that is alone has its hash as the name of its group.
    `pool` are the images of which some are held out. Raises ValueError if the pattern matches no image.
    """
    if pattern is None and images.groups is None:
        return _groups_of_copies(images, {*pool.tolist()}, pairs)
    names = images.groups if pattern is None else matched_groups(images.names, pattern)
    alone = sum(not name for name in names)
    rest = f"; {count_of(alone, 'image')} in no group" if alone else ""
    remarks = [f"{count_of(len({*names} - {None, ''}), 'group')}, held out as a whole{rest}"]
    return [name or identity for name, identity in zip(names, images.ids, strict=True)], remarks


def matched_groups(names: list[str], pattern: str) -> list[str | None]:
    """What `pattern`, or its first parentheses, matches in each name. Raises ValueError if it matches none."""
    paths = [name.replace("\\", "/") for name in names]
    found = [re.search(pattern, _original(path)) or re.search(pattern, path) for path in paths]
    groups = [match and match[min(1, match.re.groups)] for match in found]
    if not any(groups):
        raise ValueError(f"--groups {pattern} matches no path of an image, such as {names[0]}")
    return groups


def _groups_of_copies(images: Images, pool: set[int], pairs: Pairs) -> tuple[list[str], list[str]]:
    groups, labels, first, large = list(images.ids), images.labels.tolist(), {}, 0
    originals = [*map(_original, images.names)]
    identical = [(first.setdefault(identity, i), i, 1.0) for i, identity in enumerate(images.ids)]
    sizes, together = Counter(labels[i] for i in pool), defaultdict(list)
    pairs = [*identical, *pairs, *_named_copies(images.names, originals)]
    for i, number in enumerate(components(len(images), pairs).tolist()):
        together[number].append(i)
    for members in together.values():
        counts = Counter(labels[i] for i in members if i in pool)
        too_large = any(count > max(2, MAX_GROUP_SHARE * sizes[label]) for label, count in counts.items())
        large += too_large
        name = min(images.ids[i] for i in members)
        for i in members:
            groups[i] = f"{images.ids[i]} {images.names[i]}" if too_large else name
    remark = (
        f"{count_of(large, 'group')} of near-duplicates with more than a fifth of a class: split at random, so "
        "accuracies on held-out images will be too high. If they show one object, film or patient, use --groups"
    )
    apart = [*{groups[i]: i for i in pool}.values()]  # one image of each group: the others stay with it anyway
    return groups, [*([remark] if large else []), *_series([originals[i] for i in apart], [labels[i] for i in apart])]


def _original(name: str) -> str:
    """The name without what marks a changed copy."""
    stem = _stem(name)
    return re.sub(CHANGES, "", stem, flags=re.IGNORECASE) + name[len(stem) :]


def _stem(name: str) -> str:
    return re.sub(r"\.[a-zA-Z]\w*$", "", name)  # "scan.001" has no extension


def _named_copies(names: list[str], originals: list[str]) -> Pairs:
    """Pairs of images of one folder of which one is a changed copy of the other, or both of a third, by their names."""
    known, copies = {*map(_stem, names)}, defaultdict(list)
    for i, original in enumerate(map(_stem, originals)):
        # without a number "rotated_1" and "rotated_2" would be one image
        if original in known or re.search(r"\d[^/]*$", original) or ".rf." in names[i]:
            copies[original].append(i)
    return [(same[0], i, 1.0) for same in copies.values() if len(same) <= MAX_COPIES for i in same[1:]]


def _series(originals: list[str], labels: list[int]) -> list[str]:
    """A remark if the names of most images come in series, several of most classes, which may be films or patients."""
    for pattern in SERIES:
        found = [re.search(pattern, name) for name in originals]
        series = Counter((label, match[1]) for label, match in zip(labels, found, strict=True) if match)
        counts = {each: count for each, count in series.items() if count > 1}
        several = [label for label, count in Counter(label for label, _ in counts).items() if count > 1]
        if 2 * sum(counts.values()) > len(originals) and 2 * len(several) > len({*labels}):
            examples = " and ".join(repr(name) for _, name in [*counts][:2])
            problem = "if these are objects, films or patients, each is on both sides of the split"
            return [f"many names begin alike, such as with {examples}; {problem}: --groups '{pattern}' mends that"]
    return []


def find_near_duplicates(ids: list[str], thumbnails: Tensor, folder: Path) -> Similar | None:
    """`near_duplicates`, kept in `folder` for the next run with the same `ids`. None for more than COMPARED images."""
    if len(ids) > COMPARED:
        return None
    file, found = folder / f"near-duplicates-1-{hashlib.sha256(''.join(ids).encode()).hexdigest()[:16]}.json", None
    if is_first():  # a file that another process looks for may be written meanwhile
        try:
            found = tuple([tuple(pair) for pair in pairs] for pairs in json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):  # not there, or damaged
            found = near_duplicates(thumbnails)
            with explain_write_error(file):  # half of it counts as damaged; atomic_write may leave a .part behind
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found))
    return of_first(found)


# ------------------------------------------------------------------------------------------- near-duplicates


def thumbnail(image: Tensor) -> Tensor:
    """A small copy of an image: uint8 (3, H, W) -> uint8 (3, SIZE, SIZE), squeezed if its sides are not equal."""
    return F.adaptive_avg_pool2d(image.float(), SIZE).round().to(torch.uint8)


def near_duplicates(thumbnails: Tensor) -> Similar:
    """Pairs of thumbnails (N, 3, SIZE, SIZE) that are near-duplicates, and others that are alike by chance.

    The most similar ones come first (at most 1). The pairs join the images of a group as a tree does.
    """
    if len(thumbnails) < 2:
        return [], []
    views = _views(thumbnails)
    pairs = _spanning(len(thumbnails), _similar_pairs(views))
    bound = _bound(views[0], pairs)
    return [pair for pair in pairs if pair[2] > bound], [pair for pair in pairs if pair[2] <= bound]


def components(count: int, pairs: Iterable[tuple[int, int, float]]) -> Tensor:
    """The group of each of `count` images (count,), of which each pair joins two: a number from 0."""
    parents = list(range(count))
    for i, j, *_ in pairs:
        parents[_root(parents, i)] = _root(parents, j)
    return torch.tensor([_root(parents, i) for i in range(count)]).unique(return_inverse=True)[1]


def _root(parents: list[int], i: int) -> int:
    while parents[i] != i:
        parents[i] = i = parents[parents[i]]
    return i


def _spanning(count: int, pairs: Pairs) -> Pairs:
    """A maximum spanning forest (Kruskal 1956): the pairs of it above any bound join the same images as all such."""
    parents, kept = list(range(count)), []
    for pair in sorted(pairs, key=lambda pair: -pair[2]):
        one, other = (_root(parents, i) for i in pair[:2])
        if one != other:
            parents[one] = other
            kept.append(pair)
    return kept


def _frequencies(grey: Tensor) -> Tensor:
    """(B, SIZE, SIZE) -> (B, FREQUENCIES**2), whatever the brightness and the contrast."""
    places, waves = (torch.arange(SIZE) + 0.5) / SIZE, torch.arange(FREQUENCIES)
    cosines = torch.cos(math.pi * places[:, None] * waves) * (2 / SIZE) ** 0.5
    found = (cosines.T @ grey @ cosines).flatten(1)
    found[:, 0] = 0
    return found / (found.norm(dim=1, keepdim=True) + FREQUENCIES)  # a grey level of noise is not a picture


def _seen_otherwise(grey: Tensor) -> list[Tensor]:
    """Images (B, SIZE, SIZE) as they are, turned, mirrored and turned, and then their middles."""
    seen = [each.rot90(k, (1, 2)) for each in (grey, grey.flip(2)) for k in range(4)]
    for margin in MARGINS:
        centres = torch.linspace(margin, 1 - margin, 2 * SIZE + 1)[1::2]  # the middle has SIZE equal parts
        places = centres * SIZE - 0.5
        zoom = (1 - (places[:, None] - torch.arange(SIZE)).abs()).clamp(min=0)  # linear interpolation
        seen.append(zoom @ grey @ zoom.T)
    return seen


def _views(thumbnails: Tensor) -> Tensor:
    """Unit vectors (views, N, D) of N images, as _seen_otherwise; the product of two vectors is their similarity."""

    def planes(block: Tensor) -> Tensor:
        return torch.einsum("kc,ncij->knij", torch.tensor(YCBCR), block.float())

    def described(grey: Tensor, colors: Tensor) -> Tensor:
        brightness = grey.mean(dim=(1, 2))
        deviation = (grey - brightness[:, None, None]).square().mean(dim=(1, 2)).sqrt()  # faster than std_mean
        shape = (_frequencies(grey) - center) * weights * (deviation > 1)[:, None]  # a plain image is like no other
        shape = F.normalize(shape.sign() * shape.abs().sqrt())  # the root: no single frequency decides
        angles = torch.stack([(deviation + 2).log(), brightness / 80, *(colors / 30).clamp(-1.5, 1.5)], dim=1)
        scale = torch.tensor(APPEARANCE).sqrt()
        return torch.cat([(1 - sum(APPEARANCE)) ** 0.5 * shape, scale * angles.cos(), scale * angles.sin()], dim=1)

    known = torch.cat([_frequencies(planes(block)[0]) for block in thumbnails.split(TILE)])
    center = known.sum(dim=0) / (len(known) + 1)  # as if there were a plain image: all others may be the same one
    weights = ((known - center).square().mean(dim=0) + NOISE_VARIANCE).rsqrt()
    weights[0] = 0
    found = []
    for block in thumbnails.split(TILE):
        grey, *colors = planes(block)
        means = torch.stack([color.mean(dim=(1, 2)) for color in colors])
        found.append(torch.stack([described(each, means) for each in _seen_otherwise(grey)]))
    return torch.cat(found, dim=1)


def _similar_pairs(views: Tensor) -> Pairs:
    """For each image those most similar to it in each tile, if their similarity exceeds LEAST_BOUND."""
    count, found = views.shape[1], []
    tiles = [views[:, start : start + TILE] for start in range(0, count, TILE)]
    with Progress(count, "comparing images") as bar:
        for a, rows in enumerate(tiles):
            for b, columns in enumerate(tiles[a:], a):
                similarity = rows[0] @ columns[0].T
                for view in range(1, len(views)):
                    torch.maximum(similarity, rows[view] @ columns[0].T, out=similarity)
                    if view >= 8:  # a middle, of which either image may be the crop
                        torch.maximum(similarity, rows[0] @ columns[view].T, out=similarity)
                if a == b:
                    similarity = similarity.triu(1)
                some = (similarity.amax(dim=1) > LEAST_BOUND).nonzero()[:, 0]
                values, indices = similarity[some].topk(min(NEIGHBOURS, similarity.shape[1]))
                one, other = (some[:, None] + a * TILE).expand_as(indices), indices + b * TILE
                kept = values > LEAST_BOUND
                found += zip(one[kept].tolist(), other[kept].tolist(), values[kept].tolist(), strict=True)
            bar.update(rows.shape[1])
    return found


def _bound(descriptions: Tensor, pairs: Pairs) -> float:
    """The similarity that near-duplicates exceed, from descriptions (N, D) and a spanning forest of similar pairs."""
    count, bound = len(descriptions), LEAST_BOUND
    sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:CHANCE_IMAGES]
    one, other = torch.triu_indices(len(sample), len(sample), 1)
    closeness = -(1 - (descriptions[sample] @ descriptions[sample].T)[one, other]).clamp(min=1e-7).log()
    comparisons = (8 + 2 * len(MARGINS)) * count * (count - 1) / 2
    while bound < LARGEST_BOUND:
        groups = components(count, (pair for pair in pairs if pair[2] > bound))[sample]
        chance = closeness[groups[one] != groups[other]]
        if not len(chance):
            break
        # the tail is taken for exponential: from the largest fifth to the largest twentieth, a quarter of the pairs,
        # closeness grows by log(4) steps; to the largest of all comparisons, by log(comparisons / 20) more
        fifth, twentieth = chance.quantile(torch.tensor([0.8, 0.95])).tolist()
        largest = twentieth + (twentieth - fifth) / math.log(4) * math.log(comparisons / 20)
        if 1 - math.exp(-largest) <= bound:
            break
        bound = 1 - math.exp(-largest)
    return min(bound, LARGEST_BOUND)
