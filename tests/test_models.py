"""Every family of backbones: frozen, pretrained, saved and loaded."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import FAMILIES, ONE_SIZE, SMALL_FAMILIES, noise, random_model, randomize_statistics

from engine.backbones import torchvision_weights
from models import BACKBONES, TransferModel, load_checkpoint, save_checkpoint


def test_families_are_complete():
    packages = {torchvision.models.get_model_builder(name).__module__ for name in FAMILIES if "_levels" not in name}
    everything = torchvision.models.list_models(torchvision.models)
    assert {torchvision.models.get_model_builder(name).__module__ for name in everything} == packages


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_frozen_weights_do_not_change_and_unfrozen_ones_do(name):
    model = random_model(name, 96)
    images = noise(model, 3)
    before = {key: tensor.clone() for key, tensor in model.features.state_dict().items()}

    def step() -> list[str]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()
        model(images).logsumexp(dim=1).sum().backward()
        optimizer.step()
        after = model.features.state_dict()
        return [key for key in before if not torch.equal(before[key], after[key])]

    assert step() == []
    model.unfreeze()
    changed = step()
    assert changed and not any("running" in key or "num_batches" in key for key in changed)


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_a_checkpoint_restores_the_model(name, tmp_path):
    model = random_model(name, 96)
    model.temperature = 1.5
    save_checkpoint(tmp_path / "x.pt", model, {"val_accuracy": 0.5})
    again = load_checkpoint(tmp_path / "x.pt")
    assert not any(module.training for module in again.modules())
    assert again.classes == ("zebra", "ant", "car") and again.origin == {"val_accuracy": 0.5}
    assert again.preprocessing == model.preprocessing and again.temperature == 1.5
    assert torch.equal(again(noise(model)), model(noise(model)))
    assert torch.equal(model.classifier(model.forward_features(noise(model))), model(noise(model)))


@pytest.mark.parametrize("name", ["mobilenet_v2", "swin_t", "vit_b_32"])
def test_features_are_the_mean_over_both_views(name):
    model = random_model(name, ONE_SIZE.get(name, 96))
    images = noise(model)
    features = model.forward_features(images)
    assert torch.allclose(features, model.forward_features(images.flip(3)), atol=1e-5)
    one, other = model.forward_view(images), model.forward_view(images.flip(3))
    assert torch.allclose(features, (one + other) / 2) and not torch.allclose(one, other, atol=1e-3)
    model.views = 1
    assert torch.equal(model.forward_features(images), one)


def test_features_of_a_checkpoint_load_into_torchvisions_model(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    for name in ("mobilenet_v3_large", "mobilenet_v2"):
        model = TransferModel(name, [*"0123456789"]).eval()
        save_checkpoint(tmp_path / "x.pt", model, {})
        state = torch.load(tmp_path / "x.pt", weights_only=True)["state_dict"]
        source = torchvision_weights(BACKBONES[name].name).get_state_dict()
        for key in (key for key in source if key.startswith("features.")):
            assert torch.equal(state[key], source[key])
        if name == "mobilenet_v3_large":
            model.views = 1
            stock = torchvision.models.mobilenet_v3_large(num_classes=10)
            stock.load_state_dict(state)
            assert torch.allclose(stock.eval()(noise(model)), model(noise(model)), atol=1e-5)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "densenet121", "resnet18", "swin_t"])
def test_pretrained_weights_give_torchvisions_logits(name, tmp_path, monkeypatch):
    """Our features through torchvision's own last layer are torchvision's own logits."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    stock = torchvision.models.get_model(name, **options)
    randomize_statistics(stock)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(stock.state_dict(), tmp_path / "hub" / "checkpoints" / Path(weights.url).name)
    stock = torchvision.models.get_model(name, weights=weights).eval()
    model = TransferModel(name, "ab", 96).eval()
    last = [module for module in stock.modules() if isinstance(module, torch.nn.Linear)][-1]
    images = noise(model)
    features = model.forward_view(images)[:, -last.in_features :]
    assert torch.allclose(last(features), stock(images), atol=1e-4)


@pytest.mark.parametrize(("name", "size"), ONE_SIZE.items())
def test_some_backbones_accept_one_size_only(name, size):
    with pytest.raises(ValueError, match=f"{name} does not accept 97-pixel images; its weights are for {size}"):
        TransferModel(name, "ab", 97, pretrained=False)


@pytest.mark.parametrize("schema", [4, 5])
def test_checkpoints_of_earlier_versions_give_the_same_answers(schema, tmp_path):
    """Files that those versions have written, and what they answered."""
    packed = Path(__file__).with_name(f"schema_{schema}.pt.gz").read_bytes()
    (tmp_path / "x.pt").write_bytes(gzip.decompress(packed))
    model = load_checkpoint(tmp_path / "x.pt")
    pixels = (np.arange(64 * 64 * 3).reshape(64, 64, 3) * 7919 % 251).astype(np.uint8)
    found = {guess["label"]: guess["probability"] for guess in model.predict(pixels)["top"]}
    assert found == pytest.approx({"green": 0.51827, "red": 0.37735, "blue": 0.10438}, abs=1e-3)
    assert model.origin["val_accuracy"] == 0.75
    save_checkpoint(tmp_path / "y.pt", model, model.origin)
    assert load_checkpoint(tmp_path / "y.pt").predict(pixels)["probability"] == pytest.approx(found["green"], abs=1e-5)


def test_a_checkpoint_of_another_schema_is_refused(tmp_path):
    save_checkpoint(tmp_path / "x.pt", random_model("mobilenet_v3_small", 64), {})
    for content in (torch.load(tmp_path / "x.pt", weights_only=True), {}):
        torch.save(content | {"schema": 99}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="of another version"):
            load_checkpoint(tmp_path / "x.pt")


def test_damaged_checkpoints_are_noticed(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, TransferModel("mobilenet_v3_small", "ab", pretrained=False), {})
    whole = path.read_bytes()
    state = load_checkpoint(path).state_dict()
    for i in range(64):
        path.write_bytes(whole[: len(whole) * i // 64])
        with pytest.raises(ValueError, match=r"x\.pt"):
            load_checkpoint(path)
    for i in range(64):  # single bytes; those in the padding between the tensors may change nothing
        damaged = bytearray(whole)
        damaged[(len(whole) * i + 17 * i) // 64] ^= 255
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path).state_dict()
        except ValueError as error:
            assert "x.pt" in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(loaded[key], state[key]) for key in state)


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


def test_code_in_a_pickle_is_not_executed(tmp_path, monkeypatch):
    torch.save({"schema": 1, "state_dict": Payload(tmp_path / "canary")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt"):
        load_checkpoint(tmp_path / "x.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # the same in torchvision's weights
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = torchvision_weights("mobilenet_v2").url
    torch.save({"features.0.0.weight": Payload(tmp_path / "canary")}, tmp_path / "hub" / "checkpoints" / Path(url).name)
    with pytest.raises(OSError, match="damaged"):
        TransferModel("mobilenet_v2", "ab")
    assert not (tmp_path / "canary").exists()
