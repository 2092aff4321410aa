"""What do the features say about the data: near-duplicates, label errors, unfamiliar images?"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.console import Progress, count_of
from engine.features import Features
from engine.folders import Images
from engine.images import ImageError, Item, read_image
from engine.layers import RandomProjection, Standardize

COMPARED = 100_000  # with more images than this, near_duplicates gives up
CANDIDATES = 10_000  # the maximum number of pairs with similar features whose pixels are compared
SIMILAR_FEATURES, SIMILAR_PIXELS = 0.6, 0.95  # near-duplicates have a higher cosine and a higher correlation
NEIGHBORS = slice(5, 11)  # ordinary neighbours of an image, by rank
ORDINARY = 0.5  # times the first percentile of ordinary neighbours' differences: near-duplicates differ less
SAMPLE = 4096  # training images from which the features' means and standard deviations are taken
SOFTENING = 2.0  # a temperature: planted label errors rank a little higher if runners-up count more
IMPROBABLE = 0.5  # a label may be an error if its probability is less than this, times that of a random guess
UNFAMILIARITY_IMAGES = 20_000  # the maximum number of training images for Unfamiliarity
ENOUGH = 19  # with fewer validation images, even their largest score is too low a threshold for 5%
SHRINKAGE = 0.9  # the weight of the identity in the shrunk covariance of Unfamiliarity


def audit(
    parts: dict[str, Images],
    features: list[Features],
    logits: Tensor,
    classes: Sequence[str],
    correct: list[int | None],
    reading: dict | None = None,
) -> dict:
    """A report of near-duplicates and label errors as plain values, for plots/data.json.

    `parts` are the training, validation and test images, and `features` theirs. `logits` (N, classes) of all images
    come from a model that was fitted without the image. `correct` says which test images the model has right.
    """
    labels = torch.cat([part.labels for part in parts.values()])
    described = [
        {"path": path, "part": name, "label": classes[label]}
        for name, part in parts.items()
        for path, label in zip(part.paths(), part.labels.tolist(), strict=True)
    ]
    errors = [
        {**described[i], "suggested": classes[label], "probability": probability}
        for i, label, probability in label_errors(logits, labels)
    ]
    pairs = near_duplicates(features, [item for part in parts.values() for item in part.items], reading)
    if pairs is None:
        return {"near_duplicates": None, "label_errors": errors}
    duplicated = {i for *pair, _ in pairs for i in pair}
    first = len(labels) - len(correct)  # of the test images
    others = [right for i, right in enumerate(correct, first) if i not in duplicated and right is not None]
    return {
        "near_duplicates": [{"images": [described[i], described[j]], "correlation": c} for i, j, c in pairs],
        "label_errors": errors,
        "conflicting_labels": sum(described[i]["label"] != described[j]["label"] for i, j, _ in pairs),
        "test_images_with_near_duplicates": sum(i >= first for i in duplicated),
        "test_accuracy_without_them": sum(others) / len(others) if others else None,
    }


def summary(report: dict) -> str:
    """The report in a line."""
    errors = f"{count_of(len(report['label_errors']), 'label')} may be wrong"
    if report["near_duplicates"] is None:
        return f"too many images to look for near-duplicates; {errors}"
    leaked, conflicts = report["test_images_with_near_duplicates"], report["conflicting_labels"]
    accuracy = report["test_accuracy_without_them"]
    without = f" (test accuracy without them: {accuracy:.2%})" if leaked and accuracy is not None else ""
    tested = f"{count_of(leaked, 'test image')} {'has' if leaked == 1 else 'have'} near-duplicates{without}"
    pairs = f"{count_of(conflicts, 'pair') if conflicts else 'no pair'} of near-duplicates"
    return f"{tested}; {pairs} {'has' if conflicts < 2 else 'have'} conflicting labels; {errors}"


def near_duplicates(
    features: Sequence[Features], items: Sequence[Item], reading: dict | None = None
) -> list[tuple[int, int, float]] | None:
    """Pairs of near-duplicates and their correlation, the highest first. None for more than COMPARED images.

    `features` are those of the training, validation and test images, `items` all images. A pair is an image and the
    training or validation image with the most similar features, if their 16x16 pixels correlate far more than those of
    ordinary neighbours: where images vary little, as drawings do, many correlate.
    """
    if len(items) > COMPARED:
        return None
    cosines, neighbors = _neighbors(features)

    @lru_cache(maxsize=8192)
    def thumbnails(i: int) -> Tensor:
        return _thumbnails(read_image(items[i], 32, reading=reading))

    def correlations(pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, float]]:
        for i, j in pairs:
            with suppress(ImageError):  # the file may have been deleted
                # an image against the other one and its middle; two middles correlate too easily
                yield i, j, float((thumbnails(i) @ thumbnails(j).T).flatten()[:3].max())

    pairs = {}
    for i, (cosine, j) in enumerate(zip(cosines.tolist(), neighbors[:, 0].tolist(), strict=True)):
        if cosine > SIMILAR_FEATURES:
            pairs[min(i, j), max(i, j)] = cosine
    likely = sorted(pairs, key=pairs.get, reverse=True)[:CANDIDATES]
    some = range(0, len(items), -(-len(items) // 300))
    ordinary = torch.tensor(
        [c for *_, c in correlations((i, j) for i in some for j in neighbors[i, NEIGHBORS].tolist())]
    )
    difference = ORDINARY * (1 - ordinary).quantile(0.01).item() if len(ordinary) else 1.0
    bound = 1 - min(1 - SIMILAR_PIXELS, max(1e-5, difference))  # identical images are duplicates in any case
    return sorted((pair for pair in correlations(likely) if pair[2] > bound), key=lambda pair: -pair[2])


@torch.no_grad()
def _neighbors(parts: Sequence[Features]) -> tuple[Tensor, Tensor]:
    """For each of N images the training and validation images with the most similar features.

    The cosine of the first one (N,) and the indices of all (N, NEIGHBORS.stop), the most similar first.
    """
    count = sum(map(len, parts))
    scale = Standardize(parts[0].width)
    generator = torch.Generator().manual_seed(0)
    scale.fit(parts[0][torch.randperm(len(parts[0]), generator=generator)[:SAMPLE]].float())
    project = RandomProjection(parts[0].width, 256, generator)  # changes cosines by hundredths
    sketches = torch.cat([F.normalize(project(scale(block))) for part in parts for block in part.blocks()])
    candidates, found = sketches[: count - len(parts[-1])], []
    with Progress(count, "comparing images") as bar:
        for start in range(0, count, 1024):
            cosines = sketches[start : start + 1024] @ candidates.T
            cosines.diagonal(start).fill_(-1)  # of an image with itself
            found.append(cosines.topk(min(NEIGHBORS.stop, len(candidates))))
            bar.update(len(cosines))
    cosines, neighbors = (torch.cat(each) for each in zip(*found, strict=True))
    return cosines[:, 0], neighbors


def _thumbnails(image: Tensor) -> Tensor:
    """The whole of an image (3, H, W) and its middle, which a crop may have kept, as unit vectors (2, 768)."""
    _, H, W = image.shape
    parts = image, image[:, H // 16 : H - H // 16, W // 16 : W - W // 16]
    pixels = torch.stack([F.adaptive_avg_pool2d(part.float(), 16).flatten(1) for part in parts])
    return F.normalize((pixels - pixels.mean(dim=2, keepdim=True)).flatten(1))


def label_errors(logits: Tensor, labels: Tensor) -> list[tuple[int, int, float]]:
    """Images whose label is improbable, with the most probable one and its probability, the clearest error first.

    The rank follows from the probability of the given label, its self-confidence (Northcutt et al. 2021, arXiv
    1911.00068).
    """
    probabilities = (logits / SOFTENING).softmax(dim=1)
    given = probabilities.gather(1, labels[:, None])[:, 0]
    best, label = probabilities.max(dim=1)
    worst = given.argsort()[: int((given < IMPROBABLE / logits.shape[1]).sum())].tolist()
    return [(i, int(label[i]), float(best[i])) for i in worst if label[i] != labels[i]]


class Unfamiliarity(nn.Module):
    """Out-of-distribution detection: scores how unlike the training images an image is.

    The score is a weighted sum of a distance and a doubt. The distance is the Mahalanobis distance to the nearest class
    mean, with a covariance that all classes share (Lee et al. 2018, arXiv 1807.03888), on a random projection of the
    features. The doubt is 1 - the largest probability, without temperature scaling.
    """

    SIZE = 512

    def __init__(self, width: int, classes: int, generator: torch.Generator | None = None):
        super().__init__()
        self.standardize = Standardize(width)
        self.project = RandomProjection(width, self.SIZE, generator)
        self.register_buffer("centers", torch.zeros(classes, self.SIZE))
        self.register_buffer("whitening", torch.eye(self.SIZE))
        self.register_buffer("weights", torch.zeros(3))  # of distance, doubt and bias

    def distance_and_doubt(self, features: Tensor, logits: Tensor) -> Tensor:
        """(B, width), (B, classes) -> (B, 2)"""
        projected = self.project(self.standardize(features)) @ self.whitening
        distance = torch.cdist(projected, self.centers @ self.whitening).amin(dim=1)
        return torch.stack([distance, 1 - logits.softmax(dim=1).amax(dim=1)], dim=1)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """(B, width), (B, classes) -> scores (B,), those above 0 unfamiliar"""
        return F.pad(self.distance_and_doubt(features, logits), (0, 1), value=1.0) @ self.weights


@torch.no_grad()
def fit_unfamiliarity(train: Features, labels: Tensor, val: Features, logits: Tensor) -> Unfamiliarity:
    """Fits the distance to training images and their labels, and the weights to validation images.

    `val` and `logits` (M, classes) belong to the validation images; 5% of new images like these get a score above 0.
    Distance and doubt are divided by their standard deviations there; the doubt has less weight if the training images
    are few. The covariance is shrunk towards a multiple of the identity: else a blank image scores as in-distribution.
    """
    generator, classes = torch.Generator().manual_seed(0), logits.shape[1]
    chosen = torch.randperm(len(train), generator=generator)[:UNFAMILIARITY_IMAGES]
    score, labels = Unfamiliarity(train.width, classes, generator), labels[chosen]
    table = train[chosen].float()
    score.standardize.fit(table)
    projected = torch.cat([score.project(score.standardize(block)) for block in table.split(1024)])
    score.centers.index_add_(0, labels, projected).div_(labels.bincount(minlength=classes).clamp(1)[:, None])
    projected -= score.centers[labels]
    covariance = projected.T @ projected / len(projected)
    sphere = (covariance.diagonal().mean() + 1e-6) * torch.eye(Unfamiliarity.SIZE)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * sphere
    score.whitening.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)))
    blocks = zip(val.blocks(), logits.split(1024), strict=True)
    found = torch.cat([score.distance_and_doubt(features, rows) for features, rows in blocks])
    weights = torch.tensor([1, len(train) / (len(train) + train.width)]) / (found.std(dim=0, correction=0) + 1e-6)
    if len(found) < ENOUGH:  # their standard deviations say little
        weights = torch.stack(
            [1 / ((projected @ score.whitening).norm(dim=1).std(correction=0) + 1e-6), torch.zeros(())]
        )
    score.weights.copy_(torch.cat([weights, -_threshold(found @ weights)[None]]))
    return score


def _threshold(scores: Tensor) -> Tensor:
    """A bound that 5% of new images of the same kind exceed, given the scores (M,) of others (conformal prediction).

    Fewer than ENOUGH scores cannot show it: the largest one is extrapolated as if the tail were exponential.
    """
    count = len(scores)
    if count < ENOUGH:
        return scores.max() + math.log((ENOUGH + 1) / (count + 1))
    return scores.sort().values[math.ceil(0.95 * (count + 1)) - 1]
