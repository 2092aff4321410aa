"""Images through a model: order, errors, memory, batches, heat maps, cost."""

import importlib

import numpy as np
import pytest
import torch
from conftest import ROOT, noise, random_model
from PIL import Image

from engine.backbones import torchvision_weights
from engine.run import run_images
from inference import heat_map
from models import TransferModel


def test_run_images_keeps_the_order_and_names_unreadable_images(tmp_path):
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


def test_the_heat_map_is_grad_cam():
    """Its textbook form: the last maps, weighted by the average of the gradient of the label's logit."""
    model, maps = random_model("mobilenet_v2", 96), []
    image = noise(model, 1)
    heats = [heat_map(model, image, label) for label in (0, 1)]
    model.views = 1
    model.features[-1].register_forward_hook(lambda module, inputs, output: maps.append(output.requires_grad_()))
    logits = model(image)[0]
    for heat, logit in zip(heats, logits, strict=False):
        [gradient] = torch.autograd.grad(logit, maps, retain_graph=True)
        expected = (gradient.mean(dim=(2, 3), keepdim=True) * maps[0]).sum(dim=1).relu()[0]
        assert np.allclose(heat, (expected / expected.max()).detach(), atol=1e-5)


@pytest.mark.parametrize(
    "full", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory")]
)
def test_out_of_memory_halves_the_batch(full, photos, capsys):
    model, room = random_model("mobilenet_v3_small", 32), 4

    def greedy(model, images):
        if len(images) > room:
            raise full
        return model(images)

    def outputs(output):
        return torch.cat([batch.outputs[0] for batch in run_images([model], [*photos.glob("test/*/*.png")], output)])

    assert torch.allclose(outputs(greedy), outputs(torch.nn.Module.__call__), atol=1e-4)
    assert "batches of 4" in capsys.readouterr().err
    room = 0
    with pytest.raises(type(full)):
        outputs(greedy)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_predictions_are_batch_invariant(answers, trained, photos, precision, tolerance):
    """They depend neither on the other images and their order nor on the number of threads."""
    files, cores = sorted((photos / "test").rglob("*.png")), torch.get_num_threads()

    def by_path(files):
        return {record["path"]: record for record in answers(*files, "--precision", precision)}

    together = by_path(files)
    others = [by_path(files[::-1]), by_path(files[:1]), by_path(files[10:15])]
    torch.set_num_threads(3)
    others.append(by_path(files))
    torch.set_num_threads(cores)
    assert len(together) == 18 and [len(other) for other in others] == [18, 1, 5, 18]
    for path, record in [pair for other in others for pair in other.items()]:
        assert record["probability"] == pytest.approx(together[path]["probability"], abs=tolerance)
        assert precision == "bf16" or record["label"] == together[path]["label"]


def test_multiply_adds_agree_with_torchvision(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cost, model = importlib.import_module("cost"), random_model("mobilenet_v2")
    known = 1e9 * torchvision_weights("mobilenet_v2").meta["_ops"]
    assert cost.multiply_adds(model) == pytest.approx(known, rel=0.02)
    model.unfreeze()
    model.views = 1
    assert cost.multiply_adds(model) == pytest.approx(known, rel=0.02)
