"""How accurate tuned logistic regression is on the average of the last block: the baseline for the classifiers.

    pip install scikit-learn
    python benchmarks/logistic_regression.py --data cifar10-images --models mobilenet_v2

Run it where main_train.py ran: it reads the same features, or computes them. The strength of the regularisation is
chosen on the validation set. The test set is read once.
"""

import numpy as np
import torch
from common import arguments, extract
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from data import CIFAR10_SIZE, load_data
from engine.console import run_script
from engine.features import Features
from models import TransferModel

Arrays = tuple[np.ndarray, np.ndarray]  # features (N, width) and labels (N,)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # scikit-learn's C: smaller values regularise more


def main() -> int:
    args = arguments(__doc__, data="cifar10", models=["mobilenet_v2", "mobilenet_v3_large"])
    data = load_data(args.data)
    for name in args.models:
        model = TransferModel(name, data.classes, CIFAR10_SIZE)
        parts = extract(model, data.train, data.val, data.test)
        train, val, test = ((last_block(model, features), labels.numpy()) for features, labels in parts)
        accuracy, strength, best = best_on_validation(train, val)
        found = f"validation {accuracy:.2%}, test {best.score(*test):.2%}"
        print(f"{name}: {train[0].shape[1]} features, C {strength:g}: {found}")
    return 0


def last_block(model: TransferModel, features: Features) -> np.ndarray:
    """The features of the last block alone, which are the last columns."""
    width = model.features(model.example()).shape[1]
    return torch.cat([block[:, -width:] for block in features.blocks()]).numpy()


def best_on_validation(train: Arrays, val: Arrays) -> tuple[float, float, Pipeline]:
    """The validation accuracy, the strength, and the classifier, fitted to the training images."""
    candidates = []
    for strength in STRENGTHS:
        candidate = logistic_regression(strength).fit(*train)
        candidates.append((candidate.score(*val), strength, candidate))
    return max(candidates, key=lambda row: row[0])


def logistic_regression(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


if __name__ == "__main__":
    run_script(main)
