"""The command line: every command builds a job or names an output, and calls one function.

Exit codes: 0 complete; 2 bad request (nothing was run); 3 complete except quarantined items; 1 anything else.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from dinoray.config import ExtractImagesJob, build_job, read_job_file
from dinoray.errors import BadRequest, DinorayError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Image collections and volumes of any size through DINOv3, with output that can be trusted.")
extract = typer.Typer(no_args_is_help=True, help="Features of images.")
app.add_typer(extract, name="extract")

Out = Annotated[str, typer.Argument(help="Output folder or URL of a run.")]


def say(line: str) -> None:
    """Print a line at once, whatever the output is connected to."""
    print(line, flush=True)


def job_command(model: type[ExtractImagesJob], run: Callable[[Any], int]) -> Callable[..., None]:
    """A typer command with one flag per job field; `--job FILE.yaml` gives defaults, flags override it."""

    def command(**given: Any) -> None:
        sources, file = given.pop("sources"), given.pop("job")
        values = read_job_file(file) if file else {}
        values |= {name: value for name, value in given.items() if value is not None}
        if sources:
            values["sources"] = sources
        if isinstance(values.get("where"), list):
            values["where"] = dict(_pair(text) for text in values["where"])
        raise typer.Exit(run(build_job(model, values)))

    parameters = [
        inspect.Parameter("sources", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None,
                          annotation=Annotated[list[str] | None, typer.Argument(help="Folders, files, globs, URLs, manifests.")]),
        inspect.Parameter("job", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None,
                          annotation=Annotated[str | None, typer.Option("--job", help="The job as YAML.")]),
    ]
    for name, field in model.model_fields.items():
        if name == "sources":
            continue
        kind, shown = _flag_type(field.annotation), field.get_default(call_default_factory=True)
        text = (field.description or "").replace("\n", " ") + ("" if shown in (None, {}) or field.is_required()
                                                                else f" [{_shown(shown)}]")
        choices = [str(c) for c in _choices(field.annotation)]
        if choices:
            text = f"{' | '.join(choices)}. {text}"
        names = ("--" + name.replace("_", "-"),)
        parameters.append(inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None,
            annotation=Annotated[kind | None, typer.Option(*names, help=text, show_default=False)]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = (model.__doc__ or "").split(":")[0] + "."
    return command


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of one inside a tuple."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for inner in get_args(annotation) if (found := _choices(inner))), ())


def _shown(value: Any) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _flag_type(annotation: Any) -> Any:
    """The type of a field's flag: numbers and switches as they are, `where` as a list, all else as text."""
    plain = {a for a in (get_args(annotation) or (annotation,)) if a is not type(None)}
    if get_origin(annotation) is dict:
        return list[str]
    for kind in (bool, int, float):
        if plain == {kind}:
            return kind
    return str


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise BadRequest(f"not a condition: {text!r}", where="--where", todo="write e.g. --where Plate=BR001")
    return key, value


def run_extract_images(job: ExtractImagesJob) -> int:
    """Run the job with signals handled; returns the exit code."""
    from dinoray.extraction import absolute, extract_images, resume_command

    with_signals(resume_command(absolute(job)))
    return extract_images(job, say).exit_code


def with_signals(resume: str) -> None:
    """On SIGTERM and Ctrl-C: say how to resume and leave at once. Units in flight are abandoned: without a
    receipt they are redone, and everything a killed process may leave is replaced or removed then."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h")  # the live line hides the cursor
        os.write(1, f"\nstopped by {signal.Signals(number).name}; resume with: {resume}\n".encode())
        os._exit(1)  # the local Ray and its actors end with this process; waiting for them could take minutes

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)


extract.command("images")(job_command(ExtractImagesJob, run_extract_images))


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


@app.command()
def demo(out: Annotated[str, typer.Option("--out", help="Where to write.")] = "demo_out",
         no_ray: Annotated[bool, typer.Option("--no-ray", help="Without Ray.")] = False) -> None:
    """The main job, offline, on the pictures that ship inside scikit-image: features, verification, report."""
    from dinoray.demo import run_demo

    raise typer.Exit(run_demo(out, no_ray=no_ray, say=say))


def run_job_script(model: type[ExtractImagesJob], run: Callable[[Any], int], argv: list[str]) -> int:
    """What jobs/*.py call: `FILE.yaml [key=value ...]`. Quarantined items are a success unless `strict`."""
    if not argv or argv[0] in ("-h", "--help"):
        say("usage: python jobs/NAME.py FILE.yaml [key=value ...]")
        return 0 if argv else 2
    job: list[Any] = []

    def call() -> int:
        job.append(build_job(model, read_job_file(argv[0], argv[1:])))
        return run(job[0])

    code = guarded(call)
    return 0 if code == 3 and job and not job[0].strict else code


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


if __name__ == "__main__":
    main()
