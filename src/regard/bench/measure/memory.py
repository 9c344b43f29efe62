"""How much memory this process holds, how much it ever held, and how much there is left."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
# Limit, use and statistics of the container this process may run in: control groups version 2
# and 1, with the name that each gives to cached files, which make way when memory is wanted.
_GROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def resident() -> int | None:
    """Bytes of memory this process holds now."""
    return _field(_STATUS, "VmRSS")


def peak() -> int | None:
    """The most bytes this process ever held, or held since `forget_peak`.

    Linux keeps the figure of `getrusage` across exec, so that it starts at the parent's size:
    its own account of the address space is read instead.
    """
    high = _field(_STATUS, "VmHWM")
    if high is not None:
        return high
    try:
        import resource
    except ImportError:  # not on this system
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> bool:
    """Lets `peak` start anew from what is held now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    high, now = peak(), resident()
    return high is not None and now is not None and high - now < 2**22


def settle() -> None:
    """Gives back to the system what was freed, so that it is not counted as held."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
        if trim is not None:
            trim(0)


def growth(call: Callable[[], Any], device: str = "cpu") -> tuple[int | None, Any]:
    """By how many bytes memory grows at most while `call` runs; and what it returned.

    On a CPU the process must not have held more before, unless its peak can be forgotten.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        found = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start, found
    settle()
    forgotten = forget_peak()
    before = resident() if forgotten else peak()
    found = call()
    after = peak()
    return None if before is None or after is None else max(0, after - before), found


def available(device: str = "cpu") -> int | None:
    """Bytes that can still be taken without anything else giving way, if the system tells."""
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = _field(Path("/proc/meminfo"), "MemAvailable")
    if free is None:
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    for limit, used, statistics, cached in _LIMITS:
        try:
            most = int((_GROUP / limit).read_text())
            held = int((_GROUP / used).read_text())
            lines = (_GROUP / statistics).read_text().splitlines()
        except (OSError, ValueError):  # none, or "max"
            continue
        files = [int(line.split()[1]) for line in lines if line.split()[0] == cached]
        free = min(free, most - held + sum(files))
    return max(0, free)


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return int(found[0]) * 1024 if found else None
