"""The backbones, the model built on them, and its checkpoints.

    model = TransferModel("mobilenet_v2", classes=("cat", "dog"))
    logits = model(images)                              # (B, 3, 224, 224) -> (B, 2)

    model = load_checkpoint("checkpoints/mobilenet_v2.pt")
    model.predict("cat.jpg")                            # {"path": "cat.jpg", "label": "cat", "probability": 0.97, ...}

Every classification model of torchvision is a backbone, and every one of timm. BACKBONES holds those in the table of
the README.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.backbones import build, check_name
from engine.console import first_line
from engine.fast import cached_copy
from engine.files import content_hash, load_tensors, save_tensors
from engine.images import Item, images_of, is_image, preprocess, read_image
from engine.layers import Standardize, averages, run_layers, stage_ends
from engine.metrics import average_models
from engine.openvino import fastest_copy
from engine.results import versions
from engine.run import run_images
from engine.unfamiliar import Unfamiliarity
from engine.weights import is_file

# --------------------------------------------------------------------------------------------- the backbones


@dataclass(frozen=True)
class Backbone:
    """A backbone and how its features are read."""

    label: str  # in plots and tables
    plot: str  # how the names of its plots begin
    name: str  # which model, with which weights, see engine/backbones.py
    # The classifier reads the last maps, averaged over the image. With every_level it also reads those of each earlier
    # stage, averaged over each quarter of the image. The idea is from Head2Toe (Evci et al. 2022, arXiv 2201.03529).
    every_level: bool = True
    # keep the pretrained classifier, which must be a sequence that reads averages, and replace only its last layer
    keep_classifier: bool = False


BACKBONES = {
    "vgg16": Backbone("VGG16", "vgg16", "vgg16", every_level=False),
    "mobilenet_v2": Backbone("MobileNetV2", "mobilenet", "mobilenet_v2"),
    "mobilenet_v3_large": Backbone(
        "MobileNetV3-Large", "mobilenet_large", "mobilenet_v3_large", every_level=False, keep_classifier=True
    ),
    "mobilenet_v3_large_levels": Backbone(
        "MobileNetV3-Large, every level", "mobilenet_large_levels", "mobilenet_v3_large"
    ),
    "mobilenet_v3_small": Backbone("MobileNetV3-Small", "mobilenet_small", "mobilenet_v3_small"),
    "efficientnet_b0": Backbone("EfficientNet-B0", "efficientnet_b0", "efficientnet_b0"),
}


def find_backbone(name: str) -> Backbone:
    """The row of BACKBONES, or one for another model of torchvision or timm, or for other weights.

    Raises ValueError if there is none of that name.
    """
    base, colon, weights = name.partition(":")
    row = BACKBONES.get(base) or Backbone(label=base, plot=file_name(base), name=base)
    if name not in BACKBONES:
        check_name(f"{row.name}{colon}{weights}", tuple(BACKBONES))
    if not weights:
        return row
    label, plot, name = f"{row.label}, {weights}", file_name(f"{row.plot}_{weights}"), f"{row.name}:{weights}"
    keep = row.keep_classifier and not is_file(weights)  # a file may lack the classifier
    return replace(row, label=label, plot=plot, name=name, keep_classifier=keep)


def file_name(name: str) -> str:
    """The name without characters that file names cannot have."""
    return re.sub(r"[^\w.-]+", "_", name)


# ------------------------------------------------------------------------------------------------- the model


class TransferModel(nn.Module):
    """A backbone, `features`, frozen until `unfreeze`, and a `classifier` of its outputs, of which maps are averaged.

    `features.*` of the state dict loads into torchvision's model, if that model has `features` and `classifier`.
    Raises ValueError if the backbone is unknown, does not accept images of `image_size` (default: the size of its
    weights) or does not fit its weights file, OSError if its weights cannot be loaded.
    """

    def __init__(
        self,
        backbone: str,
        classes: Sequence[str],
        image_size: int | None = None,
        pretrained: bool = True,
        hidden: int = 512,
    ):
        super().__init__()
        self.backbone, self.classes, self.hidden = backbone, tuple(classes), hidden
        row = find_backbone(backbone)
        built = build(row.name, image_size, pretrained)
        self.weights, own_size = built.weights, built.preprocessing["image_size"]
        size = image_size or own_size
        # crop: the square in the middle of an image; otherwise the whole image is squeezed into a square
        self.preprocessing = {"crop": True, **built.preprocessing, "image_size": size}
        # The precision of `features`, in training and in inference. A classifier that is trained on bf16 features
        # loses up to 1.4 points of accuracy on fp32 features.
        self.precision = "fp32"
        self.program: dict[str, Tensor] = {}  # in int8: OpenVINO's, instead of `features`
        self.temperature = 1.0  # divides the logits, which calibrates the probabilities (Guo et al. 2017)
        self.fine_tuned = False
        # 2: features are the mean over the image and its mirror image (test-time augmentation); 1: of the image alone
        self.views = 2
        self.unfamiliarity: Unfamiliarity | None = None  # scores the features of a frozen backbone
        self.origin: dict = {}  # if loaded from a checkpoint: the data it was trained on, its validation accuracy
        self.path: Path | None = None  # the checkpoint from which it was loaded

        self.features = built.features.requires_grad_(False).eval()
        self.levels = stage_ends(self.features)[:-1] if row.every_level else []  # which layers' outputs are read
        self.width = self._measured_width(own_size)
        if row.keep_classifier:
            *kept, last = built.network.classifier
            self.classifier = nn.Sequential(*kept, nn.Linear(last.in_features, len(classes)))
        else:
            self.classifier = Classifier(self.width, len(classes), hidden)
        self.eval()

    def _measured_width(self, own_size: int) -> int:
        """The number of features. Raises ValueError if the backbone does not give them for images of this size."""
        name, size = self.backbone, self.preprocessing["image_size"]
        twin = f"; try {name.removesuffix('_enc')}" * name.endswith("_enc")  # timm has some models without the head
        try:
            with torch.inference_mode():
                shape = self.forward_features(self.example()).shape
        except Exception as error:  # whatever a network raises for images that it was not built for
            raise ValueError(
                f"{name} does not accept {size}-pixel images; its weights are for {own_size}{twin}"
            ) from error
        if len(shape) != 2:
            raise ValueError(f"{name} gives {tuple(shape[1:])} for an image, not one row of features{twin}")
        return shape[1]

    @property
    def name(self) -> str:
        return file_name(self.backbone) + ("_finetuned" if self.fine_tuned else "")

    @property
    def label(self) -> str:
        return find_backbone(self.backbone).label + (", fine-tuned" if self.fine_tuned else "")

    @property
    def plot(self) -> str:
        """How the names of the model's plots begin."""
        return find_backbone(self.backbone).plot + ("_finetuned" if self.fine_tuned else "")

    def unfreeze(self) -> None:
        """Makes the backbone trainable. From here on the model is called `<backbone>_finetuned`."""
        self.features.requires_grad_(True)
        self.fine_tuned = True
        self.unfamiliarity, self.precision, self.program = None, "fp32", {}  # the features will change

    def train(self, mode: bool = True) -> "TransferModel":
        """Keeps `features` in eval mode, or BatchNorm's statistics would drift."""
        super().train(mode)
        self.features.eval()
        return self

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> features (B, width), float32: the mean over the views. Training uses one view."""
        features = self.forward_view(images).float()
        if self.views == 1 or self.training:
            return features
        return (features + self.forward_view(images.flip(3)).float()) / 2

    def forward_view(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width)"""
        if not isinstance(self.features, nn.Sequential):
            return self.features(images)
        maps, levels = run_layers(self.features, self.levels, images)
        return torch.cat([levels, averages(maps, 1)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        return self.classifier(self.forward_features(images))

    def answer(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, classes + 1): logits and unfamiliarity (0 if `unfamiliarity` is None)"""
        features = self.forward_features(images)
        logits = self.classifier(features)
        score = logits.new_zeros(len(logits)) if self.unfamiliarity is None else self.unfamiliarity(features, logits)
        return torch.cat([logits, score[:, None]], dim=1)

    def predict(self, images: Item | Iterable[Item], top_k: int = 3) -> dict | list[dict]:
        """Classifies one image or several: a path, a PIL image, a file's bytes, an open file, a uint8 array (H, W, 3)
        or tensor (3, H, W); anything that yields such images; an array (B, H, W, 3), or one of paths.

        Returns a record for each: {"path": "cat.jpg", "model": "mobilenet_v2", "label": "cat", "probability": 0.97,
        "top": [{"label": "cat", "probability": 0.97}, ...], "unfamiliar": False}, or {"path", "error"} if it cannot be
        read. An unfamiliar image is unlike the training images; its label is a guess. Backbones whose weights were
        fine-tuned do not tell. Raises TypeError if `images` is something else, ValueError if `top_k` is below 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more, not {top_k}")
        single, items = is_image(images), images_of(images)
        records = [record for _, [record] in predictions([cached_copy(self, fastest_copy)], items, top_k)]
        return records[0] if single else records

    def example(self) -> Tensor:
        """An image of the mean colour, preprocessed: (1, 3, S, S)."""
        size = self.preprocessing["image_size"]
        return next(self.features.parameters()).new_zeros(1, 3, size, size)


def predictions(
    models: list[TransferModel], items: Iterable[Item], top_k: int, ensemble: bool = False
) -> Iterator[tuple[Item, list[dict]]]:
    """Yields each item with one record for each model, as in `TransferModel.predict`, or with one error record.

    With `ensemble`, yields one record for all models, which must have the same classes. Its probabilities are the
    softmax of the models' mean log-probabilities. Its "models" is the list of the models' records.
    """
    for batch, outputs, errors in run_images(models, items, TransferModel.answer):
        answers = [rows[:, :-1] / model.temperature for rows, model in zip(outputs, models, strict=True)]
        together = average_models(answers) if ensemble else None
        for i, item in enumerate(batch):
            path = {"path": str(item) if isinstance(item, Path | str) else None}
            if i in errors:
                yield item, [{**path, "error": str(errors[i])}]
                continue
            records = []
            for model, answer, rows in zip(models, answers, outputs, strict=True):
                records.append({**path, "model": model.name, **_best(answer[i], model.classes, top_k)})
                if model.unfamiliarity is not None:
                    records[-1]["unfamiliar"] = bool(rows[i, -1] > 0)
            if ensemble:
                best = _best(together[i], models[0].classes, top_k)
                votes = [record["unfamiliar"] for record in records if "unfamiliar" in record]
                if votes:
                    best["unfamiliar"] = sum(votes) > len(votes) / 2
                records = [{**path, "model": "ensemble", **best, "models": records}]
            yield item, records


def _best(logits: Tensor, classes: Sequence[str], top_k: int) -> dict:
    """The label of one image's logits (classes), its probability, and the `top_k` best."""
    best = logits.softmax(dim=0).topk(min(top_k, len(classes)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    top = [{"label": classes[label], "probability": probability} for label, probability in pairs]
    return {**top[0], "top": top}


def set_statistics(model: TransferModel, items: Iterable[Item]) -> None:
    """Sets the BatchNorm statistics of a random backbone from images. Without them, deep activations vanish."""
    images = preprocess([read_image(item) for item in items], model.preprocessing)
    norms = [module for module in model.features.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this batch replace the others
        norm.train()
    with torch.no_grad():
        model.forward_view(images)
    model.features.eval()


# -------------------------------------------------------------------------------------------- the classifier


class Classifier(nn.Module):
    """Ridge regression plus an MLP with one hidden layer, on standardised features: (B, width) -> logits (B, classes).

    `train_utils.fit_classifier` trains it: ridge regression is good with few images, the MLP with many.
    """

    def __init__(self, width: int, classes: int, hidden: int):
        super().__init__()
        self.standardize = Standardize(width)
        self.ridge = nn.Linear(width, classes)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, features: Tensor) -> Tensor:
        features = self.standardize(features)
        return self.ridge(features) + self.mlp(features)

    @torch.no_grad()
    def fit_ridge(self, features: Tensor, labels: Tensor, class_weights: bool = False) -> Tensor:
        """Sets the standardisation and the ridge layer from features (N, width) of images of every class.

        Ridge regression (Hoerl and Kennard 1970) on one-hot labels (N,), in its dual form. Its strength is the number
        of features. The same matrix gives leave-one-out scores: each image's scores without that image in the fit
        (Allen 1974). Logits are scores times a factor, which minimises the cross-entropy of the leave-one-out logits
        (Platt 1999). Returns the leave-one-out logits (N, classes).
        """
        count, width = features.shape
        weights = balanced_weights(labels)[labels] if class_weights else torch.ones(count, device=features.device)
        root, targets = weights.sqrt()[:, None], F.one_hot(labels, self.ridge.out_features).float()
        self.standardize.fit(features)
        x = self.standardize(features)
        mean, mean_target = (weights[:, None] * x).mean(dim=0), (weights[:, None] * targets).mean(dim=0)
        x = root * (x - mean)
        kernel = x @ x.T / width
        kernel.diagonal().add_(1)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
        residuals = inverse @ (root * (targets - mean_target))
        # a residual divided by 1 - leverage is the one without the image in the fit; the mean is fitted, too
        loo_scores = targets - residuals / root / (inverse.diagonal() - weights / count).clamp(1e-3)[:, None]
        factors = torch.linspace(0, 4, 201).exp().tolist()
        smoothing = 1 / (count + 2)  # keeps the loss finite when every prediction is right
        losses = [F.cross_entropy(factor * loo_scores, labels, label_smoothing=smoothing) for factor in factors]
        factor = factors[int(torch.stack(losses).argmin())]
        self.ridge.weight.copy_(factor * (residuals.T @ x) / width)
        self.ridge.bias.copy_(factor * mean_target - self.ridge.weight @ mean)
        return factor * loo_scores


def balanced_weights(labels: Tensor) -> Tensor:
    """A weight for each class, in inverse proportion to its number of labels. Their mean over the labels is 1."""
    counts = labels.bincount()
    return len(labels) / (len(counts) * counts.clamp(1))


# ------------------------------------------------------------------------------------------------ checkpoints

SCHEMA, READABLE = 6, (4, 5, 6)  # 4 had the whole row, as "metrics"
RENAMED = {"classifier.linear.": "classifier.ridge.", "classifier.network.": "classifier.mlp."}  # up to schema 5
# what a checkpoint keeps of the model's attributes, and of its row
SAVED = ("preprocessing", "hidden", "precision", "temperature", "fine_tuned", "views", "weights")
ORIGIN = ("data", "columns", "groups", "content", "split", "train_images", "val_accuracy", "weights_sha256")


def save_checkpoint(path: Path, model: TransferModel, row: dict) -> None:
    """Saves all that rebuilds the model without a download, as plain types and tensors. `row` is of results.json."""
    origin = {key: row[key] for key in ORIGIN if key in row}
    values = {"schema": SCHEMA, "name": model.backbone, "classes": list(model.classes), "origin": origin}
    values |= {name: getattr(model, name) for name in SAVED} | {"versions": versions()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    extra = {name: tensors.pop(name) for name in list(tensors) if name.startswith("unfamiliarity.")}
    # others can load state_dict alone
    parts = {"state_dict": tensors, "unfamiliarity": extra, "program": model.program}
    save_tensors(path, {**values, **parts, "sha256": content_hash({**tensors, **extra, **model.program}, values)})


def load_checkpoint(path: str | Path) -> TransferModel:
    """Loads a model onto the CPU, in eval mode. The data that it was trained on are in `model.origin`.

    Raises FileNotFoundError if `path` is missing, ValueError if it is damaged, not a checkpoint of this project, or
    cannot be rebuilt here. The message is one line. Code in the file is never executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: train one with main_train.py")
    try:
        values = load_tensors(path)
        schema = values["schema"]
        if schema in READABLE:
            used = ", ".join(f"{package} {version}" for package, version in values.get("versions", {}).items())
            tensors, program = values.pop("state_dict") | values.pop("unfamiliarity"), values.pop("program", {})
            written = values.pop("sha256")
            if content_hash(tensors | program, values) != written:
                raise ValueError("checksum mismatch")
    except Exception as error:  # whatever a hostile or damaged file makes the readers raise
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({first_line(error)})") from error
    if schema not in READABLE:
        raise ValueError(f"{path} is of another version of this project (schema {schema}): use that, or train again")
    try:
        model = _rebuild(values, tensors)
        model.program = program
    except Exception as error:  # the file is whole, so a package is missing, or its version builds another network
        written = f"; it was written with {used}" * bool(used)
        raise ValueError(f"{path} cannot be rebuilt here: {first_line(error)}{written}") from error
    model.path = path
    return model


def _rebuild(values: dict, tensors: dict[str, Tensor]) -> TransferModel:
    """The model of a checkpoint's plain values and tensors."""
    size = values["preprocessing"]["image_size"]
    model = TransferModel(values["name"], values["classes"], size, pretrained=False, hidden=values["hidden"])
    if any(name.startswith("unfamiliarity.") for name in tensors):
        model.unfamiliarity = Unfamiliarity(model.width, len(model.classes))
    state = model.state_dict()  # keeps the versions of modules: MNASNet refuses tensors without
    state.clear()
    for name, tensor in tensors.items():
        for old, new in RENAMED.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    for name in SAVED:
        setattr(model, name, values.get(name, getattr(model, name)))  # schema 4 may lack `weights`
    row = values["origin"] if "origin" in values else values["metrics"]
    model.origin = {key: row[key] for key in ORIGIN if key in row}
    return model
