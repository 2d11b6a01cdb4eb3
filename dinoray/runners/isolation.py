"""Poison isolation: a unit that was started twice without a receipt is run in a child process, item by item.

The child first works on each item alone, telling the parent before each (and whenever it has moved), then on
the whole unit without the items that are known to be bad. An item is quarantined (`crashed`, or `timeout`) only
when the child dies on it twice while the parent lives: whoever kills parents (lost nodes, preemption, `kill -9`)
quarantines nothing. The rest of the unit is computed as ever, in the same batches.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dinoray.errors import DinorayError, ItemError, TransientError
from dinoray.ledger import Receipt
from dinoray.runners.base import Runner
from dinoray.runners.build import RunnerSpec, build_runner

DEATHS = 2
"""Deaths of the child on one item (or on the whole unit, or before its first item) that are enough."""
BEAT_S = 1.0
BIRTH_TIMEOUT_S = 600.0
"""A child may take so long to load its model before it gives its first sign (longer where items have longer)."""


@dataclass
class _Search:
    """What is known of a unit so far."""

    start: int = 0
    """First item that has not passed alone."""
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Position -> (reason, message) of items that are quarantined."""
    deaths: Counter[int | str] = field(default_factory=Counter)
    """By position, or "unit" (while all items together), or "birth" (before the first item)."""


def run_isolated(spec: RunnerSpec, number: int, attempt: int, beat: Callable[[], None], *, item_timeout_s: float) -> Receipt:
    """Run a unit in children until it has its receipt.

    Raises TransientError when the child dies though every item passes alone, and what the child's runner raised.
    """
    search = _Search()
    while True:
        at: int | str = "birth"
        timed_out = 0.0
        with _Child(spec, number, attempt, search) as child:
            for message in child.messages(beat, item_timeout_s):
                if "receipt" in message:
                    return Receipt.from_json(message["receipt"])
                if "error" in message:
                    raise pickle.loads(bytes.fromhex(message["error"]))  # noqa: S301 (our own child wrote it)
                timed_out = message.get("timeout", 0.0)
                at = message.get("item", message.get("phase", at))
        how = f"no sign of life for {timed_out:.0f} s" if timed_out else _how(child.returncode)
        search.deaths[at] += 1
        if isinstance(at, int):
            twice = search.deaths[at] >= DEATHS
            search.start = at + 1 if twice else at
            if twice:
                search.bad[at] = ("timeout" if timed_out else "crashed",
                                  f"the process that worked on it alone ended twice ({how})")
        elif search.deaths[at] >= DEATHS:
            when = "before its first item" if at == "birth" else "on all items together, each of which passes alone"
            raise TransientError(f"the process of an isolated unit died {when} ({how})", where=f"{spec.out} unit {number}",
                                 todo="look for what ends processes here (memory?), then run the same command again")


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class _Child:
    """A child process at work on one unit."""

    def __init__(self, spec: RunnerSpec, number: int, attempt: int, search: _Search):
        read, write = os.pipe()
        request = {"spec": asdict(spec), "number": number, "attempt": attempt, "start": search.start, "bad": search.bad}
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen([sys.executable, "-m", "dinoray.runners.isolation", str(write)], env=env,
                                         stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(write,))
        os.close(write)
        self._pipe = os.fdopen(read, "rb")
        with contextlib.suppress(BrokenPipeError):  # it died at birth, which its exit code will tell
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()  # stays open: its end tells the child that its parent is gone

    @property
    def returncode(self) -> int:
        """Exit code after the child ended, negative for a signal."""
        return self._process.wait()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        with contextlib.suppress(BrokenPipeError):  # unread bytes for a child that is gone
            self._process.stdin.close()

    def messages(self, beat: Callable[[], None], timeout_s: float) -> Iterator[dict[str, Any]]:
        """What the child says until it ends; {"timeout": seconds}, and its end, after `timeout_s` of silence."""
        os.set_blocking(self._pipe.fileno(), False)
        buffer, last, limit = b"", time.monotonic(), max(timeout_s, BIRTH_TIMEOUT_S)
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while True:
                beat()
                if selector.select(BEAT_S):
                    data = self._pipe.read()
                    if not data:
                        self._process.wait()
                        return
                    buffer, last, limit = buffer + data, time.monotonic(), timeout_s
                    *lines, buffer = buffer.split(b"\n")
                    yield from (json.loads(line) for line in lines)
                elif time.monotonic() - last > limit:
                    yield {"timeout": limit}
                    return


def _serve(pipe: int) -> None:
    """The child: work as asked on stdin, tell on `pipe`."""
    out = os.fdopen(pipe, "wb", buffering=0)

    one_at_a_time = threading.Lock()  # a long line may be written in pieces

    def tell(**message: Any) -> None:
        with one_at_a_time:
            out.write(json.dumps(message).encode() + b"\n")

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        runner = build_runner(RunnerSpec(**request["spec"]))
        unit = runner.plan.unit(request["number"])
        threading.Thread(target=_tell_beats, args=(runner, tell), daemon=True).start()
        bad = {int(k): ItemError(*v, where=unit.items[int(k)].item_id) for k, v in request["bad"].items()}
        for position in range(request["start"], len(unit.items)):
            tell(item=position)
            runner.try_item(unit, position)
        tell(phase="unit")
        tell(receipt=runner.run_alone(unit, request["attempt"], bad).to_json())
    except DinorayError as error:
        tell(error=pickle.dumps(error).hex())
    os._exit(0)  # threads that a decoder left behind must not keep the child


def _tell_beats(runner: Runner, tell: Callable[..., None]) -> None:
    """Give a sign whenever the runner has moved: a large item, and the whole unit, may take longer than an item's time."""
    seen = runner.beats
    while True:
        time.sleep(BEAT_S)
        if runner.beats != seen:
            seen = runner.beats
            tell(beat=seen)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
