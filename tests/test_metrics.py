"""The classifier and the metrics against scikit-learn, scipy, numpy and an example by hand, and the batches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import Ridge
from torch import nn

from models import Classifier
from train_utils import (
    FINE_TUNING,
    RECIPE,
    RIDGE_IMAGES,
    TEMPERATURE_PRIOR,
    Batches,
    Training,
    balanced_weights,
    calibration,
    difference,
    evaluate,
    feature_loader,
    fit,
    fit_classifier,
    fit_linear,
    fit_temperature,
    interval,
    metrics,
)

CPU = torch.device("cpu")


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
    predicted, every = logits.argmax(1), range(5)
    assert (labels == 1).any() and (predicted == 3).any()
    ours = metrics(logits, labels, 2.0)
    for average, theirs in ((None, ours["per_class"]), ("macro", ours["macro"])):
        expected = sklearn_metrics.precision_recall_fscore_support(
            labels, predicted, labels=every, average=average, zero_division=0
        )
        for name, score in zip(("precision", "recall", "f1"), expected, strict=False):
            assert theirs[name] == pytest.approx(score, abs=1e-6), name
    assert ours["confusion_matrix"] == sklearn_metrics.confusion_matrix(labels, predicted, labels=every).tolist()
    assert ours["test_accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    top2 = sklearn_metrics.top_k_accuracy_score(labels, logits, k=2, labels=every)
    assert ours["top2_accuracy"] == pytest.approx(top2)
    loss = sklearn_metrics.log_loss(labels, softmax(logits.double().numpy(), axis=1), labels=every)
    assert ours["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert ours["calibration"] == {"before": calibration(logits, labels), "after": calibration(logits / 2, labels)}
    batches = Batches(feature_loader(logits, CPU), labels, 32, CPU)
    assert evaluate(nn.Identity(), batches) == pytest.approx((loss, ours["test_accuracy"]), rel=1e-5)


@pytest.mark.parametrize("class_weights", [False, True])
@pytest.mark.parametrize(("images", "width"), [(24, 100), (90, 7)])
def test_the_linear_layer_is_ridge_regression_and_has_left_each_image_out(images, width, class_weights):
    torch.manual_seed(images)
    labels = torch.randint(3, (images,)).clamp(max=2)
    labels[:3] = torch.arange(3)
    features = 5 + 3 * torch.randn(images, width)
    features[:, 0] += labels
    features[:, 1] = 7  # constant
    classifier = Classifier(width, 3, 4)
    left_out = fit_linear(classifier, features, labels, class_weights)
    x, targets = classifier.standardize(features).double().numpy(), F.one_hot(labels).double().numpy()
    weights = balanced_weights(labels)[labels].numpy() if class_weights else np.ones(images)
    theirs = Ridge(alpha=width).fit(x, targets, weights).predict(x)
    ours = classifier.linear(classifier.standardize(features)).detach().numpy()
    factor = ours.std() / theirs.std()
    assert np.allclose(ours, factor * theirs, atol=1e-3 * factor)
    for i in range(0, images, 7):
        others = np.arange(images) != i
        alone = Ridge(alpha=width).fit(x[others], targets[others], weights[others]).predict(x[i : i + 1])
        assert np.allclose(left_out[i], factor * alone[0], atol=1e-3 * factor)


@pytest.mark.parametrize(
    "case", ["one image in a class", "all the same", "constant features", "two of each", "both labels", "large values"]
)
def test_any_features_give_a_classifier_that_answers(case):
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.randn(40, 64) + 2 * labels[:, None]
    if case == "one image in a class":
        labels = (torch.arange(40) == 5).long()
    elif case == "all the same":
        features = features[:1].expand(40, -1).contiguous()
    elif case == "constant features":
        features[:, ::2] = 3.0
    elif case == "two of each":
        features, labels = features[:4], labels[:4]
    elif case == "both labels":
        features[20:], labels[20:] = features[:20], 1 - labels[:20]
    elif case == "large values":
        features *= 20000
    classifier = Classifier(64, 2, 16)
    val = torch.arange(len(labels)) % 4 == 3 if len(labels) > 4 else torch.arange(len(labels)) == 3
    parts = [
        Batches(feature_loader(features[part], CPU), labels[part], 32, CPU, seed)
        for part, seed in ((~val, 0), (val, None))
    ]
    _, logits = fit_classifier(classifier, *parts, RECIPE, "fp32", case)
    answers = classifier(features).softmax(dim=1)
    assert logits.isfinite().all() and answers.isfinite().all() and len(logits) == val.sum()
    accuracy = (answers.argmax(dim=1) == labels).float().mean()
    assert accuracy >= (0.5 if case in ("all the same", "both labels") else 0.97)
    assert 0.5 < fit_temperature(logits, labels[val]) < 2


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 7), (45, 50), (4285, 5000), (9, 9)])
def test_the_interval_is_wilsons(right, count):
    """Its ends are the accuracies p at which the observed one is 1.96 standard errors sqrt(p (1 - p) / n) away."""
    for end in interval(right / count, count):
        assert 0 <= end <= 1
        assert abs(right / count - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count), abs=1e-9)


def test_differences_are_judged_on_the_same_images():
    """Bonett and Price's interval, by hand: (b - c) / (n + 2), b and c with one image more each."""
    right, other = torch.zeros(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
    right[:70], other[10:75] = 1, 1  # both 60, one alone 10, the other alone 5
    gain, margin = difference(right, other)
    assert gain == pytest.approx(5 / 102) and margin == pytest.approx(1.96 * math.sqrt(17 - 25 / 102) / 102)
    assert difference(other, right) == pytest.approx((-gain, margin))
    assert difference(right, right) == pytest.approx((0, 1.96 * math.sqrt(2) / 102))  # never certain
    random, misses = torch.Generator().manual_seed(0), 0
    for _ in range(500):  # two models that are equally good: 95 % of the intervals hold the true difference, 0
        hard, one, two = torch.rand(3, 300, generator=random)
        answers = [((hard < 0.6) | (luck < 0.3)).long() for luck in (one, two)]
        gain, margin = difference(*answers)
        misses += abs(gain) > margin
    assert 10 <= misses <= 45


def test_calibration_by_hand():
    """Bins are a fifteenth wide: confidence 0.55 is in bin 8, 0.7 in bin 10, 0.9 in bin 13, 1 in the last, 14."""
    confidence, right = [0.9, 0.9, 0.7, 0.7, 0.55, 1.0], [True, False, True, True, False, True]
    logits = torch.tensor([[p, 1 - p] for p in confidence]).log()  # the first class is predicted
    result = calibration(logits, torch.tensor([0 if hit else 1 for hit in right]))
    assert {i: n for i, n in enumerate(result["count"]) if n} == {8: 1, 10: 2, 13: 2, 14: 1}
    assert [result["confidence"][i] for i in (8, 10, 13, 14)] == pytest.approx([0.55, 0.7, 0.9, 1.0])
    assert [result["accuracy"][i] for i in (8, 10, 13, 14)] == [0, 1, 0.5, 1]
    # 1 of 6 images is off by 0.55, 2 are off by 1 - 0.7, 2 by 0.9 - 0.5, 1 by nothing
    assert result["ece"] == pytest.approx((0.55 + 2 * 0.3 + 2 * 0.4 + 0) / 6)


@pytest.mark.parametrize(("seed", "scale"), [(0, 0.4), (1, 1.0), (2, 3.0)])
def test_calibration_agrees_with_numpy(seed, scale):
    logits, labels = problem(seed, scale=scale)
    chances = softmax(logits.double().numpy(), axis=1)
    confidence, right = chances.max(1), chances.argmax(1) == labels.numpy()
    result, bins = calibration(logits, labels), np.digitize(confidence, np.linspace(0, 1, 16)[1:-1])
    error = sum(abs((confidence - right)[bins == i].sum()) for i in range(15)) / len(labels)
    assert result["ece"] == pytest.approx(error, abs=1e-6)
    assert result["count"] == [(bins == i).sum() for i in range(15)]


@pytest.mark.parametrize("scale", [0.1, 0.4, 1.0, 1.7, 12.0])  # under-confident below 1, over-confident above
@pytest.mark.parametrize("classes", [2, 10])
def test_fit_temperature_finds_the_most_probable(classes, scale):
    logits, labels = problem(int(100 * scale) + classes, classes, scale)

    def improbability(t):
        rows = log_softmax(logits.double().numpy() / math.exp(t), axis=1)
        return -rows[np.arange(len(labels)), labels].sum() + (t / TEMPERATURE_PRIOR) ** 2 / 2

    best = minimize_scalar(improbability, bounds=(-3, 3), method="bounded", options={"xatol": 1e-6})
    found = fit_temperature(logits, labels)
    assert math.log(found) == pytest.approx(best.x, abs=0.003)  # the finest step is 0.004
    many = fit_temperature(logits.repeat(100, 1), labels.repeat(100))
    assert many == pytest.approx(scale, rel=0.35) and abs(math.log(many)) >= abs(math.log(found)) - 0.004


def test_a_few_images_never_sharpen_much():
    for seed in range(20):
        logits, _ = problem(seed, images=12)
        assert fit_temperature(logits, logits.argmax(dim=1)) > 0.7  # all of them right


@pytest.mark.parametrize("recipe", [RECIPE, FINE_TUNING])
def test_training_takes_any_number_of_steps(recipe):
    for steps in range(1, 13):
        labels = torch.arange(8 * steps) % 2
        load = feature_loader(torch.randn(len(labels), 4), CPU)
        train, val = (Batches(load, labels, 8, CPU, seed) for seed in (0, None))
        training = Training(nn.Linear(4, 2), train, val, replace(recipe, epochs=1))
        fit(training)
        assert train.steps == steps and len(training.history) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 32, 512])
def test_batches_hold_every_index_once(batch_size):
    for size in (*range(2, 40), 127, 128, 143, 1000):
        batches = Batches(lambda batch, _: (batch, batch), 3 * torch.arange(size), batch_size, CPU, seed=0)
        for _ in range(2):
            epoch = list(batches)
            assert len(epoch) == batches.steps and min(len(batch) for batch, _ in epoch) >= 2
            assert torch.cat([batch for batch, _ in epoch]).sort().values.equal(torch.arange(size))
            assert all(labels.equal(3 * batch) for batch, labels in epoch)


def test_many_images_are_shuffled_in_blocks():
    """So a feature file that is larger than memory is not read by a seek for every row."""
    count = 300_000
    batches = Batches(lambda batch, _: (batch, batch), torch.zeros(count), 512, CPU, seed=0)
    order = torch.cat([batch for batch, _ in batches])
    assert order.sort().values.equal(torch.arange(count))
    first = order[:100_000]
    assert len((first // 64).unique()) < 2100 and first.diff().abs().median() > 10_000


def test_a_seed_repeats_its_orders():
    def epochs(seed):
        batches = Batches(lambda batch, _: (batch, batch), torch.zeros(100), 8, CPU, seed)
        return [torch.cat([batch for batch, _ in batches]).tolist() for _ in range(3)]

    assert epochs(1) == epochs(1) != epochs(2)
    assert len(set(map(tuple, epochs(1)))) == 3  # every epoch has another order
    assert epochs(None) == [list(range(100))] * 3


def test_ridge_regression_sees_every_class_however_rare():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (20_001,), generator=random)
    labels[19_999] = 2
    load = feature_loader(torch.randn(len(labels), 8, generator=random), CPU)
    train, val = (Batches(load, labels, 512, CPU, seed) for seed in (0, None))
    chosen = torch.randperm(2 * len(labels), generator=torch.Generator().manual_seed(0))[:RIDGE_IMAGES]
    assert 2 not in torch.cat([labels, labels])[chosen]  # a sample at random would not do
    classifier = Classifier(8, 3, 4)
    fit_classifier(classifier, train, val, replace(RECIPE, epochs=1), "fp32", "")
    assert classifier.linear.weight[2].abs().sum() > 0
