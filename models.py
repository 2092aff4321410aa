"""The backbones, the model built on them, its checkpoints, and how a model is run on images.

    model = TransferModel("mobilenet_v2", classes=("cat", "dog"))
    logits = model(images)                              # (B, 3, 224, 224) -> (B, 2)

    model = load_checkpoint("checkpoints/mobilenet_v2.pt")
    model.predict("cat.jpg")                            # {"path": "cat.jpg", "label": "cat", "probability": 0.97, ...}

Every classification model of torchvision is a backbone. BACKBONES holds those that the report names or tunes.
"""

import copy
import difflib
import hashlib
import importlib
import io
import itertools
import json
import math
import operator
import os
import platform
import sys
import threading
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp

from data import ImageError, Item, available_cpus, first_line, preprocess, read_image, whole_file

# isort: split
# after data.py, which makes the import of torchvision fast
from torchvision import models
from torchvision.ops import stochastic_depth

# --------------------------------------------------------------------------------------------- the backbones


@dataclass(frozen=True)
class Backbone:
    """A backbone and how its features are read."""

    label: str  # in plots and tables
    plot: str  # the name of its plots' files
    architecture: str  # torchvision's name of the model
    # The classifier reads the last maps, averaged over the image. With every_level it also reads those of each earlier
    # stage, averaged over each quarter of the image. The idea is from Head2Toe (Evci et al. 2022, arXiv 2201.03529).
    every_level: bool = True
    keep_classifier: bool = False  # keep the pretrained classifier and replace only its last layer

    @property
    def weights(self) -> models.WeightsEnum:
        """IMAGENET1K_V1 if there is one: V2 was trained with mixup and label smoothing, which hurts frozen features.

        (Kornblith et al. 2019, arXiv 1805.08974)
        """
        weights = models.get_model_weights(self.architecture)
        return weights.__members__.get("IMAGENET1K_V1") or next(iter(weights))


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
    """The row of BACKBONES, or one for torchvision's model of that name. Raises ValueError for any other name."""
    torchvisions = models.list_models(models)
    if name not in BACKBONES and name not in torchvisions:
        close = difflib.get_close_matches(name, [*BACKBONES, *torchvisions], n=5, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "see torchvision.models.list_models()"
        raise ValueError(f"no backbone is called {name!r}: {hint}")
    return BACKBONES.get(name) or Backbone(label=name, plot=name, architecture=name)


def _build(row: Backbone, pretrained: bool) -> nn.Module:
    """Torchvision's model. Raises OSError if its weights are not in torchvision's cache and cannot be downloaded."""
    has_auxiliary = row.architecture in ("googlenet", "inception_v3")  # classifiers for their training from scratch
    options = {"init_weights": False} if has_auxiliary else {}
    if row.architecture.startswith("vit_"):  # without weights, torchvision would build it for 224 pixels
        options["image_size"] = row.weights.transforms().crop_size[0]
    if not pretrained:
        network = models.get_model(row.architecture, weights=None, **options)
    else:
        try:
            # get_model alone would execute a pickle that someone put into the cache
            row.weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
            network = models.get_model(row.architecture, weights=row.weights, **options)
        except Exception as error:  # no network, no space, no permission, or whatever a damaged file makes torch raise
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(row.weights.url).name
            what = "are damaged, delete" if file.exists() else "cannot be downloaded, put them at"
            raise OSError(
                f"the weights of {row.architecture} {what} {file} ({first_line(error)}); --demo needs none"
            ) from error
    if has_auxiliary:
        network.aux1 = network.aux2 = network.AuxLogits = None
        network.aux_logits, network.transform_input = False, True  # the pretrained weights expect that
    return network


def _features_of(backbone: nn.Module) -> nn.Module:
    """The backbone without its classifier.

    It is a sequence of layers, images -> maps (B, C, H, W), or the whole network with its last linear layer replaced
    by nn.Identity, images -> features (B, D).
    """
    if isinstance(backbone, models.DenseNet):
        backbone.features.add_module("relu5", nn.ReLU())  # which its forward applies after `features`
    if hasattr(backbone, "features") and hasattr(backbone, "classifier"):
        return backbone.features
    if isinstance(backbone, models.ResNet):
        *layers, _pool, _fc = backbone.named_children()
        return nn.Sequential(OrderedDict(layers))
    last = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)][-1]
    backbone.set_submodule(last, nn.Identity())
    return backbone


# ------------------------------------------------------------------------------------------------- the model


class TransferModel(nn.Module):
    """A frozen backbone, `features`, and a new `classifier` that reads its spatially averaged outputs.

    `features.*` of the state dict loads into torchvision's model, if that model has `features` and `classifier`.
    Raises ValueError if the backbone is unknown or does not take images of `image_size` (default: the size of its
    weights), OSError if its weights cannot be loaded.
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
        network = _build(row, pretrained)
        normal = row.weights.transforms()
        own_size = normal.crop_size[0]
        size = image_size or own_size
        # crop: of a wide or tall image the square in the middle, instead of all of it squeezed into a square
        self.preprocessing = {"image_size": size, "crop": True, "mean": normal.mean, "std": normal.std}
        # The precision of `features`, in training and in inference. A classifier that is trained on bf16 features
        # loses up to 1.4 points of accuracy on fp32 features.
        self.precision = "fp32"
        self.temperature = 1.0  # divides the logits, so that probabilities mean what they say (Guo et al. 2017)
        self.fine_tuned = False
        self.views = 2  # features are the mean over the image and its mirror image; 1: of the image alone
        self.familiarity: Familiarity | None = None  # of a frozen backbone's features

        self.features = _features_of(network).requires_grad_(False).eval()
        self.levels = _stage_ends(self.features)[:-1] if row.every_level else []  # which layers' outputs are read
        try:
            with torch.inference_mode():
                self.width = self.forward_features(self.example()).shape[1]
        except Exception as error:  # whatever a network raises for images that it was not built for
            raise ValueError(f"{backbone} takes no images of {size} pixels; its weights are for {own_size}") from error
        if row.keep_classifier:
            *kept, last = network.classifier
            self.classifier = nn.Sequential(*kept, nn.Linear(last.in_features, len(classes)))
        else:
            self.classifier = Classifier(self.width, len(classes), hidden)
        self.eval()

    @property
    def name(self) -> str:
        return self.backbone + "_finetuned" * self.fine_tuned

    @property
    def label(self) -> str:
        return find_backbone(self.backbone).label + ", fine-tuned" * self.fine_tuned

    def unfreeze(self) -> None:
        """Makes the backbone trainable. From here on the model is called `<backbone>_finetuned`."""
        self.features.requires_grad_(True)
        self.fine_tuned = True
        self.familiarity, self.precision = None, "fp32"  # the features will be others

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
        """Images (B, 3, H, W) -> (B, classes + 1): logits and Familiarity score (0 if `familiarity` is None)"""
        features = self.forward_features(images)
        logits = self.classifier(features)
        score = logits.new_zeros(len(logits)) if self.familiarity is None else self.familiarity(features, logits)
        return torch.cat([logits, score[:, None]], dim=1)

    def predict(self, images: str | Item | list[str | Item], top_k: int = 3) -> dict | list[dict]:
        """Classifies an image or a list of images: paths, PIL images or uint8 arrays (H, W, 3).

        Returns a record for each: {"path": "cat.jpg", "model": "mobilenet_v2", "label": "cat", "probability": 0.97,
        "top": [{"label": "cat", "probability": 0.97}, ...], "unfamiliar": False}, or {"path", "error"} if it cannot be
        read. An unfamiliar image is unlike the training images; its label is a guess. A fine-tuned model's record has
        no "unfamiliar".
        """
        several = images if isinstance(images, list) else [images]
        items = [Path(image) if isinstance(image, str) else image for image in several]
        model = self
        if self.precision != "fp32":
            model = copy.deepcopy(self)
            model.features.to(DTYPES[self.precision])
        records = [record for _, [record] in predictions([model], items, top_k)]
        return records if isinstance(images, list) else records[0]

    def example(self) -> Tensor:
        """A black image, preprocessed: (1, 3, S, S)."""
        size = self.preprocessing["image_size"]
        return next(self.features.parameters()).new_zeros(1, 3, size, size)


class Standardize(nn.Module):
    """Subtracts the mean of each feature and divides by its standard deviation, as they were in the images of `fit`."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, features: Tensor) -> None:
        self.mean.copy_(features.mean(dim=0))
        self.std.copy_((features.var(dim=0, correction=0) + 1e-5).sqrt())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class Classifier(nn.Module):
    """A linear layer plus a network with one hidden layer, on standardised features: (B, width) -> logits (B, classes).

    `train_utils.fit_classifier` trains it: the linear layer is good with few images, the network with many.
    """

    def __init__(self, width: int, classes: int, hidden: int):
        super().__init__()
        self.standardize = Standardize(width)
        self.linear = nn.Linear(width, classes)
        self.network = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, features: Tensor) -> Tensor:
        features = self.standardize(features)
        return self.linear(features) + self.network(features)


class Familiarity(nn.Module):
    """Scores how unlike the training images an image is, so that a model can say "none of these".

    The score is a weighted sum of a distance and a doubt. The distance is the Mahalanobis distance to the nearest
    class mean, with a covariance that all classes share (Lee et al. 2018, arXiv 1807.03888). It is computed on a
    random projection of the features to 512 numbers: each feature is added to or subtracted from one of them. The
    doubt is 1 - the largest probability, without temperature scaling. `train_utils.fit_familiarity` sets the buffers.
    """

    SIZE = 512

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.standardize = Standardize(width)
        self.register_buffer("bucket", torch.zeros(width, dtype=torch.int64))
        self.register_buffer("sign", torch.ones(width))
        self.register_buffer("centers", torch.zeros(classes, self.SIZE))
        self.register_buffer("whitening", torch.eye(self.SIZE))
        self.register_buffer("weights", torch.zeros(3))  # of the distance, of the doubt, and of 1

    def project(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, 512)"""
        sums = features.new_zeros(len(features), self.SIZE)
        return sums.index_add(1, self.bucket, self.standardize(features) * self.sign)

    def distance_and_doubt(self, features: Tensor, logits: Tensor) -> Tensor:
        """(B, width), (B, classes) -> (B, 2)"""
        projected = self.project(features) @ self.whitening
        distance = torch.cdist(projected, self.centers @ self.whitening).amin(dim=1)
        return torch.stack([distance, 1 - logits.softmax(dim=1).amax(dim=1)], dim=1)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """(B, width), (B, classes) -> scores (B,), those above 0 unfamiliar"""
        return F.pad(self.distance_and_doubt(features, logits), (0, 1), value=1.0) @ self.weights


def set_statistics(model: TransferModel, items: Iterable[Item]) -> None:
    """Gives a random backbone's BatchNorm the statistics of images. Without them a deep one loses all signal."""
    images = preprocess([read_image(item) for item in items], model.preprocessing)
    norms = [module for module in model.features.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this batch replace the others
        norm.train()
    with torch.no_grad():
        model.forward_view(images)
    model.features.eval()


def heat_map(model: TransferModel, images: Tensor) -> Tensor:
    """How much each place of the last maps supports the label, from 0 to 1: (B, 3, H, W) -> (B, h * w)

    Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391). The backbone must be a sequence of layers.
    """
    with torch.inference_mode(False), torch.enable_grad():
        maps, levels = run_layers(model.features, model.levels, images.clone())
        maps.requires_grad_()
        logits = model.classifier(torch.cat([levels, averages(maps, 1)], dim=1))
        [gradient] = torch.autograd.grad(logits.amax(dim=1).sum(), maps)
        heat = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu().flatten(1)
        return (heat / heat.amax(dim=1, keepdim=True).clamp(1e-9)).detach()


def averages(maps: Tensor, parts: int) -> Tensor:
    """Averages over parts x parts areas of the image: (B, C, H, W) -> (B, C * parts * parts)"""
    return F.adaptive_avg_pool2d(maps, parts).flatten(1)


def run_layers(layers: Iterable[nn.Module], levels: list[int], maps: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Runs layers one after the other. Returns the last maps (B, C, H, W) and the averages (B, L) of all levels.

    `levels` are the layers whose output is averaged, counted from `first`.
    """
    averaged = [maps.new_empty(maps.shape[0], 0)]  # len() would fix the batch size in an export
    for i, layer in enumerate(layers, first):
        maps = layer(maps)
        if i in levels:
            averaged.append(averages(maps, 2))
    return maps, torch.cat(averaged, dim=1)


def _stage_ends(features: nn.Module) -> list[int]:
    """The layers at which a stage of a sequence ends: blocks of several layers, poolings, and the last one."""
    if not isinstance(features, nn.Sequential):
        return []
    *layers, _ = features
    return [
        *(i for i, layer in enumerate(layers) if any(layer.children()) or "Pool" in type(layer).__name__),
        len(layers),
    ]


# ------------------------------------------------------------------------------------------------ checkpoints

SCHEMA = 3
SAVED = ("preprocessing", "hidden", "precision", "temperature", "fine_tuned", "views")  # attributes of the model


def content_hash(tensors: dict[str, Tensor], values: object = None) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors, and of plain values."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(path: Path, model: TransferModel, metrics: dict) -> None:
    """Saves all that rebuilds the model without a download, as plain types and tensors."""
    values = {"schema": SCHEMA, "name": model.backbone, "classes": list(model.classes), "metrics": metrics}
    values |= {name: getattr(model, name) for name in SAVED}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = {**values, "sha256": content_hash(tensors, values)}
    extra = {name: tensors.pop(name) for name in list(tensors) if name.startswith("familiarity.")}
    write_tensors(path, {**content, "state_dict": tensors, "familiarity": extra})  # others can load state_dict alone


def write_tensors(path: Path, content: dict) -> None:
    """torch.save that leaves a whole file or none. Raises OSError, which torch.save itself would hide."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | Path) -> TransferModel:
    """Loads a model onto the CPU, in eval mode. Its saved metrics are in `model.metrics`.

    Raises FileNotFoundError if `path` is missing, ValueError if it is damaged or not a checkpoint of this project.
    The message is one line. Code in the file is never executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: train one with main_train.py")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save does not compress: what does may be a bomb
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")
        values = torch.load(path, map_location="cpu", weights_only=True)
        if values.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {values.get('schema')}, this version reads {SCHEMA}: train it again")
        tensors, written = values.pop("state_dict") | values.pop("familiarity"), values.pop("sha256")
        if content_hash(tensors, values) != written:
            raise ValueError("its contents are not what was saved")
        size = values["preprocessing"]["image_size"]
        model = TransferModel(values["name"], values["classes"], size, pretrained=False, hidden=values["hidden"])
        if "familiarity.sign" in tensors:
            model.familiarity = Familiarity(model.width, len(model.classes))
        state = model.state_dict()  # keeps the versions of modules: MNASNet refuses tensors without
        state.clear()
        state.update(tensors)
        model.load_state_dict(state, assign=True)
        for name in ("metrics", *SAVED):
            setattr(model, name, values[name])
    except Exception as error:  # whatever a hostile or damaged file makes the readers raise
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({first_line(error)})") from error
    return model


class _Answers(nn.Module):
    """Images, uint8 (B, 3, S, S), RGB -> probabilities (B, classes)"""

    def __init__(self, model: TransferModel):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(model.preprocessing["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(model.preprocessing["std"])[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (self.model((images / 255 - self.mean) / self.std) / self.model.temperature).softmax(dim=1)


def export(model: TransferModel, path: Path) -> None:
    """Writes a model that works without this project: for torch.export.load (.pt2), or for ONNX (.onnx).

    Input: uint8 RGB images (B, 3, S, S) of the model's size S. Output: calibrated fp32 probabilities (B, classes). The
    class names are stored as JSON under "classes": an extra file (.pt2) or metadata (.onnx). The exported model is
    compared with `model` on 16 images of noise before it is written; ONNX only if onnxruntime is installed.
    Raises OSError if the file cannot be written, ValueError if the model cannot be exported.
    """
    size, classes = model.preprocessing["image_size"], json.dumps(model.classes)
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8, generator=noise)
    answers = _Answers(copy.deepcopy(model)).eval().requires_grad_(False)
    options, parts = {"dynamic_shapes": {"images": {0: torch.export.Dim("batch")}}}, (images[:1], images[1:])
    try:
        if path.suffix == ".pt2":
            buffer = io.BytesIO()
            torch.export.save(
                torch.export.export(answers, (images,), **options), buffer, extra_files={"classes": classes}
            )
            content = buffer.getvalue()
            found = [torch.export.load(io.BytesIO(content)).module()(part) for part in parts]
        elif path.suffix == ".onnx":
            options |= {"input_names": ["images"], "output_names": ["probabilities"], "verbose": False}
            program = torch.onnx.export(answers, (images,), dynamo=True, **options)
            program.model.metadata_props["classes"] = classes
            content, found = program.model_proto.SerializeToString(), []
            with suppress(ImportError):
                session = importlib.import_module("onnxruntime").InferenceSession(content)
                found = [torch.from_numpy(session.run(None, {"images": part.numpy()})[0]) for part in parts]
        else:
            raise ValueError("its name must end in .pt2 or .onnx")
        if found and not torch.allclose(torch.cat(found), answers(images), atol=1e-4):
            raise ValueError("its answers differ from those of the checkpoint")
    except ImportError as error:
        raise ValueError(f"{path} needs packages: pip install onnx onnxscript ({first_line(error)})") from error
    except Exception as error:  # whatever an exporter raises for a network that it cannot follow
        raise ValueError(f"{path} is not written: {first_line(error)}") from error
    with whole_file(path) as file:
        file.write(content)


# ------------------------------------------------------------------------------------------- running a model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_BATCH, GPU_BATCH = 32, 256  # images at a time; on the CPU on each core


def pick_device(name: str = "auto") -> torch.device:
    """The named device; for "auto" CUDA, else Apple's MPS, else the CPU. Raises ValueError if it is missing."""
    mps = torch.backends.mps.is_available() and torch.__version__ >= "2.11"  # earlier ones lack operators
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        raise ValueError(f"no {name} device here: use --device auto, which takes what there is")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """The named precision; for "auto" bf16 if the hardware computes in it, else fp32."""
    if name != "auto":
        return name
    computes_in_bf16 = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": torch.cpu._is_avx512_bf16_supported,
        "mps": lambda: False,
    }
    return "bf16" if computes_in_bf16[device.type]() else "fp32"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Makes each of torch's CPU operators use `count` threads: 1, if every core has a batch of its own."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def shared(main: Callable[[], int]) -> Callable[[], int]:
    """Wraps `main` for torchrun: rank 0 runs it, the other ranks wait for work from `ask_others`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return main

    def first_or_helper() -> int:
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        store, rank, count = next(dist.rendezvous("env://"))
        # after a restart, torchrun's store still holds what the killed processes wrote
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        forever = timedelta(days=7)  # the others wait while the first one trains
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=forever)
        signs, leaving = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE)), threading.Event()
        watch = threading.Thread(target=_watch, args=[signs, leaving], daemon=True)
        watch.start()
        try:
            if difference := _difference():
                if rank:
                    return 2
                raise ValueError(difference)
            if rank:
                return help_out()
            try:
                return main()
            finally:
                with suppress(RuntimeError):  # another process was killed
                    ask_others(None)
        finally:
            leaving.set()
            watch.join(5)  # after a signal, another process may still wait for work: it ends when this one is gone

    return first_or_helper


def _watch(signs: dist.ProcessGroup, leaving: threading.Event) -> None:
    """Ends this process if another one is gone, or silent for SILENCE seconds. Returns once all are leaving."""
    all_leave = torch.zeros(1)
    try:
        while not all_leave:
            all_leave = torch.tensor([float(leaving.wait(1))])
            dist.monitored_barrier(signs, timedelta(seconds=SILENCE - 10))  # its error names the process
            dist.all_reduce(all_leave, dist.ReduceOp.MIN, signs)
    except RuntimeError as error:
        what = f"another process is gone or silent ({first_line(error).split('. ')[0]})"
        print(f"error: {platform.node()}: {what}: the same command continues", file=sys.stderr, flush=True)
        os._exit(1)


def _difference() -> str:
    """An error message if the processes of torchrun differ in arguments, code or torch version, else ""."""
    scripts = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    own = {"arguments": sys.argv[1:], "code": hashlib.sha256(scripts).hexdigest(), "torch": str(torch.__version__)}
    every = [own] * dist.get_world_size()
    dist.all_gather_object(every, own)
    what = [name for name in own if any(other[name] != own[name] for other in every)]
    return f"the processes differ in their {' and '.join(what)}: use the same everywhere" if what else ""


def rank_and_count() -> tuple[int, int]:
    """This process's number and the number of processes: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def ask_others(work: Callable | None, *arguments: object) -> None:
    """On rank 0: makes all other ranks call work(*arguments), or exit if `work` is None. Then rank 0 continues."""
    if rank_and_count()[1] > 1:
        dist.broadcast_object_list([(work, arguments)])


def help_out() -> int:
    """On all other ranks: runs the work that rank 0 sends with `ask_others`, until it is None. Returns exit code 0."""
    while True:
        job = [None]
        dist.broadcast_object_list(job)
        work, arguments = job[0]
        if work is None:
            return 0
        with together(), suppress(FloatingPointError):  # which the first process raises as well, and reports
            work(*arguments)


@contextmanager
def together() -> Iterator[None]:
    """Ends this process if it fails in a step that all ranks share: the other ranks would wait forever.

    Without torchrun, and for a FloatingPointError, which all ranks raise, the exception is raised as usual.
    """
    try:
        yield
    except Exception as error:
        if rank_and_count()[1] == 1 or isinstance(error, FloatingPointError):
            raise
        print(f"error: {first_line(error)}: the same command continues", file=sys.stderr, flush=True)
        os._exit(1)


SHARE = 1024  # images that a process takes at a time
SILENCE = 25  # seconds without a sign of life after which a process counts as lost


def run_images(
    models: Sequence[TransferModel],
    items: Iterable[Item],
    output: Callable[[TransferModel, Tensor], Tensor] = TransferModel.forward,
    batch_size: int | None = None,
) -> Iterator[tuple[list[Item], list[Tensor], dict[int, ImageError]]]:
    """As run_images_here, but under torchrun each process takes a share of the batches."""
    count = rank_and_count()[1]
    if count == 1:
        yield from run_images_here(models, items, output, batch_size)
        return
    device = next(models[0].parameters()).device.type
    batch_size = batch_size or (CPU_BATCH if device == "cpu" else GPU_BATCH)
    ask_others(_run_shares, [copy.deepcopy(model).cpu() for model in models], device, output, batch_size)
    items = iter(items)
    try:
        while taken := list(itertools.islice(items, SHARE * count)):
            size = batch_size * -(-len(taken) // (batch_size * count))  # the batches are those of one process
            shares = [taken[i * size : (i + 1) * size] for i in range(count)]
            dist.scatter_object_list([None], shares)
            own, every = [], [None] * count
            try:
                own += run_images_here(models, shares[0], output, batch_size)
            finally:
                dist.gather_object(own, every)  # the others wait for it
            for batches in every:
                yield from batches
    finally:
        dist.scatter_object_list([None], [None] * count)


def _run_shares(models: list[TransferModel], device: str, output: Callable, batch_size: int | None) -> None:
    """Runs the models on this process's share of the images that run_images deals."""
    models, dealt = [model.to(device) for model in models], [None]
    while True:
        dist.scatter_object_list(dealt)
        [share] = dealt
        if share is None:
            return
        need_images(share)
        dist.gather_object(list(run_images_here(models, share, output, batch_size)))


def need_images(items: Sequence[Item]) -> None:
    """Raises FileNotFoundError if this machine has no folder of the images: storage that is not mounted, perhaps."""
    folders = {item.parent for item in items if isinstance(item, Path)}
    if folders and not any(folder.exists() for folder in folders):
        raise FileNotFoundError(f"{platform.node()} has no {folders.pop()}: every machine needs the images")


def run_images_here(
    models: Sequence[TransferModel],
    items: Iterable[Item],
    output: Callable[[TransferModel, Tensor], Tensor] = TransferModel.forward,
    batch_size: int | None = None,
) -> Iterator[tuple[list[Item], list[Tensor], dict[int, ImageError]]]:
    """Reads images, preprocesses them and runs every model on them, in order, in constant memory.

    Yields for each batch: its B items; the outputs (B, D) of each model, float32 on the CPU; the errors of unreadable
    images, by position in the batch. The output rows of unreadable images are NaN.

    On the CPU, each core processes its own batches, from the file to the outputs: a convolution that stays in the
    cache of one core is up to twice as fast as a convolution that all cores share. For a GPU, threads read large
    batches, and the GPU runs one batch at a time, which bounds its memory. If memory runs out, batches are halved.
    Raises torch.OutOfMemoryError if one image is too large for the GPU.
    """
    device = next(models[0].parameters()).device
    on_cpu = device.type == "cpu"
    workers = torch.get_num_threads() if on_cpu else min(16, available_cpus())
    batch_size = part = batch_size or (CPU_BATCH if on_cpu else GPU_BATCH)
    turn = nullcontext() if on_cpu else threading.Lock()

    def shape_of(model: TransferModel) -> tuple[int, bool]:
        return model.preprocessing["image_size"], model.preprocessing["crop"]

    def forward(model: TransferModel, images: list[Tensor]) -> Tensor:
        dtype = next(model.features.parameters()).dtype
        return output(model, preprocess(images, model.preprocessing, device, dtype)).float().cpu()

    def in_parts(model: TransferModel, images: list[Tensor]) -> Tensor:
        nonlocal part
        try:
            return torch.cat([forward(model, images[i : i + part]) for i in range(0, len(images), part)])
        except torch.OutOfMemoryError:
            if part == 1:
                raise
        part //= 2  # outside the handler, which keeps the memory of the failed attempt alive
        print(f"out of memory: continuing with batches of {part}", file=sys.stderr)
        return in_parts(model, images)

    def run(batch: list[Item]) -> tuple[list[Item], list[Tensor], dict[int, ImageError]]:
        images, errors = {shape_of(model): [] for model in models}, {}
        for i, item in enumerate(batch):
            for shape in images:
                try:
                    images[shape].append(read_image(item, *shape))
                except ImageError as error:
                    errors[i] = error
                    images[shape].append(torch.zeros(3, 1, 1, dtype=torch.uint8))
        with turn, torch.inference_mode():
            outputs = [in_parts(model, images[shape_of(model)]) for model in models]
            for rows in outputs:
                rows[list(errors)] = math.nan
        return batch, outputs, errors

    items = iter(items)
    pool, pending = ThreadPoolExecutor(workers), deque()
    with threads(1) if on_cpu else nullcontext():
        try:
            while batch := list(itertools.islice(items, batch_size)):
                pending.append(pool.submit(run, batch))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def predictions(
    models: Sequence[TransferModel], items: Iterable[Item], top_k: int, ensemble: bool = False
) -> Iterator[tuple[Item, list[dict]]]:
    """Yields each item with one record for each model, as in `TransferModel.predict`, or with one error record.

    With `ensemble`, yields one record for all models, which must have the same classes. Its probabilities are the
    softmax of the models' mean log-probabilities. Its "models" is the list of the models' records.
    """
    for batch, outputs, errors in run_images(models, items, TransferModel.answer):
        answers = [
            (rows[:, :-1] / model.temperature).log_softmax(dim=1) for model, rows in zip(models, outputs, strict=True)
        ]
        together = torch.stack(answers).mean(dim=0) if ensemble else None
        for i, item in enumerate(batch):
            path = {"path": str(item) if isinstance(item, Path) else None}
            if i in errors:
                yield item, [{**path, "error": str(errors[i])}]
                continue
            records = []
            for model, answer, rows in zip(models, answers, outputs, strict=True):
                records.append({**path, "model": model.name, **_best(answer[i], model.classes, top_k)})
                if model.familiarity is not None:
                    records[-1]["unfamiliar"] = bool(rows[i, -1] > 0)
            if ensemble:
                best = _best(together[i], models[0].classes, top_k)
                agreement = sum(record["label"] == best["label"] for record in records) / len(records)
                told = [record["unfamiliar"] for record in records if "unfamiliar" in record]
                best |= {"unfamiliar": sum(told) > len(told) / 2} if told else {}
                records = [{**path, "model": "ensemble", **best, "agreement": agreement, "models": records}]
            yield item, records


def _best(logits: Tensor, classes: Sequence[str], top_k: int) -> dict:
    """The label of one image's logits (classes), its probability, and the `top_k` best."""
    probabilities, labels = logits.softmax(dim=0).topk(min(top_k, len(classes)))
    pairs = zip(labels.tolist(), probabilities.tolist(), strict=True)
    top = [{"label": classes[label], "probability": probability} for label, probability in pairs]
    return {**top[0], "top": top}


# ---------------------------------------------------------------------- the fast copy: the same outputs, sooner

# Elements that a layer may write at a time on a CPU. Larger outputs leave the cache, and the system hands out their
# memory and takes it back at every call, which costs up to twice the time.
LAYER = 6_500_000

# oneDNN's names of activations, and their arguments
ACTIVATIONS = {
    nn.ReLU: ("relu", []),
    F.relu: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.SiLU: ("swish", []),
}


def fast_copy(
    model: TransferModel, device: torch.device, precision: str | None = None, packed: bool = True
) -> TransferModel:
    """A faster copy of the model with the same outputs up to rounding, for run_images.

    `features` run in `precision` (default: the model's precision), the classifier in fp32.

    Each stage of `features` is traced by torch.fx, its BatchNorm folded into the convolutions, its layout
    channels_last. On a CPU, the convolutions become PackedConv, and stages with large maps take fewer images at a time,
    unless `packed` is False. A stage keeps its plain modules if it cannot be traced, or if the faster modules fail or
    give other outputs with this version of torch on this processor.
    """
    precision = precision or model.precision
    fast = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    packed = packed and device.type == "cpu" and torch.backends.mkldnn.is_available()
    packed = packed and precision in ("fp32", pick_precision("auto", device))
    with torch.inference_mode(), threads(1):
        noise = torch.randn(fast.example().shape, generator=torch.Generator().manual_seed(0))
        images = noise.to(device, DTYPES[precision])
        if isinstance(fast.features, nn.Sequential):
            layers, ends = list(fast.features), _stage_ends(fast.features)
            stages, largest = [], []
            for first, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
                stage, images, size = _fast_stage(nn.Sequential(*layers[first : end + 1]), images, packed)
                stages.append(stage)
                largest.append(size)
            levels = [i for i, end in enumerate(ends) if end in fast.levels]
            early = max((i for i, size in enumerate(largest, 1) if packed and size * CPU_BATCH > LAYER), default=0)
            part = 2 ** max(0, int(math.log2(LAYER / max(largest)))) if early else GPU_BATCH
            fast.features = FastFeatures(stages, levels, early, part)
        else:
            fast.features, *_ = _fast_stage(fast.features, images, packed)
    return fast


def _fast_stage(stage: nn.Module, images: Tensor, packed: bool) -> tuple[nn.Module, Tensor, int]:
    """The fast copy of a stage, its output for an example (1, C, H, W), and the elements of its largest layer."""
    with suppress(Exception):  # torch.fx cannot follow every network
        stage = fuse(stage, inplace=True)  # fast_copy has made a copy already
    stage.to(dtype=images.dtype, memory_format=torch.channels_last)
    if not isinstance(stage, fx.GraphModule):
        return stage, (outputs := stage(images)), outputs.numel()
    outputs = ShapeProp(stage).propagate(images)
    shapes = [getattr(node.meta.get("tensor_meta"), "shape", torch.Size()) for node in stage.graph.nodes]
    if packed:
        with suppress(Exception):  # an operator is missing, or does not take this shape or run on this processor
            fast = _pack(copy.deepcopy(stage))
            if (fast(images) - outputs).abs().max() < 0.1 * outputs.abs().max():  # wrong operators are far off
                stage = fast
    return stage, outputs, max(shape.numel() for shape in shapes)


def _pack(graph: fx.GraphModule) -> fx.GraphModule:
    """Replaces convolutions, the additions and activations after them, and global averages by faster modules."""

    def module_of(node: object) -> nn.Module | None:
        return graph.get_submodule(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def can_take(node: object, operation: str) -> bool:
        """Whether the node is a PackedConv that can do the operation on its output: after an addition only ReLU."""
        conv = module_of(node)
        free = isinstance(conv, PackedConv) and len(node.users) == 1 and conv.activation[0] == "none"
        return free and (len(node.args) == 1 or operation == "relu")

    def skip(node: fx.Node, replacement: fx.Node) -> None:
        node.replace_all_uses_with(replacement)
        graph.graph.erase_node(node)

    for node in list(graph.graph.nodes):
        module = module_of(node)
        activation = ACTIVATIONS.get(type(module) if module else node.target)
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            graph.set_submodule(node.target, PackedConv(module))
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            graph.set_submodule(node.target, GlobalAverage())
        elif node.target is stochastic_depth or isinstance(module, nn.Identity):  # does nothing in eval mode
            skip(node, node.args[0])
        elif activation and can_take(node.args[0], activation[0]):
            module_of(node.args[0]).activation = activation
            skip(node, node.args[0])
        elif node.target in (operator.add, operator.iadd, torch.add) and not node.kwargs:
            for source, other in (node.args, node.args[::-1]):
                if can_take(source, "add"):
                    with graph.graph.inserting_before(node):  # here both inputs are there
                        skip(node, graph.graph.call_module(source.target, (source.args[0], other)))
                    graph.graph.erase_node(source)
                    break
    graph.recompile()
    return graph


class PackedConv(nn.Module):
    """A convolution with its weights in oneDNN's layout, which adds a residual and applies an activation as it writes.

    These are the operators that torch.compile uses on a CPU, without its compiler. They save trips to memory: feature
    extraction is up to 1.9 times as fast. The best layout depends on the input's shape and the number of threads; with
    any other one, oneDNN would copy the weights at every call.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        self.weight, self.bias, self.activation = conv.weight, conv.bias, ("none", [])
        self.packed = None, None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": (None, None)}  # another process packs for itself

    def forward(self, images: Tensor, residual: Tensor | None = None) -> Tensor:
        known, weight = self.packed
        if known != (layout := (images.shape, torch.get_num_threads())):
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, images.shape)
            self.packed = layout, weight
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                images, weight, self.bias, *self.geometry, *self.activation, ""
            )
        after = None if self.activation[0] == "none" else self.activation[0]
        return torch.ops.mkldnn._convolution_pointwise.binary(
            images, residual, weight, self.bias, *self.geometry, "add", None, after, [], None
        )


class GlobalAverage(nn.Module):
    """AdaptiveAvgPool2d(1), which takes up to six times as long in bf16 on a CPU."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, images.shape[2:])


class FastFeatures(nn.Module):
    """The stages of a sequence and the averages of their outputs. The first `early` take `part` images at a time.

    The maps of those are so large that a whole batch would not stay in the cache.
    """

    def __init__(self, stages: list[nn.Module], levels: list[int], early: int, part: int):
        super().__init__()
        self.early, self.late = nn.ModuleList(stages[:early]), nn.ModuleList(stages[early:])
        self.levels, self.part = levels, part

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width), as TransferModel.forward_features"""
        parts = [run_layers(self.early, self.levels, part) for part in images.split(self.part)]
        maps, early_levels = (torch.cat(outputs) for outputs in zip(*parts, strict=True))
        maps, late_levels = run_layers(self.late, self.levels, maps, first=len(self.early))
        return torch.cat([early_levels, late_levels, averages(maps, 1)], dim=1)


# -------------------------------------------------------------------------------------------------- fine-tuning


def training_copy(model: TransferModel, parts: int = 1) -> nn.Module:
    """A faster model for fine-tuning: the same parameters, and the same logits and gradients up to rounding.

    BatchNorm in eval mode only scales and shifts each channel, so it goes into the weights of the convolution before
    it. On a CPU, each batch is split into `parts`, one for each group of cores.
    """
    tensors = [*model.parameters(), *model.buffers()]
    fast = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # a copy of everything but these
    for layers in list(fast.modules()):
        if isinstance(layers, nn.Sequential):
            for (name, conv), (after, norm) in itertools.pairwise(list(layers.named_children())):
                if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                    setattr(layers, name, ConvNorm(conv, norm))
                    setattr(layers, after, nn.Identity())
    return InParts(fast, parts) if parts > 1 else fast


class ConvNorm(nn.Module):
    """A convolution and the BatchNorm after it, in eval mode, as one convolution."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, images: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        return conv._conv_forward(images, conv.weight * scale[:, None, None, None], norm.bias - shift * scale)


class InParts(nn.Module):
    """Computes features, and their gradients, for several parts of a batch at a time, each in its own thread."""

    def __init__(self, model: TransferModel, parts: int):
        super().__init__()
        self.model, self.parts, self.pool = model, parts, ThreadPoolExecutor(parts)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        features = _Parts.apply(self, torch.is_grad_enabled(), images, *self.model.features.parameters())
        return self.model.classifier(features)


class _Parts(torch.autograd.Function):
    """Images (B, 3, H, W) -> features (B, width). The gradients are sums over the parts."""

    @staticmethod
    def forward(ctx: object, network: InParts, training: bool, images: Tensor, *parameters: Tensor) -> Tensor:
        def forward_part(images: Tensor) -> Tensor:
            with torch.set_grad_enabled(training):
                return network.model.forward_features(images)

        ctx.network, ctx.parameters = network, parameters
        ctx.features = list(network.pool.map(forward_part, images.chunk(network.parts)))
        return torch.cat(ctx.features)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple:
        def backward_part(features: Tensor, gradient: Tensor) -> tuple:
            return torch.autograd.grad(features, ctx.parameters, gradient)

        parts = ctx.network.pool.map(backward_part, ctx.features, gradient.chunk(ctx.network.parts))
        return None, None, None, *map(sum, zip(*parts, strict=True))
