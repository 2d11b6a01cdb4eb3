"""`dinoray segment cells`: the masks of a collection, and the same job as a script (jobs/segment_cells.py)."""

from __future__ import annotations

from dinoray.cli.app import say, segment, with_signals
from dinoray.cli.jobs import job_command
from dinoray.config import SegmentCellsJob


def run_segment_cells(job: SegmentCellsJob) -> int:
    """Run a segmentation with signals handled; returns the exit code."""
    from dinoray.extraction import segment_cells
    from dinoray.request import absolute, resume_command

    leave = with_signals(resume_command(absolute(job)))
    return segment_cells(job, say, leave=leave).exit_code


segment.command("cells")(job_command(SegmentCellsJob, run_segment_cells))
