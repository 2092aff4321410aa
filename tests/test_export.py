"""Exported models answer as their checkpoints."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import QUICK, SMALL

import inference
import main_train
from models import load_checkpoint


def test_an_exported_model_agrees_with_its_checkpoint(run, photos, tmp_path, replace):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    code, out, err = run(inference, "--export", "exported.PT2")
    assert (code, err) == (0, "") and "(B, 3, 32, 32)" in out
    extra = {"classes": "", "preprocessing": ""}
    exported = torch.export.load(tmp_path / "exported.PT2", extra_files=extra).module()
    preprocessing = json.loads(extra["preprocessing"])
    assert (preprocessing["image_size"], preprocessing["crop"], preprocessing["interpolation"]) == (
        32,
        True,
        "bilinear",
    )
    assert preprocessing["advice"] in out
    model = load_checkpoint(tmp_path / "checkpoints" / "mobilenet_v3_small.pt")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    classes = json.loads(extra["classes"])
    for count in (1, 5):
        found = exported(torch.from_numpy(images[:count]).permute(0, 3, 1, 2))
        for row, record in zip(found, model.predict(list(images[:count])), strict=True):
            expected = {guess["label"]: guess["probability"] for guess in record["top"]}
            assert dict(zip(classes, row.tolist(), strict=True)) == pytest.approx(expected, abs=1e-4)
    for name in ("model.txt", "model.onnx"):
        if name.endswith("onnx") and importlib.util.find_spec("onnxscript"):
            continue
        code, _, err = run(inference, "--export", name)
        assert code == 2 and name in err and len(err.splitlines()) == 1 and not (tmp_path / name).exists()
    replace("_torch_export", lambda *args: (b"", lambda images: torch.zeros(len(images), 3)))
    code, _, err = run(inference, "--export", "other.pt2")
    assert code == 2 and "differ" in err and not (tmp_path / "other.pt2").exists()
