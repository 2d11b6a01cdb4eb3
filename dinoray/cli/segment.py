"""`dinoray segment cells` and `volume`: the masks of a collection, the labels of a volume, and the same jobs as scripts."""

from __future__ import annotations

from dinoray.cli.app import say, segment, with_signals
from dinoray.cli.jobs import job_command
from dinoray.config import SegmentCellsJob, SegmentVolumeJob


def run_segment_cells(job: SegmentCellsJob) -> int:
    """Run a segmentation with signals handled; returns the exit code."""
    from dinoray.extraction import segment_cells
    from dinoray.request import absolute, resume_command

    leave = with_signals(resume_command(absolute(job)))
    return segment_cells(job, say, leave=leave).exit_code


def run_segment_volume(job: SegmentVolumeJob) -> int:
    """Run a segmentation of a volume with signals handled; returns the exit code."""
    from dinoray.request import absolute, resume_command
    from dinoray.volume_segmentation import segment_volume

    leave = with_signals(resume_command(absolute(job)))
    return segment_volume(job, say, leave=leave).exit_code


segment.command("volume")(job_command(SegmentVolumeJob, run_segment_volume))
segment.command("cells")(job_command(SegmentCellsJob, run_segment_cells))
