"""One driver per output: `_dinoray/driver.json` says who works on it, and `_dinoray/stop.json` asks it to end.

The file is made by put-if-absent and rewritten every HEARTBEAT_S with a growing count. Who finds it there
takes it over at once when it names a process of this machine that is gone, or after STALE_S in which it did
not change (by the reader's own clock, so that clocks need not agree); else it is refused. The lock keeps two
drivers from wasting each other's time and from planning at once; results do not depend on it: whoever
writes a unit writes the same bytes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from dinoray.errors import BadRequest, DinorayError, Stopped, SystemicError
from dinoray.io.stores import LocalStore, Store

logger = logging.getLogger(__name__)

KEY = "_dinoray/driver.json"
STOP_KEY = "_dinoray/stop.json"
HEARTBEAT_S = 15.0
STALE_S = 60.0
POLL_S = 2.0
"""How often a driver looks whether it is asked to stop (five times as long on remote stores)."""

CLOCK_SLACK_S = 30.0
"""Start times of one process may differ by this when the clock was set in between."""

_held: list[Driver] = []
"""The drivers of this process: a signal handler gives them up."""


class OutputHeld(BadRequest):
    """Another driver works on this output (exit code 2)."""


class Driver:
    """Holds an output for this process; use as a context manager.

    Raises OutputHeld when another driver is alive. `takeover` takes the output without waiting to see.
    """

    def __init__(self, store: Store, command: str, say: Callable[[str], None], *, takeover: bool = False,
                 stale_s: float = STALE_S, heartbeat_s: float = HEARTBEAT_S):
        self.store, self.say, self.takeover = store, say, takeover
        self.stale_s, self.heartbeat_s = stale_s, heartbeat_s
        self.note = {"token": uuid.uuid4().hex, "command": command, "beat": 0,
                     "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **_process()}
        self.leave: Callable[[str], None] | None = None
        """What to do when asked to stop at once (`dinoray stop` without --drain); set by the command line."""
        self.drain_note = "units in work are finished, no new ones are begun"
        """What a drain means for this kind of run."""
        self.drained_note = "after the units that were in work"
        """When a run of this kind ends that was asked to."""
        self._lost = ""
        self._drain = False
        self._looking = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="driver")

    def __enter__(self) -> Driver:
        self._acquire()
        self.store.delete(STOP_KEY)  # it was meant for an earlier driver
        _held.append(self)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        _held.remove(self)
        try:
            self.release()
        except (DinorayError, OSError) as trouble:
            if error is None:
                raise
            logger.warning("the output could not be released: %s", trouble)  # the first error tells the cause

    @property
    def token(self) -> str:
        """What names this driver in driver.json."""
        return str(self.note["token"])

    def check_lost(self) -> None:
        """Raise SystemicError when another driver took the output over."""
        if self._lost:
            raise SystemicError(f"another driver took this output over: {self._lost}", where=self.store.url,
                                todo="let it finish; its results are the same")

    def check(self) -> None:
        """Raise when this run must end: as `check_lost`, and Stopped after `dinoray stop --drain`."""
        self.check_lost()
        self._look_for_stop()  # the runners may have seen it before our own thread did
        if self._drain:
            raise Stopped(f"stopped as asked, {self.drained_note}", where=self.store.url,
                          todo="run the same command again: it resumes")

    def release(self) -> None:
        """Give the output up, if it is still ours."""
        found = _read(self.store)
        if found is not None and found.get("token") == self.note["token"]:
            self.store.delete(KEY)

    # ---------------------------------------------------------------- taking it

    def _acquire(self) -> None:
        seen, since, said = None, 0.0, False
        while not self.store.put_if_absent(KEY, self._text()):
            found = _read(self.store)
            if found is None:
                continue  # it was given up in between
            if self.takeover or _is_dead(found):
                self._replace(found)
                return
            if _same_machine(found):
                self._refuse(found)
            if seen is None:
                seen, since = found, time.monotonic()
            elif found != seen:
                self._refuse(found)
            elif time.monotonic() - since >= self.stale_s:
                self._replace(found)
                return
            if not said:
                self.say(f"this output was being worked on by {describe(found)}; waiting up to {self.stale_s:.0f} s to see "
                         "whether that driver is alive (--takeover does not wait)")
                said = True
            time.sleep(min(1.0, self.stale_s / 10))

    def _replace(self, found: dict[str, Any]) -> None:
        """Take the place of a driver that is gone. Two that do so at once: the one whose note stays has it."""
        logger.info("taking over from %s", describe(found))
        self.store.put(KEY, self._text())
        if not _is_dead(found):
            time.sleep(min(1.0, self.stale_s / 10))  # time for a rival to overwrite ours
        now = _read(self.store)
        if now is None or now.get("token") != self.note["token"]:
            self._refuse(now or found)

    def _refuse(self, found: dict[str, Any]) -> None:
        raise _held_by(found, self.store)

    def _text(self) -> bytes:
        return json.dumps(self.note, indent=1, sort_keys=True).encode()

    # ---------------------------------------------------------------- keeping it

    def _run(self) -> None:
        poll = POLL_S if isinstance(self.store, LocalStore) else 5 * POLL_S
        last = time.monotonic()
        while not self._end.wait(min(poll, self.heartbeat_s)):
            try:
                if time.monotonic() - last >= self.heartbeat_s:
                    last = time.monotonic()
                    found = _read(self.store)
                    if found is not None and found.get("token") != self.note["token"]:
                        self._lost = describe(found)
                        return
                    self.note["beat"] += 1
                    self.store.put(KEY, self._text())
                self._look_for_stop()
            except (DinorayError, OSError) as error:  # the work itself will say what is wrong with the storage
                logger.warning("the driver's heartbeat failed: %s", error)

    def _look_for_stop(self) -> None:
        with self._looking:
            mode = None if self._drain else stop_mode(self.store)
            if mode is None:
                return
            if mode != "drain" and self.leave is not None:
                self.leave("`dinoray stop`")
            self._drain = True
            self.say(f"asked to stop: {self.drain_note}")


def refuse_if_held(store: Store, takeover: bool = False) -> None:
    """Raise OutputHeld at once when a driver of this machine is alive on the output; Driver itself looks closer."""
    found = _read(store)
    if found and not takeover and _same_machine(found) and not _is_dead(found):
        raise _held_by(found, store)


def _held_by(found: dict[str, Any], store: Store) -> OutputHeld:
    return OutputHeld(f"another driver works on this output: {describe(found)}", where=store.url,
                      todo="wait for it, end it with `dinoray stop`, or use --takeover if you know that it is gone")


def give_up(timeout_s: float = 1.0) -> None:
    """Release what this process holds, for at most `timeout_s`: called while it is being ended."""

    def release() -> None:
        for driver in _held:
            with contextlib.suppress(DinorayError, OSError):  # the next driver finds a process that is gone
                driver.release()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    thread.join(timeout_s)


def stop_mode(store: Store) -> str | None:
    """`drain` or `now` when the driver of this output is asked to stop, else None."""
    try:
        return json.loads(store.get(STOP_KEY)).get("mode", "drain")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        return "drain"  # the file is there: whoever made it wants the run to end


def stop(store: Store, *, drain: bool, say: Callable[[str], None], timeout_s: float | None = None,
         work: str = "the units in work") -> bool:
    """Ask the driver of an output to stop and wait until it has; False when `timeout_s` passed first. `work` names what a
    drain waits for."""
    found = _read(store)
    if found is None or _is_dead(found):
        say("no run is at work on this output" + (f" (the last one, {describe(found)}, is gone)" if found else ""))
        return True
    store.put(STOP_KEY, json.dumps({"mode": "drain" if drain else "now"}).encode())
    say(f"asked {describe(found)} to stop" + (f" after {work}" if drain else " now"))
    began, changed, seen = time.monotonic(), time.monotonic(), found
    while (now := _read(store)) is not None and now.get("token") == found.get("token") and not _is_dead(now):
        if now != seen:
            seen, changed = now, time.monotonic()
        if time.monotonic() - changed > STALE_S:
            say(f"the driver has given no sign for {STALE_S:.0f} s: it is gone")
            return True
        if timeout_s is not None and time.monotonic() - began > timeout_s:
            return False
        time.sleep(0.5)
    say("stopped")
    return True


def at_work(store: Store) -> str:
    """Who holds the output now, in words; empty when nobody does that is not known to be gone."""
    found = _read(store)
    return describe(found) if found and not _is_dead(found) else ""


def token_of_holder(store: Store) -> str:
    """What names the driver that holds the output now; empty when none does."""
    return str((_read(store) or {}).get("token", ""))


def describe(note: dict[str, Any]) -> str:
    """`process 123 on HOST since TIME`."""
    return f"process {note.get('pid', '?')} on {note.get('host', '?')} since {note.get('since', '?')}"


def _read(store: Store) -> dict[str, Any] | None:
    try:
        note = json.loads(store.get(KEY))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}  # no driver of ours writes such a file: it never changes and goes stale
    return note if isinstance(note, dict) else {}


def _process() -> dict[str, Any]:
    """What tells this process from all others, also after its number was used again or in another container."""
    me = psutil.Process()
    return {"host": socket.gethostname(), "pid": me.pid, "started": round(me.create_time(), 2), "machine": _machine()}


def _machine() -> str:
    """This boot of this machine and the namespace that its process numbers belong to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {round(psutil.boot_time())}"


def _same_machine(note: dict[str, Any]) -> bool:
    return note.get("machine") == _machine()


def _is_dead(note: dict[str, Any]) -> bool:
    """Whether the note names a process of this machine that is gone."""
    if not _same_machine(note):
        return False
    try:
        return abs(psutil.Process(int(note["pid"])).create_time() - float(note["started"])) > CLOCK_SLACK_S
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True
