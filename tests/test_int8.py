"""Models in int8: OpenVINO's program is trained on, saved, and answers. Without the packages, one line says so."""

import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, SMALL_FAMILIES, checkpoints, noise, random_model, repeatable, same

import inference
from engine import openvino
from engine.images import preprocess
from engine.layers import Standardize
from engine.openvino import fastest_copy, quantize
from models import TransferModel, load_checkpoint, save_checkpoint, set_statistics

INT8 = ("--precision", "int8", "--device", "cpu")


@pytest.fixture
def packages():
    for name in ("openvino", "nncf"):
        pytest.importorskip(name)


@pytest.fixture
def quantized(train_once, tmp_path, packages):
    """A folder with a model in int8, and the arguments of its training."""
    done = train_once("int8", *SMALL, *INT8)
    assert ((done / "code").read_text(), (done / "err").read_text()) == ("0", "")
    shutil.copytree(done / "data", tmp_path / "data")
    shutil.copytree(done / "my runs [v2]", tmp_path, dirs_exist_ok=True)
    return tmp_path, (done / "photos", *INT8)


def test_a_second_run_has_the_same_program(quantized, train):
    folder, command = quantized
    [program] = (folder / "data" / "features").glob("*.int8")
    before, row, content = checkpoints(folder), repeatable(folder), program.read_bytes()
    for file in (folder / "data" / "features").glob("*.features"):
        file.unlink()
    assert train(*command)[0] == 0
    assert same(checkpoints(folder), before) and repeatable(folder) == row and program.read_bytes() == content


def test_the_checkpoint_answers_as_in_training(quantized, run, photos):
    folder, _ = quantized
    [file], [row] = (folder / "checkpoints").glob("*.pt"), repeatable(folder).values()
    code, out, _ = run(inference, photos / "test", "--evaluate")
    assert code == 0 and f"{row['test_accuracy']:.2%}" in out
    assert load_checkpoint(file).program and row["precision"]["features"] == "int8"
    image = next((photos / "test").rglob("*.png"))
    assert run(inference, image, "--precision", "fp32")[0] == 0
    assert run(inference, "--export", "model.pt2", "--checkpoint", file)[0] == 2


def test_it_can_be_fine_tuned(quantized, train):
    folder, command = quantized
    assert train(*command, "--fine-tune", 1)[0] == 0
    assert repeatable(folder)["mobilenet_v3_small_finetuned"]["precision"]["features"] in ("fp32", "int8")


def sample_of(name: str, image_size: int = 64) -> tuple[TransferModel, list[torch.Tensor], list[str]]:
    """A model for int8, 40 images, and their hashes."""
    model = random_model(name, image_size)
    images = [(255 * image).to(torch.uint8) for image in noise(model, 40).sigmoid()]
    set_statistics(model, images)
    model.precision, model.views = "int8", 1
    return model, images, [f"{i:04}" for i in range(40)]


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_features_stay_alike(name, packages, tmp_path):
    """Or the network is refused, as random ones may be. Labels: each image is most similar to itself in fp32."""
    model, images, ids = sample_of(name, 97)
    try:
        model.program, _ = quantize(model, images[:24], ids[:24], tmp_path)
    except ValueError as error:
        assert "become others" in str(error) and name not in ("mobilenet_v2", "mobilenet_v3_small", "resnet18")
        return
    batch = preprocess(images[24:], model.preprocessing)
    with torch.inference_mode():
        copies = [fastest_copy(model, torch.device("cpu"), precision=kind) for kind in ("fp32", "int8")]
        plain, other = (copy.forward_features(batch) for copy in copies)
    standardize = Standardize(model.width)
    standardize.fit(plain)
    plain, other = (F.normalize(standardize(rows)) for rows in (plain, other))
    assert (plain * other).sum(dim=1).mean() > 0.7
    assert (other @ plain.T).argmax(dim=1).tolist() == list(range(len(batch)))


def test_a_program_is_used_again_or_refused(packages, tmp_path, monkeypatch):
    model, images, ids = sample_of("squeezenet1_1")
    quantize(model, images[:8], ids[:8], tmp_path)  # a quick look, whose sample is too small for what follows
    _, seconds = quantize(model, images[:24], ids[:24], tmp_path)
    _, kept = sorted(tmp_path.glob("*.int8"), key=lambda file: file.stat().st_mtime_ns)
    assert quantize(model, images[:32], ids[:32], tmp_path)[1] == seconds  # most of the sample is the same
    monkeypatch.setattr(openvino, "LEAST_SIMILAR", 2)
    with pytest.raises(ValueError, match="squeezenet1_1 cannot run in int8"):
        quantize(model, images[20:], ids[20:], tmp_path)  # most of the sample are other images
    kept.write_bytes(b"oops")
    with pytest.raises(ValueError, match="squeezenet1_1 cannot run in int8"):
        quantize(model, images, ids, tmp_path)


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_training_needs_both_packages(missing, train, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = train(photos, *INT8)
    assert code == 2 and err.count("\n") == 1 and "pip install" in err
    assert not (tmp_path / "checkpoints").exists()


def test_answers_need_openvino(run, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    model = random_model("mobilenet_v3_small", 64)
    model.precision, model.program = "int8", {"graph": torch.ones(3, dtype=torch.uint8)}
    save_checkpoint(tmp_path / "checkpoints" / "a.pt", model, {})
    image = next((photos / "test").rglob("*.png"))
    code, out, err = run(inference, image)
    assert (code, out, err.count("\n")) == (2, "", 2) and "pip install" in err
    assert run(inference, image, "--precision", "fp32")[0] == 0
    save_checkpoint(tmp_path / "checkpoints" / "b.pt", random_model("mobilenet_v3_small", 64), {})
    code, out, err = run(inference, image, "--format", "csv")  # the other model answers
    assert code == 1 and out.count("\n") == 2 and err.count("\n") == 1 and "skipped" in err
    model.unfreeze()
    assert model.precision == "fp32" and not model.program


def test_a_model_in_fp32_has_no_program(run, photos, tmp_path):
    save_checkpoint(tmp_path / "checkpoints" / "a.pt", random_model("mobilenet_v3_small", 64), {})
    code, _, err = run(inference, next((photos / "test").rglob("*.png")), "--precision", "int8")
    assert code == 2 and err.count("\n") == 2 and "--precision int8" in err
