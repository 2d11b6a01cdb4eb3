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
_M_ARENA_MAX = -8


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


def give_back() -> None:
    """Return freed memory to the system (malloc_trim(3)): takes milliseconds."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
