"""Backbones of timm, weights by name and from files, and the preprocessing that weights ask for."""

import hashlib
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import CPU, checkpoints, noise, results
from PIL import Image

import inference
import main_train
from engine.backbones import build, torchvision_weights
from engine.fast import fast_copy
from engine.images import preprocess, read_image, reading_arguments
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
    assert code == 2 and "pip install 'timm>=" in err
    monkeypatch.undo()
    hints = {
        "timm/convnext_atom": "timm/convnext_atto",
        "resnet50:help": "IMAGENET1K_V2",
        "timm/hf_hub:timm/resnet18.a1_in1k": "timm/resnet18.a1_in1k",
        "hf-hub:somebody/resnet": "timm/ARCHITECTURE:FILE",
    }
    for name, hint in hints.items():
        code, _, err = run(main_train, "--demo", "--models", name)
        assert code == 2 and hint in err.splitlines()[-1]


def test_a_checkpoint_without_timm_or_with_an_old_one_is_not_called_damaged(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "x.pt", TransferModel("timm/convnext_atto", "ab", 64, pretrained=False), {})
    for module, hint in ((None, "need timm"), (types.SimpleNamespace(__version__="0.9.16"), "timm 0.9.16 is too old")):
        monkeypatch.setitem(sys.modules, "timm", module)
        with pytest.raises(ValueError, match=hint) as caught:
            load_checkpoint(tmp_path / "x.pt")
        message = str(caught.value)
        assert "damaged" not in message and "pip install 'timm>=" in message and f"timm {timm.__version__}" in message


def test_weights_by_name_and_from_files(run, train, photos, tmp_path):
    network = torch.nn.DataParallel(TransferModel("mobilenet_v3_small", "ab", 32, pretrained=False)).state_dict()
    own = {name: tensor for name, tensor in network.items() if "classifier" not in name}
    torch.save({"state_dict": own}, tmp_path / "x-rays.pth")
    torch.save({"model": "resnet18", 1: None}, tmp_path / "none.pth")
    names = ["mobilenet_v3_small", "mobilenet_v3_small:IMAGENET1K_V1", "mobilenet_v3_small:x-rays.pth"]
    code, out, err = train(photos, "--models", "vgg16", "resnet18:none.pth", *names)
    *_, download, file = err.splitlines()  # the other models are trained
    assert code == 1 and "checkpoints/vgg16-397923af.pth" in download and "--demo" in download and "none.pth" in file
    weights, rows = checkpoints(tmp_path), results(tmp_path)
    assert [row["weights"].partition("'")[0] for row in rows] == ["IMAGENET1K_V1"] * 2 + ["x-rays.pth (state_dict)"]
    assert all(row["weights"] in out for row in rows)
    assert len({row["label"] for row in rows}) == len({row["plot"] for row in rows}) == len(weights) == 3
    assert len({row["weights_sha256"] for row in rows}) == 2
    key = "features.0.0.weight"
    of_file = weights["mobilenet_v3_small_x-rays.pth.pt"]
    assert torch.equal(of_file[key], own[f"module.{key}"])
    assert torch.equal(weights["mobilenet_v3_small.pt"][key], weights["mobilenet_v3_small_IMAGENET1K_V1.pt"][key])
    (tmp_path / "x-rays.pth").unlink()
    assert run(inference, photos / "test")[0] == 0  # checkpoints hold the weights
    assert "x-rays.pth" in load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small_x-rays.pth.pt").weights


def test_a_cached_file_is_compared_with_the_hash_in_its_name(weights, tmp_path, monkeypatch):
    official = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    folder, name = tmp_path / "hub" / "checkpoints", Path(official.url).name
    shutil.copytree(weights / "hub" / "checkpoints", folder)  # random weights at the place of torchvision's
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()[:8]
    found = TransferModel("mobilenet_v3_small", "ab", 32).weights
    assert found == f"IMAGENET1K_V1's place, another file: sha256 {digest}"
    right = (folder / name).rename(folder / name.replace("047dcff4", digest)).name
    monkeypatch.setattr(official.value, "url", f"https://127.0.0.1/{right}")
    assert TransferModel("mobilenet_v3_small", "ab", 32).weights == "IMAGENET1K_V1"


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_a_file_may_hold_auxiliary_classifiers(name, tmp_path):
    """As torchvision's own does."""
    network = torchvision.models.get_model(name, weights=None, init_weights=False, aux_logits=True)
    torch.save(network.state_dict(), tmp_path / "x.pth")
    loaded = build(f"{name}:{tmp_path / 'x.pth'}", None, pretrained=True).network
    assert torch.equal(next(loaded.parameters()), next(network.parameters()))


@pytest.mark.parametrize(
    "name",
    ["efficientnet_b0", "mobilenet_v2", "resnet50:IMAGENET1K_V2", "swin_t", "vit_b_16:IMAGENET1K_SWAG_LINEAR_V1"]
    + [f"timm/{name}" for name in ("convnext_tiny.in12k", "mobilenetv4_conv_small", "resnetv2_50")]
    + [f"timm/{name}" for name in ("vit_small_patch14_dinov2.lvd142m", "beit_base_patch16_224")]
    + ["timm/convnextv2_nano.fcmae_ft_in22k_in1k_384"],  # which were trained on squeezed images
)
def test_preprocessing_is_that_of_the_weights(name, tmp_path):
    """But for the crop: all of the square in the middle is used, or, squeezed, all of the image."""
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
    preprocessing = {"crop": True} | build(name, None, pretrained=False).preprocessing
    assert preprocessing["image_size"] == size
    image = read_image(tmp_path / "x.png", *reading_arguments(preprocessing))
    actual = preprocess([image], preprocessing)[0]
    assert (actual - expected).abs().mean() < 0.005  # 0.03 with the wrong interpolation
