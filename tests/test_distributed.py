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
    command = ["--data", str(photos), "--models", "mobilenet_v3_large", *map(str, QUICK), "--fine-tune", "2"]
    (tmp_path / "program.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import main_train, replace_everywhere, run_script
from engine.distributed import spmd

def main():
    main_train.main([*{command}, "--output", "whole"])
    global train_one_epoch
    train_one_epoch = replace_everywhere("train_one_epoch", interrupted)
    try:
        main_train.main([*{command}, "--output", "resumed"])
    except KeyboardInterrupt:
        replace_everywhere("train_one_epoch", train_one_epoch)
        return main_train.main([*{command}, "--output", "resumed"])

def interrupted(*args):
    epochs.append(0)
    if len(epochs) == 5:  # after three epochs of the classifier and one of the whole model
        raise KeyboardInterrupt
    return train_one_epoch(*args)

epochs = []
replace_everywhere("measure_cost", lambda *args: {{}})
run_script(spmd(main))
""")
    code, out, err = finish(start(*TORCHRUN, "program.py", cwd=tmp_path))
    assert code == 0 and "resuming after 1 of 2 epochs" in out, err
    whole, resumed = checkpoints(tmp_path / "whole"), checkpoints(tmp_path / "resumed")
    assert len(whole) == 2 and same(whole, resumed)
