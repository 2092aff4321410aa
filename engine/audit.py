"""What do the features say about the data: near-duplicates, label errors, unfamiliar images?"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.console import Progress, count_of
from engine.features import Features
from engine.images import ImageError, read_image
from engine.layers import RandomProjection, Standardize

COMPARED = 100_000  # with more images than this, near_duplicates gives up
CANDIDATES = 10_000  # the maximum number of pairs with similar features whose pixels are compared
SIMILAR_FEATURES, SIMILAR_PIXELS = 0.6, 0.93  # near-duplicates have a higher cosine and a higher correlation
SAMPLE = 4096  # training images from which the features' means and standard deviations are taken
MARGIN = 0.9  # by how much another label must be more probable than an image's own one
# The maximum number of images for Unfamiliarity, and the weight of the identity in its shrunk covariance
UNFAMILIARITY_IMAGES, SHRINKAGE = 20_000, 0.9


# ---------------------------------------------------------------------- near-duplicates and label errors


def audit(
    parts: dict[str, object],
    features: Sequence[Features],
    logits: Tensor,
    classes: Sequence[str],
    correct: Sequence[int | None],
) -> dict:
    """A report of near-duplicates and label errors as plain values, for plots/data.json.

    `parts` are the training, validation and test images (data.Images), and `features` theirs. `logits` (N, classes) of all images
    come from a model that was fitted without the image. `correct` says which test images another model classifies
    correctly.
    """
    images = [(part, i) for part, its in parts.items() for i in range(len(its))]
    labels = torch.cat([its.labels for its in parts.values()])
    paths = {part: its.paths() for part, its in parts.items()}

    def describe(k: int) -> dict:
        part, i = images[k]
        return {"path": paths[part][i], "part": part, "label": classes[labels[k]]}

    pairs = near_duplicates(features, lambda k: read_image(parts[images[k][0]].items[images[k][1]], 32))
    report = {
        "near_duplicates": pairs and [{**pair, "images": [describe(k) for k in pair["images"]]} for pair in pairs],
        "label_errors": [
            {**describe(error["image"]), "suggested": classes[error["label"]], "probability": error["probability"]}
            for error in label_errors(logits, labels)
        ],
    }
    if pairs is None:
        return report
    duplicated = {images[k][1] for pair in pairs for k in pair["images"] if images[k][0] == "test"}
    others = [hit for i, hit in enumerate(correct) if i not in duplicated and hit is not None]
    return report | {
        "conflicting_labels": sum(bool(labels[i] != labels[j]) for i, j in (pair["images"] for pair in pairs)),
        "test_images_with_near_duplicates": len(duplicated),
        "test_accuracy_without_them": sum(others) / len(others) if others else None,
    }


def summary(report: dict) -> str:
    """The report in a line."""
    errors = count_of(len(report["label_errors"]), "label")
    if report["near_duplicates"] is None:
        return f"too many images to look for near-duplicates; {errors} may be wrong"
    leaked, conflicts = report["test_images_with_near_duplicates"], report["conflicting_labels"]
    accuracy = report["test_accuracy_without_them"]
    without = f" (test accuracy without them: {accuracy:.2%})" if leaked and accuracy is not None else ""
    conflicting = f"{count_of(conflicts, 'pair')} of near-duplicates" if conflicts else "no pair of near-duplicates"
    verb = "has" if conflicts < 2 else "have"
    tested = f"{count_of(leaked, 'test image')} {'has' if leaked == 1 else 'have'} near-duplicates{without}"
    return f"{tested}; {conflicting} {verb} conflicting labels; {errors} may be wrong"


def near_duplicates(parts: Sequence[Features], read: Callable[[int], Tensor]) -> list[dict] | None:
    """Finds near-duplicates among the training, validation and test images. None for more than COMPARED images.

    `parts` are the images' features. An image's index counts from the first training image to the last test image;
    `read` returns one image, uint8 (3, H, W). A pair is an image and the training or validation image with the most
    similar features. It is reported if their 16x16 pixels correlate: {"images": (i, j), "correlation"}, the highest
    correlation first.
    """
    if sum(map(len, parts)) > COMPARED:
        return None
    pairs = []
    for i, j in _similar_pairs(parts):
        with suppress(ImageError):  # the file may have been deleted
            one, other = (_thumbnails(read(k)) for k in (i, j))
            # an image against the other one and its middle; two middles correlate too easily
            correlation = float((one @ other.T).flatten()[:3].max())
            if correlation > SIMILAR_PIXELS:
                pairs.append({"images": (i, j), "correlation": correlation})
    return sorted(pairs, key=lambda pair: -pair["correlation"])


@torch.no_grad()
def _similar_pairs(parts: Sequence[Features]) -> list[tuple[int, int]]:
    """Each image and the training or validation image with the most similar features, the most similar pairs first."""
    count = sum(map(len, parts))
    scale = Standardize(parts[0].width)
    generator = torch.Generator().manual_seed(0)
    scale.fit(parts[0][torch.randperm(len(parts[0]), generator=generator)[:SAMPLE]].float())
    project = RandomProjection(parts[0].width, 256, generator)  # changes cosines by hundredths
    sketches = torch.cat([F.normalize(project(scale(block))) for part in parts for block in part.blocks()])
    candidates, pairs = sketches[: count - len(parts[-1])], {}
    with Progress(count, "comparing images") as bar:
        for start in range(0, count, 1024):
            cosines = sketches[start : start + 1024] @ candidates.T
            cosines.diagonal(start).fill_(-1)  # of an image with itself
            for i, (cosine, j) in enumerate(zip(*(best.tolist() for best in cosines.max(dim=1)), strict=True), start):
                if cosine > SIMILAR_FEATURES:
                    pairs[min(i, j), max(i, j)] = cosine
            bar.update(len(cosines))
    return sorted(pairs, key=pairs.get, reverse=True)[:CANDIDATES]


def _thumbnails(image: Tensor) -> Tensor:
    """The whole of an image (3, H, W) and its middle, which a crop may have kept, as unit vectors (2, 768)."""
    _, H, W = image.shape
    parts = image, image[:, H // 16 : H - H // 16, W // 16 : W - W // 16]
    pixels = torch.stack([F.adaptive_avg_pool2d(part.float(), 16).flatten(1) for part in parts])
    return F.normalize((pixels - pixels.mean(dim=2, keepdim=True)).flatten(1))


def label_errors(logits: Tensor, labels: Tensor) -> list[dict]:
    """Finds labels that may be wrong, the clearest first: {"image": i, "label", "probability"}.

    `logits` (N, classes) come from a model that was fitted without the image. A label is reported if another one is
    much more probable.
    """
    probabilities = logits.softmax(dim=1)
    best, label = probabilities.max(dim=1)
    margin = best - probabilities.gather(1, labels[:, None])[:, 0]
    worst = margin.argsort(descending=True)[: int((margin > MARGIN).sum())].tolist()
    return [{"image": i, "label": int(label[i]), "probability": float(best[i])} for i in worst]


# ---------------------------------------------------------------------------------------- unfamiliar images


class Unfamiliarity(nn.Module):
    """Scores how unlike the training images an image is, so that a model can say "none of these".

    In the literature this is out-of-distribution detection. The score is a weighted sum of a distance and a doubt. The
    distance is the Mahalanobis distance to the nearest class mean, with a covariance that all classes share (Lee et al.
    2018, arXiv 1807.03888), on a random projection of the features. The doubt is 1 - the largest probability, without
    temperature scaling. `fit_unfamiliarity` sets the buffers.
    """

    SIZE = 512

    def __init__(self, width: int, classes: int, generator: torch.Generator | None = None):
        super().__init__()
        self.standardize = Standardize(width)
        self.project = RandomProjection(width, self.SIZE, generator)
        self.register_buffer("centers", torch.zeros(classes, self.SIZE))
        self.register_buffer("whitening", torch.eye(self.SIZE))
        self.register_buffer("weights", torch.zeros(3))  # of the distance, of the doubt, and of 1

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
    """Fits Unfamiliarity to the features of training images and their labels, and calibrates it on validation images.

    `val` and `logits` (M, classes) belong to the validation images; 5 % of these get a score above 0. Distance and
    doubt are divided by their standard deviations on the validation images; the doubt has less weight if the training
    images are few. The covariance is shrunk towards a multiple of the identity. Without shrinkage a blank image scores
    as in-distribution.
    """
    generator, classes = torch.Generator().manual_seed(0), logits.shape[1]
    chosen = torch.randperm(len(train), generator=generator)[:UNFAMILIARITY_IMAGES]
    score, labels = Unfamiliarity(train.width, classes, generator), labels[chosen]
    table = train[chosen].float()
    score.standardize.fit(table)
    projected = torch.cat([score.project(score.standardize(block)) for block in table.split(1024)])
    counts = labels.bincount(minlength=classes).clamp(1)
    score.centers.index_add_(0, labels, projected).div_(counts[:, None])
    projected -= score.centers[labels]
    covariance = projected.T @ projected / len(projected)
    sphere = (covariance.diagonal().mean() + 1e-6) * torch.eye(Unfamiliarity.SIZE)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * sphere
    score.whitening.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)))
    blocks = zip(val.blocks(), logits.split(1024), strict=True)
    found = torch.cat([score.distance_and_doubt(features, rows) for features, rows in blocks])
    weights = torch.tensor([1, len(train) / (len(train) + train.width)]) / (found.std(dim=0, correction=0) + 1e-6)
    score.weights.copy_(torch.cat([weights, -(found @ weights).quantile(0.95)[None]]))
    return score
