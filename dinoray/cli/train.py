"""`dinoray train`: a training job from a YAML file."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from dinoray.cli.app import app, guarded, say, with_signals
from dinoray.config import TrainDistanceMapJob, build_job, read_job_file

train = typer.Typer(no_args_is_help=True, help="Train models on labelled images.")
app.add_typer(train, name="train")

JobFile = Annotated[str, typer.Argument(help="The job as YAML (jobs/configs has examples).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value: fields that differ from the file.")]


@train.command("distance-map")
def distance_map(job: JobFile, overrides: Overrides = None) -> None:
    """A UNet over DINOv3 that predicts distance maps of cells. All fields: docs/training.md."""
    command = shlex.join(["dinoray", "train", "distance-map", job, *(overrides or [])])
    raise typer.Exit(run_train_distance_map(_read(job, overrides), command))


def _read(file: str, overrides: list[str] | None) -> TrainDistanceMapJob:
    return build_job(TrainDistanceMapJob, read_job_file(file, overrides, TrainDistanceMapJob))


def run_train_distance_map(job: TrainDistanceMapJob, command: str = "") -> int:
    """Train with signals handled; returns the exit code."""
    from dinoray.train import train_distance_map

    leave = with_signals(command or f"the same job on {job.out}")
    return train_distance_map(job, say, command=command, leave=leave).exit_code


def run_training_script(argv: list[str]) -> int:
    """What jobs/train_*.py call: `FILE.yaml [key=value ...]`."""
    if not argv or argv[0] in ("-h", "--help"):
        say("usage: python jobs/train_distance_map.py FILE.yaml [key=value ...]")
        return 0 if argv else 2
    command = shlex.join(["python", "jobs/train_distance_map.py", *argv])
    return guarded(lambda: run_train_distance_map(_read(argv[0], argv[1:]), command))
