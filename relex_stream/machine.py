"""What this process may use of the machine: cores, memory, file descriptors; and what it used."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import psutil

from relex_stream.errors import OptionError


def usable_cores() -> int:
    """Return the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def wanted_workers(workers: int | None) -> int:
    """Return the number of workers asked for, or one per core.

    Raises
    ------
    OptionError
        If it is less than 1.
    """
    if workers is None:
        return usable_cores()
    if workers < 1:
        raise OptionError(f"--workers must be at least 1, not {workers}")
    return workers


def resident_bytes() -> int:
    """Return what this process holds in memory now."""
    resident: int = psutil.Process().memory_info().rss
    return resident


def peak_bytes() -> int:
    """Return the most this process has held in memory so far."""
    # Not getrusage where it can be helped: on Linux that also counts what the process that
    # started this one held, until the start of the program here.
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Return the memory this process may still take, by the machine and by its control group."""
    free: int = psutil.virtual_memory().available
    for limit_name, used_name in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            limit = int(Path(limit_name).read_text())
            used = int(Path(used_name).read_text())
        except (OSError, ValueError):
            continue
        free = min(free, max(0, limit - used))
    return free


def memory_limit(asked_bytes: int | None, default_bytes: int) -> int:
    """Return the limit to plan for: as asked, else the default or what is free if that is less.

    A caller that holds much already (a notebook with torch and a model) gets half the default on
    top of that, instead of a refusal.
    """
    if asked_bytes is not None:
        return asked_bytes
    held = resident_bytes()
    return min(max(default_bytes, held + default_bytes // 2), held + available_bytes())
