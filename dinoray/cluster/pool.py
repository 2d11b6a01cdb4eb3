"""`run_units` over Ray Data: one block = one lease of consecutive units, one actor = one runner.

Rows carry unit numbers only; pixels and features never travel through the object store or the driver.
Rounds: pending = plan - receipts -> one Dataset; after an error, a hang or the end, recompute; give up after
`rounds` rounds without a new receipt. Nothing outside this module knows Ray Data.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.logging import configure_logging
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinoray.cluster.resources import ActorShape
from dinoray.errors import DinorayError, SystemicError
from dinoray.ledger import Receipt
from dinoray.runners.base import Runner, UnitLeft
from dinoray.runners.build import RunnerSpec, build_runner
from dinoray.runners.rounds import PAUSE_S, Round, run_rounds

logger = logging.getLogger(__name__)

SINGLE_UNIT_LEASES = 2000
"""Up to this many pending units a lease is one unit; above, leases grow so that blocks stay few."""
LARGEST_LEASE = 8
BEAT_S = 2.0
"""How often an actor says that it moves."""


@ray.remote(num_cpus=0)
class Monitor:
    """Hears from the actors that they move; the driver asks it before it takes silence for a hang."""

    def __init__(self) -> None:
        self.last = 0.0
        self.handles: list[Any] = []

    def register(self, handle: Any) -> None:
        """An actor has come up; its first beat."""
        self.handles.append(handle)
        self.beat()

    def actors(self) -> list[Any]:
        """Handles of all actors that ever came up."""
        return self.handles

    def beat(self) -> None:
        """An actor has done something since it last said so."""
        self.last = time.time()

    def last_beat(self) -> float:
        """Time of the last beat (s since the epoch), 0 before the first."""
        return self.last


class LeaseActor:
    """A Ray Data actor: builds its runner once, then runs leases. Only receipts leave it."""

    def __init__(self, spec: RunnerSpec, monitor: Any):
        monitor.register.remote(ray.get_runtime_context().current_actor)
        self.runner: Runner | None = None
        try:
            self.runner, self.trouble = build_runner(spec), ""
        except DinorayError as error:  # told by the first lease: an actor that dies at birth is retried for minutes
            self.trouble = f"systemic: {error}"
        threading.Thread(target=self._beat, args=(monitor,), daemon=True, name="heartbeat").start()

    def _beat(self, monitor: Any) -> None:
        seen = -1
        while self.runner is not None:
            if self.runner.beats != seen:
                seen = self.runner.beats
                monitor.beat.remote()
            time.sleep(BEAT_S)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        if self.trouble:
            yield {"receipt": [""], "error": [self.trouble]}
            return
        for units in batch["units"]:
            numbers = [int(n) for n in str(units).split(",")]
            try:
                for result in self.runner.lease(numbers):
                    if isinstance(result, UnitLeft):
                        yield {"receipt": [""], "error": [str(result.error)]}
                    else:
                        yield {"receipt": [result.to_json()], "error": [""]}
            except DinorayError as error:
                # as a row, so that one unit's trouble does not cancel the other actors' work; the driver decides
                yield {"receipt": [""], "error": [("systemic: " if error.exit_code == 2 or
                                                   isinstance(error, SystemicError) else "") + str(error)]}


def lease_size(num_pending: int) -> int:
    """Units per lease: 1 up to SINGLE_UNIT_LEASES pending, then growing to LARGEST_LEASE."""
    return min(LARGEST_LEASE, max(1, -(-num_pending // SINGLE_UNIT_LEASES)))


def leases(pending: Sequence[int]) -> list[str]:
    """Pending unit numbers as comma-separated leases, in order."""
    size = lease_size(len(pending))
    return [",".join(str(n) for n in pending[i:i + size]) for i in range(0, len(pending), size)]


def run_units(spec: RunnerSpec, recompute_pending: Callable[[], list[int]], on_receipt: Callable[[Receipt], None],
              *, shape: ActorShape, rounds: int, stall_timeout_s: float, check: Callable[[], None] = lambda: None,
              pause_s: float = PAUSE_S) -> None:
    """Run all pending units on a pool of actors; `on_receipt` sees each new receipt once, on this thread.

    Raises what `on_receipt` and `check` (called between rounds) raise, SystemicError when an actor says that nothing
    can work, NoProgress after `rounds` rounds without a new receipt (with the last trouble).
    """
    run_rounds(recompute_pending, on_receipt, lambda pending, this: _round(spec, pending, this, shape, stall_timeout_s),
               rounds=rounds, where=spec.out, workers=shape.max_workers, check=check, pause_s=pause_s)


def _round(spec: RunnerSpec, pending: list[int], this: Round, shape: ActorShape, stall_timeout_s: float) -> None:
    """One Dataset over the pending units."""
    rows: queue.Queue[Any] = queue.Queue()
    stop = threading.Event()
    # on the driver's node: on a spot node it could be lost, and the round with it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = Monitor.options(scheduling_strategy=here).remote()
    thread = threading.Thread(target=_execute, args=(spec, pending, shape, monitor, rows, stop), daemon=True)
    thread.start()
    try:
        while True:
            try:
                row = rows.get(timeout=min(BEAT_S, stall_timeout_s))
            except queue.Empty:
                silent_s = time.time() - (ray.get(monitor.last_beat.remote()) or time.time())  # 0 until an actor is up
                if silent_s < stall_timeout_s:
                    continue
                this.trouble = f"no actor has moved for {silent_s:.0f} s"
                logger.warning("%s: starting a new round", this.trouble)
                _kill_actors(monitor, thread)
                return
            if row is None:
                return
            if isinstance(row, Exception):
                logger.warning("a round ended with %s: %s", type(row).__name__, str(row).strip()[-2000:])
                this.trouble = f"{type(row).__name__}: {str(row).strip()[-500:]}"
                return
            text = row["error"]
            if text.startswith("systemic: "):
                raise SystemicError(text.removeprefix("systemic: "),
                                    todo="mend the cause, then run the same command again: it resumes")
            if text:
                this.left(text)
                if this.hopeless:
                    _kill_actors(monitor, thread)
                    return
                continue
            this.receipt(Receipt.from_json(row["receipt"]))
    finally:
        stop.set()


def _kill_actors(monitor: Any, thread: threading.Thread) -> None:
    for actor in ray.get(monitor.actors.remote()):
        ray.kill(actor, no_restart=True)  # SIGKILL: ends stopped processes too
    thread.join(timeout=60)


def _execute(spec: RunnerSpec, pending: list[int], shape: ActorShape, monitor: Any, rows: queue.Queue,
             stop: threading.Event) -> None:
    """Run the Dataset (own thread, so that the caller can watch the clock) and queue its rows, then None."""
    try:
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.verbose_progress = False
        context.execution_no_progress_timeout_s = -1  # waiting for nodes counts there; the caller watches instead
        context.max_consecutive_actor_init_deaths = 3
        context.actor_init_retry_on_errors = False
        texts = leases(pending)
        with DataContext.current(context):
            dataset = ray.data.from_items([{"units": text} for text in texts], override_num_blocks=len(texts))
            dataset = dataset.map_batches(LeaseActor, fn_constructor_args=(spec, monitor), batch_size=1,
                                          compute=strategy(shape, len(texts)), num_cpus=shape.num_cpus,
                                          num_gpus=shape.num_gpus)
            quiet_console()
            for row in dataset.iter_rows():
                if stop.is_set():
                    return
                rows.put(row)
        rows.put(None)
    except Exception as error:  # handed to the caller's thread, which logs or raises it
        rows.put(error)


def quiet_console() -> None:
    """Keep Ray Data's notes and tracebacks off the console (they stay in its log files): progress is told from receipts,
    and the error that ends a round by `_round`."""
    configure_logging()
    for name in ("ray", "ray.data"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL)


def strategy(shape: ActorShape, num_leases: int) -> ActorPoolStrategy:
    """The pool: exactly N actors, or MIN..MAX with at least two leases in flight each so that it can grow."""
    low, high = min(shape.min_workers, num_leases), min(shape.max_workers, num_leases)
    if low == high:
        return ActorPoolStrategy(size=low, max_tasks_in_flight_per_actor=2)
    return ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=3)
