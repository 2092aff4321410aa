"""Features are computed once, kept in files, and never stale."""

import builtins
import errno
import re
import shutil
import time

import pytest
import torch
from conftest import QUICK, ROOT, SMALL, checkpoints, draw, finish, repeatable, results, same, start

import main_train
from engine.features import Features


def test_a_second_run_uses_the_features_and_is_identical(run, photos, tmp_path):
    run(main_train, "--data", photos, *SMALL, *QUICK)
    first, state = repeatable(tmp_path), checkpoints(tmp_path)
    code, out, _ = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert code == 0 and "(cached)" in out and "checkpoints/mobilenet_v3_small.pt, trained on" in out
    assert repeatable(tmp_path) == first and same(checkpoints(tmp_path), state)
    shutil.rmtree(tmp_path / "data")
    code, out, _ = run(main_train, "--data", photos, *SMALL, *QUICK)
    assert "(cached)" not in out
    assert repeatable(tmp_path) == first and same(checkpoints(tmp_path), state)


def test_stale_features_are_not_used_and_damaged_ones_computed_again(run, photos, tmp_path):
    command = ("--data", photos, *SMALL, *QUICK)
    run(main_train, *command)
    first = repeatable(tmp_path)
    for change in (("--image-size", 48), ("--precision", "bf16"), ("--models", "mobilenet_v2")):
        assert "(cached)" not in run(main_train, *command, "--output", "other" + change[0], *change)[1]
    draw(photos / "train" / "red" / "0.png", (0, 0, 255), seed=9)
    assert "(cached)" not in run(main_train, *command)[1]
    changed = repeatable(tmp_path)["mobilenet_v3_small"]
    assert changed["val_loss"] != first["mobilenet_v3_small"]["val_loss"]
    damaged = list((tmp_path / "data" / "features").glob("mobilenet_v3_small*.features"))
    for file in damaged:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    code, out, err = run(main_train, *command)
    assert code == 0 and "(cached)" not in out and err.count("1 images' records are damaged") == 1
    assert repeatable(tmp_path)["mobilenet_v3_small"] == changed


def test_an_interrupted_extraction_resumes(run, photos, tmp_path, replace):
    replace("CPU_BATCH", 8)
    (photos / "train" / "red" / "3.png").write_bytes(b"oops")
    command = ("--data", photos, *SMALL, *QUICK)
    run(main_train, *command)
    expected, state = repeatable(tmp_path), checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "data")

    def interrupted(*args, **kwargs):
        for i, batch in enumerate(whole(*args, **kwargs)):
            if i == 1:
                raise KeyboardInterrupt
            yield batch

    whole = replace("run_images", interrupted)
    assert run(main_train, *command)[0] == 130
    replace("run_images", whole)
    [file] = (tmp_path / "data" / "features").glob("*.features")
    file.write_bytes(file.read_bytes()[:-5])  # killed while it wrote
    code, out, _ = run(main_train, *command)
    assert code == 1 and re.search(r": \d+ of 4[78] images are known", out)
    assert repeatable(tmp_path) == expected and same(checkpoints(tmp_path), state)


def test_only_new_images_are_computed(run, photos, tmp_path, replace, monkeypatch):
    """An image that could not be read before is new. Another split or a part of the images computes nothing."""
    computed = []

    def counted(models, items, *args, **kwargs):
        for batch in whole(models, items, *args, **kwargs):
            computed.append(len(batch[0]) - len(batch[2]))
            yield batch

    command, file = ("--data", photos, *SMALL, *QUICK, "--precision", "fp32"), photos / "train" / "red" / "0.png"
    whole = replace("run_images", counted)
    whole_open = builtins.open

    def broken_open(path, *args, **kwargs):
        if path == file:
            raise OSError(errno.EIO, "Input/output error")
        return whole_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", broken_open)

    code, _, err = run(main_train, *command)
    assert code == 1 and "Input/output error" in err and sum(computed) == 77
    monkeypatch.setattr(builtins, "open", whole_open)
    assert run(main_train, *command)[0] == 0 and sum(computed) == 78
    draw(photos / "train" / "red" / "new.png", (200, 40, 40), seed=99)
    assert run(main_train, *command)[0] == 0 and sum(computed) == 79
    assert run(main_train, *command, "--limit", 30, "--output", "part")[0] == 0 and sum(computed) == 79


def test_a_complete_cache_is_only_read_and_belongs_to_a_decoder(run, photos, tmp_path, monkeypatch):
    command, cache, seen = ("--data", photos, *SMALL, *QUICK), tmp_path / "data", []
    for _ in range(2):
        assert run(main_train, *command)[0] == 0
        seen.append({path: path.stat().st_mtime_ns for path in cache.rglob("*")})
    assert seen[0] == seen[1] and results(tmp_path)[0]["features"]["cached"]
    monkeypatch.setattr("PIL.__version__", "0.1")
    assert run(main_train, *command)[0] == 0 and not results(tmp_path)[0]["features"]["cached"]


def test_features_of_many_images_are_float16(run, photos, tmp_path, replace):
    sizes, losses = [], []
    for large in (100, 10):
        replace("HALF_PRECISION_ABOVE", large)
        command = ("--data", photos, *SMALL, *QUICK, "--output", str(large), "--cache", str(large))
        assert run(main_train, *command)[0] == 0
        sizes.append(sum(file.stat().st_size for file in tmp_path.glob(f"{large}/features/*.features")))
        losses.append(repeatable(tmp_path / str(large))["mobilenet_v3_small"]["test_loss"])
    assert sizes[1] < 0.52 * sizes[0] and losses[1] == pytest.approx(losses[0], rel=0.05)


def test_two_runs_share_a_cache(photos, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    folders = [tmp_path / "a", tmp_path / "b"]
    command = (ROOT / "main_train.py", "--data", photos, *SMALL, *QUICK, "--output")
    runs = [start(*command, folder, cwd=tmp_path) for folder in folders]
    for code, _, err in map(finish, runs):
        assert code == 0 and {*err.splitlines()} <= {"waiting for another run that uses data/features"}  # for each part
    assert repeatable(folders[0]) == repeatable(folders[1])
    assert same(checkpoints(folders[0]), checkpoints(folders[1]))
    assert len(list((tmp_path / "data" / "features").glob("*.features"))) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_the_time_of_a_resumed_extraction_is_the_sum_of_its_parts(run, photos, tmp_path, replace):
    replace("CPU_BATCH", 8)

    def slow(*args, **kwargs):
        for i, batch in enumerate(whole(*args, **kwargs)):
            if i == 5:
                raise KeyboardInterrupt
            time.sleep(0.3)
            yield batch

    whole = replace("run_images", slow)
    assert run(main_train, "--data", photos, *SMALL, *QUICK)[0] == 130
    replace("run_images", whole)
    run(main_train, "--data", photos, *SMALL, *QUICK)
    assert 1.5 < results(tmp_path)[0]["seconds"]["features"] < 30


def test_features_of_several_files_are_read_by_place():
    table = torch.randn(10, 3)
    whole = Features.in_memory(table)
    places = torch.tensor([[i % 2, i // 2] for i in range(10)])
    split = Features([table[::2], table[1::2]], places)
    chosen = torch.tensor([7, 0, 3, 3])
    assert len(split) == len(whole) == 10 and split.width == whole.width == 3
    assert split[chosen].equal(table[chosen]) and whole[chosen].equal(table[chosen])
    assert torch.cat([*split.blocks()]).equal(table)
