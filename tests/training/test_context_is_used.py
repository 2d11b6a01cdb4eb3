"""A label that only structure outside of the crop decides: with its context the model finds it, without it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoray.config.fusion import TrainContextFusionJob
from dinoray.io.stores import LocalStore
from dinoray.training.context_fusion import ContextFusionTask, record_of
from dinoray.training.loop import fit
from dinoray.training.volume_regions import Region
from dinoray.training.workers import Workers
from dinoray.vision.fusion_model import new_model
from tests.runs import TINY, tiny_backbone
from tests.training.volumes import build, fusion_job, write_volume

SLAB, BLOCK, CROP, FACTOR = 48, 64, 16, 6
NM = 8.0


def outside_decides(folder: Path, seed: int) -> tuple[Path, Path]:
    """Along x, empty slabs of 48 voxels alternate with slabs that are bright or dark by blocks of 64 voxels in y.

    The label of a voxel of the middle 8 of an empty slab is whether the slab after it is bright beside it: 16 voxels away at
    least, so that no crop of 16 voxels that holds a label shows any of it. Other voxels are not known.
    """
    rng = np.random.default_rng(seed)
    count = 4
    signs = rng.permutation(np.arange(4 * count) % 2).reshape(4, count).astype(bool)  # [y, slab], as many bright as dark
    bright = np.repeat(signs, BLOCK, axis=0)  # [y, slab]
    shape = (32, len(bright), 2 * SLAB * count)
    raw, labels = np.full(shape, 120.0), np.full(shape, 255, np.uint8)
    for k in range(count):
        start = 2 * k * SLAB
        raw[:, :, start + SLAB:start + 2 * SLAB] = np.where(bright[:, k], 200, 40)[None, :, None]
        labels[:, :, start + 24:start + 32] = bright[None, :, k, None]
    raw += 4 * rng.standard_normal(shape)
    return (write_volume(folder / "raw.zarr", np.clip(raw, 0, 255).astype(np.uint8), (NM,) * 3),
            write_volume(folder / "labels.zarr", labels, (NM,) * 3))


def iou_of(folder: Path, **fields: Any) -> float:
    """Mean IoU over another volume after a short training."""
    pairs = [folder / f"volume{i}" for i in range(3)]
    sources = [{"raw": str(p / "raw.zarr"), "labels": str(p / "labels.zarr"), "unknown": 255} for p in pairs]
    values = fusion_job((pairs[0], pairs[0]), folder / f"out-{fields['fusion']}", crop_voxels=CROP, context_factor=FACTOR,
                        context_cells=8, base_channels=8, levels=2, batch_size=4, micro_batch=4,
                        warmup_steps=20, learning_rate=1e-3, loss="cross_entropy", checkpoint_every=10_000, log_every=20,
                        validation_crops=48, model="vitt16", weights="random", min_known=0.2,
                        augmentation={"turns": "none", "p_tone": 0, "p_noise": 0, "p_blur": 0, "p_missing": 0, "p_shifted": 0})
    job: TrainContextFusionJob = build(values | {"train": sources[:2], "validation": sources[2:], **fields})
    size = (NM * FACTOR,) * 3
    train, validation = ([Region(s, keep_bytes=10**9, context_nm=None if job.fusion == "none" else size) for s in part]
                         for part in (job.train, job.validation))
    backbone = tiny_backbone(replace(TINY, patch_size=2)) if job.uses_backbone else None
    task = ContextFusionTask(job, "f", new_model(record_of(job, train[0].factor), backbone, seed=0), train, validation)
    return fit(job, task, Workers(), LocalStore(job.out)).history[-1]["val_iou"]


@pytest.mark.slow
def test_only_the_context_tells(tmp_path: Path) -> None:
    for i in range(3):
        outside_decides(tmp_path / f"volume{i}", seed=i)
    found = {fusion: iou_of(tmp_path, fusion=fusion, steps=steps, validate_every=steps)
             for fusion, steps in (("full", 250), ("index_gate", 250), ("none", 100))}
    assert found["full"] >= 0.9
    assert found["none"] < 0.6, "one guess for all: half of them are right"
    assert found["index_gate"] < found["full"] - 0.05
