"""Named points at which a test can end or trouble this process: the proof behind "killed and resumed".

`DINORAY_FAILPOINTS="unit.receipt=kill@3,plan.seal=kill"` acts at the third passage of `unit.receipt` and at the
first of `plan.seal`. Actions: `kill` (SIGKILL to this process, nothing is flushed), `sleep:SECONDS`, and
`raise` (an OSError with errno EIO). With `DINORAY_FAILPOINT_DIR=FOLDER` each entry acts once among all processes
that share the folder, so that a restarted actor goes on; passages are counted per process. Without the
variable a point costs one dictionary look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

from dinoray.errors import BadRequest

POINTS = {
    "plan.request": "after job.json, before anything is planned",
    "plan.file": "after a file of the plan, before its index",
    "plan.seal": "just before the index that seals a plan",
    "unit.begin": "after the attempt of a unit was marked, before its work",
    "unit.data": "before the first object of a unit is stored",
    "unit.receipt": "between the data of a unit and its receipt",
    "unit.done": "after the receipt of a unit",
    "stats.begin": "as unit.begin, in the statistics pass", "stats.data": "as unit.data, in the statistics pass",
    "stats.receipt": "as unit.receipt, in the statistics pass", "stats.done": "as unit.done, in the statistics pass",
    "run.verify": "after the last unit, before the output is verified",
}
"""Every point and where it lies."""
VARIABLE, ONCE_FOLDER = "DINORAY_FAILPOINTS", "DINORAY_FAILPOINT_DIR"

_passed: Counter[str] = Counter()


def reach(point: str) -> None:
    """Pass a point; acts when `DINORAY_FAILPOINTS` asks for it."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    _passed[point] += 1
    for name, action, passage in parse(text):
        if name == point and passage == _passed[point] and _first(f"{name}={action}@{passage}"):
            _act(action, point)


def parse(text: str) -> list[tuple[str, str, int]]:
    """(point, action, passage) of each entry. Raises BadRequest for what is none."""
    entries = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, rest = part.partition("=")
        action, _, passage = rest.partition("@")
        if name not in POINTS or action.split(":")[0] not in ("kill", "sleep", "raise") or not (passage or "1").isdecimal():
            raise BadRequest(f"not a failpoint: {part!r}", where=VARIABLE,
                             todo=f"POINT=kill|raise|sleep:S[@N]; points: {', '.join(POINTS)}")
        entries.append((name, action, int(passage or 1)))
    return entries


def _first(entry: str) -> bool:
    """Whether no process has acted on this entry yet."""
    folder = os.environ.get(ONCE_FOLDER)
    if not folder:
        return True
    try:
        os.close(os.open(os.path.join(folder, entry.replace("/", "_")), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
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
