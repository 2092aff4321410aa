"""OpenVINO computes what the plain model computes, and everything else works without it."""

import shutil
import sys

import pytest
import torch
from conftest import QUICK, SMALL, noise, random_model, repeatable, results

import inference
import main_train
from engine.fast import fast_copy
from engine.files import save_tensors
from engine.openvino import Program, convert, openvino_copy
from models import load_checkpoint

# without Sequential features, with shuffled channels, with branches, with attention over channels
KINDS = ("resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small")


@pytest.mark.parametrize("name", KINDS)
def test_the_same_outputs(name, tmp_path):
    model = random_model(name, 97)
    images, openvino = noise(model, 3), pytest.importorskip("openvino")
    copy = fast_copy(model, torch.device("cpu"), "fp32")
    copy.features = Program(openvino, convert(openvino, model))
    with torch.inference_mode():
        expected = model.forward_features(images)
        chosen = openvino_copy(model, tmp_path / "program")  # the faster one here
        for each in (copy, chosen):
            assert (each.forward_features(images) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (tmp_path / "program").exists()


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
