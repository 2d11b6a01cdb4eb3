"""Named points at which a test can end or trouble this process: the proof behind "killed and resumed".

`DINORAY_FAILPOINTS="unit.receipt=kill@3,plan.seal=kill"` acts at the third passage of `unit.receipt` and at the
first of `plan.seal`; `item.load~bad.png=kill@*` acts whenever an item whose name holds `bad.png` passes.
Actions: `kill` (SIGKILL to this process, nothing is flushed), `sleep:SECONDS`, and `raise` (an OSError with errno
EIO). With `DINORAY_FAILPOINT_DIR=FOLDER` each entry (but those with `@*`) acts once among all processes that share
the folder, so that a restarted actor goes on; passages are counted per process. Without the variable a point
costs one dictionary look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass

from dinoray.errors import BadRequest

POINTS = {
    "plan.request": "after job.json, before anything is planned",
    "plan.arrays": "after the metadata of a volume's arrays, before its units are planned",
    "plan.file": "after a file of the plan, before its index",
    "plan.seal": "just before the index that seals a plan",
    "item.load": "before an item is read",
    "unit.begin": "after the attempt of a unit was marked, before its work",
    "unit.data": "before the first object of a unit is stored",
    "unit.receipt": "between the data of a unit and its receipt",
    "unit.done": "after the receipt of a unit",
    "stats.begin": "as unit.begin, in the statistics pass", "stats.data": "as unit.data, in the statistics pass",
    "stats.receipt": "as unit.receipt, in the statistics pass", "stats.done": "as unit.done, in the statistics pass",
    "volume.begin": "as unit.begin, for the units of a volume", "volume.data": "as unit.data, for the units of a volume",
    "volume.receipt": "as unit.receipt, for the units of a volume", "volume.done": "as unit.done, for the units of a volume",
    "train.step": "before each step of a training", "train.state": "between a saved state of a training and what points at it",
    "train.checkpoint": "before the checkpoint folder of a training is written",
    "run.verify": "after the last unit, before the output is verified",
}
"""Every point and where it lies."""
VARIABLE, ONCE_FOLDER = "DINORAY_FAILPOINTS", "DINORAY_FAILPOINT_DIR"

_passed: Counter[Entry] = Counter()


def reach(point: str, detail: str = "") -> None:
    """Pass a point; acts when `DINORAY_FAILPOINTS` asks for it. `detail`: what passes (an item's id)."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    for entry in parse(text):
        if entry.point != point or entry.detail not in detail:
            continue
        _passed[entry] += 1
        if entry.passage == 0 or (entry.passage == _passed[entry] and _first(entry)):
            _act(entry.action, point)


@dataclass(frozen=True)
class Entry:
    """One wish: at this passage (0: at each) of a point by what holds `detail`."""

    point: str
    detail: str
    action: str
    passage: int


def parse(text: str) -> list[Entry]:
    """The entries of a variable's text. Raises BadRequest for what is none."""
    entries = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, rest = part.partition("=")
        action, _, passage = rest.partition("@")
        point, _, detail = name.partition("~")
        known = point in POINTS and action.split(":")[0] in ("kill", "sleep", "raise")
        if not known or not (passage in ("", "*") or passage.isdecimal()):
            raise BadRequest(f"not a failpoint: {part!r}", where=VARIABLE,
                             todo=f"POINT[~TEXT]=kill|raise|sleep:S[@N|@*]; points: {', '.join(POINTS)}")
        entries.append(Entry(point, detail, action, 0 if passage == "*" else int(passage or 1)))
    return entries


def _first(entry: Entry) -> bool:
    """Whether no process has acted on this entry yet."""
    folder = os.environ.get(ONCE_FOLDER)
    if not folder:
        return True
    detail = "".join(f"{byte:02x}" for byte in entry.detail.encode())
    marker = os.path.join(folder, f"{entry.point}-{entry.action}-{entry.passage}" + (f"-{detail}" if detail else ""))
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _act(action: str, point: str) -> None:
    kind, _, value = action.partition(":")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "sleep":
        time.sleep(float(value or 1))
    if kind == "raise":
        raise OSError(errno.EIO, f"failpoint {point}")
