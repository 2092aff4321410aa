"""How is a file written whole, a folder locked, a content hashed, a file of tensors trusted?"""

import hashlib
import io
import json
import mmap
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from engine.console import first_line


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears at `path` once it is complete, and not at all if anything fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with explain_write_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def explain_write_error(path: Path) -> Iterator[None]:
    """Adds the file's path and the free space to an OSError."""
    try:
        yield
    except OSError as error:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(f"{path} cannot be written ({error.strerror or error}); {free:.0f} MB are free there") from error


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Locks a file until the block or the process ends. If it is locked: waits if `wait`, else raises OSError."""
    with explain_write_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            advice = "wait for it to end, or choose another --output"
            raise OSError(f"another run uses {path.parent}: {advice}") from error
        print(f"waiting for another run that uses {path.parent}", file=sys.stderr)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # as on some network file systems
        print(f"{path.parent} cannot be locked ({first_line(error)}): run one at a time", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def content_hash(tensors: dict[str, Tensor], values: object = None) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors, and of plain values."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


def save_tensors(path: Path, content: dict) -> None:
    """torch.save that leaves a whole file or none. Raises OSError."""
    buffer = io.BytesIO()  # torch.save to a file would hide why a write failed
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_tensors(path: Path) -> dict:
    """Loads what `save_tensors` wrote, without running code in it. A damaged or hostile file raises any exception."""
    with path.open("rb") as file:  # given a path, torch.load goes by its suffix
        with zipfile.ZipFile(file) as archive:  # torch.save does not compress: a compressed file may be a zip bomb
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")
            if any(entry.CRC for entry in archive.infolist()) and archive.testzip():  # torch.load does not look
                raise ValueError("checksum mismatch")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
