"""The metrics against scikit-learn, scipy, numpy and examples by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import CPU
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn import metrics as sklearn_metrics
from torch import nn

from engine.batches import Batches, feature_loader
from engine.metrics import (
    TEMPERATURE_PRIOR,
    accuracy_interval,
    calibration,
    classification_metrics,
    fit_temperature,
    paired_difference,
    wilson_interval,
)
from train_utils import evaluate


def problem(seed, classes=5, scale=1.0, images=400):
    """Logits that are `scale` times those the labels were drawn from, so that the best temperature is about `scale`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (images, classes))
    labels = [rng.choice(classes, p=row) for row in softmax(logits, axis=1)]
    return torch.tensor(scale * logits, dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_sklearn(seed):
    logits, labels = problem(seed)
    logits[:, 1] = -20  # never predicted, nor second
    logits, labels = logits[labels != 3], labels[labels != 3]  # no test image, but predicted
    predicted, every, tested = logits.argmax(1), range(5), [0, 1, 2, 4]
    assert (labels == 1).any() and (predicted == 3).any()
    ours = classification_metrics(logits, labels, 2.0)
    assert {name: scores.pop(3) for name, scores in ours["per_class"].items()} == dict.fromkeys(ours["macro"])
    for average, theirs in ((None, ours["per_class"]), ("macro", ours["macro"])):
        expected = sklearn_metrics.precision_recall_fscore_support(
            labels, predicted, labels=tested, average=average, zero_division=0
        )
        for name, score in zip(("precision", "recall", "f1"), expected, strict=False):
            assert theirs[name] == pytest.approx(score, abs=1e-6), name
    theirs = sklearn_metrics.confusion_matrix(labels, predicted, labels=every)
    assert ours["confusion"] == [[*pair, theirs[tuple(pair)]] for pair in np.argwhere(theirs).tolist()]
    assert ours["test_accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    top2 = sklearn_metrics.top_k_accuracy_score(labels, logits, k=2, labels=every)
    assert ours["top2_accuracy"] == pytest.approx(top2)
    loss = sklearn_metrics.log_loss(labels, softmax(logits.double().numpy(), axis=1), labels=every)
    assert ours["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert ours["calibration"] == {"before": calibration(logits, labels), "after": calibration(logits / 2, labels)}
    batches = Batches(feature_loader(logits, CPU), labels, 32, CPU)
    assert evaluate(nn.Identity(), batches) == pytest.approx((loss, ours["test_accuracy"]), rel=1e-5)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 7), (45, 50), (4285, 5000), (9, 9)])
def test_the_ends_of_the_wilson_interval(right, count):
    """Its ends are the accuracies p at which the observed one is 1.96 standard errors sqrt(p (1 - p) / n) away."""
    for end in wilson_interval(right / count, count):
        assert 0 <= end <= 1
        assert abs(right / count - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count), abs=1e-9)


def test_paired_difference():
    """Bonett and Price's interval, by hand: (b - c) / (n + 2), b and c with one image more each."""
    one = 70 * [1] + 30 * [0]
    other = 10 * [0] + 65 * [1] + 25 * [0]  # both have 60 right, one alone 10, the other alone 5
    gain, margin = paired_difference(one, other)
    assert gain == pytest.approx(5 / 102) and margin == pytest.approx(1.96 * math.sqrt(17 - 25 / 102) / 102)
    assert paired_difference(other, one) == pytest.approx((-gain, margin))
    assert paired_difference(one, one) == pytest.approx((0, 1.96 * math.sqrt(2) / 102))  # never certain
    random, misses = torch.Generator().manual_seed(0), 0
    for _ in range(500):  # two models that are equally good: 95% of the intervals hold the true difference, 0
        hard, one, two = torch.rand(3, 300, generator=random)
        answers = [((hard < 0.6) | (luck < 0.3)).int().tolist() for luck in (one, two)]
        gain, margin = paired_difference(*answers)
        misses += abs(gain) > margin
    assert 10 <= misses <= 45


@pytest.mark.parametrize(("seed", "scale"), [(0, 0.4), (1, 1.0), (2, 3.0)])
def test_calibration_agrees_with_numpy(seed, scale):
    logits, labels = problem(seed, scale=scale)
    chances = softmax(logits.double().numpy(), axis=1)
    confidence, right = chances.max(1), chances.argmax(1) == labels.numpy()
    result, bins = calibration(logits, labels), np.digitize(confidence, np.linspace(0, 1, 16)[1:-1])
    error = sum(abs((confidence - right)[bins == i].sum()) for i in range(15)) / len(labels)
    assert result["ece"] == pytest.approx(error, abs=1e-6)
    assert result["count"] == [(bins == i).sum() for i in range(15)]
    for name, values in (("confidence", confidence), ("accuracy", right)):
        means = [values[bins == i].mean() if (bins == i).any() else 0 for i in range(15)]
        assert result[name] == pytest.approx(means, abs=1e-6)


@pytest.mark.parametrize("scale", [0.1, 0.4, 1.0, 1.7, 12.0])  # under-confident below 1, over-confident above
@pytest.mark.parametrize("classes", [2, 10])
def test_fit_temperature_finds_the_maximum(classes, scale):
    logits, labels = problem(int(100 * scale) + classes, classes, scale)

    def improbability(t):
        rows = log_softmax(logits.double().numpy() / math.exp(t), axis=1)
        return -rows[np.arange(len(labels)), labels].sum() + (t / TEMPERATURE_PRIOR) ** 2 / 2

    best = minimize_scalar(improbability, bounds=(-3, 3), method="bounded", options={"xatol": 1e-6})
    found = fit_temperature(logits, labels)
    assert math.log(found) == pytest.approx(best.x, abs=0.003)  # the finest step is 0.004
    many = fit_temperature(logits.repeat(100, 1), labels.repeat(100))
    assert many == pytest.approx(scale, rel=0.35) and abs(math.log(many)) >= abs(math.log(found)) - 0.004


def test_the_prior_limits_the_temperature_of_few_images():
    for seed in range(20):
        logits, _ = problem(seed, images=12)
        assert fit_temperature(logits, logits.argmax(dim=1)) > 0.7  # all of them right


@pytest.mark.parametrize("number", [2, 3, 4, 5, 8, 30])
def test_margins_of_few_groups_are_those_of_student(number):
    """The gains of a group are all alike: so each group is one observation."""
    gains = torch.randn(number, generator=torch.Generator().manual_seed(number)).sign().tolist()
    gains[:2] = 1.0, -1.0
    groups = [i for i in range(number) for _ in range(50)]
    _, margin = paired_difference([gains[i] for i in groups], [0.0] * len(groups), groups)
    expected = stats.t.ppf(0.975, number - 1) * stats.sem(gains)
    assert margin == pytest.approx(expected, rel=4e-3)


def test_intervals_of_groups_hold_the_truth():
    """Groups whose images are all right or all wrong say as much as one image each; groups by chance change little."""
    random, misses, pairs = torch.Generator().manual_seed(0), 0, 0
    for _ in range(300):  # 20 groups of 15 images, 70% of the groups easy; the other model is equally good
        one, other = ((torch.rand(20, generator=random) < 0.7).int().repeat_interleave(15).tolist() for _ in range(2))
        groups = torch.arange(20).repeat_interleave(15).tolist()
        low, high = accuracy_interval(one, groups)
        misses += not low < 0.7 < high
        gain, margin = paired_difference(one, other, groups)
        pairs += abs(gain) > margin
    assert misses < 30 and pairs < 30  # 15 expected
    hits = (torch.rand(300, generator=random) < 0.7).int().tolist()
    plain, grouped = (accuracy_interval(hits, each) for each in (None, [i // 2 for i in range(300)]))
    assert grouped == pytest.approx(plain, abs=0.02) and accuracy_interval([1] * 30, [0] * 30)[0] < 0.3
    assert paired_difference(hits, hits[::-1], range(300)) == paired_difference(hits, hits[::-1])
