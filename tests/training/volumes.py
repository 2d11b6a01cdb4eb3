"""Small volumes with labels for the tests of the context-fusion training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from scipy import ndimage

from dinoray.config.fusion import TrainContextFusionJob


def write_volume(folder: Path, values: np.ndarray, voxel_nm: tuple[float, float, float],
                 translation_nm: tuple[float, float, float] | None = None) -> Path:
    """An OME-Zarr 0.5 of one level. By default its outer corner is at the origin, as that of any other level of the same place."""
    array = zarr.create_array(folder / "0", shape=values.shape, dtype=values.dtype,
                              chunks=tuple(min(32, n) for n in values.shape), zarr_format=3,
                              config={"write_empty_chunks": True})
    array[:] = values
    if translation_nm is None:
        translation_nm = tuple(v / 2 for v in voxel_nm)  # type: ignore[assignment]
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(voxel_nm)},
                                                        {"type": "translation", "translation": list(translation_nm)}]}  # type: ignore[arg-type]
    (folder / "zarr.json").write_text(json.dumps({
        "zarr_format": 3, "node_type": "group",
        "attributes": {"ome": {"version": "0.5", "multiscales": [{"name": "v", "axes": axes, "datasets": [level]}]}}}))
    return folder


def blobs(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Labels uint32: smooth blobs, touching here and there, 0 between them."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.random(shape), 2.5)
    return ndimage.label(field > np.quantile(field, 0.6))[0].astype(np.uint32)


def make_pair(folder: Path, shape: tuple[int, int, int] = (40, 40, 40), *, factor: int = 1, label_nm: float = 16.0, seed: int = 0,
              classes: bool = False) -> tuple[Path, Path]:
    """(raw uint8 at label_nm / factor, labels); raw is bright where there is an object."""
    labels = blobs(shape, seed)
    if classes:
        labels = (labels > 0).astype(np.uint32)
    fine = np.kron(labels > 0, np.ones((factor,) * 3, bool))
    rng = np.random.default_rng(seed + 1)
    raw = np.clip(60 + 120 * fine + 12 * rng.standard_normal(fine.shape), 0, 255).astype(np.uint8)
    return (write_volume(folder / "raw.zarr", raw, (label_nm / factor,) * 3),
            write_volume(folder / "labels.zarr", labels, (label_nm,) * 3))


def fusion_job(pair: tuple[Path, Path], out: Path | str, **fields: Any) -> dict[str, Any]:
    """A job of a few steps without a backbone; the two halves of the volume train and validate."""
    source = {"raw": str(pair[0]), "labels": str(pair[1])}
    values = {"train": [source], "validation": [source], "out": str(out), "inputs": "raw", "fusion": "none", "crop_voxels": 16,
              "base_channels": 4, "levels": 2, "steps": 8, "batch_size": 4, "micro_batch": 2, "warmup_steps": 2,
              "learning_rate": 0.003, "validate_every": 4, "checkpoint_every": 3, "log_every": 1, "precision": "float32",
              "device": "cpu", "data_threads": 2, "no_ray": True, "validation_crops": 4}
    return values | fields


def build(values: dict[str, Any]) -> TrainContextFusionJob:
    """The job."""
    return TrainContextFusionJob(**values)
