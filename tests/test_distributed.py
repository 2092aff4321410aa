"""Two processes under torchrun."""

import sys

import pytest
import torch
from conftest import QUICK, ROOT, SMALL, TORCHRUN, checkpoints, finish, repeatable, same, start

import inference
import main_train


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
def test_two_processes_give_the_results_of_one(run, photos, tmp_path, monkeypatch):
    """Under torchrun: the same features, results and answers, in order. Fine-tuning is the same up to rounding."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (photos / "train" / "red" / "broken.png").write_bytes(b"oops")
    features, rows, state, answers = [], [], [], []
    for folder in (tmp_path / "one", tmp_path / "two"):
        checkpoint = folder / "checkpoints" / "mobilenet_v3_small.pt"
        tasks = {
            main_train: ["--data", photos, *SMALL, *QUICK, "--fine-tune", 1, "--output", folder, "--cache", folder],
            inference: [photos / "train", "--format", "csv", "--checkpoint", checkpoint],
        }
        if folder.name == "one":
            done = [run(script, *args) for script, args in tasks.items()]
        else:
            done = [finish(start(*TORCHRUN, script.__file__, *args, cwd=tmp_path)) for script, args in tasks.items()]
        (code, out, err), (found, answer, _) = done
        assert code == found == (1 if folder.name == "one" else 0)  # torchrun would take 1 for a crash
        assert out.count("test accuracy") == 2 and err.count("left out: ") == 1 and answer.count("\n") == 1 + 61
        answers.append(answer.splitlines())
        files = sorted((folder / "features").glob("*.features"))
        assert [file.suffixes[-2] for file in files] == ([".0"] if folder.name == "one" else [".0", ".1"])
        content = b"".join(file.read_bytes() for file in files)
        size = len(content) // 78
        records = [content[i * size : (i + 1) * size] for i in range(78)]
        features.append({record[:32]: record[40:] for record in records})  # without seconds and checksum
        rows.append(repeatable(folder))
        state.append(checkpoints(folder))
    assert len(features[0]) == 78 and features[0] == features[1]
    one, two = (
        [run.pop(f"mobilenet_v3_small_finetuned{end}") for run in runs] for runs, end in ((rows, ""), (state, ".pt"))
    )
    for a, b in zip(one[0]["history"], one[1]["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert all(torch.allclose(two[0][key], two[1][key], atol=1e-3) for key in two[0])
    assert rows[0] == rows[1] and same(*state) and answers[0] == answers[1]


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
def test_fine_tuning_with_dropout_repeats_and_resumes(photos, weights, tmp_path, monkeypatch):
    """With two processes, each of which draws its own dropout."""
    monkeypatch.setenv("TORCH_HOME", str(weights))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--data", photos, "--models", "mobilenet_v3_large", *QUICK, "--fine-tune", 2, "--output", "."]
    (tmp_path / "interrupted.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport main_train\n"
        "from engine.console import run_script\nfrom engine.distributed import spmd\n"
        "save = main_train.save_tensors\n"
        "main_train.save_tensors = lambda *args: (save(*args), os._exit(9))\n"  # after the first epoch
        "run_script(spmd(main_train.main))\n"
    )
    states = []
    for number, scripts in enumerate(([ROOT / "main_train.py"], [tmp_path / "interrupted.py", ROOT / "main_train.py"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for script in scripts:
            process = start(*TORCHRUN, script, *arguments, cwd=folder)
            out, _ = process.communicate(timeout=300)
            assert (process.returncode == 0) == (script.name == "main_train.py")
        states.append(checkpoints(folder))
    assert "resuming after 1 of 2 epochs" in out and len(states[0]) == 2 and same(*states)
