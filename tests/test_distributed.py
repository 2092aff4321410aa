"""Two processes under torchrun."""

import sys

import pytest
import torch
from conftest import QUICK, ROOT, SMALL, checkpoints, finish, repeatable, same, start

import inference
import main_train

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import inference, main_train, train_utils
from engine.console import run_script
from engine.distributed import with_process_group

def main():
    print("TRAINED", main_train.main({train} + ["--output", "two", "--cache", "two"]))
    print("ANSWERED", inference.main({infer} + ["--checkpoint", "two/checkpoints/mobilenet_v3_small.pt"]))
    main_train.main({dropout} + ["--output", "whole"])
    train_utils.train_one_epoch = interrupted
    try:
        main_train.main({dropout} + ["--output", "resumed"])
    except KeyboardInterrupt:
        train_utils.train_one_epoch = train_one_epoch
        return main_train.main({dropout} + ["--output", "resumed"])

def interrupted(*args):
    epochs.append(0)
    if len(epochs) == 5:  # after three epochs of the classifier and one of the whole model
        raise KeyboardInterrupt
    return train_one_epoch(*args)

epochs, train_one_epoch = [], train_utils.train_one_epoch
run_script(with_process_group(main))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each process needs a GPU of its own")
def test_two_processes_give_the_results_of_one(run, known, photos, weights, tmp_path, monkeypatch):
    """The same features, results and answers, in order. Fine-tuning is the same up to rounding; with dropout, which
    each process draws for itself, it repeats and resumes."""
    monkeypatch.setenv("TORCH_HOME", str(weights))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (photos / "train" / "red" / "broken.png").write_bytes(b"oops")
    train = ["--data", str(photos), *SMALL, *map(str, QUICK), "--fine-tune", "1"]
    dropout = ["--data", str(photos), "--models", "mobilenet_v3_large", *map(str, QUICK), "--fine-tune", "2"]
    infer = [str(photos / "train"), "--format", "csv"]
    one, two = tmp_path / "one", tmp_path / "two"
    code, out, err = run(main_train, *train, "--output", one)
    found, answers, _ = run(inference, *infer, "--checkpoint", one / "checkpoints" / "mobilenet_v3_small.pt")
    assert code == found == 1 and out.count("test accuracy") == 2 and err.count("left out: ") == 1

    program = PROGRAM.format(root=str(ROOT), train=train, infer=infer, dropout=dropout)
    (tmp_path / "program.py").write_text(program)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    code, out, err = finish(start(*torchrun, "program.py", cwd=tmp_path))
    assert code == 0, err  # torchrun would take 1 for a crash
    trained, rest = out.split("TRAINED 1\n")
    answered, rest = rest.split("ANSWERED 1\n")
    assert trained.count("test accuracy") == 2 and "resuming after 1 of 2 epochs" in rest
    assert answered.splitlines() == answers.splitlines() and answers.count("\n") == 1 + 61
    features, rows, state = [], [], []
    for folder, cache, ranks in ((one, known / "data", [".0"]), (two, two, [".0", ".1"])):
        files = sorted((cache / "features").glob("mobilenet_v3_small*.features"))
        assert [file.suffixes[-2] for file in files if file.stat().st_size] == ranks
        content = b"".join(file.read_bytes() for file in files)
        size = len(content) // 78
        records = [content[i * size : (i + 1) * size] for i in range(78)]
        features.append({record[:32]: record[40:] for record in records})  # without seconds and checksum
        rows.append(repeatable(folder))
        state.append(checkpoints(folder))
    assert len(features[0]) == 78 and features[0] == features[1]
    tuned = [run.pop("mobilenet_v3_small_finetuned") for run in rows]
    for a, b in zip(*(row["history"] for row in tuned), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    tuned = [weights.pop("mobilenet_v3_small_finetuned.pt") for weights in state]
    assert all(torch.allclose(tuned[0][key], tuned[1][key], atol=1e-3) for key in tuned[0])
    assert rows[0] == rows[1] and same(*state)
    whole, resumed = checkpoints(tmp_path / "whole"), checkpoints(tmp_path / "resumed")
    assert len(whole) == 2 and same(whole, resumed)
