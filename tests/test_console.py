"""Errors, exit codes, signals, progress, imports."""

import ast
import importlib
import io
import os
import re
import signal
import sys

import pytest
import torch
from conftest import QUICK, ROOT, finish, results, start, without_progress

import inference
import main_train
import visualization
from engine.console import Progress, optional_step, run_script


def test_progress_in_a_log_is_an_occasional_line(capsys):
    bar = Progress(100, "photos", done=10)
    bar.update(5)
    bar.close()
    assert capsys.readouterr() == ("", "")
    bar = Progress(100, "photos", done=10)
    bar.mininterval = bar.due = 0
    bar.update(5)
    bar.update(5)
    bar.close()
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"photos: 15 of 100 images, .* elapsed, .* left\n", err)
    bar = Progress(None, "photos")  # as of standard input
    bar.mininterval = bar.due = 0
    bar.update(5)
    bar.close()
    assert re.fullmatch(r"photos: 5 images, .* elapsed\n", capsys.readouterr().err)


def test_a_notebooks_stdout_cannot_be_reconfigured(trained, photos, monkeypatch):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as left:
        run_script(lambda: inference.main([str(photos / "test")]))
    assert left.value.code == 0 and len(sys.stdout.getvalue().splitlines()) == 18


@pytest.fixture
def started(photos, weights, tmp_path):
    """A training in a process of its own, once it has begun with its first model."""
    command = ["--data", photos, "--models", "mobilenet_v3_small", "mobilenet_v2", *QUICK, "--output", tmp_path]
    process = start(ROOT / "main_train.py", *command, cwd=tmp_path, env=os.environ | {"TORCH_HOME": str(weights)})
    while not process.stdout.readline().startswith("mobilenet_v3_small: weights"):
        assert process.poll() is None
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGINT, 130, "Interrupted. Run the same command to resume.\n"), (signal.SIGTERM, 143, "")],
)
def test_signals_end_without_a_traceback(started, tmp_path, sent, code, said):
    started.send_signal(sent)
    ended, _, err = finish(started)
    assert (ended, err) == (code, said) and not list(tmp_path.rglob("*.part"))


def test_a_run_whose_reader_is_gone_saves_its_model(started, tmp_path):
    """As in `main_train.py | head -3`."""
    started.stdout.close()
    err = without_progress(started.stderr.read())
    assert (started.wait(), err) == (0, "")
    assert [row["model"] for row in results(tmp_path)] == ["mobilenet_v3_small"]


def test_an_interruption_is_not_lost_in_an_import(monkeypatch):
    """As in C code of matplotlib, which makes an ImportError of it."""
    sent, whole = [], importlib.import_module

    def importing(name):
        try:
            sent.append(name)
            signal.raise_signal(signal.SIGINT) if len(sent) == 1 else None
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error
        return whole(name)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(importlib, "import_module", importing)
    try:
        with pytest.raises(KeyboardInterrupt), visualization.own_settings():
            pytest.fail("the script goes on")
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_optional_step_ends_the_script_if_nobody_reads():
    with pytest.raises(BrokenPipeError), optional_step("comparison", []):
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("script", "args", "expected"),
    [
        (main_train, ["--models", "resnet"], "resnet50"),
        (main_train, ["--device", "tpu"], "mps"),
        (main_train, ["--epochs", "0"], "above 0"),
        (main_train, ["--lr", "nan"], "--lr"),
        (main_train, ["--fine-tune-lr", "inf"], "--fine-tune-lr"),
        (main_train, ["--seed", "-1"], "--seed"),
        (main_train, ["--demo", "--data", "pets"], "leave out --data"),
        (main_train, ["--device", "cuda"], "--device auto"),
        (inference, ["x.png", "--threshold", "80"], "below 1"),
        (inference, ["x.png"], "main_train.py"),
        (inference, ["x.png", "--checkpoint", "none.pt"], "none.pt"),
    ],
)
def test_invalid_arguments(run, script, args, expected):
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("there is a GPU here")
    code, _, err = run(script, *args)
    assert code == 2 and expected in err


SCRIPTS = [path.stem for path in ROOT.glob("*.py")]
MODULES = [*SCRIPTS, *(f"engine.{path.stem}" for path in (ROOT / "engine").glob("[!_]*.py"))]


def test_the_engine_imports_no_script():
    for path in (ROOT / "engine").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in imported} & {*SCRIPTS}, path


def test_every_module_can_be_imported_first(tmp_path):
    """Each one in turn after all other modules of the project are forgotten. None prints or writes anything."""
    assert len(SCRIPTS) == 6 and len(MODULES) > 15
    program = (
        f"import importlib, sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
        f"for name in {MODULES}:\n"
        f"    for loaded in {{'engine', *{MODULES}}} & {{*sys.modules}}:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    assert finish(start("-c", program, cwd=tmp_path)) == (0, "", "") and not list(tmp_path.iterdir())
