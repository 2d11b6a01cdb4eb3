"""Parts of equal shape, gathered in plan order into micro-batches that a pool computes.

Which parts share a batch is a function of the plan alone: a batch begins when it is full, or when the parts that wait
hold too many bytes, then the largest group goes as it is. Results are taken in the order in which batches began.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from dinoray.errors import ItemError
from dinoray.runners.compute import ComputePool

WAITING_BYTES = 256 * 2**20
"""Parts of many different shapes may wait for company up to this. Only the order of the plan decides when, so it changes
no byte from run to run."""


class Part(Protocol):
    """What is computed: parts with equal keys may share a batch."""

    @property
    def key(self) -> tuple: ...

    @property
    def nbytes(self) -> int: ...


class Gathering:
    """The micro-batches of one unit. `compute` gets parts of one key (in the pool's threads), `full` says of a part how
    many of its key make a batch; `take` gets the owners of a batch's parts, and its result or the ItemError that it met."""

    def __init__(self, pool: ComputePool, compute: Callable[[list[Any]], Any], *, full: Callable[[Any], int],
                 take: Callable[[Sequence[Any], Any], None], seconds: dict[str, float]):
        self._pool, self._compute, self._full, self._take, self._seconds = pool, compute, full, take, seconds
        self._waiting: dict[tuple, list[tuple[Any, Part]]] = {}
        self._running: deque[tuple[list[Any], Future[tuple[Any, float]]]] = deque()
        self.waiting_bytes = 0

    def add(self, owner: Any, part: Part) -> None:
        """One more part; may wait for batches that were begun before."""
        group = self._waiting.setdefault(part.key, [])
        group.append((owner, part))
        self.waiting_bytes += part.nbytes
        full = len(group) == self._full(part)
        if full or self.waiting_bytes > WAITING_BYTES:
            key = part.key if full else max(self._waiting, key=lambda k: sum(p.nbytes for _, p in self._waiting[k]))
            while len(self._running) > self._pool.threads:  # one batch ready behind each running one
                self._collect()
            self._launch(key)

    def finish(self) -> None:
        """Compute what still waits, and take all results."""
        for key in list(self._waiting):
            self._launch(key)
        while self._running:
            self._collect()

    def _launch(self, key: tuple) -> None:
        group = self._waiting.pop(key)
        self.waiting_bytes -= sum(part.nbytes for _, part in group)
        self._running.append(([owner for owner, _ in group], self._pool.submit(self._timed, [part for _, part in group])))

    def _timed(self, parts: list[Any]) -> tuple[Any, float]:
        began = time.monotonic()
        try:
            return self._compute(parts), time.monotonic() - began
        except ItemError as error:  # one part is too large for the device: its image is at fault, not the run
            return error, time.monotonic() - began

    def _collect(self) -> None:
        owners, future = self._running.popleft()
        began = time.monotonic()
        result, compute_s = future.result()
        self._seconds["wait_compute"] += time.monotonic() - began
        self._seconds["compute"] += compute_s
        self._take(owners, result)
