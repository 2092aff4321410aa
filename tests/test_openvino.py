"""OpenVINO computes what the plain model computes, and everything else works without it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, ONE_SIZE, noise, random_model, repeatable, results

import inference
from engine import openvino
from engine.device import threads
from engine.files import load_tensors, save_tensors
from engine.openvino import Program, as_bytes, convert, fastest_copy, holds_program, openvino_copy, package_version


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_outputs(name, tmp_path):
    package, file = pytest.importorskip("openvino"), tmp_path / "program"
    model = random_model(name, ONE_SIZE.get(name, 97))
    save_tensors(file, as_bytes(package, convert(package, model)))
    images = noise(model, 3)
    with torch.inference_mode():
        expected, copy = model.forward_features(images), openvino_copy(model, file)
        assert isinstance(copy.features, Program)
        assert (copy.forward_features(images) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("wrong", [2, 99])
def test_what_is_compiled_wrongly_is_not_used(wrong):
    """Compiled for several streams, int8 networks are wrong now and then: findings/openvino_streams.sh"""
    package, compiled = pytest.importorskip("openvino"), []

    class Core(package.Core):
        def compile_model(self, network, device, options):
            compiled.append(options["NUM_STREAMS"])
            program = super().compile_model(network, device, options)
            right = options["NUM_STREAMS"] == 1 or len(compiled) > 1 + wrong
            return program if right else lambda image: [2 * program(image)[0]]

    model = random_model("squeezenet1_1", 64)
    images, program = noise(model), as_bytes(package, convert(package, model))
    with threads(3), torch.inference_mode():
        outputs = Program(SimpleNamespace(Core=Core), program)(images)
        assert torch.allclose(outputs, model.forward_view(images), rtol=1e-3, atol=1e-4)
    assert compiled == [1] + [3] * min(5, wrong + 1)


def test_the_faster_one_is_kept(tmp_path):
    pytest.importorskip("openvino")
    model, file = random_model("squeezenet1_1", 97), tmp_path / "program"
    first = openvino_copy(model, file)
    written = file.stat().st_mtime_ns
    again = openvino_copy(model, file)
    assert type(first.features) is type(again.features) and file.stat().st_mtime_ns == written
    assert isinstance(first.features, Program) == (load_tensors(file) != {})
    for copy in (first, fastest_copy(model, torch.device("cpu"), images=10_000)):
        assert torch.allclose(copy.forward_view(noise(model)), model.forward_view(noise(model)), rtol=1e-3, atol=1e-4)


def features_of(folder):
    """The files of features, plain ones and those of OpenVINO, and the programs."""
    files = sorted((folder / "data" / "features").glob("mobilenet_v3_small*"))
    kinds = [[file for file in files if file.suffix == end] for end in (".features", ".program")]
    return *([file for file in kinds[0] if ("openvino" in file.name) == yes] for yes in (False, True)), kinds[1]


def test_what_is_kept_is_used(run, train, trained, photos, monkeypatch):
    pytest.importorskip("openvino")
    plain = repeatable(trained)["mobilenet_v3_small"]
    [known], *_ = features_of(trained)
    content, command = known.read_bytes(), (photos, "--seeds", 2, "--device", "cpu")
    monkeypatch.setattr(openvino, "WORTH_CONVERTING", 30)
    assert train(*command)[0] == 0
    assert features_of(trained) == ([known], [], [])  # all are known
    known.write_bytes(content[: len(content) // 2])
    assert train(*command)[0] == 0
    assert features_of(trained) == ([known], [], [])  # many are known
    known.write_bytes(content[: len(content) // 20])  # few, as after a quick look with --limit
    assert train(*command)[0] == 0
    _, [converted], [program] = features_of(trained)
    written = program.stat().st_mtime_ns
    converted.write_bytes(converted.read_bytes()[: converted.stat().st_size // 2])
    monkeypatch.setattr(openvino, "WORTH_CONVERTING", 2048)
    assert train(*command)[0] == 0
    _, [_], [program] = features_of(trained)
    assert program.stat().st_mtime_ns == written  # not converted again
    row = repeatable(trained)["mobilenet_v3_small"]
    versions = {each["model"]: each["features"].get("openvino") for each in results(trained)}
    assert versions["mobilenet_v3_small"] == (package_version("openvino") if holds_program(program) else None)
    assert row["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)
    assert run(inference, photos / "test", "--evaluate")[0] == 0


@pytest.mark.parametrize("broken", ["", "raise OSError('libfoo.so: no such file')"])
def test_a_broken_or_old_one_is_named_in_one_line(broken, train, trained, photos, monkeypatch):
    installed = trained / "installed"
    (installed / "openvino-2022.1.dist-info").mkdir(parents=True)
    (installed / "openvino-2022.1.dist-info" / "METADATA").write_text("Name: openvino\nVersion: 2022.1\n")
    (installed / "openvino.py").write_text(broken)
    monkeypatch.syspath_prepend(installed)
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    features_of(trained)[0][0].unlink()
    monkeypatch.setattr(openvino, "WORTH_CONVERTING", 30)
    code, _, err = train(photos, "--precision", "fp32", "--device", "cpu")
    assert code == 0 and err.count("OpenVINO is not used") == err.count("\n") == 1, err
