"""`dinoray train`: a training job from a YAML file."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from dinoray.cli.app import app, guarded, say, with_signals
from dinoray.config import TrainContextFusionJob, TrainDistanceMapJob, TrainingJob, build_job, read_job_file

train = typer.Typer(no_args_is_help=True, help="Train models on labelled images and volumes.")
app.add_typer(train, name="train")

JobFile = Annotated[str, typer.Argument(help="The job as YAML (jobs/configs has examples).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value: fields that differ from the file.")]


@train.command("distance-map")
def distance_map(job: JobFile, overrides: Overrides = None) -> None:
    """A UNet over DINOv3 that predicts distance maps of cells. All fields: docs/training.md."""
    raise typer.Exit(_run(TrainDistanceMapJob, job, overrides, ["dinoray", "train", "distance-map"]))


@train.command("context-fusion")
def context_fusion(job: JobFile, overrides: Overrides = None) -> None:
    """A 3D UNet on voxels and DINOv3 tokens, guided by a wider context. All fields: docs/training-volumes.md."""
    raise typer.Exit(_run(TrainContextFusionJob, job, overrides, ["dinoray", "train", "context-fusion"]))


def _run(model: type[TrainingJob], file: str, overrides: list[str] | None, command: list[str]) -> int:
    return run_training(build_job(model, read_job_file(file, overrides, model)), shlex.join([*command, file, *(overrides or [])]))


def run_training(job: TrainingJob, command: str = "") -> int:
    """Train with signals handled; returns the exit code."""
    import dinoray.train

    leave = with_signals(command or f"the same job on {job.out}")
    return dinoray.train.train(job, say, command=command, leave=leave).exit_code


def run_training_script(model: type[TrainingJob], argv: list[str]) -> int:
    """What jobs/train_*.py call: `FILE.yaml [key=value ...]`."""
    script = f"jobs/train_{model.kind.replace('-', '_')}.py"
    if not argv or argv[0] in ("-h", "--help"):
        say(f"usage: python {script} FILE.yaml [key=value ...]")
        return 0 if argv else 2
    return guarded(lambda: _run(model, argv[0], argv[1:], ["python", script]))
