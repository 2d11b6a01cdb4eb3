"""What the benchmarks share: a line about the hardware, and markdown tables."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch


def hardware() -> str:
    """One line to stand above every table: processor, cores, memory, versions."""
    name = platform.processor() or "unknown CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models and models[0] else name
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"\n{name} ({torch.backends.cpu.get_cpu_capability()}), {psutil.cpu_count()} cores, "
            f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {device}; Python {platform.python_version()}, "
            f"torch {version('torch')}, ray {version('ray')}\n")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"
