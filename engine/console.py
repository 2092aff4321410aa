"""How does a script talk to its user: one-line errors, exit codes, progress, argument types."""

import argparse
import io
import math
import os
import re
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from engine.device import available_cpus

OWN_FOLDERS = (Path(__file__).parent, Path(__file__).parent.parent)  # where the project's code is
FIXABLE = (OSError, ValueError, ArithmeticError, torch.OutOfMemoryError)  # errors that a user can fix


def run_script(main: Callable[[], int], when_interrupted: str = "Interrupted.") -> NoReturn:
    """Runs `main` and exits with its code. An error that the user can fix is one line on stderr, not a traceback."""
    for name in ("stdout", "stderr"):  # if one is closed, the next opened file reuses its descriptor
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    with suppress(ValueError):  # signals can be set in the main thread only, and a notebook may use another
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    socket.setdefaulttimeout(30)  # ends a download from a server that sends nothing
    warnings.filterwarnings("ignore", module="PIL")
    warnings.filterwarnings("ignore", "No complete tensor found")  # torch.export.save; export() compares the answers
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # there is no replacement yet
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    if hasattr(sys.stdin, "reconfigure"):  # not in a notebook
        sys.stdin.reconfigure(errors="surrogateescape")  # file names may be invalid text
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        code = 130
    except BrokenPipeError:  # as in `inference.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except FIXABLE as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


@contextmanager
def optional_step(what: object, failed: list) -> Iterator[None]:
    """Surrounds an optional step. An exception becomes a line on stderr and an entry in `failed`."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed, which ends every script
        raise
    except Exception as error:  # any exception: an optional step must not end the run
        print_failure(what, error)
        failed.append(what)


def print_failure(what: object, error: Exception) -> None:
    """Prints one line on stderr: what has failed, and why."""
    print(f"error: {what} failed: {with_place(error)}", file=sys.stderr)


def with_place(error: Exception) -> str:
    """The first line of an error's message and, if a user cannot fix it, its place in this project's code."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent in OWN_FOLDERS]
    known = isinstance(error, FIXABLE) or not own
    return first_line(error) + ("" if known else f" ({Path(own[-1].filename).name}, line {own[-1].lineno})")


class Progress(tqdm):
    """A progress bar of images: tqdm's own in a terminal, a plain line every 30 seconds in a log."""

    def __init__(self, total: int | None, title: str, done: int = 0, disable: bool = False):
        self.in_terminal, self.due = sys.stderr.isatty(), time.monotonic() + 5  # the first line comes sooner
        line = "{desc}: {n_fmt} images, {elapsed} elapsed"
        if total:
            line = "{desc}: {n_fmt} of {total_fmt} images, {elapsed} elapsed, {remaining} left"
        log = {} if self.in_terminal else {"file": io.StringIO(), "mininterval": 1, "bar_format": line, "leave": False}
        # training and validation differ in speed; the average (smoothing=0) predicts the time left best
        super().__init__(total=total, desc=title, initial=done, unit="img", smoothing=0, disable=disable, **log)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.in_terminal:
            super().display(msg, pos)
        elif msg is None and time.monotonic() >= self.due:
            print(self, file=sys.stderr)
            self.due = time.monotonic() + 30


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.nargs == 0 or action.default is None else super()._get_help_string(action)


def number(kind: type, above: float = 0, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type for numbers of one kind, int or float, between two bounds."""

    def parse(text: str) -> float:
        if not above < (value := kind(text)) < below:
            bound = f" and below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: must be above {above}{bound}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type if the text is no number
    return parse


def pattern(text: str) -> str:
    """An argparse type for regular expressions."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text}: not a regular expression ({error})") from error
    return text


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    """The text with escape sequences and invalid characters spelled out: safe for terminals and plots."""
    return text if text.isprintable() else repr(text)[1:-1]


def some(values: Sequence[str], count: int = 3) -> str:
    """The first values, for a message."""
    return ", ".join(map(printable, values[:count])) + (", ..." if len(values) > count else "")


def count_of(number: int, noun: str) -> str:
    """For example "1 image", "2 images", "2 classes"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


_said = set()


def say_once(key: str, line: str) -> None:
    """Prints a line on stderr, unless one of that key has been printed."""
    if key not in _said:
        _said.add(key)
        print(printable(line), file=sys.stderr)
