"""One start of a command, and the kills that are carried out on it while it runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from dinoray.chaos.kills import Kill
from dinoray.driver import KEY as DRIVER_KEY
from dinoray.failpoints import ONCE_FOLDER, VARIABLE
from dinoray.io.stores import LocalStore
from dinoray.ledger import Ledger

POLL_S = 0.005


@dataclass
class Start:
    """What came of one start of the command."""

    code: int = 0
    """Exit code; -9 when the driver was killed."""
    printed: str = ""
    seconds: float = 0.0
    """From the moment the driver held the output to its end."""
    carried_out: list[Kill] = field(default_factory=list)
    before: int = 0
    """Units that had receipts when it began."""
    done: int = 0
    """Units that have receipts now."""
    again: list[str] = field(default_factory=list)
    """Units that were started though they had a receipt."""


def start_and_strike(argv: Sequence[str], store: LocalStore, kills: Sequence[Kill], *, rng: random.Random, work_s: float = 0.0,
                     units: int = 0, timeout_s: float = 600.0) -> Start:
    """Run a command on the output in `store` to its end and carry out `kills` meanwhile; those that found no moment are
    not in `carried_out`.

    `work_s`, `units`: what an undisturbed run takes, by which random moments are measured. A command that has not ended
    after `timeout_s` is killed and has the exit code -9 without a kill in `carried_out`.
    """
    ledger = Ledger(store)
    done_before, attempts_before = ledger.done(), ledger.attempts()
    start = Start(before=len(done_before))
    with tempfile.TemporaryDirectory(prefix="dinoray-chaos-") as once, tempfile.TemporaryFile() as output:
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
               VARIABLE: ",".join(kill.entry for kill in kills if kill.point), ONCE_FOLDER: once}
        for name in ("RAY_ADDRESS", "RAY_JOB_ID"):  # a Ray of its own: nobody else's actors are killed
            env.pop(name, None)
        process = subprocess.Popen(list(argv), env=env, stdout=output, stderr=subprocess.STDOUT)
        watch = _Watch(process, store, kills, once, rng, work_s, units - len(done_before))
        deadline = time.monotonic() + timeout_s
        try:
            while process.poll() is None and time.monotonic() < deadline:
                watch.look()
                time.sleep(POLL_S)
        finally:
            process.kill()
            start.code = process.wait()
        start.seconds = time.monotonic() - (watch.held or time.monotonic())
        start.carried_out = watch.struck()
        output.seek(0)
        start.printed = output.read().decode(errors="replace")
    start.done = len(ledger.done())
    attempts = ledger.attempts()
    start.again = sorted(unit for unit in done_before if attempts.get(unit, 0) > attempts_before.get(unit, 0))
    return start


class _Watch:
    """Carries out the kills that no failpoint does: those at random moments."""

    def __init__(self, process: subprocess.Popen[bytes], store: LocalStore, kills: Sequence[Kill], once: str,
                 rng: random.Random, work_s: float, pending: int):
        self.process, self.store, self.once, self.rng = process, store, once, rng
        self.held: float | None = None
        """When the driver held the output (monotonic s)."""
        self._named = [kill for kill in kills if kill.point]
        self._random = sorted((k for k in kills if not k.point), key=lambda k: (k.victim == "driver", k.moment))
        self._with_actors = any(kill.victim == "actor" for kill in kills)
        self._struck: list[Kill] = []
        self._work_s, self._pending, self._receipts = work_s, pending, self._count()

    def struck(self) -> list[Kill]:
        """The kills that were carried out, named ones first."""
        return [kill for kill in self._named if self._acted(kill)] + self._struck

    def look(self) -> None:
        """Strike if it is time for the next random kill; actors come before the driver."""
        if self.held is None:
            with contextlib.suppress(FileNotFoundError, ValueError):
                if json.loads(self.store.get(DRIVER_KEY))["pid"] == self.process.pid:
                    self.held = time.monotonic()
            return
        if not self._random:
            return
        kill = self._random[0]
        if not self._due(kill):
            return
        if kill.victim == "driver":
            self.process.kill()
        elif not self._kill_an_actor():
            return
        self._struck.append(self._random.pop(0))

    def _due(self, kill: Kill) -> bool:
        if kill.victim == "actor":
            return self._progress() >= 0.7 * kill.moment
        if self._with_actors:  # which come first
            return all(map(self._acted, self._named)) and self._progress() >= 0.3 + 0.5 * kill.moment
        if time.monotonic() - (self.held or 0) >= kill.moment * self._work_s:
            return True
        # by its units too, where they are known: the clean run that `work_s` is from may have had a slower machine
        return self._pending > 0 and self._progress() >= kill.moment

    def _acted(self, kill: Kill) -> bool:
        return any(name.startswith(f"{kill.point}-kill-{kill.passage}") for name in os.listdir(self.once))

    def _count(self) -> int:
        return sum(1 for _ in self.store.list("_dinoray/receipts"))

    def _progress(self) -> float:
        """Share of the units that were pending which are done now."""
        return (self._count() - self._receipts) / max(1, self._pending)

    def _kill_an_actor(self) -> bool:
        """SIGKILL to one of the processes that are at work on units and descend from the driver."""
        try:
            family = {child.pid: child for child in psutil.Process(self.process.pid).children(recursive=True)}
        except psutil.NoSuchProcess:
            return False
        working = set()
        for key, _ in self.store.list("_dinoray/attempts"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                working.add(json.loads(self.store.get(key))["pid"])
        alive = sorted(working & family.keys())
        if not alive:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            family[self.rng.choice(alive)].kill()
            return True
        return False
