"""What every command shares: the typer app, printing, signals, and errors turned into exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from dinoray.driver import give_up
from dinoray.errors import DinorayError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Image collections and volumes of any size through DINOv3, with output that can be trusted.")
extract = typer.Typer(no_args_is_help=True, help="Features of images, cells and volumes.")
app.add_typer(extract, name="extract")
segment = typer.Typer(no_args_is_help=True, help="Cell instances, by a checkpoint that `dinoray train` made.")
app.add_typer(segment, name="segment")

Out = Annotated[str, typer.Argument(help="Output folder or URL of a run.")]


def say(line: str) -> None:
    """Print a line at once, whatever the output is connected to."""
    print(line, flush=True)


def with_signals(resume: str) -> Callable[[str], None]:
    """On SIGTERM and Ctrl-C, or when the returned function is called: say how to resume and leave at once.

    Units in flight are abandoned: without a receipt they are redone, and everything a killed process may leave is
    replaced or removed then.
    """

    def leave(why: str) -> None:
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h")  # the live line hides the cursor
        os.write(1, f"\nstopped by {why}; resume with: {resume}\n".encode())
        give_up()
        os._exit(1)  # the local Ray and its actors end with this process; waiting for them could take minutes

    def on_signal(number: int, frame: FrameType | None) -> None:
        del frame
        leave(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return leave


def guarded(call: Callable[[], int]) -> int:
    """Run and turn our own errors into a message and their exit code; others keep their traceback (exit 1)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for name in ("tifffile", "imagecodecs", "PIL"):  # one line per odd file; what matters becomes a quarantine reason
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return call()
    except DinorayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
