"""The metrics against scikit-learn, scipy, numpy and an example worked out by hand, and the batches they come from."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn import metrics as sklearn_metrics
from torch import nn

from train_utils import Batches, calibration, evaluate, feature_loader, fit_temperature, metrics

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
    batches = Batches(feature_loader([logits], CPU), labels, 32, CPU)
    assert evaluate(nn.Identity(), batches) == pytest.approx((loss, ours["test_accuracy"]), rel=1e-5)


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
def test_fit_temperature_finds_the_minimum(classes, scale):
    logits, labels = problem(int(100 * scale) + classes, classes, scale)

    def loss(log_temperature):
        rows = log_softmax(logits.double().numpy() / math.exp(log_temperature), axis=1)
        return -rows[np.arange(len(labels)), labels].mean()

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-6})
    found = fit_temperature(logits, labels)
    assert math.log(found) == pytest.approx(best.x, abs=0.003)  # the finest step is 0.004
    assert loss(math.log(found)) == pytest.approx(best.fun, abs=1e-5)
    for factor in (0.6, 1.3, 1.6):
        assert fit_temperature(factor * logits, labels) == pytest.approx(factor * found, rel=0.005)


@pytest.mark.parametrize("batch_size", [1, 2, 32, 512])
def test_batches_hold_every_index_once(batch_size):
    for size in (*range(2, 40), 127, 128, 143, 1000):
        batches = Batches(lambda batch, _: (batch, batch), 3 * torch.arange(size), batch_size, CPU, seed=0)
        for _ in range(2):
            epoch = list(batches)
            assert len(epoch) == len(batches) and min(len(batch) for batch, _ in epoch) >= 2
            assert torch.cat([batch for batch, _ in epoch]).sort().values.equal(torch.arange(size))
            assert all(labels.equal(3 * batch) for batch, labels in epoch)


def test_a_seed_repeats_its_orders():
    def epochs(seed):
        batches = Batches(lambda batch, _: (batch, batch), torch.zeros(100), 8, CPU, seed)
        return [torch.cat([batch for batch, _ in batches]).tolist() for _ in range(3)]

    assert epochs(1) == epochs(1) != epochs(2)
    assert len(set(map(tuple, epochs(1)))) == 3  # every epoch has another order
    assert epochs(None) == [list(range(100))] * 3
