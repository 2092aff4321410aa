"""OpenVINO computes what the plain model computes, and everything else works without it."""

import shutil
import sys

import pytest
import torch
from conftest import QUICK, SMALL, noise, random_model, repeatable, results

import inference
import main_train
from engine.files import load_tensors, save_tensors
from engine.openvino import Program, convert, openvino_copy
from models import load_checkpoint


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])  # mobilenet_v3_small is below
def test_the_same_outputs(name, tmp_path):
    model, file, openvino = random_model(name, 97), tmp_path / "program", pytest.importorskip("openvino")
    save_tensors(file, convert(openvino, model))
    images = noise(model, 3)
    with torch.inference_mode():
        expected, copy = model.forward_features(images), openvino_copy(model, file)
        assert isinstance(copy.features, Program)
        assert (copy.forward_features(images) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_faster_one_is_kept(tmp_path):
    pytest.importorskip("openvino")
    model, file = random_model("squeezenet1_1", 97), tmp_path / "program"
    first = openvino_copy(model, file)
    written = file.stat().st_mtime_ns
    again = openvino_copy(model, file)
    assert type(first.features) is type(again.features) and file.stat().st_mtime_ns == written
    assert isinstance(first.features, Program) == (load_tensors(file) != {})
    assert torch.allclose(first.forward_view(noise(model)), model.forward_view(noise(model)), rtol=1e-3, atol=1e-4)


def test_a_program_that_is_there_is_used(run, trained, photos):
    openvino = pytest.importorskip("openvino")
    command = ("--data", photos, *SMALL, *QUICK, "--seeds", 2, "--precision", "fp32", "--device", "cpu")
    [known] = (trained / "data" / "features").glob("mobilenet_v3_small*.features")
    program = known.with_name(known.name.replace(".0.features", ".openvino"))
    save_tensors(program, convert(openvino, load_checkpoint(trained / "checkpoints" / "mobilenet_v3_small.pt")))
    plain, written = repeatable(trained)["mobilenet_v3_small"], program.stat().st_mtime_ns
    known.unlink()
    assert run(main_train, *command)[0] == 0
    [features] = (trained / "data" / "features").glob("mobilenet_v3_small*.features")
    assert "openvino" in features.name and program.stat().st_mtime_ns == written  # not converted again
    row = repeatable(trained)["mobilenet_v3_small"]
    assert row["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)
    assert run(inference, photos / "test", "--evaluate")[0] == 0


def test_features_that_are_known_are_used_rather_than_computed_by_openvino(run, trained, photos):
    [known] = (trained / "data" / "features").glob("mobilenet_v3_small*.features")
    known.with_name(known.name.replace(".0.features", ".openvino")).write_bytes(b"oops")
    assert run(main_train, "--data", photos, *SMALL, *QUICK, "--seeds", 2)[0] == 0
    assert {row["model"]: row for row in results(trained)}["mobilenet_v3_small"]["features"]["cached"]


@pytest.mark.parametrize("broken", ["", "raise OSError('libfoo.so: no such file')"])
def test_a_broken_or_old_one_is_named_in_one_line(broken, run, trained, photos, monkeypatch):
    installed = trained / "installed"
    (installed / "openvino-2022.1.dist-info").mkdir(parents=True)
    (installed / "openvino-2022.1.dist-info" / "METADATA").write_text("Name: openvino\nVersion: 2022.1\n")
    (installed / "openvino.py").write_text(broken)
    monkeypatch.syspath_prepend(installed)
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    [known] = (trained / "data" / "features").glob("mobilenet_v3_small*.features")
    shutil.move(known, known.with_name(known.name.replace(".0.features", ".openvino")))  # worth a try
    code, _, err = run(main_train, "--data", photos, *SMALL, *QUICK, "--precision", "fp32", "--device", "cpu")
    assert code == 0 and err.count("OpenVINO is not used") == err.count("\n"), err
