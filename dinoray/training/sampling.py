"""Which samples a step sees: a function of the job and the step, never of the workers, a restart, or what ran before.

Step s takes the global indices s * B .. (s + 1) * B - 1. They are cut into micro-batches once, whatever the number of
workers, and each worker takes consecutive ones: two workers compute the very micro-batches that one would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np


def generator(seed: int, index: int) -> np.random.Generator:
    """All the randomness of sample `index`."""
    return np.random.default_rng(np.random.SeedSequence((seed, index)))


def micro_batches(step: int, batch_size: int, micro_batch: int) -> list[range]:
    """The global indices of a step, in micro-batches."""
    start, end = step * batch_size, (step + 1) * batch_size
    return [range(i, min(i + micro_batch, end)) for i in range(start, end, micro_batch)]


def pick(rng: np.random.Generator, cumulative: np.ndarray) -> int:
    """Draw an index by cumulative weights that end at 1."""
    return min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(cumulative) - 1)


def bounded_map(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """As `pool.map`, but at most `ahead` results wait at a time. Raises what `function` raised, in the order of the items."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Ahead:
    """Samples of coming steps, made by threads ahead of the step that needs them; `close` stops it."""

    def __init__(self, make: Callable[[int], Any], batches: Iterator[Sequence[range]], *, threads: int, steps_ahead: int = 2):
        """`batches` yields each step's micro-batches of this worker."""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sample")
        self._make, self._batches, self._steps_ahead = make, batches, steps_ahead
        self._waiting: deque[list[list[Future]]] = deque()

    def next(self) -> list[list[Any]]:
        """The next step's micro-batches of samples. Raises what making one of them raised."""
        while len(self._waiting) < self._steps_ahead:
            try:
                parts = next(self._batches)
            except StopIteration:
                break
            self._waiting.append([[self._pool.submit(self._make, index) for index in part] for part in parts])
        return [[future.result() for future in part] for part in self._waiting.popleft()]

    def close(self) -> None:
        """Drop what was not begun, wait for the rest."""
        self._pool.shutdown(wait=True, cancel_futures=True)
