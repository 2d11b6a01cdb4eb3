"""The command line: every command builds a job or names an output, and calls one function.

Exit codes: 0 complete; 2 bad request (nothing was run); 3 complete except quarantined items; 1 anything else.
"""

from __future__ import annotations

import sys

import typer

from dinoray.cli import (  # noqa: F401 (their commands register themselves)
    chaos,
    doctor,
    evaluate,
    export,
    jobs,
    outputs,
    segment,
    train,
)
from dinoray.cli.app import app, guarded, say, with_signals
from dinoray.cli.jobs import job_command, run_extract_images, run_extract_volume, run_job_script
from dinoray.cli.segment import run_segment_cells, run_segment_volume

__all__ = ["app", "guarded", "job_command", "main", "run_extract_images", "run_extract_volume", "run_job_script",
           "run_segment_cells", "run_segment_volume", "say", "with_signals"]


def main() -> None:
    """Entry point of the `dinoray` command."""

    def call() -> int:
        try:
            return int(app(standalone_mode=False) or 0)
        except typer.Exit as stop:
            return stop.exit_code
        except Exception as error:
            if not hasattr(error, "format_message"):  # not one of click's usage errors
                raise
            print(f"{error.format_message()}\n  try: dinoray --help", file=sys.stderr, flush=True)
            return 2

    sys.exit(guarded(call))
