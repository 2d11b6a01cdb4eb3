"""Bounded, counted retries with full jitter, for trouble of storage that may pass and for nothing else.

Which trouble that is, `storage_errors.classify` says. After the last try comes TransientError: the unit stays
pending, nothing is quarantined. Waits are drawn uniformly from 0 to a ceiling that grows from 0.2 s to 10 s (full
jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/), so that a thousand throttled
workers do not come back together.

Every retry is counted, by kind: `with counting(count): ...` attributes those of the calling thread (and of what it
has the event loop do) to `count`; without one they go to `PROCESS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any, BinaryIO, TypeVar

from dinoray.config import without_secrets
from dinoray.io.storage_errors import TRANSIENT, classify, describe, retry_after, transient_error

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 6
"""Tries of one call, the first included."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
"""Ceiling of the wait after the first and after the last but one try; geometric in between."""

CONNECT_S = 10.0
"""Longest wait for a connection, in seconds."""
SILENCE_S = float(os.environ.get("DINORAY_STORAGE_TIMEOUT_S") or 30.0)
"""Longest silence inside a request before it counts as timed out, in seconds."""
SLOWEST_BYTES_PER_S = 50_000
"""A request that moves fewer bytes per second, over its whole length, counts as timed out too."""


def longest_s(num_bytes: int) -> float:
    """The longest that a request which moves this many bytes may take, in seconds."""
    return CONNECT_S + 3 * SILENCE_S + num_bytes / SLOWEST_BYTES_PER_S


class RetryCount:
    """How many retries there were, by kind of trouble; safe to share between threads."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(TRANSIENT, 0)
        self._lock = threading.Lock()

    def add(self, kind: str) -> None:
        """One more retry; `kind` is one of TRANSIENT."""
        with self._lock:
            self._counts[kind] += 1

    @property
    def total(self) -> int:
        """All retries."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """{"throttled": n, "server_error": n, "timeout": n, "connection": n, "truncated": n}."""
        with self._lock:
            return dict(self._counts)


PROCESS = RetryCount()
"""Retries of this process that no `counting` was asked for."""

_count: ContextVar[RetryCount] = ContextVar("dinoray_retries", default=PROCESS)
_inside: ContextVar[bool] = ContextVar("dinoray_retrying", default=False)


@contextlib.contextmanager
def counting(count: RetryCount) -> Iterator[RetryCount]:
    """Retries of this thread (or task) go to `count` until the end of the block. A thread pool does not hand this on:
    open the block in the function that the pool runs."""
    token = _count.set(count)
    try:
        yield count
    finally:
        _count.reset(token)


def wait_ceiling_s(failures: int) -> float:
    """The longest wait after this many failures, in seconds."""
    steps = max(1, TRIES - 2)
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * (LONGEST_WAIT_S / FIRST_WAIT_S) ** ((failures - 1) / steps))


def _after(error: Exception, failures: int, where: str) -> float | None:
    """Seconds to wait before the next try; None for what no retry mends. Raises TransientError after the last try."""
    kind = classify(error)
    if kind not in TRANSIENT:
        return None
    if failures >= TRIES:
        raise transient_error(error, where, failures) from error
    _count.get().add(kind)
    ceiling = wait_ceiling_s(failures)
    wait = max(random.uniform(0.0, ceiling), min(retry_after(error), LONGEST_WAIT_S))
    logger.info("%s at %s, try %d of %d in %.1f s: %s", kind, without_secrets(where), failures + 1, TRIES, wait, describe(error))
    return wait


def retried(call: Callable[[], T], where: str) -> T:
    """`call()`, tried up to TRIES times. Raises TransientError after the last; other errors at once, as they are.

    `call` must be safe to repeat. Requests inside it are not retried a second time by what they go through.
    """
    if _inside.get():
        return call()
    token = _inside.set(True)
    try:
        failures = 0
        while True:
            try:
                return call()
            except Exception as error:
                failures += 1
                wait = _after(error, failures, where)
                if wait is None:
                    raise
            sleep(wait)
    finally:
        _inside.reset(token)


async def retried_async(call: Callable[[], Awaitable[T]], where: str) -> T:
    """As `retried`, in an event loop: for single requests of a file system that makes several for one call."""
    failures = 0
    while True:
        try:
            return await call()
        except Exception as error:
            if _inside.get():
                raise
            failures += 1
            wait = _after(error, failures, where)
            if wait is None:
                raise
        await sleep_async(wait)


def sleep(seconds: float) -> None:
    """Wait; tests replace it."""
    time.sleep(seconds)


async def sleep_async(seconds: float) -> None:
    """Wait in an event loop; tests replace it."""
    await asyncio.sleep(seconds)


class RetriedFile(io.RawIOBase):
    """A seekable file, open for reading, whose reads are retried from the same position."""

    def __init__(self, file: BinaryIO, where: str):
        super().__init__()
        self._file, self._where = file, where

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, all that is left when negative."""
        at = self._file.tell()

        def once() -> bytes:
            self._file.seek(at)
            return self._file.read(size)

        return retried(once, self._where)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; the number of bytes, 0 at the end."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[:len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """All that is left."""
        return self.read(-1)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move; the new position."""
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Close the file below too."""
        if not self.closed:
            self._file.close()
        super().close()
