"""How is a backbone built from its name: torchvision's or timm's, with whose weights?

A name is that of a model of torchvision, or "timm/" and that of a model of timm. After a colon, it may name weights of
torchvision, or a file with a state dict.
"""

import difflib
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from engine.console import first_line
from engine.fast import without_compiler
from engine.layers import averages

with without_compiler():
    from torchvision import models

FILES = (".pth", ".pt", ".bin", ".safetensors")  # of weights


def check_name(name: str, more: tuple[str, ...] = ()) -> None:
    """Raises ValueError if there is no such model, or none with such weights. `more` are names for suggestions."""
    architecture, _, weights = name.partition(":")
    if architecture.startswith("timm/"):
        known = [f"timm/{each}" for each in (*_timm().list_models(), *_timm().list_pretrained())]
    else:
        known = models.list_models(models)
    if architecture not in known:
        similar = difflib.get_close_matches(architecture, [*more, *known], n=5, cutoff=0.4)
        hint = f"did you mean {', '.join(similar)}?" if similar else "see torchvision.models.list_models()"
        raise ValueError(f"no backbone is called {architecture!r}: {hint}")
    if weights and not weights.endswith(FILES):
        of_torchvision = () if architecture.startswith("timm/") else models.get_model_weights(architecture).__members__
        if weights not in of_torchvision:
            choices = " or ".join([*of_torchvision, f"a file ({', '.join(FILES)})"])
            raise ValueError(
                f"{architecture} has no weights {weights!r}: use {architecture}:NAME, where NAME is {choices}"
            )


def weights_name(name: str) -> str:
    architecture, _, weights = name.partition(":")
    if weights or architecture.startswith("timm/"):
        return weights or _timm().get_pretrained_cfg(architecture.removeprefix("timm/")).tag
    return torchvision_weights(name).name


def build(name: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict]:
    """The network, with its last layer, and the preprocessing that its weights ask for. `name` has been checked.

    Raises OSError if the weights cannot be loaded or downloaded, ValueError if those of a file do not fit.
    """
    architecture, _, weights = name.partition(":")
    from_file = weights.endswith(FILES)
    of = _build_timm if architecture.startswith("timm/") else _build_torchvision
    network, preprocessing = of(name, image_size, pretrained and not from_file)
    if pretrained and from_file:
        _load_file(network, Path(weights).expanduser(), architecture)
    return network, preprocessing


def torchvision_weights(name: str) -> models.WeightsEnum:
    """Torchvision's weights of that name, by default IMAGENET1K_V1 if there are such.

    V2 was trained with mixup and label smoothing, which hurts frozen features (Kornblith et al. 2019, arXiv
    1805.08974).
    """
    architecture, _, weights = name.partition(":")
    known = models.get_model_weights(architecture)
    return known.__members__.get(weights) or known.__members__.get("IMAGENET1K_V1") or next(iter(known))


def _build_torchvision(name: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict]:
    architecture, weights = name.partition(":")[0], torchvision_weights(name)
    transforms = weights.transforms()
    preprocessing = {"image_size": transforms.crop_size[0], "mean": transforms.mean, "std": transforms.std}
    preprocessing["interpolation"] = transforms.interpolation.value
    # extra classifiers, used only in training from scratch
    has_auxiliary = architecture in ("googlenet", "inception_v3")
    options = {"init_weights": False} if has_auxiliary else {}
    if architecture.startswith("vit_"):  # without weights, torchvision would build it for 224 pixels
        options["image_size"] = preprocessing["image_size"]
    if not pretrained:
        network = models.get_model(architecture, weights=None, **options)
    else:
        try:
            # get_model alone would execute a pickle that someone put into the cache
            weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
            network = models.get_model(architecture, weights=weights, **options)
        except Exception as error:  # no network, no space, no permission, or whatever a damaged file makes torch raise
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            what = "are damaged, delete" if file.exists() else "cannot be downloaded, put them at"
            raise OSError(
                f"the weights of {architecture} {what} {file} ({first_line(error)}); --demo needs none"
            ) from error
    if has_auxiliary:
        network.aux1 = network.aux2 = network.AuxLogits = None
        network.aux_logits, network.transform_input = False, True  # the pretrained weights expect that
    return network, preprocessing


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ValueError("names that begin with timm/ need timm: pip install timm") from error
    return timm


def _build_timm(name: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict]:
    timm, name = _timm(), name.partition(":")[0].removeprefix("timm/")
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    preprocessing = {"image_size": config["input_size"][-1], "mean": list(config["mean"]), "std": list(config["std"])}
    preprocessing["interpolation"] = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
    options = {"pretrained": pretrained, "num_classes": 0}
    try:
        try:
            network = timm.create_model(name, img_size=image_size or preprocessing["image_size"], **options)
        except OSError:  # of the hub
            raise
        except Exception:  # it takes images of any size, or not of this one
            network = timm.create_model(name, **options)
    except Exception as error:  # no network, or whatever the hub raises
        raise OSError(
            f"timm/{name} cannot be loaded ({first_line(error)}); put its weights into a file and use timm/{name}:FILE"
        ) from error
    return TimmFeatures(network), preprocessing


class TimmFeatures(nn.Module):
    """A model of timm without its classifier: images (B, 3, H, W) -> features (B, D).

    If it has stages with smaller and smaller maps, the averages of each earlier stage come first.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        sizes = [stage["reduction"] for stage in model.feature_info]
        self.has_stages = len(set(sizes)) == len(sizes) and hasattr(model, "forward_intermediates")

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
    network.set_submodule(_last_linear(network), nn.Identity())
    return network


def _last_linear(network: nn.Module) -> str:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


def _load_file(network: nn.Module, file: Path, architecture: str) -> None:
    """Loads a state dict. Its classifier may be missing or have other classes."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # no such file, no safetensors, or whatever a damaged file makes torch raise
        raise OSError(f"{file} cannot be loaded ({first_line(error)})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds no state dict")
    for name in ("state_dict", "model"):  # as training scripts save it
        state = state.get(name, state)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if isinstance(network, TimmFeatures):
        network, heads = network.model, network.model.pretrained_cfg["classifier"]
    else:
        heads = "classifier" if hasattr(network, "classifier") else _last_linear(network)
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads or ()))
    heads += ("aux1.", "aux2.", "AuxLogits.")  # which _build_torchvision has removed
    own = network.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    wrong = [name for name in sorted({*own, *state} - fitting.keys()) if not name.startswith(heads)]
    if wrong := [name for name in wrong if "num_batches" not in name]:
        shown = f"{len(wrong)} tensors are missing, unknown or of another shape, such as {', '.join(wrong[:3])}"
        raise ValueError(f"{file} does not fit {architecture}: {shown}")
    network.load_state_dict(fitting, strict=False)
