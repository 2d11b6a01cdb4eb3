"""Helpers of the tests of segmented volumes: checkpoints with weights that say something, jobs, outputs read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from dinoray.config import SegmentVolumeJob
from dinoray.io.stores import LocalStore
from dinoray.vision.affinities import FACES
from dinoray.vision.distance_model import BackboneRecord
from dinoray.vision.fusion_checkpoint import FusionConfig, save_fusion
from dinoray.vision.fusion_model import FusionModel, FusionRecord, new_model
from tests.runs import tiny_backbone


def make_checkpoint(folder: Path, *, target: str = "classes", inputs: str = "raw", fusion: str = "none", factor: int = 1,
                    levels: int = 2, norm: str = "layer", crop: int = 16, voxel_nm: float = 16.0, context_factor: int = 2,
                    seed: int = 0) -> tuple[Path, FusionModel, FusionConfig]:
    """A checkpoint with random weights whose logits are far apart, so that labels differ from voxel to voxel."""
    outputs = 3
    record = FusionRecord(
        outputs=outputs, factor=(factor,) * 3, inputs=inputs, fusion=fusion, context_cells=4, base=4, levels=levels, norm=norm)  # type: ignore[arg-type]
    backbone = tiny_backbone() if record.uses_backbone else None
    model = new_model(record, backbone, seed=seed)
    with torch.no_grad():
        model.unet.unet.head.weight.mul_(100)
    model.eval()
    config = FusionConfig(
        model=record, target=target, classes=("background", "a", "b") if target == "classes" else ("background", "object"),  # type: ignore[arg-type]
        offsets=FACES if target == "affinities" else (), voxel_nm=(voxel_nm,) * 3, raw_voxel_nm=(voxel_nm / factor,) * 3,
        context_factor=context_factor, crop_voxels=(crop,) * 3,
        backbone=None if backbone is None else BackboneRecord(model="vitt16", weights="random:0", digest=backbone.digest,
                                                              included=False, mean=backbone.config.mean, std=backbone.config.std))
    config = save_fusion(LocalStore(folder), "checkpoint", model, config, lambda c: "card\n")
    return folder / "checkpoint", model, config


def segment_job(source: Path | str, checkpoint: Path, out: Path | str, **fields: Any) -> SegmentVolumeJob:
    """Small windows and units, in this process."""
    values = {"sources": str(source), "checkpoint": str(checkpoint), "out": str(out), "no_ray": True, "window_voxels": 16,
              "halo_voxels": 4, "unit_windows": 2, "block_voxels": 32, "shard_voxels": 16, "decode_threads": 2,
              "compute_threads": 2, "precision": "float32", "device": "cpu"}
    return SegmentVolumeJob(**(values | fields))


def labels_of(out: Path) -> np.ndarray:
    """labels.zarr, by plain zarr."""
    return zarr.open_array(out / "labels.zarr/0", mode="r")[:]


def probabilities_of(out: Path) -> np.ndarray:
    """The stored probabilities [outputs, z, y, x], by plain zarr."""
    return zarr.open_array(out / "dense/probabilities.zarr/0", mode="r")[:]
