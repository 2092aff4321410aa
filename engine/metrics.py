"""How good is a model, and is a difference real?

Logits are (N, classes), labels (N,), probabilities and accuracies from 0 to 1. Images that belong together, such as the
frames of a film, say less than as many others: intervals take whole groups of them as the unit of sampling.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE_PRIOR = 0.1  # log(temperature) is normal around 0 with this deviation, so that few images move it little


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean cross-entropy, and the share of images whose label has the largest logit."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).float().mean().item()


def average_models(logits: Iterable[Tensor]) -> Tensor:
    """The ensemble's logits (N, classes): the mean of the log-probabilities of calibrated logits."""
    return torch.stack([each.log_softmax(dim=1) for each in logits]).mean(dim=0)


def classification_metrics(logits: Tensor, labels: Tensor, temperature: float) -> dict:
    """Test metrics as plain numbers: accuracies, scores of each class, calibration, confusion."""
    loss, accuracy = loss_and_accuracy(logits, labels)
    return {
        "test_loss": loss,
        "test_accuracy": accuracy,
        "test_images": len(labels),
        "top2_accuracy": (logits.topk(min(2, logits.shape[1])).indices == labels[:, None]).any(1).float().mean().item(),
        **class_scores(logits.argmax(dim=1), labels, logits.shape[1]),
        "calibration": {"before": calibration(logits, labels), "after": calibration(logits / temperature, labels)},
    }


def class_scores(predicted: Tensor, labels: Tensor, classes: int) -> dict:
    """Precision, recall and F1 of each class and their means, which leave out classes without images: theirs are None.

    "confusion" lists the pairs that occur: a true class, the predicted one, and how many images. With thousands of
    classes, a matrix would be mostly zeros.
    """
    hits = labels[labels == predicted].bincount(minlength=classes)
    predictions, images = predicted.bincount(minlength=classes), labels.bincount(minlength=classes)
    pairs, counts = torch.stack([labels, predicted], dim=1).unique(dim=0, return_counts=True)
    scores = {"precision": hits / predictions.clamp(1), "recall": hits / images.clamp(1)}
    scores["f1"] = 2 * hits / (predictions + images).clamp(1)
    return {
        "per_class": {
            name: [value if count else None for value, count in zip(score.tolist(), images.tolist(), strict=True)]
            for name, score in scores.items()
        },
        "macro": {name: score[images > 0].mean().item() for name, score in scores.items()},
        "confusion": torch.cat([pairs, counts[:, None]], dim=1).tolist(),
    }


def calibration(logits: Tensor, labels: Tensor, bins: int = 15) -> dict:
    """The expected calibration error, and for each bin of confidence its count, mean confidence and accuracy."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    which = (confidence * bins).long().clamp(max=bins - 1)
    hits = (predicted == labels).float()
    count = which.bincount(minlength=bins)
    confidences = which.bincount(confidence, minlength=bins) / count.clamp(1)
    accuracies = which.bincount(hits, minlength=bins) / count.clamp(1)
    error = ((confidences - accuracies).abs() * count).sum() / len(labels)
    rows = {"count": count.tolist(), "confidence": confidences.tolist(), "accuracy": accuracies.tolist()}
    return {"ece": error.item(), **rows}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The most probable temperature given validation logits, as in Guo et al. 2017 but with a prior.

    A search for its logarithm.
    """

    def negative_log_posterior(log: float) -> float:
        loss = F.cross_entropy(logits / math.exp(log), labels, reduction="sum").item()
        return loss + (log / TEMPERATURE_PRIOR) ** 2 / 2

    best = 0.0
    for step in (0.5, 0.1, 0.02, 0.004):  # finer and finer, from -3.7 to 3.7
        best = min((best + step * i for i in range(-6, 7)), key=negative_log_posterior)
    return math.exp(best)


def calibrated_loss(logits: Tensor, labels: Tensor) -> float:
    """The mean cross-entropy at the temperature of these logits."""
    return loss_and_accuracy(logits / fit_temperature(logits, labels), labels)[0]


def wilson_interval(accuracy: float, count: float) -> tuple[float, float]:
    """The 95% confidence interval of an accuracy on `count` images (Wilson 1927)."""
    z = 1.96
    center = accuracy + z**2 / (2 * count)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / count + (z / (2 * count)) ** 2)
    return max(0.0, center - spread) / (1 + z**2 / count), min(1.0, (center + spread) / (1 + z**2 / count))


def accuracy_interval(correct: Sequence[float], groups: Sequence[object] | None) -> tuple[float, float]:
    """The 95% confidence interval of an accuracy, given which images are right, or how often, and the group of each.

    It is Wilson's. If groups have several images, it is that for the effective number of images: of independent images
    which would give the accuracy the same variance (Korn and Graubard 1998), made smaller by Student's t for few
    groups. The variance is the jackknife's, which leaves out each group in turn; if it is 0, the groups are counted.
    """
    share = sum(correct) / len(correct)
    if not groups or len({*groups}) == len(groups):
        return wilson_interval(share, len(correct))
    variance, number = _jackknife(correct, groups)
    effective = share * (1 - share) / variance if variance else number  # mostly because all are right, or all wrong
    effective *= (1.96 / _t_quantile(number - 1)) ** 2
    return wilson_interval(share, max(1.0, min(effective, len(correct))))


def paired_difference(
    one: Sequence[float], other: Sequence[float], groups: Sequence[object] | None = None
) -> tuple[float, float]:
    """By how much one accuracy exceeds another one on the same images, and the margin of its 95% interval.

    Both are 1 where the model is right, else 0, or means of that over seeds. A difference smaller than the margin is
    not significant. Images that both models have right, or wrong, hardly change that, as in McNemar's test (interval:
    Bonett and Price 2012, who add a pair for each side). Of `groups`, the variance is the jackknife's, if it is larger.
    """
    gains = [a - b for a, b in zip(one, other, strict=True)] + [1, -1]
    total, count = sum(gains), len(gains)
    margin = 1.96 * math.sqrt(sum(gain**2 for gain in gains) - total**2 / count) / count
    if groups and len({*groups}) < len(groups):
        variance, number = _jackknife(gains[:-2], groups)
        margin = max(margin, _t_quantile(number - 1) * math.sqrt(variance))
    return total / count, margin


def _jackknife(values: Sequence[float], groups: Sequence[object]) -> tuple[float, int]:
    """The variance of the mean of values, one for each image, if groups of images are drawn, and how many there are."""
    sums, counts = Counter(), Counter()
    for value, group in zip(values, groups, strict=True):
        sums[group] += value
        counts[group] += 1
    total, count, number = sum(values), len(values), len(counts)
    if number == 1:
        return math.inf, 1
    means = [(total - sums[group]) / (count - counts[group]) for group in counts]
    center = sum(means) / number
    return (number - 1) / number * sum((mean - center) ** 2 for mean in means), number


def _t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t distribution, within 0.3% (from 4 degrees on: Fisher and Cornish 1960)."""
    if freedom < 4:
        return (12.706, 12.706, 4.303, 3.182)[freedom]
    return 1.96 + 2.37238 / freedom + 2.82271 / freedom**2 + 2.55611 / freedom**3  # polynomials of 1.96
