"""Progress counted from receipts: a live line on a terminal, one line every 30 s otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Live

from dinoray.ledger import Tally

LINE_EVERY_S = 30.0


class Progress:
    """`begin` a phase with its total of items, `advance` with the running tally, `end`; use as a context manager."""

    def __init__(self, say: Callable[[str], None], *, line_every_s: float = LINE_EVERY_S):
        self._say, self._every = say, line_every_s
        self._live: Live | None = None
        self._task = None
        self._phase, self._total, self._before, self._began, self._last = "", 0, 0, 0.0, 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    def begin(self, phase: str, *, total: int, tally: Tally) -> None:
        """Start a phase; what `tally` holds already was done by earlier runs and does not count for the pace."""
        self.end()
        self._phase, self._total, self._before = phase, total, tally.items
        self._began = self._last = time.monotonic()
        if sys.stderr.isatty():
            self._live = Live(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                              TextColumn("{task.fields[pace]}"), console=Console(stderr=True), transient=True)
            self._task = self._live.add_task(phase, total=total, completed=tally.items, pace="starting")
            self._live.start()

    def end(self) -> None:
        """End the phase: the live line goes, so that other lines do not run into it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def advance(self, tally: Tally) -> None:
        """Show the tally."""
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=tally.items, pace=self.pace(tally, now))
        elif now - self._last >= self._every:
            self._last = now
            self._say(f"{self._phase}: {tally.items}/{self._total}  {self.pace(tally, now)}")

    def pace(self, tally: Tally, now: float) -> str:
        """`items/s, time left, quarantined`, from this run's receipts alone."""
        rate = (tally.items - self._before) / max(1e-9, now - self._began)
        left = (self._total - tally.items) / rate if rate > 0 else float("inf")
        text = f"{rate:.1f} items/s, {duration(left)} left"
        return text + (f", {tally.quarantined} quarantined" if tally.quarantined else "")


def duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s`, `12 s`, or `?` when unknown."""
    if seconds == float("inf"):
        return "?"
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
