"""TransferModel.predict in other people's programs: what it accepts, threads, modes, precision, foreign modules."""

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, draw, finish, random_model, start
from PIL import Image

import inference
from models import load_checkpoint, save_checkpoint

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def test_what_is_an_image_and_what_is_not():
    model, file = random_model("mobilenet_v3_small", 64), io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    forms = [PIXELS, Image.fromarray(PIXELS), file.getvalue(), torch.from_numpy(PIXELS).permute(2, 0, 1)]
    forms += [np.dstack([PIXELS, np.full_like(PIXELS[..., 0], 255)]), PIXELS[..., ::-1].copy()[..., ::-1]]  # RGBA, BGR
    grey = [PIXELS[..., 0], PIXELS[..., :1]]
    bad = [
        np.zeros((0, 50, 3), np.uint8),
        np.zeros((9, 9, 2), np.uint8),
        PIXELS / 255,
        torch.rand(3, 8, 8),
        b"oops",
        7,
        None,
        np.uint8(3),
        "none.png",
    ]
    for several in ([*forms, *grey, *bad], (*forms, *grey, *bad), iter([*forms, *grey, *bad])):
        records = model.predict(several)
        answers = [record.get("probability") for record in records]
        assert answers[:6] == pytest.approx([answers[0]] * 6) and answers[6] == pytest.approx(answers[7])
        assert all("error" in record for record in records[8:]) and len(records) == 8 + len(bad)
    for record in records[8:12]:
        assert "a uint8 array (H, W)" in record["error"] and "not " in record["error"]
    assert [one["label"] for one in model.predict(PIXELS[None])] == [model.predict(PIXELS)["label"]]


def test_what_other_programs_pass(tmp_path):
    model = random_model("mobilenet_v3_small", 64)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.fromarray(np.roll(PIXELS, i)).save(file)
    names = [str(file) for file in files]
    expected = [pytest.approx(record["probability"]) for record in model.predict(files)]
    assert model.predict(files[0])["path"] == names[0]
    content = files[0].read_bytes()
    with open(files[0], "rb") as opened, open(files[0], errors="replace") as text:
        forms = content, bytearray(content), memoryview(content), io.BytesIO(content)
        for one in (names[0], np.array(names)[0], *forms):
            assert model.predict(one)["probability"] == expected[0], type(one)
        assert all(model.predict(opened)["probability"] == expected[0] for _ in range(2))  # read again
        assert all(record["probability"] == expected[0] for record in model.predict([opened] * 70))
        assert "'rb'" in model.predict(text)["error"]
    column = np.array(names, dtype=object)
    for several in (np.array(names), column, column[:, None], (name for name in names), dict.fromkeys(names).keys()):
        records = model.predict(several)
        assert [record["probability"] for record in records] == expected
        assert [record["path"] for record in records] == names
    DataFrame = type("DataFrame", (dict,), {})
    for nothing in (None, 3, 2.5, {"image": names[0]}, DataFrame(), object()):
        with pytest.raises(TypeError, match=f"not images: {type(nothing).__name__}; an image is a path"):
            model.predict(nothing)
    assert "ndarray (3, 40, 40) of uint8" in model.predict(PIXELS.transpose(2, 0, 1))["error"]
    assert "not an image: NoneType" in model.predict([None])[0]["error"] and model.predict([]) == []
    with pytest.raises(ValueError, match="top_k"):
        model.predict(PIXELS, top_k=0)
    for convert in (model.half, model.bfloat16, model.double):
        with pytest.raises(TypeError, match=r"float32: use model\.float\(\)"):
            convert().predict(PIXELS)
        model.float()


def test_one_lazily_opened_image_in_many_batches(tmp_path):
    Image.fromarray(np.tile(PIXELS, (20, 20, 1))).save(tmp_path / "x.jpg")
    model = random_model("mobilenet_v3_small", 64)
    expected = model.predict(tmp_path / "x.jpg")["probability"]
    with Image.open(tmp_path / "x.jpg") as image:
        found = [record.get("probability") for record in model.predict([image] * 200)]
    assert found == pytest.approx([expected] * 200, abs=0.02)  # a file is decoded at a smaller size


def test_overlapping_calls_leave_the_number_of_threads_as_it_was():
    model, before = random_model("mobilenet_v3_small", 64), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: model.predict([PIXELS] * 40), range(8)))
            assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_predict_does_not_depend_on_the_mode_and_follows_changes():
    model = random_model("mobilenet_v3_large", 64)
    expected = model.predict(PIXELS)["probability"]
    assert model.train().predict(PIXELS)["probability"] == expected
    model.temperature = 4.0
    assert model.predict(PIXELS)["probability"] < expected
    with torch.no_grad():
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.copy_(torch.tensor([0.0, 0.0, 99.0]))
    assert model.predict(PIXELS)["label"] == "car"


def test_predict_follows_changes_of_the_preprocessing(tmp_path):
    """Of a model whose tensors have no version counter, too."""
    save_checkpoint(tmp_path / "x.pt", random_model("mobilenet_v3_small", 64), {})
    with torch.inference_mode():
        model = load_checkpoint(tmp_path / "x.pt")
    wide = np.concatenate([PIXELS, 255 - PIXELS], axis=1)
    cropped = model.predict(wide)["probability"]
    model.preprocessing["crop"] = False
    assert model.predict(wide)["probability"] != cropped


def test_predict_inference_and_export_agree(run, photos, tmp_path):
    """In bf16, where a second path would show."""
    model = random_model("mobilenet_v3_small", 32)
    model.precision, model.temperature = "bf16", 2.0
    save_checkpoint(tmp_path / "checkpoints" / "x.pt", model, {})
    draw(photos / "test" / "large.png", (40, 90, 200), seed=0, size=(400, 300))
    (photos / "test" / "none.png").write_bytes(b"x")
    code, out, _ = run(inference, photos / "test", "--format", "json")
    *records, unread = sorted(map(json.loads, out.splitlines()), key=lambda record: "error" in record)
    paths = [record["path"] for record in records]
    *predicted, error = model.predict([*paths, unread["path"]])
    assert code == 1 and error == unread and len(records) == 19
    for one, record in zip(predicted, records, strict=True):
        assert one.keys() == record.keys() and one["label"] == record["label"] == one["top"][0]["label"]
        assert one["probability"] == pytest.approx(record["probability"], abs=1e-4)
    assert model.features[0][0].weight.dtype == torch.float32
    images = [Image.open(path).resize((32, 32)) for path in paths]
    assert run(inference, "--export", "x.pt2")[0] == 0
    batch = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    exported = torch.export.load("x.pt2").module()(batch).max(dim=1).values.tolist()
    assert exported == pytest.approx([record["probability"] for record in model.predict(images)], abs=0.02)
    code, _, err = run(inference, "--export", "x.onnx")
    assert code == 2 and "ONNX keeps fp32 only" in err


def test_a_program_with_modules_of_the_same_names(tmp_path):
    """As the README shows it: the project's folder comes first on the path."""
    save_checkpoint(tmp_path / "x.pt", random_model("mobilenet_v3_small", 64), {})
    Image.fromarray(PIXELS).save(tmp_path / "cat.png")
    (tmp_path / "data.py").write_text("raise RuntimeError('the program\\'s own')")
    [line] = re.findall(r"`(sys\.path\.insert\(.*?\))`", (ROOT / "README.md").read_text(encoding="utf-8"))
    line = line.replace("path/to/this/project", str(ROOT))
    (tmp_path / "program.py").write_text(
        f"import sys\n{line}\nfrom models import load_checkpoint\nprint(load_checkpoint('x.pt').predict('cat.png'))\n"
    )
    code, out, err = finish(start("program.py", cwd=tmp_path))
    assert code == 0 and "'label'" in out, err
