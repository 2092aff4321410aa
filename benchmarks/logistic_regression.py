"""How accurate tuned logistic regression is on the average of the last block: the baseline for the classifiers.

    pip install scikit-learn
    python benchmarks/logistic_regression.py --data cifar10-images --models mobilenet_v2

Run it where main_train.py ran: it reads the same features, or computes them. The strength of the regularisation is
chosen on the validation set. The test set is read once.
"""

import argparse
import sys
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import CIFAR10_SIZE, load_data, run_script
from models import BACKBONES, TransferModel, pick_device
from train_utils import cached_features

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # scikit-learn's C: smaller values regularise more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--models", nargs="+", choices=BACKBONES, default=("mobilenet_v2", "mobilenet_v3_large"))
    args = parser.parse_args()
    device = pick_device()
    data = load_data(args.data)
    parts, folder = (data.train, data.val, data.test), Path("data/features")
    for name in args.models:
        model = TransferModel(name, data.classes, CIFAR10_SIZE)
        features = [cached_features(model, images, folder, device) for images in parts]
        model.levels = []
        width = model.forward_features(model.example()).shape[1]  # of the last block alone, whose columns come last
        train, val, test = (part.of(part.readable)[:, -width:].float().numpy() for part in features)
        candidates = []
        for strength in STRENGTHS:
            candidate = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
            candidate.fit(train, data.train.labels.numpy())
            accuracy = candidate.score(val, data.val.labels.numpy())
            print(f"{name}: C {strength:g}, validation {accuracy:.2%}")
            candidates.append((accuracy, strength, candidate))
        accuracy, strength, best = max(candidates, key=lambda row: row[0])
        tested = best.score(test, data.test.labels.numpy())
        print(f"{name}: {width} features, C {strength:g}: validation {accuracy:.2%}, test {tested:.2%}")
    return 0


if __name__ == "__main__":
    run_script(main)
