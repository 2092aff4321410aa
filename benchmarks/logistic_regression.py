"""What tuned logistic regression makes of the last block's features: the figure that our classifiers have to beat.

    pip install scikit-learn
    python benchmarks/logistic_regression.py --data cifar10-images --models mobilenet_v2

Run it where main_train.py ran: it reads the same features, or computes them. The regularisation is chosen
on the validation set; the test set is read once.
"""

import argparse
import sys
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import load_data, run_script
from models import BACKBONES, TransferModel, pick_device, pick_precision
from train_utils import cached_features

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--models", nargs="+", choices=BACKBONES, default=("mobilenet_v2", "mobilenet_v3_large"))
    args = parser.parse_args()
    device = pick_device()
    data = load_data(args.data)
    for name in args.models:
        model = TransferModel(name, data.classes)
        precision = pick_precision("auto", device)
        features = [
            cached_features(model, images, Path("data/features"), device, precision).array.float()
            for images in (data.images, data.test)
        ]
        model.every_level = False
        last = model.forward_features(torch.zeros(1, 3, 32, 32)).shape[1]  # columns, of the last block
        train, val, test = (
            part[:, -last:].numpy() for part in (features[0][data.train], features[0][data.val], features[1])
        )
        scale = StandardScaler().fit(train)
        labels = data.images.labels.numpy()
        found = []
        for strength in STRENGTHS:
            fitted = LogisticRegression(C=strength, max_iter=1000).fit(scale.transform(train), labels[data.train])
            found.append((fitted.score(scale.transform(val), labels[data.val]), strength, fitted))
            print(f"{name}: C {strength:g}, validation {found[-1][0]:.2%}")
        accuracy, strength, best = max(found, key=lambda row: row[0])
        tested = best.score(scale.transform(test), data.test.labels.numpy())
        print(f"{name}: {last} features, C {strength:g}: validation {accuracy:.2%}, test {tested:.2%}")
    return 0


if __name__ == "__main__":
    run_script(main)
