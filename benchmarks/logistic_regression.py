"""How accurate tuned logistic regression is on the average of the last block: the baseline for the classifiers.

    pip install scikit-learn
    python benchmarks/logistic_regression.py --data cifar10-images --models mobilenet_v2

Run it where main_train.py ran: it reads the same features, or computes them. The strength of the regularisation is
chosen on the validation set. The test set is read once.
"""

import argparse

from common import known
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data import CIFAR10_SIZE, load_data, run_script
from models import BACKBONES, TransferModel

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # scikit-learn's C: smaller values regularise more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--models", nargs="+", choices=BACKBONES, default=("mobilenet_v2", "mobilenet_v3_large"))
    args = parser.parse_args()
    data = load_data(args.data)
    for name in args.models:
        model = TransferModel(name, data.classes, CIFAR10_SIZE)
        parts = known(model, (data.train, data.val, data.test))
        model.levels = []
        width = model.forward_features(model.example()).shape[1]  # of the last block alone, whose columns come last
        train, val, test = ((part[:, -width:].float().numpy(), labels.numpy()) for part, labels in parts)
        candidates = []
        for strength in STRENGTHS:
            candidate = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
            candidate.fit(*train)
            accuracy = candidate.score(*val)
            print(f"{name}: C {strength:g}, validation {accuracy:.2%}")
            candidates.append((accuracy, strength, candidate))
        accuracy, strength, best = max(candidates, key=lambda row: row[0])
        tested = best.score(*test)
        print(f"{name}: {width} features, C {strength:g}: validation {accuracy:.2%}, test {tested:.2%}")
    return 0


if __name__ == "__main__":
    run_script(main)
