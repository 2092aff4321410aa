"""Test accuracy with few training images: our classifier, its two halves, and what others would use.

    python benchmarks/few.py --data cifar10-images --models mobilenet_v2

Of each class N images are drawn, of which a fifth is for validation, as in main_train.py. Prints a table in Markdown,
means and standard deviations over --draws, for

    ours                    train_utils.fit_classifier
    the network alone       its hidden layer, on the images for training, the best epoch on those for validation
    ridge regression        its linear layer, on all N images
    logistic regression     scikit-learn's, on all N images and the last block alone, as others do
"""

import argparse

import numpy as np
import torch
from common import Part, batches, known
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from data import CIFAR10_SIZE, load_data, run_script
from models import Classifier, TransferModel, pick_device, threads
from train_utils import RECIPE, evaluate, fit_classifier, fit_linear

COLUMNS = ("ours", "the network alone", "ridge regression", "logistic regression")
LOGISTIC = 100  # images a class up to which logistic regression is worth the wait


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "mobilenet_v3_large_levels"])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--images", nargs="+", type=int, default=[5, 10, 20, 50, 100, 500], help="of each class")
    parser.add_argument("--draws", type=int, default=5)
    args = parser.parse_args()
    device, data = pick_device(), load_data(args.data)
    for name in args.models:
        model = TransferModel(name, data.classes, CIFAR10_SIZE)
        train, val, test = known(model, (data.train, data.val, data.test))
        model.levels = []
        last = model.forward_features(model.example()).shape[1]  # columns of the last block, the last ones
        print(f"\n| {model.label}, images of each class | {' | '.join(COLUMNS)} |\n| --- |" + " ---: |" * len(COLUMNS))
        for count in args.images:
            with threads(1):
                draws = [accuracies(model, (train, val), test, last, count, seed, device) for seed in range(args.draws)]
            means, spreads = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=args.draws > 1)
            cells = [f"{m:.1%} ± {100 * s:.1f}" for m, s in zip(means, spreads, strict=True)]
            print(f"| {count} | {' | '.join(cells)} |".replace("nan% ± nan", "-"), flush=True)
    return 0


def accuracies(
    model: TransferModel,
    pool: tuple[Part, Part],
    test: Part,
    last: int,
    count: int,
    seed: int,
    device: torch.device,
) -> list[float]:
    """A row of the table for one draw of `count` images of each class."""
    generator = torch.Generator().manual_seed(seed)
    parts, classes = [], len(model.classes)
    for (features, labels), share in zip(pool, (count - max(1, count // 5), max(1, count // 5)), strict=True):
        order = torch.randperm(len(labels), generator=generator)
        drawn = torch.cat([order[labels[order] == label][:share] for label in range(classes)])
        parts.append((features[drawn].float(), labels[drawn]))

    torch.manual_seed(seed)
    classifier = Classifier(model.width, classes, model.hidden).to(device)
    training, _ = fit_classifier(classifier, batches(parts[0], seed), batches(parts[1]), RECIPE, "fp32", "")
    network = training.model  # its last layer is scaled, which changes no answer
    ridge = Classifier(model.width, classes, 1).to(device)
    features, labels = (torch.cat(both) for both in zip(*parts, strict=True))
    fit_linear(ridge, features.to(device), labels.to(device))
    linear = nn.Sequential(ridge.standardize, ridge.linear)
    answers = [evaluate(each, batches(test))[1] for each in (classifier, network, linear)]
    if count > LOGISTIC:
        return [*answers, np.nan]
    logistic = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    logistic.fit(features[:, -last:].numpy(), labels.numpy())
    return [*answers, logistic.score(test[0][:, -last:].float().numpy(), test[1].numpy())]


if __name__ == "__main__":
    run_script(main)
