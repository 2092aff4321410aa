"""Weights files as trainers write them, and files that are none."""

import argparse
import collections
import os
import pathlib
import pickle

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from engine.backbones import build
from models import TransferModel, save_checkpoint

torch.manual_seed(0)
NETWORK = torchvision.models.mobilenet_v3_small()
STATE = NETWORK.state_dict()
BODY = {name: tensor for name, tensor in STATE.items() if name.startswith("features.")}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}
STEM = STATE["features.0.0.weight"]
LEARNER = nn.Sequential(nn.Sequential(NETWORK.features), nn.Sequential(nn.Flatten(), nn.Linear(576, 7)))
NAMESPACE = argparse.Namespace(lr=0.1, folder=pathlib.Path("data"), best=np.float64(3), state=np.random.get_state())


def below(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


class Config:
    """A class that only the file's writer has."""

    def __init__(self):
        self.items = self.lr = 0.1


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


KINDS = {  # what the file holds, and which part of it is taken
    "plain": (STATE, ""),
    "compiled": (below("_orig_mod.", STATE), ""),
    "compiled, DDP": (below("module._orig_mod.", STATE), ""),
    "DDP, compiled": (below("_orig_mod.module.", STATE), ""),
    "DDP of a part": ({name.replace("features", "features.module"): tensor for name, tensor in STATE.items()}, ""),
    "half": ({name: tensor.half() for name, tensor in STATE.items()}, ""),
    "Lightning": ({"state_dict": below("model.", STATE), "hyper_parameters": NAMESPACE}, "state_dict.model"),
    "LightlySSL": ({"model": below("backbone.", BODY)}, "model.backbone"),
    "timm_model": (below("timm_model.", STATE), "timm_model"),
    "torchvision": ({"model": STATE, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "args": NAMESPACE}, "model"),
    "model_state_dict": ({"model_state_dict": STATE, "loss": torch.tensor(1.0)}, "model_state_dict"),
    "net": ({"net": STATE, "acc": np.float32(91)}, "net"),
    "defaultdict": (collections.defaultdict(int, STATE), ""),
    "unknown class": ({"config": Config(), "state_dict": STATE}, "state_dict"),
    "integer keys": ({"model": "resnet18", 3: STATE}, "3"),
    "list": ([STATE, {"epoch": 1}], "0"),
    "MoCo": (
        {"state_dict": {**below("module.encoder_q.", BODY), **below("module.encoder_k.", OTHER), "module.queue": STEM}},
        "state_dict.encoder_q, not state_dict.encoder_k",
    ),
    "MoCo v3": (
        {"state_dict": {**below("module.base_encoder.", BODY), **below("module.momentum_encoder.", OTHER)}},
        "state_dict.base_encoder, not state_dict.momentum_encoder",
    ),
    "DINO": (
        {"student": below("module.backbone.", OTHER), "teacher": below("backbone.", BODY)},
        "teacher.backbone, averaged (EMA), not student.backbone",
    ),
    "SwAV": (
        {**BODY, "projection.0.weight": torch.ones(2, 2), "projection.0.bias": torch.ones(2)}, "without projection"
    ),
    "AveragedModel": (
        {"model": OTHER, "average": {"n_averaged": torch.tensor(5), **below("module.", STATE)}},
        "average, averaged (EMA), not model",
    ),
    "timm": ({"state_dict": OTHER, "state_dict_ema": STATE}, "state_dict_ema, averaged (EMA), not state_dict"),
    "model_ema": ({"model": OTHER, "model_ema": STATE}, "model_ema, averaged (EMA), not model"),
    "fastai": ({"model": LEARNER.state_dict(), "opt": {"state": [{}]}}, "model by their order"),
    "Sequential": (nn.Sequential(*NETWORK.children()).state_dict(), "by their order"),
    "the layers alone": (NETWORK.features.state_dict(), "by their order"),
}  # fmt: skip


def load(file, name="mobilenet_v3_small", image_size=None):
    return build(f"{name}:{file}", image_size, pretrained=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_trainers_write(kind, tmp_path):
    content, place = KINDS[kind]
    suffix = ".pth.tar" if "MoCo" in kind else ".ckpt" if kind == "Lightning" else ".pth"
    torch.save(content, tmp_path / f"x{suffix}", _use_new_zipfile_serialization=kind != "torchvision")  # the old format
    built = load(tmp_path / f"x{suffix}")
    for name, tensor in built.features.state_dict(prefix="features.").items():
        assert torch.equal(tensor, STATE[name].half().to(tensor.dtype) if kind == "half" else STATE[name])
    assert built.weights == f"{tmp_path / f'x{suffix}'}" + (f" ({place})" if place else "")


def test_safetensors_under_any_name(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "x.pth")
    torch.save(STATE, tmp_path / "y.safetensors")
    for file in ("x.pth", "y.safetensors"):
        assert torch.equal(load(tmp_path / file).features.state_dict()["0.0.weight"], STEM)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "timm/convnext_atto"])
def test_our_own_checkpoint_may_be_the_next_models_weights(name, tmp_path):
    torch.manual_seed(1)
    model = TransferModel(name, "ab", 64, pretrained=False)
    save_checkpoint(tmp_path / "x.pt", model, {})
    loaded = load(tmp_path / "x.pt", name).features.state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.features.state_dict().items())


def body_with(**tensors: torch.Tensor) -> dict:
    """The backbone's tensors, some of them replaced; `stem` is its first convolution."""
    return {**BODY, **{"features.0.0.weight" if name == "stem" else name: each for name, each in tensors.items()}}


SORTED = dict(sorted(nn.Sequential(*NETWORK.children()).state_dict().items()))
RESNET = torchvision.models.resnet34()
WRONG = {  # what the file holds, the backbone, and a part of the message
    "whole model": (NETWORK, "mobilenet_v3_small", "a whole model (torchvision.models.mobilenetv3.MobileNetV3)"),
    "whole model in a dict": ({"epoch": 3, "model": NETWORK}, "mobilenet_v3_small", "a whole model"),
    "a name": ({"model": "resnet18", "epoch": 3}, "resnet18", "holds no tensors"),
    "a tensor": (torch.zeros(3), "resnet18", "holds no tensors"),
    "nothing": (None, "resnet18", "holds no tensors"),
    "numbers": ({0: torch.zeros(3), 1: "x"}, "resnet18", "0 (3,)"),
    "deeper": (RESNET.state_dict(), "resnet18", "80 are unknown"),
    "deeper, numbered": (nn.Sequential(*RESNET.children()).state_dict(), "resnet18", "layer1"),
    "numbered in another order": (SORTED, "mobilenet_v3_small", "0.0.0.weight"),
    "a tensor less": (body_with(stem=None), "mobilenet_v3_small", "backbone features.0.0.weight (16, 3"),
    "a parameter more": (body_with(reg_token=torch.zeros(1, 4)), "mobilenet_v3_small", "reg_token (1, 4)"),
    "grey": (body_with(stem=torch.ones(16, 1, 3, 3)), "mobilenet_v3_small", "(16, 1, 3, 3)"),
    "not finite": (body_with(stem=torch.full((16, 3, 3, 3), np.nan)), "mobilenet_v3_small", "not finite"),
    "sparse": (body_with(stem=torch.ones(16, 3, 3, 3).to_sparse()), "mobilenet_v3_small", "plain values"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_files_that_do_not_fit_are_named_with_the_reason(kind, tmp_path):
    content, backbone, hint = WRONG[kind]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth") as caught:
        load(tmp_path / "x.pth", backbone)
    message = str(caught.value)
    assert hint in message and message.isprintable() and "weights_only" not in message


@pytest.mark.parametrize("old_format", [False, True])
def test_nothing_in_a_file_is_executed(old_format, tmp_path):
    canary = tmp_path / "canary"
    for number, payload in enumerate([Payload(os.system, f"touch {canary}"), Payload(open, str(canary), "w")]):
        for content in (payload, {"state_dict": STATE, "more": payload}):
            torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not old_format)
            if number and content is not payload:  # nothing is made from such objects
                assert load(tmp_path / "x.pth").weights.endswith("(state_dict)")
                continue
            with pytest.raises(ValueError, match=r"x\.pth holds \w+\.(system|open)"):
                load(tmp_path / "x.pth")
    assert not canary.exists()


def test_files_that_are_no_weights(tmp_path):
    torch.save(STATE, tmp_path / "whole.pth")
    torch.jit.trace(NETWORK.eval(), torch.zeros(1, 3, 32, 32)).save(tmp_path / "script.pt")
    files = {
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n", "git lfs pull"),
        "page.pth": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        "empty.pth": (b"", "damaged"),
        "cut.pth": ((tmp_path / "whole.pth").read_bytes()[:3000], "damaged"),
        "noise.safetensors": (bytes(range(256)), "damaged"),
        "list.pkl": (pickle.dumps([1, 2]), "not of PyTorch"),
        "script.pt": ((tmp_path / "script.pt").read_bytes(), "TorchScript"),
        "broken.pth": ((tmp_path / "whole.pth").read_bytes()[2000:], "damaged"),
    }
    for name, (content, hint) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
            load(tmp_path / name)
        assert hint in str(caught.value) and str(caught.value).isprintable()
    with pytest.raises(OSError, match="No such file"):
        load(tmp_path / "none.pth")


def test_position_embeddings_are_resampled(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    clip = {f"visual.trunk.{name}": tensor for name, tensor in network.state_dict().items() if "head." not in name}
    torch.save({"state_dict": below("module.", {**clip, "text.weight": torch.ones(2, 2)})}, tmp_path / "clip.pt")
    loaded = load(tmp_path / "clip.pt", "timm/vit_tiny_patch16_224", 160).features.model
    expected = timm.create_model("vit_tiny_patch16_224", img_size=160, num_classes=5)
    state = timm.models.vision_transformer.checkpoint_filter_fn(network.state_dict(), expected)
    assert torch.equal(loaded.pos_embed, state["pos_embed"]) and loaded.pos_embed.shape[1] == 101
    with torch.device("meta"):
        larger = torchvision.models.vit_b_32(image_size=256).state_dict()
    torch.save({name: torch.zeros(tensor.shape) for name, tensor in larger.items()}, tmp_path / "vit.pth")
    assert load(tmp_path / "vit.pth", "vit_b_32").network.encoder.pos_embedding.shape[1] == 50


def test_heads_of_timm_and_weights_for_one_size(tmp_path):
    """The head of LeViT has a BatchNorm, and its attention biases are for one size."""
    network = timm.create_model("levit_128s", num_classes=5)
    torch.save(network.state_dict(), tmp_path / "x.pth")
    loaded = load(tmp_path / "x.pth", "timm/levit_128s").features.model.state_dict()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.items())
    with pytest.raises(ValueError, match="at 224 pixels only, not 160"):
        load(tmp_path / "x.pth", "timm/levit_128s", 160)
