"""How is a backbone built from its name: torchvision's or timm's, with whose weights?

A name is that of a model of torchvision, or "timm/" and that of a model of timm. After a colon, it may name weights of
torchvision, or a file with a state dict.
"""

import difflib
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.console import first_line
from engine.fast import without_compiler
from engine.files import file_hash
from engine.layers import averages
from engine.weights import is_file, load_weights

with without_compiler():
    from torchvision import models

TIMM = "timm>=1.0.3"  # the first with forward_intermediates and stable names


class Built(NamedTuple):
    """A backbone that has been built."""

    network: nn.Module  # whole; its last linear layer may have been replaced, see `features_of`
    features: nn.Module  # its part before the classifier
    preprocessing: dict  # which its weights ask for
    weights: str  # which it has


def check_name(name: str, more: tuple[str, ...] = ()) -> None:
    """Raises ValueError if there is no such model, or none with such weights. `more` are names for suggestions."""
    architecture, _, weights = name.partition(":")
    if re.match(r"(timm/)?hf[-_]hub:", name):  # as timm's own functions take
        model = name.rpartition("/")[2]
        known = model.partition(".")[0] in _timm().list_models()
        hint = f"use timm/{model}" if known else "save the state dict of the model, and use timm/ARCHITECTURE:FILE"
        raise ValueError(f"{name} is a name of the hub: {hint}")
    if architecture.startswith("timm/"):
        known = [f"timm/{each}" for each in (*_timm().list_models(), *_timm().list_pretrained())]
    else:
        known = models.list_models(models)
    if architecture not in known:
        similar = difflib.get_close_matches(architecture, {*more, *known}, n=5, cutoff=0.4)
        hint = f"did you mean {', '.join(similar)}?" if similar else "see torchvision.models.list_models()"
        raise ValueError(f"no backbone is called {architecture!r}: {hint}")
    if weights and not is_file(weights):
        of_torchvision = () if architecture.startswith("timm/") else models.get_model_weights(architecture).__members__
        if weights not in of_torchvision:
            choices = " or ".join([*of_torchvision, "a file, such as x.pth or x.safetensors"])
            raise ValueError(f"{architecture} has no weights {weights!r}: after the colon, use {choices}")


def build(name: str, image_size: int | None, pretrained: bool) -> Built:
    """Builds a backbone with the weights that its name asks for, or with random ones. `name` has been checked.

    Raises OSError if the weights cannot be loaded or downloaded, ValueError if those of a file do not fit.
    """
    architecture, _, weights = name.partition(":")
    from_timm, from_file = architecture.startswith("timm/"), pretrained and is_file(weights)
    make = _build_timm if from_timm else _build_torchvision
    network, preprocessing, used = make(name, image_size, pretrained and not from_file)
    model = network.model if from_timm else network
    complete = model.state_dict(keep_vars=True)  # before features_of replaces a layer
    features = features_of(network)
    if from_file:
        kept = {id(tensor) for tensor in features.state_dict(keep_vars=True).values()}
        own = {name: tensor for name, tensor in complete.items() if id(tensor) in kept}
        if from_timm:
            with torch.device("meta"):  # without content
                complete = _timm().create_model(architecture.removeprefix("timm/"), num_classes=2).state_dict()
        heads = {name.rpartition(".")[0] for name in complete.keys() - own.keys()}
        try:
            used = load_weights(Path(weights).expanduser(), own, heads, _conversion(model), architecture)
        except ValueError:
            size = preprocessing["image_size"]
            if from_timm and image_size not in (None, size):
                build(name, None, pretrained)  # raises if they do not fit there, either
                raise ValueError(f"{weights} fits {architecture} at {size} pixels only, not {image_size}") from None
            raise
        used = f"{weights} ({used})" if used else weights
    return Built(network, features, preprocessing, used if pretrained else "random")


def _conversion(model: nn.Module) -> Callable[[dict], dict] | None:
    """The function by which torchvision or timm adapts names, and position embeddings to another image size."""
    if isinstance(model, models.VisionTransformer):
        interpolate = models.vision_transformer.interpolate_embeddings
        return lambda tensors: interpolate(model.image_size, model.patch_size, OrderedDict(tensors))
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return convert and (lambda tensors: convert(tensors, model))


def torchvision_weights(name: str) -> models.WeightsEnum:
    """Torchvision's weights of that name, by default IMAGENET1K_V1 if there are such.

    V2 was trained with mixup and label smoothing, which hurts frozen features (Kornblith et al. 2019, arXiv
    1805.08974).
    """
    architecture, _, weights = name.partition(":")
    known = models.get_model_weights(architecture)
    return known.__members__.get(weights) or known.__members__.get("IMAGENET1K_V1") or next(iter(known))


def _build_torchvision(name: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict, str]:
    """The network with its classifier, its preprocessing, and the name of its weights."""
    architecture, weights = name.partition(":")[0], torchvision_weights(name)
    transforms = weights.transforms()
    preprocessing = {"image_size": transforms.crop_size[0], "mean": transforms.mean, "std": transforms.std}
    preprocessing["interpolation"] = transforms.interpolation.value
    has_auxiliary = architecture in ("googlenet", "inception_v3")  # classifiers, used in training from scratch only
    options = {"init_weights": False} if has_auxiliary else {}
    if architecture.startswith("vit_"):  # without weights, torchvision would build it for 224 pixels
        options["image_size"] = preprocessing["image_size"]
    file, used = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name, weights.name
    if not pretrained:
        network = models.get_model(architecture, weights=None, **options)
    else:
        try:
            # get_model alone would execute a pickle that someone put into the cache
            weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
            network = models.get_model(architecture, weights=weights, **options)
        except Exception as error:  # no network, no space, no permission, or whatever a damaged file makes torch raise
            what = f"cannot be downloaded, put them at {file} ({first_line(error)})"
            if file.exists():
                what = f"are damaged, or of another model: delete {file}"
            raise OSError(f"the weights of {architecture} {what}; --demo needs none") from error
        digest = file_hash(file)  # which torchvision compares with the file's name after a download only
        if not digest.startswith(file.stem.rpartition("-")[2]):
            used = f"{weights.name}'s place, another file: sha256 {digest[:8]}"
    if has_auxiliary:
        network.aux1 = network.aux2 = network.AuxLogits = None
        network.aux_logits, network.transform_input = False, True  # the pretrained weights expect that
    return network, preprocessing, used


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"names that begin with timm/ need timm: pip install '{TIMM}'") from error
    if timm.__version__.startswith("0."):
        raise ValueError(f"timm {timm.__version__} is too old: pip install '{TIMM}'")
    return timm


def _build_timm(name: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict, str]:
    """The network without a classifier, its preprocessing, and the name of its weights."""
    timm, name = _timm(), name.partition(":")[0].removeprefix("timm/")
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    preprocessing = {"image_size": config["input_size"][-1], "mean": list(config["mean"]), "std": list(config["std"])}
    preprocessing["interpolation"] = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
    preprocessing["crop"] = config["crop_mode"] != "squash"
    options = {"pretrained": pretrained, "num_classes": 0}
    try:
        try:
            network = timm.create_model(name, img_size=image_size or preprocessing["image_size"], **options)
        except OSError:  # the hub cannot be reached
            raise
        except Exception:  # it takes images of any size, or not of this one
            network = timm.create_model(name, **options)
    except Exception as error:  # no network, or whatever the hub raises
        raise OSError(
            f"timm/{name} cannot be loaded ({first_line(error)}); put its weights into a file and use timm/{name}:FILE"
        ) from error
    return TimmFeatures(network), preprocessing, timm.get_pretrained_cfg(name).tag


class TimmFeatures(nn.Module):
    """A model of timm without its classifier: images (B, 3, H, W) -> features (B, D).

    If it has stages with smaller and smaller maps, the averages of each earlier stage come first.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        sizes, needed = [stage["reduction"] for stage in model.feature_info], ("forward_intermediates", "forward_head")
        self.has_stages = len(set(sizes)) == len(sizes) and all(hasattr(model, name) for name in needed)

    def forward(self, images: Tensor) -> Tensor:
        if not self.has_stages:
            return self.model(images)
        maps, stages = self.model.forward_intermediates(images)
        return torch.cat([*(averages(stage, 2) for stage in stages[:-1]), self.model.forward_head(maps)], dim=1)


def features_of(network: nn.Module) -> nn.Module:
    """The network without its classifier.

    It is a sequence of layers, images -> maps (B, C, H, W), or the whole network with its last linear layer replaced
    by nn.Identity, images -> features (B, D).
    """
    if isinstance(network, TimmFeatures):
        return network
    if isinstance(network, models.DenseNet):
        network.features.add_module("relu5", nn.ReLU())  # which its forward applies after `features`
    if hasattr(network, "features") and hasattr(network, "classifier"):
        return network.features
    if isinstance(network, models.ResNet):
        *layers, _pool, _fc = network.named_children()
        return nn.Sequential(OrderedDict(layers))
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    network.set_submodule(linear[-1], nn.Identity())
    return network
