"""What a check found: one line each, `ok`, `warn` or `fail`, with one piece of advice where something is to be done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line: how bad, about what, what was found, and what to do about it (empty when nothing is)."""

    level: Level
    subject: str
    text: str
    advice: str = ""

    def line(self, width: int = 0) -> str:
        """The line that is printed; subjects are padded to `width`."""
        return f"{self.level:<4}  {self.subject:<{width}}  {self.text}" + (f" -> {self.advice}" if self.advice else "")


def lines(findings: Iterable[Finding]) -> list[str]:
    """All lines with their subjects aligned."""
    findings = list(findings)
    width = max((len(f.subject) for f in findings), default=0)
    return [f.line(width) for f in findings]


def verdict(findings: Iterable[Finding]) -> str:
    """The last line: how many of each."""
    levels = [f.level for f in findings]
    counts = ", ".join(f"{levels.count(level)} {level}" for level in ("ok", "warn", "fail"))
    return f"verdict: {'fail' if 'fail' in levels else 'ok'} ({counts})"


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000: `1.5 GB`."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")
