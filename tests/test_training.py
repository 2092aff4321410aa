"""The classifier, its ridge regression, and fine-tuning."""

import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, checkpoints, random_model, repeatable, results, same, share_right
from sklearn.linear_model import Ridge
from torch import nn

import train_utils
from data import load_data
from engine.batches import Batches, feature_loader
from engine.features import Features
from engine.images import ImageError
from engine.metrics import fit_temperature
from models import Classifier, balanced_weights, load_checkpoint
from train_utils import FINE_TUNING, RECIPE, RIDGE_IMAGES, Training, fine_tune, fit, fit_classifier, refit_ridge


@pytest.mark.parametrize("class_weights", [False, True])
@pytest.mark.parametrize(("images", "width"), [(24, 100), (90, 7)])
def test_fit_ridge_agrees_with_sklearn_and_leaves_each_image_out(images, width, class_weights):
    torch.manual_seed(images)
    labels = torch.randint(3, (images,)).clamp(max=2)
    labels[:3] = torch.arange(3)
    features = 5 + 3 * torch.randn(images, width)
    features[:, 0] += labels
    features[:, 1] = 7  # constant
    classifier = Classifier(width, 3, 4)
    left_out = classifier.fit_ridge(features, labels, class_weights)
    x, targets = classifier.standardize(features).double().numpy(), F.one_hot(labels).double().numpy()
    weights = balanced_weights(labels)[labels].numpy() if class_weights else np.ones(images)
    theirs = Ridge(alpha=width).fit(x, targets, weights).predict(x)
    ours = classifier.ridge(classifier.standardize(features)).detach().numpy()
    factor = ours.std() / theirs.std()
    assert np.allclose(ours, factor * theirs, atol=1e-3 * factor)
    for i in range(0, images, 7):
        others = np.arange(images) != i
        alone = Ridge(alpha=width).fit(x[others], targets[others], weights[others]).predict(x[i : i + 1])
        assert np.allclose(left_out[i], factor * alone[0], atol=1e-3 * factor)


@pytest.mark.parametrize(
    "case", ["one image in a class", "all the same", "constant features", "two of each", "both labels", "large values"]
)
def test_degenerate_features_give_a_finite_classifier(case):
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


def test_ridge_regression_includes_rare_classes():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (20_001,), generator=random)
    labels[19_999] = 2
    load = feature_loader(torch.randn(len(labels), 8, generator=random), CPU)
    train, val = (Batches(load, labels, 512, CPU, seed) for seed in (0, None))
    chosen = torch.randperm(2 * len(labels), generator=torch.Generator().manual_seed(0))[:RIDGE_IMAGES]
    assert 2 not in torch.cat([labels, labels])[chosen]  # a sample at random would not do
    classifier = Classifier(8, 3, 4)
    fit_classifier(classifier, train, val, dataclasses.replace(RECIPE, epochs=1), "fp32", "")
    assert classifier.ridge.weight[2].abs().sum() > 0


def test_fine_tuning_starts_without_having_seen_the_validation_images():
    """The linear layer is then what ridge regression on the training images gives."""
    random = torch.Generator().manual_seed(0)
    labels, features = torch.randint(3, (60,), generator=random), torch.randn(60, 8, generator=random)
    recipe = dataclasses.replace(RECIPE, epochs=1)
    classifier, alone = Classifier(8, 3, 4), Classifier(8, 3, 4)
    train = Batches(feature_loader(features[:40], CPU), labels[:40], 512, CPU, 0)
    val = Batches(feature_loader(features[40:], CPU), labels[40:], 512, CPU)
    fit_classifier(classifier, train, val, recipe, "fp32", "")
    network = classifier.mlp(classifier.standardize(features))
    refit_ridge(classifier, Features.in_memory(features[:40]), labels[:40], val_images=20)
    alone.fit_ridge(features[:40], labels[:40])
    expected = 8 / (60 + 8) * alone.ridge(alone.standardize(features))
    assert torch.allclose(classifier(features) - network, expected, atol=1e-5)


@pytest.mark.parametrize("recipe", [RECIPE, FINE_TUNING])
def test_training_takes_any_number_of_steps(recipe):
    for steps in range(1, 13):
        labels = torch.arange(8 * steps) % 2
        load = feature_loader(torch.randn(len(labels), 4), CPU)
        train, val = (Batches(load, labels, 8, CPU, seed) for seed in (0, None))
        training = Training(nn.Linear(4, 2), train, val, dataclasses.replace(recipe, epochs=1))
        fit(training)
        assert train.steps == steps and len(training.history) == 1


def test_fine_tuning_resumes(train, answers, known, photos, tmp_path, monkeypatch, fine_tuning_helps):
    (photos / "train" / "red" / "3.png").write_bytes(b"oops")
    names = ["mobilenet_v3_small", "mobilenet_v3_large"]
    command = (photos, "--fine-tune", 2, "--models", *names)
    code, out, _ = train(*command)
    assert code == 1 and "mobilenet_v3_small_finetuned: test accuracy" in out
    expected, state = repeatable(tmp_path), checkpoints(tmp_path)
    assert list(expected) == [f"{name}{tuned}" for name in names for tuned in ("", "_finetuned")]

    frozen, tuned = state["mobilenet_v3_small.pt"], state["mobilenet_v3_small_finetuned.pt"]
    for key in frozen:
        is_fixed = "running" in key or "num_batches" in key or "standardize" in key
        assert torch.equal(frozen[key], tuned[key]) == is_fixed, key
    records = answers(photos / "test", "--checkpoint", "checkpoints/mobilenet_v3_small_finetuned.pt")
    assert share_right(records) == pytest.approx(expected["mobilenet_v3_small_finetuned"]["test_accuracy"])

    (tmp_path / "checkpoints" / "mobilenet_v3_small_finetuned.pt").unlink()
    epochs = []

    def interrupted(*args):
        epochs.append(0)
        if len(epochs) == (3 + 2) + (3 + 1) + 1:  # a classifier and two epochs, of the second model only one
            raise KeyboardInterrupt
        return whole(*args)

    whole = train_utils.train_one_epoch
    monkeypatch.setattr(train_utils, "train_one_epoch", interrupted)
    assert train(*command)[0] == 130
    epochs.clear()
    code, out, _ = train(*command)
    assert code == 1 and "resuming after 2 of 2 epochs" in out and "resuming after 1 of 2 epochs" in out
    assert len(epochs) == 2 * 3 + 1
    assert repeatable(tmp_path) == expected and same(checkpoints(tmp_path), state)
    assert not list(tmp_path.rglob("*.resume"))


def test_fine_tuning_keeps_the_frozen_weights_if_no_epoch_is_better(train, known, photos, tmp_path):
    code, _, err = train(photos, "--fine-tune", 1, "--fine-tune-lr", 0.1)
    assert (code, err) == (0, "")
    frozen, tuned = checkpoints(tmp_path).values()
    assert frozen.keys() == tuned.keys() and all(torch.equal(frozen[key], tuned[key]) for key in frozen)
    frozen, tuned = results(tmp_path)
    for key in ("confusion", "val_loss", "accuracy_by_seed", "temperature"):
        assert frozen[key] == tuned[key]
    model = load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small_finetuned.pt")
    assert np.isfinite(model.predict(photos / "test" / "red" / "0.png")["probability"])


def test_a_loss_that_is_not_finite_stops_one_model(train, known, photos, tmp_path, monkeypatch):
    epochs = []

    def diverges(*args):
        epochs.append(0)
        return (float("nan"), 0.1) if len(epochs) == 3 else whole(*args)

    whole = train_utils.train_one_epoch
    monkeypatch.setattr(train_utils, "train_one_epoch", diverges)
    code, _, err = train(photos, "--models", "mobilenet_v3_small", "mobilenet_v2")
    assert code == 1 and err.count("\n") == 1 and all(text in err for text in ("mobilenet_v3_small", "nan", "epoch 3"))
    rows = repeatable(tmp_path)
    assert [len(row["history"]) for row in rows.values()] == [2, 3]
    origin = load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small.pt").origin
    assert origin["val_accuracy"] == rows["mobilenet_v3_small"]["val_accuracy"]


def test_a_file_deleted_during_fine_tuning_is_named(photos):
    data, model = load_data(str(photos)), random_model("squeezenet1_1", 64)
    model.unfreeze()
    data.train.items[1].unlink()
    with pytest.raises(ImageError, match=re.escape(str(data.train.items[1]))):
        fine_tune(model, data.train, data.val, FINE_TUNING, "fp32", CPU, seed=0)
