"""Commands on the output of a run: look at it, prove it whole, repair it, add to it."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from dinoray.cli.app import Out, app, say, with_signals
from dinoray.errors import BadRequest, SystemicError
from dinoray.wording import count_bytes, plural


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
    from dinoray.generations import unfinished_notes
    from dinoray.verification import open_run, verify_deep, verify_fast

    if deep and fast:
        raise BadRequest("--deep and --fast exclude each other", todo="give one of them; without one it is --fast")
    store = open_run(out)[0]
    note = ""
    try:
        totals = verify_deep(store) if deep else verify_fast(store, write_success=True)
    except SystemicError as error:  # a read-only copy is as whole as any
        totals, note = verify_fast(store, write_success=False), f"\nnot marked with _SUCCESS: {error.what} [{error.where}]"
    noun, rows = {"volume": ("slab", "token"), "volume-labels": ("block", "voxel"),
                  "cell-masks": ("image", "cell")}.get(totals["kind"], ("image", "row"))
    say(f"whole: {plural(totals['items'], noun)} in {plural(totals['units'], 'unit')}, {plural(totals['rows'], rows)}, "
        f"{totals['quarantined']} quarantined, {count_bytes(totals['bytes'])}" + (", all checksums match" if deep else "") + note)
    for line in unfinished_notes(store):
        say(line)


@app.command()
def report(out: Out, to: Annotated[str | None, typer.Option("--to", help="File to write [OUT/report.html].")] = None) -> None:
    """One self-contained HTML page: plate maps, leakage, pictures, PCA maps, quarantine, what limits the run."""
    from dinoray.report.html import write_report

    say(f"report {write_report(out, to)}")


Workers = Annotated[str | None, typer.Option(help="auto, a number of actors, or MIN,MAX [as before].")]
NoRay = Annotated[bool | None, typer.Option("--no-ray/--ray", help="In this process, without Ray [as before].",
                                            show_default=False)]
Checkpoint = Annotated[str | None, typer.Option(help="Of a segmentation: where the same checkpoint lies now, if it was moved.")]
Weights = Annotated[str | None, typer.Option(help="Where the same weights lie now, if they were moved.")]
Fraction = Annotated[float | None, typer.Option(help="Share of quarantined items that stops the run [as before].")]
Takeover = Annotated[bool, typer.Option("--takeover", help="Take the output from a driver that you know to be gone.")]


@app.command()
def retry(out: Out, reason: Annotated[list[str] | None, typer.Option("--reason", help="Only these reasons [all].")] = None,
          workers: Workers = None, no_ray: NoRay = None, weights: Weights = None, checkpoint: Checkpoint = None,
          max_failed_fraction: Fraction = None, takeover: Takeover = False) -> None:
    """Try quarantined items again, as their files are now; what was committed stays as it is."""
    from dinoray.repair import retry

    leave = with_signals(shlex.join(["dinoray", "retry", out]))
    outcome = retry(out, reasons=[r.strip() for text in reason or () for r in text.split(",")], say=say, leave=leave,
                    workers=workers, no_ray=no_ray, weights=weights, checkpoint=checkpoint,
                    max_failed_fraction=max_failed_fraction, takeover=takeover)
    raise typer.Exit(outcome.exit_code)


@app.command()
def extend(out: Out, sources: Annotated[list[str], typer.Argument(help="What to add: folders, files, globs, URLs, manifests.")],
           labels: Annotated[str | None, typer.Option(help="Of cells: the label images of these inputs [as before].")] = None,
           centroids: Annotated[str | None, typer.Option(help="Of cells: the table of these inputs [as before].")] = None,
           workers: Workers = None, no_ray: NoRay = None, weights: Weights = None, checkpoint: Checkpoint = None,
           max_failed_fraction: Fraction = None, takeover: Takeover = False) -> None:
    """Add new inputs to a run, with the settings it was made with; inputs that it holds already are passed over."""
    from dinoray.repair import extend

    leave = with_signals(shlex.join(["dinoray", "extend", out, *sources]))
    outcome = extend(out, sources, say=say, leave=leave, labels=labels, centroids=centroids, workers=workers, no_ray=no_ray,
                     weights=weights, checkpoint=checkpoint, max_failed_fraction=max_failed_fraction, takeover=takeover)
    raise typer.Exit(outcome.exit_code)


@app.command()
def stop(out: Out, drain: Annotated[bool, typer.Option("--drain", help="Finish the units or the step in work first.")] = False,
         timeout_s: Annotated[float | None, typer.Option(help="Wait no longer than this (s) for it to end.")] = None) -> None:
    """Ask the run that is at work on an output to end; running its command again resumes it."""
    from dinoray.driver import stop
    from dinoray.io.stores import open_store
    from dinoray.verification import training_record

    store = open_store(out)
    if not any(store.exists(f"_dinoray/{name}") for name in ("job.json", "driver.json")):
        raise BadRequest("this is not an output of dinoray", where=out, todo="give the --out of a run")
    work = "the step in work" if training_record(store) is not None else "the units in work"
    if not stop(store, drain=drain, say=say, timeout_s=timeout_s, work=work):
        say("it has not ended yet; the request stands")
        raise typer.Exit(1)
