"""Plots and the report page."""

import json
import os
import shutil
import sys
from html import escape

import pytest
from conftest import results
from matplotlib.text import Text
from PIL import Image

import inference
import visualization
from engine.page import write_page


def test_the_report_page_is_complete(train, photos, tmp_path):
    photos = photos.rename(tmp_path / "<b>&pets")
    shutil.copy(photos / "train" / "red" / "1.png", photos / "test" / "red" / "copy.png")
    train(photos, "--models", "mobilenet_v2", "mobilenet_v3_small")
    page = (tmp_path / "plots" / "report.html").read_text()
    for row in results(tmp_path):
        assert f"<td>{row['model']}</td>" in page and f"<td>{row['test_accuracy']:.2%}</td>" in page
    drawn = list((tmp_path / "plots").glob("*.png"))
    assert page.count("src=") == page.count("data:image/png;base64,") == len(drawn)  # nothing from elsewhere
    assert page.count("<figure") == page.count("<figcaption>") == len(drawn)  # each says how it is read
    best = max(results(tmp_path), key=lambda row: row["val_accuracy"])
    assert "<p>79 images of 3 classes: 48 for training, 12 for validation, 19 for testing." in page
    assert f"validation is {best['label']}. It classifies {best['test_accuracy']:.1%} of the test images" in page
    data = page[page.index("<h2>The data</h2>") :]
    assert "1 test image has near-duplicates" in data and "copy.png (test, red)</li>" in data
    report = json.loads((tmp_path / "plots" / "data.json").read_text())
    rows = {row["model"]: row for row in results(tmp_path)}
    for row in rows.values():  # an earlier run may have drawn the same for another model
        (tmp_path / "plots" / f"{row['plot']}_data.png").write_bytes(b"an image")
    write_page(rows, best, report, tmp_path / "plots")
    assert (tmp_path / "plots" / "report.html").read_text().count('_data"') == 1
    assert "http" not in page and "$" not in page and escape(str(photos)) in page and "<b>" not in page


@pytest.mark.skipif(sys.platform != "linux", reason="names that only Linux allows")
def test_class_names_are_not_interpreted(run, train, answers, photos):
    """Class names with mathtext, escape sequences, foreign scripts, and bytes that are no text."""
    names = ["Ba$$in_{x}", "\x1b[31mred", os.fsdecode(b"caf\xe9"), "犬" * 50, "😀"]
    for part in ("train", "test"):
        for old, new in zip(("blue", "green", "red"), names[:3], strict=True):
            (photos / part / old).rename(photos / part / new)
        for name in names[3:]:
            shutil.copytree(photos / part / names[0], photos / part / name)
    code, out, err = train(photos)
    assert (code, err) == (0, "")
    code, out, err = run(inference, photos / "test")
    assert code == 0 and len(out.splitlines()) == 30 and "Ba$$in_{x} " in out
    assert "\x1b" not in out + err
    assert {guess["label"] for record in answers(photos / "test") for guess in record["top"]} <= {*names}
    assert run(inference)[0] == 0


def test_the_plot_of_a_thousand_classes_has_a_limited_size(tmp_path):
    pairs = [[3, 7, 5], *([i, i, 9] for i in range(1000))]
    figure = visualization.plot_confusion("x", pairs, [f"class {i}" for i in range(1000)])
    figure.savefig(tmp_path / "x.png", dpi=visualization.DPI)
    width, height = Image.open(tmp_path / "x.png").size
    assert max(width, height) < 2500
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert {text for text in texts if "taken for" in text} == {"class 3 taken for class 7"}
