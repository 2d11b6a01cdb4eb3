"""`dinoray chaos`: the kill test on this machine."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from dinoray.cli.app import app, say


@app.command()
def chaos(kills: Annotated[int, typer.Option(help="How many kills.")] = 20,
          seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
          out: Annotated[str | None, typer.Option(help="A new folder for the outputs [a temporary one].")] = None,
          model: Annotated[str, typer.Option(help="Variant; its weights are random.")] = "vitt16",
          source: Annotated[str | None, typer.Option(help="Folder of images [small pictures of scikit-image].")] = None,
          limit: Annotated[int, typer.Option(help="Images taken of --source.")] = 60,
          ray: Annotated[bool, typer.Option("--ray/--no-ray", help="With actors of a local Ray, which are killed too.")] = False,
          keep: Annotated[bool, typer.Option("--keep", help="Keep the outputs.")] = False) -> None:
    """Kill a run again and again, resume it with the same command, and compare the result with a clean run, byte for byte."""
    from dinoray.chaos.command import ChaosSettings, run_chaos

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that the run at work ends too
    raise typer.Exit(run_chaos(ChaosSettings(kills=kills, seed=seed, out=out, model=model, source=source, limit=limit,
                                             ray=ray, keep=keep), say))
