"""The TensorBoard file of one run of a training, with a flush that can be relied on (tensorboardX's own writer hands events
to a thread, and its flush does not wait for it)."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Board:
    """Scalars into a file of its own below `folder`, which TensorBoard reads together with those of earlier runs."""

    def __init__(self, folder: Path, first_step: int):
        """`first_step`: what earlier runs said from this step on is hidden, because it is computed again."""
        # TensorBoard reads files by name, which begins with the second: two of one second must not share a name
        self._file = EventsWriter(str(folder / "events"), f".{first_step:09d}.{uuid.uuid4().hex[:8]}")
        self._file.write_event(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, tag: str, value: float, step: int) -> None:
        """One point."""
        self._file.write_event(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))

    def flush(self) -> None:
        """All points are in the file when this returns."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
