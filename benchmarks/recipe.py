"""What each choice in the recipe of the classifiers is worth: validation accuracy with one of them changed at a time.

    python benchmarks/recipe.py --data cifar10-images

Run it where main_train.py ran: it reads the same features, or computes them. Prints a table in Markdown, means over
--seeds. It does not read the test set.
"""

from dataclasses import dataclass, replace
from statistics import mean

from common import arguments, extract, fit, new_model, print_header, print_row
from torch import nn

from data import Data, load_data
from engine.console import run_script
from engine.metrics import loss_and_accuracy
from models import Classifier, find_backbone
from train_utils import RECIPE, Recipe


@dataclass(frozen=True)
class Variant:
    recipe: Recipe = RECIPE
    hidden: int = 512
    dropout: float = 0.0
    views: int = 2


VARIANTS = {
    "the recipe": Variant(),
    "learning rate halved": Variant(replace(RECIPE, lr=RECIPE.lr / 2)),
    "learning rate doubled": Variant(replace(RECIPE, lr=RECIPE.lr * 2)),
    "weight decay 0.3": Variant(replace(RECIPE, weight_decay=0.3)),
    "weight decay 3": Variant(replace(RECIPE, weight_decay=3.0)),
    "half the epochs": Variant(replace(RECIPE, epochs=RECIPE.epochs // 2)),
    "twice the epochs": Variant(replace(RECIPE, epochs=RECIPE.epochs * 2)),
    "labels not smoothed": Variant(replace(RECIPE, label_smoothing=0.0)),
    "dropout 0.5": Variant(dropout=0.5),
    "hidden layer of 256": Variant(hidden=256),
    "hidden layer of 1024": Variant(hidden=1024),
    "the image alone, without its mirror image": Variant(views=1),
}


def main() -> int:
    names = ["mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_large_levels"]
    args = arguments(__doc__, data="cifar10", models=names, seeds=3)
    data = load_data(args.data)
    columns = [[cell(name, data, variant, args.seeds) for variant in VARIANTS.values()] for name in args.models]
    print_header("validation accuracy", *(find_backbone(name).label for name in args.models))
    for row in zip(VARIANTS, *columns, strict=True):
        print_row(*row)
    return 0


def cell(name: str, data: Data, variant: Variant, seeds: int) -> str:
    """The mean over the seeds. "-" if the variant changes the hidden layer and the classifier is a pretrained one."""
    found = []
    for seed in range(seeds):
        model = new_model(name, data.classes, seed, hidden=variant.hidden)
        model.views = variant.views
        if (variant.hidden, variant.dropout) != (512, 0):
            if not isinstance(model.classifier, Classifier):
                return "-"
            model.classifier.mlp.insert(2, nn.Dropout(variant.dropout))  # after the hidden layer's activation
        train, val = extract(model, data.train, data.val)
        _, logits = fit(model.classifier, train, val, seed, variant.recipe)
        found.append(loss_and_accuracy(logits, val[1])[1])
    return f"{mean(found):.2%}"


if __name__ == "__main__":
    run_script(main)
