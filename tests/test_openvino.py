"""OpenVINO computes what the plain model computes, and everything else works without it."""

import sys

import pytest
import torch
from conftest import QUICK, SMALL, SMALL_FAMILIES, noise, random_model, repeatable, results

import inference
import main_train
from engine.openvino import Program, openvino_copy


@pytest.fixture
def many(replace):
    """A few images count as many, and OpenVINO as faster than the fast copy."""
    pytest.importorskip("openvino")
    replace("MANY", 10)
    replace("_is_better", lambda fast, plain: True)


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_the_same_outputs(name, many, tmp_path):
    model = random_model(name, 97)
    images = noise(model, 3)
    with torch.inference_mode():
        expected = model.forward_features(images)
        copy = openvino_copy(model, tmp_path / "program")
        assert isinstance(copy.features, Program)
        assert (copy.forward_features(images) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_training_uses_it_and_keeps_the_program(run, photos, tmp_path, many, replace):
    command = ("--data", photos, *SMALL, *QUICK, "--precision", "fp32", "--device", "cpu")
    features = tmp_path / "data" / "features"
    replace("MANY", 10**6)
    assert run(main_train, *command)[0] == 0
    plain, before = repeatable(tmp_path)["mobilenet_v3_small"], {*features.iterdir()}
    replace("MANY", 10)
    assert run(main_train, *command)[0] == 0  # what is there is used
    assert {*features.iterdir()} == before and results(tmp_path)[0]["features"]["computed"] == 0
    for file in before:
        file.unlink()
    assert run(main_train, *command)[0] == 0
    [program] = features.glob("*.openvino")
    assert all("openvino" in file.name for file in features.glob("*.features"))
    row = repeatable(tmp_path)["mobilenet_v3_small"]
    assert row["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)

    def convert(*args):
        raise AssertionError("it is converted again")

    replace("convert", convert)
    for file in features.glob("*.features"):
        file.unlink()
    assert run(main_train, *command)[0] == 0
    assert repeatable(tmp_path)["mobilenet_v3_small"] == row and program.stat().st_size > 10**6
    assert run(inference, photos / "test", "--evaluate")[0] == 0


@pytest.mark.parametrize("broken", ["", "raise OSError('libfoo.so: no such file')"])
def test_a_broken_or_old_one_is_named_in_one_line(broken, run, photos, tmp_path, monkeypatch, replace):
    (tmp_path / "openvino.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    replace("version", lambda name: "2022.1")
    replace("MANY", 40)
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK, "--precision", "fp32", "--device", "cpu")
    assert code == 0 and err.count("\n") == 1 and "OpenVINO is not used" in err, err
