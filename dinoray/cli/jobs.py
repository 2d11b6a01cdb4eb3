"""Commands that run jobs: one flag per field of the job's model, and the same jobs as scripts (jobs/*.py)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from dinoray.cli.app import app, extract, guarded, say, with_signals
from dinoray.config import (
    ExtractCellsJob,
    ExtractImagesJob,
    ExtractJob,
    ExtractVolumeJob,
    FeatureJob,
    UnitJob,
    build_job,
    read_job_file,
)
from dinoray.errors import BadRequest


def job_command(model: type[UnitJob], run: Callable[[Any], int]) -> Callable[..., None]:
    """A typer command with one flag per job field; `--job FILE.yaml` gives defaults, flags override it."""

    def command(**given: Any) -> None:
        sources, file = given.pop("sources"), given.pop("job")
        values = read_job_file(file) if file else {}
        values |= {name: value for name, value in given.items() if value is not None}
        if sources:
            values["sources"] = sources
        if isinstance(values.get("where"), list):
            values["where"] = _conditions(values["where"])
        raise typer.Exit(run(build_job(model, values)))

    parameters = [
        inspect.Parameter("sources", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None,
                          annotation=Annotated[list[str] | None, typer.Argument(help=model.model_fields["sources"].description)]),
        inspect.Parameter("job", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None,
                          annotation=Annotated[str | None, typer.Option("--job", help="The job as YAML.")]),
    ]
    for name, field in sorted(model.model_fields.items(), key=lambda pair: _place(pair[0])):
        if name == "sources":
            continue
        kind, shown = _flag_type(field.annotation), field.get_default(call_default_factory=True)
        text = (field.description or "").replace("\n", " ") + ("" if shown in (None, {}) or field.is_required()
                                                                else f" [{_shown(shown)}]")
        choices = [str(c) for c in _choices(field.annotation)]
        if choices:
            text = f"{' | '.join(choices)}. {text}"
        flag = "--" + name.replace("_", "-")
        names = (f"{flag}/--no-{flag[2:]}",) if kind is bool and shown else (flag,)
        parameters.append(inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None,
            annotation=Annotated[kind | None, typer.Option(*names, help=text, show_default=False)]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = (model.__doc__ or "").split(":")[0] + "."
    return command


def _place(field: str) -> int:
    """Where a flag stands in the help: input, output and model, then what is the command's own, then how a job runs."""
    first = ("sources", "out", "model", "checkpoint", "weights", "accept_dinov3_license")
    return first.index(field) if field in first else len(first) + (field in FeatureJob.model_fields)


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


def _conditions(texts: list[str]) -> dict[str, str]:
    """All `--where KEY=VALUE` together. Raises BadRequest for a key that is given twice: both cannot hold."""
    pairs = [_pair(text) for text in texts]
    keys = [key.removeprefix("Metadata_") for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise BadRequest(f"two conditions on {', '.join(twice)}", where="--where",
                         todo="one condition with a glob takes several values: --where 'Plate=BR00[12]*'")
    return dict(pairs)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise BadRequest(f"not a condition: {text!r}", where="--where", todo="write e.g. --where Plate=BR001")
    return key, value


def run_extract_images(job: ExtractJob) -> int:
    """Run a job of images or cells with signals handled; returns the exit code."""
    from dinoray.extraction import extract_images
    from dinoray.request import absolute, resume_command

    leave = with_signals(resume_command(absolute(job)))
    return extract_images(job, say, leave=leave).exit_code


def run_extract_volume(job: ExtractVolumeJob) -> int:
    """Run a job over a volume with signals handled; returns the exit code."""
    from dinoray.request import absolute, resume_command
    from dinoray.volume_extraction import extract_volume

    leave = with_signals(resume_command(absolute(job)))
    return extract_volume(job, say, leave=leave).exit_code


extract.command("images")(job_command(ExtractImagesJob, run_extract_images))
extract.command("cells")(job_command(ExtractCellsJob, run_extract_images))
extract.command("volume")(job_command(ExtractVolumeJob, run_extract_volume))


@app.command()
def demo(out: Annotated[str, typer.Option("--out", help="Where to write.")] = "demo_out",
         no_ray: Annotated[bool, typer.Option("--no-ray", help="Without Ray.")] = False) -> None:
    """The main jobs, offline, on pictures inside scikit-image, a made volume, and drawn cells: features, verification, reports;
    a model of cells trained, used and measured."""
    from dinoray.demo import run_demo

    raise typer.Exit(run_demo(out, no_ray=no_ray, say=say))


def run_job_script(model: type[UnitJob], run: Callable[[Any], int], argv: list[str]) -> int:
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
