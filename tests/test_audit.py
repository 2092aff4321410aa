"""Near-duplicates, label errors and unfamiliar images."""

import json
import shutil
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import inference
from data import load_data
from engine.audit import audit, summary
from engine.features import Features
from engine.groups import find_near_duplicates
from engine.unfamiliar import fit_unfamiliarity


def test_planted_near_duplicates_and_label_errors_are_found(train, photos, tmp_path):
    red, blue = photos / "train" / "red", photos / "train" / "blue"
    for i in (1, 2, 3):
        shutil.copy(red / f"{i}.png", photos / "test" / "red" / f"copy{i}.png")
    shutil.copy(blue / "5.png", photos / "train" / "green" / "blue5.png")
    (red / "7.png").rename(blue / "red7.png")
    code, out, err = train(photos, "--models", "mobilenet_v2")
    assert (code, err) == (0, "")
    assert "3 test images have near-duplicates (test accuracy of mobilenet_v2 without them: " in out
    report = json.loads((tmp_path / "plots" / "data.json").read_text())
    pairs = {tuple(sorted(Path(image["path"]).name for image in pair["images"])) for pair in report["near_duplicates"]}
    assert pairs == {("1.png", "copy1.png"), ("2.png", "copy2.png"), ("3.png", "copy3.png"), ("5.png", "blue5.png")}
    assert report["test_images_with_near_duplicates"] == 3 and 0 <= report["test_accuracy_without_them"] <= 1
    assert "1 pair of near-duplicates has conflicting labels" in out and report["conflicting_labels"] == 1
    errors = {(Path(each["path"]).name, each["label"], each["suggested"]) for each in report["label_errors"]}
    assert ("red7.png", "blue", "red") in errors and len(errors) < 12
    assert f"{len(errors)} label{'s' * (len(errors) > 1)} may be wrong" in out
    assert (tmp_path / "plots" / "mobilenet_data.png").exists()


def test_near_duplicates_of_very_many_images_are_not_looked_for(photos, tmp_path):
    assert find_near_duplicates(["x"] * 100_001, torch.zeros(0), tmp_path) is None
    data = load_data(str(photos))
    labels = torch.cat([images.labels for images in data.parts.values()])
    report = audit(data.parts, None, 9.0 * F.one_hot(labels), data.classes, [1.0] * 18)
    assert report["near_duplicates"] is None and report["label_errors"] == []
    assert "too many images to look for near-duplicates" in summary(report)


def test_half_a_list_of_near_duplicates_is_made_anew(tmp_path):
    """As a killed run leaves it, and nothing else."""
    images = torch.randint(256, (20, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    command = [*map(str, range(21))], torch.cat([images, images[:1]]), tmp_path / "features"
    found = find_near_duplicates(*command)
    [file] = command[2].iterdir()
    whole = file.read_bytes()
    assert len(found[0]) == 1 and find_near_duplicates(*command) == found
    for length in (0, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert find_near_duplicates(*command) == found and file.read_bytes() == whole


def test_frames_of_films_are_said_to_be_in_training(train, tmp_path):
    for film in range(6):
        scene = Image.fromarray(np.random.default_rng(film).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        scene, folder = scene.resize((60, 60), Image.Resampling.BICUBIC), tmp_path / "films" / f"{film % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(20):
            scene.crop((k // 2, 0, k // 2 + 50, 50)).save(folder / f"{film}_{k}.jpg")
    code, out, _ = train(tmp_path / "films")
    report = json.loads((tmp_path / "plots" / "data.json").read_text())
    assert code == 0 and report["test_images"] == 24 and report["test_images_with_near_duplicates"] >= 22
    assert report["test_images_with_near_neighbours"] >= 22 and "--groups" in out


def test_unfamiliar_and_unsure_images_are_marked(run, answers, trained, photos, tmp_path):
    random = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / "foreign" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)

    def share(folder):
        records = answers(folder, "--threshold", 0.5)
        assert all(record["unsure"] == (record["probability"] < 0.5) for record in records)
        return np.mean([record["unfamiliar"] for record in records])

    assert share(tmp_path / "foreign") > 0.9 and share(photos / "test") < 0.5
    assert ", unfamiliar" in run(inference, tmp_path / "foreign")[1]


@pytest.mark.parametrize("count", [2, 10, 18, 19, 40, 100])
def test_five_percent_of_new_images_are_unfamiliar(count):
    """However few the validation images are."""
    random, shares = torch.Generator().manual_seed(0), []
    for _ in range(12):
        labels = torch.randint(3, (700,), generator=random)
        features = torch.randn(700, 40, generator=random) + 3 * F.one_hot(labels, 40)
        logits, train, val, new = 4 * features[:, :3], features[:400], features[400 : 400 + count], features[500:]
        known = Features.in_memory(train), labels[:400], Features.in_memory(val), logits[400 : 400 + count]
        score = fit_unfamiliarity(*known)
        shares.append((score(new, logits[500:]) > 0).float().mean().item())
    assert (score(10 * torch.randn(50, 40, generator=random), torch.zeros(50, 3)) > 0).all()
    assert 0.005 < mean(shares) < 0.08
