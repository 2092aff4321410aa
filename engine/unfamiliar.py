"""How unlike the training images is an image? This belongs to a checkpoint."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.features import Features
from engine.layers import RandomProjection, Standardize

MAX_IMAGES = 20_000  # so many training images are enough to fit the distance
MIN_SCORES = 19  # with fewer validation images, no score of theirs can serve as a threshold for 5%
SHRINKAGE = 0.9  # the weight of the identity in the shrunk covariance


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
        self.register_buffer("weights", torch.zeros(3))  # for distance, doubt and bias

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
    chosen = torch.randperm(len(train), generator=generator)[:MAX_IMAGES]
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
    if len(found) < MIN_SCORES:  # their standard deviations say little
        spread = (projected @ score.whitening).norm(dim=1).std(correction=0)
        weights = torch.stack([1 / (spread + 1e-6), torch.zeros(())])
    score.weights.copy_(torch.cat([weights, -_threshold(found @ weights)[None]]))
    return score


def _threshold(scores: Tensor) -> Tensor:
    """A bound that 5% of new images of the same kind exceed, given the scores (M,) of others (conformal prediction).

    Fewer than MIN_SCORES scores cannot show it: the largest one is extrapolated as if the tail were exponential.
    """
    count = len(scores)
    if count < MIN_SCORES:
        return scores.max() + math.log((MIN_SCORES + 1) / (count + 1))
    return scores.sort().values[math.ceil(0.95 * (count + 1)) - 1]
