"""The job files that ship: every one is a valid job of its command, and so is what they offer in comments."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dinoray.config import (
    ExtractCellsJob,
    ExtractImagesJob,
    ExtractVolumeJob,
    SegmentCellsJob,
    SegmentVolumeJob,
    TrainContextFusionJob,
    TrainDistanceMapJob,
    build_job,
    read_job_file,
)

CONFIGS = Path(__file__).parent.parent / "jobs/configs"
MODELS = {"extract_cells": ExtractCellsJob, "extract_images": ExtractImagesJob, "extract_volume": ExtractVolumeJob,
          "jump_plate": ExtractImagesJob, "segment_cells": SegmentCellsJob, "segment_volume": SegmentVolumeJob,
          "train_context_fusion": TrainContextFusionJob, "train_distance_map": TrainDistanceMapJob}


def test_every_config_is_known_here() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_a_valid_job_and_takes_an_override(name: str) -> None:
    job = build_job(MODELS[name], read_job_file(CONFIGS / f"{name}.yaml", ["out=elsewhere"]))
    assert job.out == "elsewhere"
    assert build_job(MODELS[name], read_job_file(CONFIGS / f"{name}.yaml")).out != "elsewhere"


def test_the_training_from_nothing_in_the_comments_is_a_valid_job() -> None:
    text = (CONFIGS / "train_distance_map.yaml").read_text()
    frozen = build_job(TrainDistanceMapJob, yaml.safe_load(text))
    assert frozen.backbone_learning_rate is None and frozen.weights is None and frozen.model == "vits16"
    offered = text[text.index("# From nothing"):].splitlines()[1:]
    changed = yaml.safe_load("\n".join(line.removeprefix("# ") for line in offered))
    job = build_job(TrainDistanceMapJob, yaml.safe_load(text) | changed)
    assert (job.model, job.weights, job.crop_px % 8) == ("vitt8", "random", 0) and job.backbone_learning_rate is not None


def test_the_model_that_one_job_writes_is_what_the_next_one_reads() -> None:
    out = read_job_file(CONFIGS / "train_distance_map.yaml")["out"]
    assert read_job_file(CONFIGS / "segment_cells.yaml")["checkpoint"] == f"{out}/checkpoint"
