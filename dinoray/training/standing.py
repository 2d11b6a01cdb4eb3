"""Where a training stands, from what its first worker notes beside the output: for whoever watches, and for `status`."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from dinoray.driver import at_work
from dinoray.errors import DinorayError
from dinoray.io.stores import LocalStore, Store
from dinoray.wording import plural

logger = logging.getLogger(__name__)

PROGRESS_KEY, CHECKPOINT = "_dinoray/progress.json", "checkpoint"
"""The last figures; the folder of the output that is the result."""
FAILURE_KEY = "_dinoray/failure.json"
"""Why the workers were last started again."""
WATCH_S, TELL_S = 1.0, 10.0
"""How often a watcher looks (five times as long on remote stores), and tells at most."""


def read_progress(store: Store) -> dict[str, Any]:
    """Last figures of a training; empty before the first."""
    try:
        return json.loads(store.get(PROGRESS_KEY))
    except FileNotFoundError:
        return {}


def note_failure(store: Store, run: str, why: str, limit: int) -> None:
    """Keep why the workers of the driver `run` failed, how often they have, and how often they may (-1: without limit)."""
    before = _read_failure(store, run)
    note = {"run": run, "why": why, "count": before.get("count", 0) + 1, "limit": limit}
    store.put(FAILURE_KEY, json.dumps(note).encode())


def _read_failure(store: Store, run: str) -> dict[str, Any]:
    try:
        found = json.loads(store.get(FAILURE_KEY))
    except FileNotFoundError:
        return {}
    return found if found.get("run") == run else {}


def finished(store: Store, fingerprint: str) -> bool:
    """Whether the training has ended and its checkpoint is written."""
    try:
        config = json.loads(store.get(f"{CHECKPOINT}/config.json"))
    except FileNotFoundError:
        return False
    return bool(read_progress(store).get("ended")) and config.get("training", {}).get("fingerprint") == fingerprint


def figures(progress: dict[str, Any]) -> str:
    """`step 20/100  loss 0.03  validation loss 0.02 ...`."""
    words = [f"step {progress['step']}/{progress['steps']}"]
    words += [f"{name.replace('val_', 'validation ')} {progress[name]:.4g}"
              for name in ("loss", "val_loss", "lr", "samples_per_s") if name in progress]
    if "extraction_share" in progress:
        extraction, wait = progress["extraction_share"], progress.get("wait_share", 0.0)
        words.append(f"extraction {extraction:.0%}, UNet {max(0.0, 1 - extraction - wait):.0%}, data wait {wait:.0%}")
    return "  ".join(words)


def memory_words(peaks: dict[str, int]) -> str:
    """Bytes of the phases of a step: `extraction 280 MiB, UNet step 540 MiB`."""
    return f"extraction {peaks['extraction'] / 2**20:.0f} MiB, UNet step {peaks['step'] / 2**20:.0f} MiB"


def standing_lines(store: Store, record: dict[str, Any]) -> Iterator[str]:
    """What `status` says of a training; `record` is its job.json."""
    progress, busy = read_progress(store), at_work(store)
    yield f"{record['fingerprint']}  {record['kind']}  {store.url}"
    if busy:
        yield f"at work: {busy}"
    if not progress:
        yield "no step yet"
        return
    workers = f" on {plural(progress['workers'], 'worker')}" if progress.get("workers") else ""
    yield figures(progress) + f"  {progress.get('seconds', 0.0):.0f} s so far{workers}"
    if progress.get("starts", 1) > 1:
        yield f"the workers of this run were started {progress['starts']} times"
    if progress.get("best_step"):
        yield f"best validation loss {progress['best_loss']:.4g} at step {progress['best_step']}"
    if finished(store, record["fingerprint"]):
        yield f"ended by {progress['ended']}; checkpoint {store.url}/{CHECKPOINT}"
    elif not busy:
        yield f"not finished; resume with: {record.get('command') or 'the same command'}"


class Watch(threading.Thread):
    """Tells the progress that the first worker notes, from wherever it runs. `run` is the driver's token: what another run
    noted is not told again."""

    def __init__(self, store: Store, run: str, say: Callable[[str], None]):
        super().__init__(daemon=True, name="watch")
        self.store, self.run_name, self.say = store, run, say
        self.begun = False
        """Whether this run's workers are at work."""
        self._end = threading.Event()
        self._told, self._next, self._micro_batch = -1, 0.0, 0
        self._starts, self._failures = 1, 0
        self._memory: dict[str, int] = {}

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        while not self._end.wait(WATCH_S if isinstance(self.store, LocalStore) else 5 * WATCH_S):
            self._look()
        self._next = 0.0
        self._look()

    def _look(self) -> None:
        try:
            self._tell(read_progress(self.store))
        except (DinorayError, OSError) as error:  # the work itself will say what is wrong with the storage
            logger.warning("the progress of the training could not be read: %s", error)

    def _tell(self, found: dict[str, Any]) -> None:
        if not found or found.get("run") != self.run_name:
            return
        if not self.begun:
            self.begun, self._told, self._micro_batch = True, found["step"], found["micro_batch"]
            if _read_failure(self.store, self.run_name):  # before their first step
                self.say(self._new_start(found))
            elif found["began"]:
                self.say(f"going on from step {found['began']}")
        elif found.get("starts", 1) != self._starts:
            self._told = found["step"]
            self.say(self._new_start(found))
        self._starts = found.get("starts", 1)
        if found["micro_batch"] != self._micro_batch:
            self._micro_batch = found["micro_batch"]
            self.say(f"a device ran out of memory: micro-batches of {self._micro_batch} from here on")
        if found.get("memory", {}) != self._memory:
            self._memory = found["memory"]
            self.say(f"memory of the first step, measured: {memory_words(self._memory)}")
        if found["step"] != self._told and time.monotonic() >= self._next:
            self._told, self._next = found["step"], time.monotonic() + TELL_S
            self.say(figures(found))

    def _new_start(self, found: dict[str, Any]) -> str:
        """Why the workers began anew: they failed, or the group changed its size."""
        failure = _read_failure(self.store, self.run_name)
        if failure.get("count", 0) == self._failures:
            return f"started again with {plural(found['workers'], 'worker')}: going on from step {found['began']}"
        self._failures = failure["count"]
        of = f" of {failure['limit']}" if failure["limit"] >= 0 else ""
        return f"a worker failed ({failure['why']}): going on from step {found['began']}, restart {failure['count']}{of}"
