from dataclasses import replace

import pytest
import torch
import torchvision

from models import BACKBONES, DTYPES, TransferModel, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
SMALL = [name for name in BACKBONES if name != "vgg16"]


@pytest.fixture
def images():
    return torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_classifier_on_features_is_the_model(name, images):
    model = TransferModel(name, "abc", pretrained=False).eval()
    features = model.forward_features(images)
    assert features.shape == (len(images), model.width)
    assert torch.equal(model.classifier(features), model(images))


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_means_frozen(name, images):
    model = TransferModel(name, "abc", pretrained=False)
    before = {key: tensor.clone() for key, tensor in model.features.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    for _ in range(2):
        model(images).sum().backward()
        optimizer.step()
    after = model.features.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", SMALL)
def test_for_inference_computes_the_same(name, images, weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))  # random BatchNorm statistics, so that folding has work to do
    monkeypatch.setattr("models.LAYER", 1_600_000)  # so that early blocks take these few pictures in parts
    model = TransferModel(name, "abc").eval()
    with torch.inference_mode():
        expected = model.forward_features(images)
        fast = model.for_inference(CPU, DTYPES["fp32"])
        assert fast.early and fast.part < len(images)
        fp32 = fast.forward_features(images)
        bf16 = model.for_inference(CPU, DTYPES["bf16"]).forward_features(images.bfloat16()).float()
        one = fast.forward_features(images[:1])  # the weights' layout goes by the batch size
    assert torch.allclose(fp32, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert torch.allclose(one, fp32[:1], rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert (bf16 - expected).norm() < 0.05 * expected.norm()
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())  # the model itself is untouched


def test_every_level_stays_what_it_is_where_the_levels_are_single_layers(images, monkeypatch):
    def build():
        network = torch.nn.Module()
        network.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3)
        )
        network.features[1].running_mean.fill_(0.5)  # so that folding it would change the first level
        network.classifier = torch.nn.Sequential(torch.nn.Linear(8, 1000))
        return network

    monkeypatch.setitem(BACKBONES, "tiny", replace(BACKBONES["mobilenet_v2"], build=build))
    model = TransferModel("tiny", "abc", pretrained=False).eval()
    fast = model.for_inference(CPU, torch.float32)
    assert model.width == 3 * 4 * 4 + 8
    assert torch.allclose(fast.forward_features(images), model.forward_features(images), atol=1e-5)


def test_the_checkpoint_is_at_home_in_torchvision(tmp_path, images, weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    for name in ("mobilenet_v3_large", "mobilenet_v2"):
        model = TransferModel(name, [*"0123456789"]).eval()
        save_checkpoint(tmp_path / "x.pt", model, {})
        state = torch.load(tmp_path / "x.pt", weights_only=True)["state_dict"]
        source = BACKBONES[name].weights.get_state_dict()
        for key in (key for key in source if key.startswith("features.")):
            assert torch.equal(state[key], source[key])
        if name == "mobilenet_v3_large":
            stock = torchvision.models.mobilenet_v3_large(num_classes=10)
            stock.load_state_dict(state)
            assert torch.allclose(stock.eval()(images), model(images), atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_checkpoint_rebuilds_itself(name, tmp_path, images):
    model = TransferModel(name, ("zebra", "ant"), image_size=64, pretrained=False).eval()
    save_checkpoint(tmp_path / "x.pt", model, {"val_accuracy": 0.5})
    again, metrics = load_checkpoint(tmp_path / "x.pt")
    assert again.classes == ("zebra", "ant") and metrics == {"val_accuracy": 0.5}
    assert again.preprocessing == model.preprocessing
    assert torch.equal(again(images), model(images))


def test_damage_is_always_noticed(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, TransferModel("mobilenet_v3_small", "ab", pretrained=False), {})
    whole = path.read_bytes()
    state = load_checkpoint(path)[0].state_dict()
    for i in range(64):
        path.write_bytes(whole[: len(whole) * i // 64])
        with pytest.raises(ValueError, match=r"x\.pt"):
            load_checkpoint(path)
    for i in range(64):  # single bytes; those in the padding between the tensors may change nothing
        damaged = bytearray(whole)
        damaged[(len(whole) * i + 17 * i) // 64] ^= 255
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)[0].state_dict()
        except ValueError as error:
            assert "x.pt" in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(loaded[key], state[key]) for key in state)


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


def test_a_pickle_with_a_payload_runs_nothing(tmp_path):
    torch.save({"schema": 1, "state_dict": Payload(tmp_path / "canary")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt"):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "canary").exists()
