"""Backbones of timm, weights by name and from files, and the preprocessing that weights ask for."""

import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import CPU, QUICK, checkpoints, noise, results
from PIL import Image

import inference
import main_train
from engine.backbones import build, torchvision_weights
from engine.fast import fast_copy
from engine.images import preprocess, read_image
from models import TransferModel, load_checkpoint, save_checkpoint

FAMILIES = {
    "beit_base_patch16_224": 32,
    "convnext_atto": 64,
    "eva02_tiny_patch14_224": 56,
    "maxvit_rmlp_pico_rw_256": 64,
    "mobilenetv4_conv_small": 64,
    "resnetv2_50": 64,
    "swin_tiny_patch4_window7_224": 224,
    "tf_efficientnetv2_b0": 64,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_tiny_patch16_224": 64,
}
SMALL = ("convnext_atto", "mobilenetv4_conv_small", "vit_tiny_patch16_224")


@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_features_are_those_of_timm(name, size, tmp_path):
    torch.manual_seed(0)
    model = TransferModel(f"timm/{name}", "ab", size, pretrained=False)
    images = noise(model)
    with torch.inference_mode():
        expected = model.features.model(images)
        features = model.forward_view(images)
        fast = fast_copy(model, CPU).forward_view(images)
    assert torch.allclose(features[:, -expected.shape[1] :], expected, atol=1e-4)
    assert torch.allclose(fast, features, rtol=1e-3, atol=1e-4)
    if name not in SMALL:
        return
    save_checkpoint(tmp_path / "x.pt", model, {})
    image = torch.randint(256, (3, 90, 70), dtype=torch.uint8)
    assert load_checkpoint(tmp_path / "x.pt").predict(image) == model.predict(image) | {"path": None}


def test_timm_in_the_demo(run, tmp_path):
    command = ("--demo", "--limit", 16, "--epochs", 1, "--fine-tune", 1, "--models", "timm/mobilenetv4_conv_small")
    code, _, err = run(main_train, *command)
    assert (code, err) == (0, "")
    file = tmp_path / "demo" / "checkpoints" / "timm_mobilenetv4_conv_small.pt"
    assert run(inference, "--checkpoint", file, "--explain", "why.png")[0] == 0
    assert run(inference, "--export", "x.pt2", "--checkpoint", file)[0] == 0 and (tmp_path / "x.pt2").exists()


def test_timm_is_optional(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = run(main_train, "--demo", "--models", "timm/vit_tiny_patch16_224")
    assert code == 2 and "pip install timm" in err
    monkeypatch.undo()
    for name, hint in (("timm/convnext_atom", "timm/convnext_atto"), ("resnet50:help", "IMAGENET1K_V2")):
        code, _, err = run(main_train, "--demo", "--models", name)
        assert code == 2 and hint in err.splitlines()[-1]


def test_weights_by_name_and_from_files(run, photos, tmp_path):
    network = torch.nn.DataParallel(TransferModel("mobilenet_v3_small", "ab", 32, pretrained=False)).state_dict()
    own = {name: tensor for name, tensor in network.items() if "classifier" not in name}
    torch.save({"state_dict": own}, tmp_path / "x-rays.pth")
    torch.save({"state_dict": {name: tensor for name, tensor in own.items() if "0.0.weight" not in name}}, "less.pth")
    names = ["mobilenet_v3_small", "mobilenet_v3_small:IMAGENET1K_V1", "mobilenet_v3_small:x-rays.pth"]
    code, _, err = run(main_train, "--data", photos, *QUICK, "--models", *names)
    assert (code, err) == (0, "")
    weights, rows = checkpoints(tmp_path), results(tmp_path)
    assert [row["weights"] for row in rows] == ["IMAGENET1K_V1", "IMAGENET1K_V1", "x-rays.pth"]
    assert len({row["label"] for row in rows}) == len({row["plot"] for row in rows}) == len(weights) == 3
    key = "features.0.0.weight"
    of_file = weights["mobilenet_v3_small_x-rays.pth.pt"]
    assert torch.equal(of_file[key], own[f"module.{key}"])
    assert torch.equal(weights["mobilenet_v3_small.pt"][key], weights["mobilenet_v3_small_IMAGENET1K_V1.pt"][key])
    (tmp_path / "x-rays.pth").unlink()
    assert run(inference, photos / "test")[0] == 0  # checkpoints hold the weights
    for name, hint in (("less.pth", "features.0.0.weight"), ("none.pth", "none.pth cannot be loaded")):
        code, _, err = run(main_train, "--data", photos, *QUICK, "--models", f"mobilenet_v3_small:{name}")
        assert code == 2 and hint in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_a_file_may_hold_auxiliary_classifiers(name, tmp_path):
    """As torchvision's own does."""
    network = torchvision.models.get_model(name, weights=None, init_weights=False, aux_logits=True)
    torch.save(network.state_dict(), tmp_path / "x.pth")
    loaded, _ = build(f"{name}:{tmp_path / 'x.pth'}", None, pretrained=True)
    assert torch.equal(next(loaded.parameters()), next(network.parameters()))


@pytest.mark.parametrize(
    "name",
    ["efficientnet_b0", "mobilenet_v2", "resnet50:IMAGENET1K_V2", "swin_t", "vit_b_16:IMAGENET1K_SWAG_LINEAR_V1"]
    + [f"timm/{name}" for name in ("convnext_tiny.in12k", "mobilenetv4_conv_small", "resnetv2_50")]
    + [f"timm/{name}" for name in ("vit_small_patch14_dinov2.lvd142m", "beit_base_patch16_224")],
)
def test_preprocessing_is_that_of_the_weights(name, tmp_path):
    """But for the crop: all of the square in the middle is used."""
    pixels = np.random.default_rng(0).integers(256, size=(60, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((1280, 640), Image.Resampling.BICUBIC).save(tmp_path / "x.png")
    if name.startswith("timm/"):
        config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name[5:]).to_dict())
        transform, size = timm.data.create_transform(**config | {"crop_pct": 1.0}), config["input_size"][-1]
    else:
        partial = torchvision_weights(name).transforms
        size = partial().crop_size[0]
        transform = partial(resize_size=size)
    expected = transform(Image.open(tmp_path / "x.png").convert("RGB"))
    _, preprocessing = build(name, None, pretrained=False)
    assert preprocessing["image_size"] == size
    actual = preprocess(
        [read_image(tmp_path / "x.png", size, True, preprocessing["interpolation"])], preprocessing | {"crop": True}
    )[0]
    assert (actual - expected).abs().mean() < 0.005  # 0.03 with the wrong interpolation
