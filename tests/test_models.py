"""Every backbone: frozen, run fast, saved, loaded, and used for predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import draw, randomize_statistics
from PIL import Image

import inference
from models import (
    BACKBONES,
    TransferModel,
    export,
    fast_copy,
    heat_map,
    load_checkpoint,
    run_images,
    save_checkpoint,
    threads,
    training_copy,
)

CPU = torch.device("cpu")

# the smallest member of every family of torchvision's classification models, and both ways of reading MobileNetV3-Large
FAMILIES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_large_levels", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
    "swin_v2_t", "vgg11_bn", "vgg16", "vit_b_32",
]  # fmt: skip
ONE_SIZE = {"maxvit_t": 224, "vit_b_32": 224}


def random_model(name: str, image_size: int | None = None, classes=("zebra", "ant", "car")) -> TransferModel:
    torch.manual_seed(0)
    return randomize_statistics(TransferModel(name, classes, image_size, pretrained=False)).eval()


def noise(model: TransferModel, count: int = 2) -> torch.Tensor:
    size = model.preprocessing["image_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_families_are_complete():
    packages = {torchvision.models.get_model_builder(name).__module__ for name in FAMILIES if "_levels" not in name}
    everything = torchvision.models.list_models(torchvision.models)
    assert {torchvision.models.get_model_builder(name).__module__ for name in everything} == packages


@pytest.mark.parametrize("image_size", [None, 97])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_fast_copy_computes_the_same(name, image_size):
    if image_size and name in ONE_SIZE:
        with pytest.raises(ValueError, match=f"{name} takes no images of {image_size} pixels; .* {ONE_SIZE[name]}"):
            random_model(name, image_size)
        return
    model = random_model(name, image_size)
    model.views = 1
    images = noise(model)
    with torch.inference_mode():
        expected = model.forward_features(images)
        fast = fast_copy(model, CPU, "fp32")
        actual = fast.forward_features(images)
        one = fast.forward_features(images[:1])  # the weights' layout follows from the batch size
    assert expected.shape == (2, model.width)
    tolerance = 1e-4 * expected.abs().max()
    assert (actual - expected).abs().max() < tolerance and (one - expected[:1]).abs().max() < tolerance


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18"])
def test_the_fast_copy_in_bf16_and_in_parts(name, monkeypatch):
    monkeypatch.setattr("models.LAYER", 1_600_000)  # so that the first stages take these few images in parts
    model = random_model(name, 64)
    images = noise(model, 8)
    with torch.inference_mode():
        expected = model.forward_features(images)
        whole = fast_copy(model, CPU, "fp32").forward_features(images)
        bf16 = fast_copy(model, CPU, "bf16").forward_features(images.bfloat16()).float()
    assert (whole - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (bf16 - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["_convolution_pointwise", "_reorder_convolution_weight"])
def test_the_fast_copy_does_without_an_operator_that_fails_or_is_wrong(name, monkeypatch):
    def missing(*args):
        raise RuntimeError("could not create a memory")

    def wrong(images, *args):
        return torch.zeros(1)

    model = random_model("mobilenet_v2", 32)
    expected = fast_copy(model, CPU, "fp32").forward_features(noise(model))
    for broken in (missing, wrong):
        monkeypatch.setattr(torch.ops.mkldnn, name, broken)
        actual = fast_copy(model, CPU, "fp32").forward_features(noise(model))
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_means_frozen_and_unfrozen_trains(name):
    model = random_model(name, ONE_SIZE.get(name, 96))
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


@pytest.mark.parametrize("name", FAMILIES)
def test_the_training_copy_has_the_same_parameters_and_gradients(name):
    model = random_model(name, ONE_SIZE.get(name, 80))
    model.unfreeze()
    model.train()
    model.features.double()  # or rounding would move an activation across zero here and there
    images = noise(model).double()

    def gradients(network: torch.nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(0)  # for dropout
        model.zero_grad()
        (logits := network(images)).logsumexp(dim=1).sum().backward()
        return [logits.detach(), *(parameter.grad for parameter in model.parameters())]

    expected = gradients(model)
    with torch.inference_mode():
        answers = model.eval()(images)
    for parts in (1, 2):
        network = training_copy(model.train(), parts)
        with threads(1):  # for each part
            for actual, plain in zip(gradients(network), expected, strict=True):
                assert (actual - plain).abs().max() <= 1e-5 * plain.abs().max() + 1e-9
            network.eval()
            with torch.inference_mode():
                assert torch.allclose(network(images), answers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_rebuilds_itself(name, tmp_path):
    model = random_model(name, ONE_SIZE.get(name, 96))
    model.temperature = 1.5
    save_checkpoint(tmp_path / "x.pt", model, {"val_accuracy": 0.5})
    again = load_checkpoint(tmp_path / "x.pt")
    assert not any(module.training for module in again.modules())
    assert again.classes == ("zebra", "ant", "car") and again.metrics == {"val_accuracy": 0.5}
    assert again.preprocessing == model.preprocessing and again.temperature == 1.5
    assert torch.equal(again(noise(model)), model(noise(model)))
    assert torch.equal(model.classifier(model.forward_features(noise(model))), model(noise(model)))


@pytest.mark.parametrize("name", ["mobilenet_v2", "swin_t", "vit_b_32"])
def test_an_image_and_its_mirror_image_are_the_same(name):
    model = random_model(name, ONE_SIZE.get(name, 96))
    images = noise(model)
    features = model.forward_features(images)
    assert torch.allclose(features, model.forward_features(images.flip(3)), atol=1e-5)
    one, other = model.forward_view(images), model.forward_view(images.flip(3))
    assert torch.allclose(features, (one + other) / 2) and not torch.allclose(one, other, atol=1e-3)
    model.views = 1
    assert torch.equal(model.forward_features(images), one)


def test_the_heat_map_is_grad_cam():
    """Its textbook form: the last maps, weighted by the average of the gradient of the label's logit."""
    model, maps = random_model("mobilenet_v2", 96), []
    images = noise(model, 3)
    heat = heat_map(model, images)
    model.views = 1
    model.features[-1].register_forward_hook(lambda module, inputs, output: maps.append(output.requires_grad_()))
    [gradient] = torch.autograd.grad(model(images).max(dim=1).values.sum(), maps)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * maps[0]).sum(dim=1).relu()
    expected = expected / expected.amax(dim=(1, 2), keepdim=True)
    assert torch.allclose(heat.reshape_as(expected), expected, atol=1e-5)


def test_what_is_exported_answers_as_the_model(tmp_path):
    model = random_model("resnet18", 96)
    model.temperature = 2.0
    export(model, tmp_path / "x.pt2")
    images = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    answers = torch.export.load(tmp_path / "x.pt2").module()(images)
    for row, record in zip(answers, model.predict([image.permute(1, 2, 0).numpy() for image in images]), strict=True):
        expected = {guess["label"]: guess["probability"] for guess in record["top"]}
        assert dict(zip(model.classes, row.tolist(), strict=True)) == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_of_another_version_says_so(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "x.pt", random_model("mobilenet_v3_small", 64), {})
    monkeypatch.setattr("models.SCHEMA", 99)
    with pytest.raises(ValueError, match="this version reads 99: train it again"):
        load_checkpoint(tmp_path / "x.pt")


def test_features_are_torchvisions(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    for name in ("mobilenet_v3_large", "mobilenet_v2"):
        model = TransferModel(name, [*"0123456789"]).eval()
        save_checkpoint(tmp_path / "x.pt", model, {})
        state = torch.load(tmp_path / "x.pt", weights_only=True)["state_dict"]
        source = BACKBONES[name].weights.get_state_dict()
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


def test_a_name_that_is_none_gets_a_suggestion():
    with pytest.raises(ValueError, match="resnet50"):
        TransferModel("resnet", "ab")


def test_run_images_keeps_order_and_names_what_it_cannot_read(tmp_path):
    paths = []
    for i in range(30):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (4, 4), (i, 0, 0)).save(paths[-1])
    paths[7].write_bytes(b"not an image")
    paths[8].write_bytes(paths[9].read_bytes()[:50])
    paths[20].unlink()
    model = TransferModel("squeezenet1_1", "ab", 32, pretrained=False)
    model.preprocessing |= {"image_size": 4, "mean": [0.0] * 3, "std": [1.0] * 3}
    for size in (1, 3, 64):
        values, broken = [], {}
        batches = run_images([model], paths, lambda model, images: 255 * images[:, 0, 0, :1], batch_size=size)
        for items, [outputs], errors in batches:
            broken |= {items[i].name: str(error) for i, error in errors.items()}
            values += outputs.flatten().tolist()
        assert sorted(broken) == ["20.png", "7.png", "8.png"]
        assert all(name in message for name, message in broken.items())
        assert [i for i, value in enumerate(values) if np.isnan(value)] == [7, 8, 20]
        assert values == pytest.approx([np.nan if i in (7, 8, 20) else i for i in range(30)], abs=1e-3, nan_ok=True)


def test_predict_answers_as_inference_does(run, tmp_path, monkeypatch):
    model = random_model("mobilenet_v3_small", 64)
    model.temperature = 2.0
    save_checkpoint(tmp_path / "x.pt", model, {})
    for i, size in enumerate([(20, 30), (64, 64), (400, 300)]):
        draw(tmp_path / f"{i}.png", (40 * i, 90, 200), seed=i, size=size)
    (tmp_path / "3.png").write_bytes(b"x")
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    _, out, _ = run(inference, *files, "--checkpoint", "x.pt", "--format", "json")
    records = [json.loads(line) for line in out.splitlines()]

    loaded = load_checkpoint("x.pt")
    answers = loaded.predict(files)
    assert [answer.keys() for answer in answers] == [record.keys() for record in records]
    assert answers[3] == records[3] and "3.png" in answers[3]["error"]
    images = [Image.open(file) for file in files[:3]]
    for forms in (answers, loaded.predict(images), loaded.predict([np.array(image) for image in images])):
        for answer, record in zip(forms[:3], records[:3], strict=True):
            assert answer["label"] == record["label"] == answer["top"][0]["label"]
            assert answer["probability"] == pytest.approx(record["probability"], abs=1e-5)
    alone = loaded.predict(Path(files[0]))
    assert alone["path"] == files[0] and alone["probability"] == pytest.approx(answers[0]["probability"], abs=1e-5)
    loaded.temperature = 1e-3  # probabilities are calibrated
    assert loaded.predict(files[0])["probability"] > answers[0]["probability"]


def test_damage_is_always_noticed(tmp_path):
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


def test_a_pickle_with_a_payload_runs_nothing(tmp_path, monkeypatch):
    torch.save({"schema": 1, "state_dict": Payload(tmp_path / "canary")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt"):
        load_checkpoint(tmp_path / "x.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nor one among torchvision's weights
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = BACKBONES["mobilenet_v2"].weights.url
    torch.save({"features.0.0.weight": Payload(tmp_path / "canary")}, tmp_path / "hub" / "checkpoints" / Path(url).name)
    with pytest.raises(OSError, match="damaged"):
        TransferModel("mobilenet_v2", "ab")
    assert not (tmp_path / "canary").exists()
