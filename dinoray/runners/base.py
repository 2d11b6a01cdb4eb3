"""What every runner shares: the lease over consecutive units, and reading ahead of the work.

A runner holds what is expensive (a model) once; a lease is a generator over unit numbers that yields one
receipt per unit. For each unit: a receipt is there -> yield it; else mark the attempt, work, commit. While
unit j computes, the items of j and j+1 are read and decoded by threads, bounded by count and bytes, and the
objects of j-1 are encoded and stored by a writer thread.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from dinoray.driver import stop_mode
from dinoray.errors import DinorayError, ItemError, TransientError
from dinoray.failpoints import reach
from dinoray.io.items import Item
from dinoray.io.retries import RetryCount, counting
from dinoray.ledger import Ledger, Receipt, StoredObject
from dinoray.memory.meter import rss_peak
from dinoray.units import Plan, Unit

logger = logging.getLogger(__name__)

READ_AHEAD_PER_THREAD = 2
"""Items decoded ahead, per decode thread."""
DECODED_PER_FILE_BYTE = 4
"""Decoded bytes guessed per byte of file (compression, 8-bit PNG) when bounding what is held ahead."""


class Runner(Protocol):
    """What a pool runs: anything with `lease` and `close`."""

    beats: int
    """Grows whenever the runner has done something: what a watchdog looks at."""

    def lease(self, numbers: Sequence[int]) -> Iterator[Receipt | UnitLeft]: ...

    def close(self) -> None: ...


@dataclass
class UnitLeft:
    """A unit that met transient trouble: no receipt was written, it stays pending."""

    number: int
    error: TransientError


@dataclass
class Loaded:
    """One item after the decode threads: `value`, or the ItemError that quarantines it."""

    unit: Unit
    item: Item
    value: Any = None
    error: ItemError | None = None
    trouble: TransientError | None = None
    """Why the whole unit must be left for later."""


@dataclass
class _Start:
    """Marks the beginning of a unit in the stream: its finished receipt, or the number of this attempt."""

    unit: Unit
    receipt: Receipt | None
    attempt: int = 0
    isolated: bool = False
    """It is worked on in a child process; none of its items is read here."""


ISOLATE_AFTER = 2
"""So many starts of a unit whose process died; the next is run in a child process (dinoray.runners.isolation)."""

Finish = Callable[[], None]
"""The last part of a unit's work: store what is left and complete the receipt (writer thread)."""


class UnitRunner:
    """Base of the runners. A subclass gives `load` (in decode threads) and `process` (one unit)."""

    point = "unit"
    """First part of the names of its failpoints."""
    finishes_items = False
    """Whether the last part of a unit's work still computes something of single items, and so belongs to a trial of one."""

    def __init__(self, plan: Plan, ledger: Ledger, *, decode_threads: int, prefetch_bytes: int):
        self.plan, self.ledger = plan, ledger
        self.decode_threads, self.prefetch_bytes = decode_threads, prefetch_bytes
        self.beats = 0
        self.isolate: Callable[[int, int, Callable[[], None]], Receipt] | None = None
        """Run unit `number`, start `attempt`, in a child process; set by `build_runner`."""
        self._retries: dict[str, RetryCount] = {}
        """Storage requests repeated for each unit in work."""
        self._open: dict[str, int] = {}
        """Units begun and not settled: {id: attempt}."""
        self._pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._putter = ThreadPoolExecutor(2, thread_name_prefix="put")

    def load(self, item: Item) -> Any:
        """Read, decode and prepare one item (decode threads). Raises ItemError to quarantine it."""
        raise NotImplementedError(type(self).__name__)

    def cost(self, item: Item) -> int:
        """Bytes that an item read ahead is guessed to hold."""
        return item.num_bytes * DECODED_PER_FILE_BYTE

    def process(self, unit: Unit, loaded: Iterable[Loaded], receipt: Receipt) -> Finish:
        """Do the unit's work on its items in plan order; the returned function stores and fills the receipt."""
        raise NotImplementedError(type(self).__name__)

    def close(self) -> None:
        """Stop the threads; the runner is unusable afterwards."""
        for pool in (self._pool, self._putter, self._writer):
            pool.shutdown(wait=True, cancel_futures=True)

    def put_later(self, key: str, data: bytes | memoryview) -> Future[StoredObject]:
        """Store an object of the unit in the background."""
        return self._putter.submit(copy_context().run, self.ledger.put_object, key, data)  # retries count for the unit

    def lease(self, numbers: Sequence[int]) -> Iterator[Receipt | UnitLeft]:
        """Do these units in order; yields the receipt of each, also of those that were done already.

        Transient trouble leaves its unit (UnitLeft) and goes on. After `dinoray stop` no further unit is begun.
        """
        try:
            for result in self._lease(numbers):
                if isinstance(result, Receipt):
                    self._open.pop(result.unit, None)
                    self._retries.pop(result.unit, None)
                yield result
        except BaseException as error:
            self._end_open(type(error).__name__)
            raise
        self._end_open("left")

    def _end_open(self, why: str) -> None:
        """Note for the units that have no receipt that their process lives: what came up is no poison."""
        while self._open:
            unit_id, attempt = self._open.popitem()
            try:
                self.ledger.end(unit_id, attempt, why)
            except (DinorayError, OSError) as error:  # the storage is what is wrong: the start counts as a death
                logger.warning("the end of unit %s could not be noted: %s", unit_id, error)

    def _lease(self, numbers: Sequence[int]) -> Iterator[Receipt | UnitLeft]:
        stream = _read_ahead(self._work(numbers), self._submit, cost_of=self.cost,
                             count=READ_AHEAD_PER_THREAD * self.decode_threads, max_bytes=self.prefetch_bytes)
        storing: Future[Receipt | UnitLeft] | None = None
        for _, entries in groupby(stream, key=lambda entry: entry.unit.number):
            start = next(entries)
            next_one = None if start.receipt is not None else self._run(start, entries)  # noqa: B031
            if storing is not None:
                yield storing.result()
            if start.receipt is not None:
                yield start.receipt
            storing = next_one
        if storing is not None:
            yield storing.result()

    def try_item(self, unit: Unit, position: int) -> None:
        """Work on one item of a unit alone and throw the result away; nothing is stored. Bad items are no error here."""
        one = Unit(unit.number, unit.id, (unit.items[position],))
        kept, self.ledger = self.ledger, _DryLedger(self.ledger.store, self.ledger.prefix)
        try:
            finish = self.process(one, [self._load(one, one.items[0])], self._new_receipt(one, 0))
            if self.finishes_items:
                finish()
        finally:
            self.ledger = kept

    def run_alone(self, unit: Unit, attempt: int, bad: dict[int, ItemError]) -> Receipt:
        """Run one unit here and now, with the items at `bad` quarantined unread. Raises TransientError."""
        began = time.monotonic()
        receipt = self._new_receipt(unit, attempt)
        receipt.isolated = True
        entries = (Loaded(unit, item, error=bad[position]) if position in bad else self._load(unit, item)
                   for position, item in enumerate(unit.items))
        result = self._commit(self.process(unit, _untroubled(entries), receipt), receipt, began)
        if isinstance(result, UnitLeft):
            raise result.error
        return result

    def _work(self, numbers: Sequence[int]) -> Iterator[_Start | tuple[Unit, Item]]:
        for number in numbers:
            if stop_mode(self.ledger.store):
                return
            unit = self.plan.unit(number)
            receipt = self.ledger.receipt(unit.id)
            if receipt is not None:
                yield _Start(unit, receipt)
                continue
            attempt = self.ledger.begin(unit.id)
            reach(f"{self.point}.begin")
            self._open[unit.id] = attempt
            if attempt > ISOLATE_AFTER and self.isolate is not None and self.ledger.deaths(unit.id, attempt) >= ISOLATE_AFTER:
                yield _Start(unit, None, attempt, isolated=True)
                continue
            yield _Start(unit, None, attempt)
            for item in unit.items:
                yield unit, item

    def _submit(self, work: tuple[Unit, Item]) -> Future[Loaded]:
        return self._pool.submit(self._load, *work)

    def _load(self, unit: Unit, item: Item) -> Loaded:
        self.beats += 1
        reach("item.load", item.item_id)
        try:
            with counting(self._retries_of(unit.id)):
                return Loaded(unit, item, value=self.load(item))
        except ItemError as error:
            return Loaded(unit, item, error=error)
        except TransientError as error:
            return Loaded(unit, item, trouble=error)

    def _retries_of(self, unit_id: str) -> RetryCount:
        return self._retries.setdefault(unit_id, RetryCount())

    def _new_receipt(self, unit: Unit, attempt: int) -> Receipt:
        return Receipt(unit=unit.id, number=unit.number, fingerprint=self.plan.facts["fingerprint"], plate=unit.plate,
                       items=len(unit.items), attempt=attempt, worker={"host": socket.gethostname(), "pid": os.getpid()})

    def _run(self, start: _Start, entries: Iterator[Loaded]) -> Future[Receipt | UnitLeft]:
        began = time.monotonic()
        try:
            if start.isolated and self.isolate is not None:
                return _finished(self.isolate(start.unit.number, start.attempt, self._beat))
            receipt = self._new_receipt(start.unit, start.attempt)
            with counting(self._retries_of(start.unit.id)):
                finish = self.process(start.unit, _untroubled(entries), receipt)
        except TransientError as error:
            return _finished(UnitLeft(start.unit.number, error))
        return self._writer.submit(self._commit, finish, receipt, began)

    def _beat(self) -> None:
        self.beats += 1

    def _commit(self, finish: Finish, receipt: Receipt, began: float) -> Receipt | UnitLeft:
        reach(f"{self.point}.data")
        retries = self._retries_of(receipt.unit)
        try:
            with counting(retries):
                finish()
            receipt.retries = {kind: n for kind, n in retries.as_dict().items() if n}
            receipt.seconds["wall"] = time.monotonic() - began
            receipt.seconds = {stage: round(value, 4) for stage, value in receipt.seconds.items()}
            receipt.memory.setdefault("rss_peak", rss_peak())
            reach(f"{self.point}.receipt")
            kept = self.ledger.commit(receipt)
        except TransientError as error:
            return UnitLeft(receipt.number, error)
        reach(f"{self.point}.done")
        return kept


class _DryLedger(Ledger):
    """A ledger that stores nothing: for trying an item."""

    def put_object(self, key: str, data: bytes | memoryview) -> StoredObject:
        return StoredObject(key, len(data), "")


def _finished(result: Receipt | UnitLeft) -> Future[Receipt | UnitLeft]:
    future: Future[Receipt | UnitLeft] = Future()
    future.set_result(result)
    return future


def _untroubled(entries: Iterable[Loaded]) -> Iterator[Loaded]:
    """The entries; raises the TransientError of the first one that has met one."""
    for entry in entries:
        if entry.trouble is not None:
            raise entry.trouble
        yield entry


def _read_ahead(work: Iterator[_Start | tuple[Unit, Item]], submit: Callable[[tuple[Unit, Item]], Future[Loaded]],
                *, cost_of: Callable[[Item], int], count: int, max_bytes: int) -> Iterator[_Start | Loaded]:
    """Yield the entries in order, with items loaded by `submit` ahead of the reader.

    At most `count` items and (guessed) `max_bytes` are ahead, but always one. Whoever stops reading early
    leaves nothing running but what was submitted.
    """
    ahead: deque[tuple[_Start | Future[Loaded], int]] = deque()
    held = items = 0
    exhausted = blocked = False
    try:
        while True:
            while not (exhausted or blocked) and (not ahead or (items < count and held < max_bytes)):
                try:
                    entry = next(work)
                except StopIteration:
                    exhausted = True
                    break
                if isinstance(entry, _Start):
                    ahead.append((entry, 0))
                    blocked = entry.isolated  # no later item is read here before it is worked on
                    if not items and entry.receipt is not None:
                        break  # a finished unit is reported at once, not after the next ones were read
                    continue
                cost = max(1, cost_of(entry[1]))
                ahead.append((submit(entry), cost))
                held += cost
                items += 1
            if not ahead:
                return
            entry, cost = ahead.popleft()
            held -= cost
            items -= bool(cost)
            blocked = blocked and not (isinstance(entry, _Start) and entry.isolated)
            yield entry if isinstance(entry, _Start) else entry.result()
    finally:
        for entry, _ in ahead:
            if isinstance(entry, Future):
                entry.cancel()
