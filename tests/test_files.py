"""Locks, and what is left after a write that fails."""

import errno
import importlib
import json
import shutil
import subprocess
import sys

import pytest
from conftest import QUICK, ROOT, limited_files, results, without_progress

from engine.files import locked


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_a_held_lock_differs_from_missing_support(tmp_path, monkeypatch, capsys):
    with locked(tmp_path / "lock", wait=False), pytest.raises(OSError, match="another run"):
        with locked(tmp_path / "lock", wait=False):
            pass

    def missing(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(importlib.import_module("fcntl"), "flock", missing)
    for wait in (True, False):
        with locked(tmp_path / "lock", wait=wait):
            assert "No locks available" in capsys.readouterr().err


def test_two_runs_cannot_share_an_output_folder(train, photos, tmp_path):
    with locked(tmp_path / "checkpoints" / ".lock", wait=False):
        code, _, err = train(photos)
    assert code == 2 and "another run" in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_failed_write_keeps_the_old_file(train, trained):
    [row] = [row for row in results(trained) if row["model"] == "mobilenet_v3_small"]
    checkpoint = trained / "checkpoints" / "mobilenet_v3_small.pt"
    before = checkpoint.read_bytes()
    with limited_files(10**6):
        code, _, err = train(row["data"], "--seed", 1)
    assert code == 2 and str(checkpoint.relative_to(trained)) in err and "MB are free" in err
    assert checkpoint.read_bytes() == before and not list(trained.rglob("*.part"))


NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "--net", "sh", "-ec"]


def own_mounts_work() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*NAMESPACE, "mount -t tmpfs x /mnt"]).returncode == 0


@pytest.mark.skipif(not own_mounts_work(), reason="needs a system that lets users mount")
def test_a_full_disk_and_a_read_only_folder(photos, weights, tmp_path, monkeypatch):
    """On real file systems, without a network, from a warm cache of weights."""

    def namespace(script, *args):
        command = [sys.executable, ROOT / "main_train.py", "--data", photos, *QUICK, "--models", *args]
        done = subprocess.run(
            [*NAMESPACE, script, "sh", *map(str, command)], cwd=tmp_path, text=True, capture_output=True
        )
        return done.returncode, without_progress(done.stderr)

    monkeypatch.setenv("TORCH_HOME", str(weights))
    (tmp_path / "out").mkdir()
    # the first checkpoint finds room, the second doesn't
    two = ("mobilenet_v3_small", "mobilenet_v2", "--output", "out")
    script = """
        mount -t tmpfs -o size=12m x out
        "$@" || code=$?
        test $(ls -A out/checkpoints | wc -l) = 3  # the lock, the split and one checkpoint
        cat out/plots/results.json >seen
        exit $code"""
    code, err = namespace(script, *two)
    assert code == 1 and "out/checkpoints/mobilenet_v2.pt" in err and "MB are free" in err
    assert [row["model"] for row in json.loads((tmp_path / "seen").read_text())["runs"]] == ["mobilenet_v3_small"]
    code, err = namespace('mount --bind . .; mount -o remount,ro,bind .; cd .; cd "$PWD"; "$@"', *two[:1])
    assert code == 2 and "Read-only file system" in err and err.count("error") == 1


def test_no_home(train, photos, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.delenv("TORCH_HOME")
    code, _, err = train(photos)
    assert code == 2 and "/proc/nowhere" in err.splitlines()[-1]
