"""Settings of the context-fusion training that fit a card: what `memory_level` stands for, field by field.

A field that the job gives itself is not touched. The levels are those of the system that this training grew from (24, 16, 12 GB,
and a CPU), in sizes that are possible: what a step takes is forecast and printed before the first one
(dinoray.training.fusion_memory).
"""

from __future__ import annotations

from typing import Any

LEVELS: dict[str, dict[str, Any]] = {
    "24gb": {"micro_batch": 4, "base_channels": 32, "crop_voxels": 96, "precision": "bfloat16", "model": "vitb16",
             "slice_batch": 64, "gradient_checkpointing": True},
    "16gb": {"micro_batch": 2, "base_channels": 32, "crop_voxels": 96, "precision": "bfloat16", "model": "vits16",
             "slice_batch": 64, "gradient_checkpointing": True},
    "12gb": {"micro_batch": 2, "base_channels": 32, "crop_voxels": 64, "precision": "bfloat16", "model": "vits16",
             "slice_batch": 32, "gradient_checkpointing": True},
    "cpu": {"micro_batch": 1, "base_channels": 16, "crop_voxels": 48, "precision": "float32", "model": "vits16", "slice_batch": 8,
            "gradient_checkpointing": False},
}


def with_level(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job with what its `memory_level` adds. Raises ValueError for a level that is none."""
    level = values.get("memory_level")
    if level is None:
        return values
    if level not in LEVELS:
        raise ValueError(f"memory_level: {level!r} is none of {', '.join(LEVELS)}")
    preset = dict(LEVELS[level])
    if values.get("weights") is not None or (values.get("inputs") == "raw" and values.get("fusion") == "none"):
        preset.pop("model")  # the weights say which; without tokens there is none
    return preset | values
