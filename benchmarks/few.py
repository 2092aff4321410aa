"""Test accuracy with few training images: our classifier, its two halves, and what others would use.

    python benchmarks/few.py --data cifar10-images --models mobilenet_v2

Of each class N images are drawn, of which a fifth is for validation, as in main_train.py. Prints a table in Markdown,
means and standard deviations over --draws, for

    ours                    train_utils.fit_classifier
    the network alone       its hidden layer, on the images for training, the best epoch on those for validation
    ridge regression        its linear layer, on all N images
    logistic regression     scikit-learn's, on all N images and the last block alone, as others do
"""

import numpy as np
import torch
from common import DEVICE, Part, arguments, batches, extract, fit, last_block, print_header, print_row
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from data import CIFAR10_SIZE, load_data
from engine.console import run_script
from engine.features import Features
from models import Classifier, TransferModel
from train_utils import evaluate

COLUMNS = ("ours", "the network alone", "ridge regression", "logistic regression")
LOGISTIC = 100  # images a class up to which logistic regression is worth the wait


def main() -> int:
    names = ["mobilenet_v2", "mobilenet_v3_large_levels"]
    args = arguments(__doc__, data="cifar10", models=names, images=[5, 10, 20, 50, 100, 500], draws=5)
    data = load_data(args.data)
    for name in args.models:
        model = TransferModel(name, data.classes, CIFAR10_SIZE)
        *pool, test = extract(model, data.train, data.val, data.test)
        print()
        print_header(f"{model.label}, images of each class", *COLUMNS)
        for count in args.images:
            draws = [accuracies(model, pool, test, count, seed) for seed in range(args.draws)]
            means, spreads = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=args.draws > 1)
            cells = [f"{m:.1%} ± {100 * s:.1f}" for m, s in zip(means, spreads, strict=True)]
            print_row(count, *("-" if "nan" in cell else cell for cell in cells))
    return 0


def accuracies(model: TransferModel, pool: list[Part], test: Part, count: int, seed: int) -> list[float]:
    """A row of the table for one draw of `count` images of each class, from training and validation images."""
    generator, parts, of_val = torch.Generator().manual_seed(seed), [], max(1, count // 5)
    for (features, labels), share in zip(pool, (count - of_val, of_val), strict=True):
        order = torch.randperm(len(labels), generator=generator)
        drawn = torch.cat([order[labels[order] == label][:share] for label in range(len(model.classes))])
        parts.append((features[drawn].float(), labels[drawn]))

    def accuracy(*layers: nn.Module) -> float:
        return evaluate(nn.Sequential(*layers), batches(test))[1]

    torch.manual_seed(seed)
    classifier = Classifier(model.width, len(model.classes), model.hidden)
    fit(classifier, *parts, seed)
    # the MLP's last layer is scaled, which changes no label
    found = [accuracy(classifier), accuracy(classifier.standardize, classifier.mlp)]
    features, labels = (torch.cat(both) for both in zip(*parts, strict=True))
    classifier.fit_ridge(features.to(DEVICE), labels.to(DEVICE))
    found.append(accuracy(classifier.standardize, classifier.ridge))
    if count > LOGISTIC:
        return [*found, np.nan]
    logistic = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    logistic.fit(last_block(model, Features.in_memory(features)), labels.numpy())
    return [*found, logistic.score(last_block(model, test[0]), test[1].numpy())]


if __name__ == "__main__":
    run_script(main)
