"""Which hardware is here, and how is it used? Device, precision, threads, memory, batch size, time."""

import ctypes
import math
import os
import platform
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = (*DTYPES, "int8")  # int8: see engine/openvino.py
# Images in a batch. On the CPU every core has a batch of its own. For a GPU one thread reads a batch, so larger ones
# would leave most cores without work if there are a few hundred photographs.
CPU_BATCH, GPU_BATCH = 16, 64


def pick_device(name: str = "auto") -> torch.device:
    """The named device; for "auto" CUDA, else Apple's MPS, else the CPU. Raises ValueError if it is of no use here."""
    mps = torch.backends.mps.is_available() and torch.__version__ >= "2.11"  # earlier versions lack operators
    present = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(device for device, available in present.items() if available and _computes(device))
    elif not present[name]:
        needed = " (it needs torch 2.11)" if name == "mps" else ""
        raise ValueError(f"no {name} device here{needed}: --device auto uses what is available")
    elif not _computes(name):
        raise ValueError(f"{name} is of no use here: --device auto takes another device")
    # new threads start on the first GPU, so this process's GPU is named
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def _computes(device: str) -> bool:
    """Whether a device that is present computes. If not, says why: torch lacks code for an old GPU, or it is taken."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(f"{device} is present but does not compute: {reason}", file=sys.stderr)
        return False


def pick_precision(name: str, device: torch.device) -> str:
    """The named precision; for "auto" bf16 if the hardware computes in it, else fp32."""
    return name if name != "auto" else "bf16" if computes_in_bf16(device) else "fp32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 instructions. Elsewhere PyTorch emulates them, up to forty times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def batch_size_for(device: torch.device) -> int:
    """The number of images that the device computes at a time."""
    return CPU_BATCH if device.type == "cpu" else GPU_BATCH


def layout_for(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The memory format of images and of convolutions' weights.

    channels_last is the faster one on a CPU, and on CUDA where tensor cores compute, but not in fp32. On MPS some
    operators give wrong numbers in it (pytorch/pytorch#180984 and #192212).
    """
    fast = device.type == "cpu" or (device.type == "cuda" and dtype == torch.bfloat16)
    return torch.channels_last if fast else torch.contiguous_format


def available_cpus(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The number of cores that this process may use, given its affinity and its container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no container, or its quota is "max"
        time_allowed, period = map(int, quota.read_text().split())
        cpus = min(cpus, math.ceil(time_allowed / period))
    return cpus


_lock = threading.Lock()
_in_full_precision, _before = 0, ()  # the calling threads, and cuDNN's setting before the first of them


@contextmanager
def full_precision() -> Iterator[None]:
    """Makes cuDNN compute fp32 with its 23 mantissa bits, instead of the 10 of TF32."""
    global _in_full_precision, _before
    with _lock:
        if not _in_full_precision:
            cudnn, full = torch.backends.cudnn, False
            try:
                _before = cudnn, "allow_tf32", cudnn.allow_tf32
            except RuntimeError:  # since torch 2.9: the program has changed the setting that is to replace this one
                _before, full = (cudnn.conv, "fp32_precision", cudnn.conv.fp32_precision), "ieee"
            setattr(*_before[:2], full)
        _in_full_precision += 1
    try:
        yield
    finally:
        with _lock:
            _in_full_precision -= 1
            if not _in_full_precision:
                setattr(*_before)


_unlimited = 0  # the number of threads without a limit, when it was last looked at
_limits: dict[int, list[int]] = defaultdict(list)  # the limits in force of each calling thread, a stack


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limits each of torch's CPU operators to `count` threads: 1 where every core has a batch of its own.

    Each calling thread has its own limit. A new thread starts with the number that any thread set last.
    """
    global _unlimited
    with _lock:
        if not any(_limits.values()) and torch.get_num_threads() != _unlimited:
            with ThreadPoolExecutor(1) as new:  # a thread that has started during a limit keeps it
                _unlimited = max(torch.get_num_threads(), new.submit(torch.get_num_threads).result())
        own = _limits[threading.get_ident()]
        own.append(count)
        torch.set_num_threads(count)
    try:
        yield
    finally:
        with _lock:
            own.pop()
            torch.set_num_threads(own[-1] if own else _unlimited)


@cache
def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors for the next ones, from here on in this process.

    By default it returns large blocks to the system and takes them anew at every layer, which is up to a half of the
    time of a forward pass. Elsewhere nothing happens.
    """
    with suppress(Exception):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(option, value)


def synchronized_time(device: torch.device) -> float:
    """Seconds on a monotonic clock, read when the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """The device's usual name: "NVIDIA H100 80GB HBM3", or "AMD EPYC 9R14, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # only Linux has the file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"Apple {device.type} on {name}"
