"""Commands on the output of a run: look at it, prove it whole, repair it, add to it."""

from __future__ import annotations

from typing import Annotated

import typer

from dinoray.cli.app import Out, app, say
from dinoray.errors import BadRequest


@app.command()
def status(out: Out) -> None:
    """How far a run is: units, items, quarantine by reason, stages."""
    from dinoray.status import status_lines

    for line in status_lines(out):
        say(line)


@app.command()
def verify(out: Out, deep: Annotated[bool, typer.Option("--deep", help="Read everything and compare checksums.")] = False,
           fast: Annotated[bool, typer.Option("--fast", help="Listing and footers only (the default).")] = False) -> None:
    """Prove that an output is whole: every unit has its receipt, every object is what its receipt says."""
    from dinoray.verification import open_run, verify_deep, verify_fast

    if deep and fast:
        raise BadRequest("--deep and --fast exclude each other", todo="give one of them; without one it is --fast")
    store, plan, ledger = open_run(out)
    totals = verify_deep(store, plan, ledger) if deep else verify_fast(store, plan, ledger, write_success=True)
    say(f"whole: {totals['items']} images in {totals['units']} units, {totals['rows']} rows, "
        f"{totals['quarantined']} quarantined, {totals['bytes']} bytes" + (", all checksums match" if deep else ""))


@app.command()
def report(out: Out, to: Annotated[str | None, typer.Option("--to", help="File to write [OUT/report.html].")] = None) -> None:
    """One self-contained HTML page: pictures, PCA maps, neighbours, quarantine, what limits the run."""
    from dinoray.report.html import write_report

    say(f"report {write_report(out, to)}")
