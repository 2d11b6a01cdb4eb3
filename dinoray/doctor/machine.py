"""Checks of this machine: cores, memory, disk, shared memory, open files, device, and access to the model hub."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from dinoray.doctor.findings import Finding, size
from dinoray.doctor.limits import Limits, container_limits, effective_cores
from dinoray.memory.budget import LOCAL_OBJECT_STORE_BYTES
from dinoray.memory.meter import available_cores

GB = 10**9
LEAST_MEMORY, GOOD_MEMORY = 1 * GB, 4 * GB
"""Below the first not even the small models load beside Ray; below the second one actor is all that fits."""
LEAST_DISK, GOOD_DISK = 1 * GB, 10 * GB
FULL_FRACTION = 0.95
"""From this share of used space on Ray stops making objects (its local_fs_capacity_threshold)."""
GOOD_OPEN_FILES = 4096


def check_machine() -> Iterator[Finding]:
    """All checks of the machine, in the order they are printed."""
    limits = container_limits()
    yield check_cores(available_cores(), os.cpu_count() or 1, limits)
    memory = psutil.virtual_memory()
    yield check_memory(memory.total, memory.available, limits)
    yield check_disk("temporary disk", Path(tempfile.gettempdir()), "set TMPDIR (and RAY_TMPDIR) to a folder on a larger disk")
    yield check_shared_memory(Path("/dev/shm"))
    yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield check_device()
    yield check_hub()


def check_cores(usable: int, present: int, limits: Limits) -> Finding:
    """Cores by affinity and by the container's limit."""
    text = f"{usable} usable of {present}" + ("" if limits.cpus is None else f", the container may use {limits.cpus:g}")
    busy = effective_cores(usable, limits)
    if busy < usable:
        return Finding("warn", "cores", text, f"give --compute-threads {busy} --decode-threads {max(2, busy)}: threads beyond "
                       "the container's limit are stopped again and again")
    return Finding("ok", "cores", text)


def check_memory(total: int, available: int, limits: Limits) -> Finding:
    """RAM, and what the container leaves of it, in bytes."""
    text = f"{size(available)} free of {size(total)}"
    if limits.memory_bytes is not None and limits.memory_used_bytes is not None:
        left = limits.memory_bytes - limits.memory_used_bytes
        text += f", the container may use {size(limits.memory_bytes)} and has {size(left)} left"
        available = min(available, left)
    if available < LEAST_MEMORY:
        return Finding("fail", "memory", text, f"free some, or use a machine with {size(GOOD_MEMORY)} or more")
    if available < GOOD_MEMORY:
        return Finding("warn", "memory", text, "use --no-ray or --workers 1, a small model, and --prefetch-bytes 200000000")
    return Finding("ok", "memory", text)


def check_disk(subject: str, folder: Path, advice: str) -> Finding:
    """Free space where `folder` is or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    used = 1 - usage.free / usage.total if usage.total else 1.0
    text = f"{size(usage.free)} free of {size(usage.total)} at {folder}"
    if usage.free < LEAST_DISK:
        return Finding("fail", subject, text, advice)
    if used > FULL_FRACTION:
        return Finding("warn", subject, f"{text}, {used:.0%} used: Ray makes no more objects above {FULL_FRACTION:.0%}", advice)
    return Finding("warn" if usage.free < GOOD_DISK else "ok", subject, text, advice if usage.free < GOOD_DISK else "")


def check_shared_memory(folder: Path, needed: int = LOCAL_OBJECT_STORE_BYTES) -> Finding:
    """/dev/shm against the object store of a Ray that dinoray starts; a cluster's nodes want their own size there."""
    if not folder.is_dir():
        return Finding("warn", str(folder), "there is none", "Ray's object store falls back to the temporary disk")
    usage = shutil.disk_usage(folder)
    text = f"{size(usage.free)} free of {size(usage.total)}, Ray's object store here takes {size(needed)}"
    if usage.free < needed:
        return Finding("warn", str(folder), text, "start the container with --shm-size=1g, else Ray keeps objects on disk")
    return Finding("ok", str(folder), text)


def check_open_files(soft: int, hard: int) -> Finding:
    """The limit on open files: each actor and each connection to a store takes some."""
    endless = resource.RLIM_INFINITY
    text = f"limit {'none' if soft == endless else soft} (hard {'none' if hard == endless else hard})"
    if soft != endless and soft < GOOD_OPEN_FILES:
        wanted = 65536 if hard == endless else min(hard, 65536)
        return Finding("warn", "open files", text, f"run `ulimit -n {wanted}` before a large job")
    return Finding("ok", "open files", text)


def check_device() -> Finding:
    """What the network would run on here, and what that means for --precision."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        free, total = torch.cuda.mem_get_info()
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        text = (f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, {size(free)} free of {size(total)}, "
                f"bfloat16 {'yes' if fast else 'only emulated'}, CUDA {torch.version.cuda}")
        return Finding("ok", "device", text) if fast else Finding("warn", "device", text, "give --precision float32")
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists():
        why = "this torch is built without CUDA" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda}"
        return Finding("fail", "device", f"there is an NVIDIA driver, but torch cannot use it ({why})",
                       "install the torch build for your driver, see https://pytorch.org/get-started")
    return check_cpu(torch.backends.cpu.get_cpu_capability(), cpu_flags())


def check_cpu(capability: str, flags: set[str]) -> Finding:
    """The processor's instruction sets: `capability` as torch calls it, `flags` as the kernel does."""
    fast = sorted(flags & {"avx512_bf16", "amx_bf16"})
    text = f"CPU, {capability}, bfloat16 " + (f"in hardware ({', '.join(fast)})" if fast else "not in hardware")
    if fast:
        return Finding("ok", "device", text + "; float32 is the default, --precision bfloat16 is the faster choice here")
    if capability in ("AVX512", "AVX2") or not flags:
        return Finding("ok", "device", text + "; keep --precision float32")
    return Finding("warn", "device", text, "expect a small fraction of the usual speed: no AVX2")


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets that the kernel reports; empty where it does not (not Linux, not x86)."""
    try:
        rows = file.read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return next((set(row.partition(":")[2].split()) for row in rows if row.startswith("flags")), set())


def check_hub() -> Finding:
    """Whether a Hugging Face token is set. It is never shown."""
    import huggingface_hub

    if huggingface_hub.get_token():
        return Finding("ok", "model hub", "a Hugging Face token is set (it stays with the driver)")
    return Finding("ok", "model hub", "no Hugging Face token is set: needed only to download gated weights",
                   "set HF_TOKEN for those, or use --weights FILE")
