"""The C library's allocator kept to what is in use. Elsewhere than on glibc nothing is done.

glibc gives each thread an arena of its own (8 per core) and keeps what was freed in each. A process that reads, computes
and stores in a dozen threads then holds its peak once per arena: a volume of 256^3 voxels took 180 MB where 130 MB were
in use. Two arenas cost no measurable time (ViT-S, 2 threads); giving all large blocks back at once (M_MMAP_THRESHOLD of
1 MB) would make the forward pass 50 % slower, so that is left as it is.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

ARENAS = 2
KEPT_BYTES = 64 * 2**20
"""What a thread's arena keeps of freed memory at its end: one heap of glibc's."""
_MMAP_BYTES = 32 * 2**20
"""Blocks above this are mapped one by one, the most that glibc would set by itself."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@cache
def _libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None  # musl has neither


def share_arenas() -> None:
    """Let threads that begin from now on share ARENAS arenas (mallopt(3)); call it before threads are started."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, ARENAS)


def keep_freed() -> None:
    """Let every arena keep up to KEPT_BYTES of freed memory instead of a few MB (mallopt(3)); for threads that compute.

    A forward frees and takes the same tens of MB a hundred times. In the main thread glibc learns to keep them; in other
    threads it gives them back every time, and a window of 256 px (ViT-S/16, bfloat16) took 54 ms instead of 44, 13 of them
    in the kernel for 6,500 page faults.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """Return freed memory to the system (malloc_trim(3)): takes milliseconds."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
