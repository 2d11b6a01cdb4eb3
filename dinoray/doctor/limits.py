"""What a container may use: CPU and memory limits of this process's control group, versions 1 and 2.

Programs see the machine's cores and memory, not these limits; a worker that sizes itself by what it sees is
slowed down or killed. Source: kernel documentation, admin-guide/cgroup-v2 (cpu.max, memory.max, memory.current)
and cgroup-v1 (cpu.cfs_quota_us, memory.limit_in_bytes, memory.usage_in_bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Limits:
    """The tightest limits from this process's group up to the root; None where there is none."""

    cpus: float | None
    """Cores' worth of time."""
    memory_bytes: int | None
    memory_used_bytes: int | None
    """What counts against `memory_bytes` now."""


def container_limits(root: Path = ROOT, membership: Path = MEMBERSHIP) -> Limits:
    """The limits of this process. On systems without control groups all are None."""
    cpus: list[float] = []
    memory: list[tuple[int, int]] = []
    for folder in _folders(root, membership, ""):
        quota = _words(folder / "cpu.max")
        if len(quota) == 2 and quota[0] != "max":
            cpus.append(int(quota[0]) / int(quota[1]))
        memory += _memory(folder / "memory.max", folder / "memory.current")
    for folder in _folders(root, membership, "cpu"):
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            cpus.append(int(quota[0]) / int(period[0]))
    for folder in _folders(root, membership, "memory"):
        memory += _memory(folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes")
    tightest = min(memory, key=lambda pair: pair[0] - pair[1], default=(None, None))
    return Limits(min(cpus, default=None), *tightest)


def _folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """This process's group and its parents, of version 2 (no controller) or of a version 1 controller."""
    try:
        rows = [row.split(":", 2) for row in membership.read_text().splitlines()]
    except OSError:  # no /proc: not Linux
        return
    for _, controllers, path in rows:
        if (controllers == "" and controller == "") or (controller and controller in controllers.split(",")):
            base = root / controllers if controller else root
            own = base / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder == base or base in folder.parents)


def _memory(limit: Path, used: Path) -> list[tuple[int, int]]:
    words, now = _words(limit), _words(used)
    # version 1 says "no limit" as a number near 2**63
    if not words or words[0] == "max" or int(words[0]) > 2**60 or not now:
        return []
    return [(int(words[0]), int(now[0]))]


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:  # this controller is not mounted here
        return []


def effective_cores(cores: int, limits: Limits) -> int:
    """Cores that can really be kept busy: at least one."""
    return cores if limits.cpus is None else max(1, min(cores, math.floor(limits.cpus + 0.5)))
