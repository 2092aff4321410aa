"""Exported models answer as their checkpoints."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import random_model

import inference
from engine.export import export
from models import load_checkpoint


def test_an_exported_model_agrees_with_its_checkpoint(run, trained):
    code, out, err = run(inference, "--export", "exported.PT2")
    assert (code, err) == (0, "") and "(B, 3, 32, 32)" in out
    extra = {"classes": "", "preprocessing": ""}
    exported = torch.export.load(trained / "exported.PT2", extra_files=extra).module()
    preprocessing, classes = json.loads(extra["preprocessing"]), json.loads(extra["classes"])
    assert preprocessing.pop("advice") in out
    assert preprocessing == {"image_size": 32, "crop": True, "interpolation": "bilinear"}
    model = load_checkpoint(trained / "checkpoints" / "mobilenet_v3_small.pt")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    for count in (1, 5):
        found = exported(torch.from_numpy(images[:count]).permute(0, 3, 1, 2))
        for row, record in zip(found, model.predict(list(images[:count])), strict=True):
            expected = {guess["label"]: guess["probability"] for guess in record["top"]}
            assert dict(zip(classes, row.tolist(), strict=True)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["model.txt", "model.onnx"])
def test_what_cannot_be_exported(run, trained, name):
    if name.endswith("onnx") and importlib.util.find_spec("onnxscript"):
        pytest.skip("ONNX can be written here")
    code, _, err = run(inference, "--export", name)
    assert code == 2 and name in err and len(err.splitlines()) == 1 and not (trained / name).exists()


class Noise(torch.nn.Module):
    def forward(self, images):
        return images + 9 * torch.randn_like(images)


def test_a_model_whose_exported_answers_differ_is_not_written(tmp_path):
    model = random_model("squeezenet1_1", 64)
    model.features[1] = Noise()
    with pytest.raises(ValueError, match="differ"):
        export(model, tmp_path / "x.pt2")
    assert not (tmp_path / "x.pt2").exists()
