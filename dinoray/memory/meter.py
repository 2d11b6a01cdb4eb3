"""What memory a process really uses, in bytes."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from pathlib import Path

import psutil


def rss_peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:  # Linux
        for line in status:
            if line.startswith("VmHWM:"):  # getrusage would begin with the size of the process that started this one
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss() -> int:
    """Resident set of this process now, in bytes."""
    return psutil.Process().memory_info().rss


def reset_rss_peak() -> None:
    """Let `rss_peak` begin anew with what this process holds now (Linux; elsewhere it keeps its history)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as control:
        control.write("5")


def uss(pid: int | None = None) -> int:
    """Unique set size of a process in bytes: what would be free if it ended. Needs no special rights for own processes."""
    return psutil.Process(pid).memory_full_info().uss


def tree_uss(pid: int | None = None) -> int:
    """Sum of the unique set sizes of a process and all its descendants; those that end meanwhile count 0."""
    total = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_vendor() -> str:
    """Vendor of the processor (`AuthenticAMD`, `GenuineIntel`), else its architecture: math libraries go by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")]
    return found[0] if found else platform.machine()
