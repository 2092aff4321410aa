"""What is wrong with the data: near-duplicates of test images, label errors? Which images are unfamiliar?"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.console import count_of
from engine.features import Features
from engine.folders import Images
from engine.groups import Pairs, components
from engine.layers import RandomProjection, Standardize

SOFTENING = 2.0  # a temperature: planted label errors rank a little higher if runners-up count more
IMPROBABLE = 0.5  # a label may be an error if its probability is less than this, times that of a random guess
UNFAMILIARITY_IMAGES = 20_000  # the maximum number of training images for Unfamiliarity
ENOUGH = 19  # with fewer validation images, even their largest score is too low a threshold for 5%
SHRINKAGE = 0.9  # the weight of the identity in the shrunk covariance of Unfamiliarity


def audit(
    parts: dict[str, Images],
    similar: tuple[Pairs, Pairs] | None,
    logits: Tensor,
    classes: Sequence[str],
    correct: list[int],
) -> dict:
    """A report of near-duplicates and label errors as plain values, for plots/data.json.

    `parts` are the training, validation and test images, `similar` what `near_duplicates` says of all of them. `logits`
    (N, classes) of all images come from a model that was fitted without the image. `correct` says which test images the
    model has right.
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
    if similar is None:
        return {"near_duplicates": None, "label_errors": errors}

    def in_training(pairs: Pairs) -> Tensor:
        """For each test image, whether pairs join it to a training or validation image (test images,)."""
        groups = components(len(labels), pairs)
        return torch.isin(groups[-len(correct) :], groups[: -len(correct)])

    pairs, alike = similar
    leaked = in_training(pairs)
    others = [right for right, known in zip(correct, leaked.tolist(), strict=True) if not known]
    return {
        "near_duplicates": [{"images": [described[i], described[j]], "correlation": c} for i, j, c in pairs],
        "label_errors": errors,
        "conflicting_labels": sum(described[i]["label"] != described[j]["label"] for i, j, _ in pairs),
        "test_images": len(correct),
        "test_images_with_near_duplicates": int(leaked.sum()),
        "test_images_with_near_neighbours": int(in_training(pairs + alike).sum()),
        "test_accuracy_without_them": sum(others) / len(others) if others else None,
    }


def summary(report: dict) -> str:
    """The report in a line."""
    errors = f"{count_of(len(report['label_errors']), 'label')} may be wrong"
    if report["near_duplicates"] is None:
        return f"too many images to look for near-duplicates; {errors}"
    leaked, conflicts = report["test_images_with_near_duplicates"], report["conflicting_labels"]
    accuracy, near = report["test_accuracy_without_them"], report["test_images_with_near_neighbours"]
    without = f" (test accuracy without them: {accuracy:.2%})" if leaked and accuracy is not None else ""
    lines = [f"{count_of(leaked, 'test image')} {'has' if leaked == 1 else 'have'} near-duplicates{without}"]
    if near > report["test_images"] / 2:
        lines += [f"most test images have a near neighbour in training ({near:,} of {report['test_images']:,})"]
        lines += ["if they show the same object, film or patient, hold out whole groups: --groups"]
    pairs = f"{count_of(conflicts, 'pair') if conflicts else 'no pair'} of near-duplicates"
    return "; ".join([*lines, f"{pairs} {'has' if conflicts < 2 else 'have'} conflicting labels", errors])


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
