"""Volumes and their outputs for the tests of the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from dinoray.config import ExtractVolumeJob
from dinoray.io.volume_grid import ArraySpec, VolumeGrid
from dinoray.volume_extraction import extract_volume

VOXEL, MOVE = (12.0, 8.0, 10.0), (600.0, -40.0, 1000.0)


def write_volume(folder: Path, values: np.ndarray, voxel: tuple[float, ...] = VOXEL, move: tuple[float, ...] = MOVE) -> Path:
    """An OME-Zarr 0.5 image of one level in nm."""
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    group.create_array("s0", shape=values.shape, chunks=(16, 32, 32), dtype=values.dtype)[:] = values
    transforms = [{"type": "scale", "scale": list(voxel)}, {"type": "translation", "translation": list(move)}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{
        "name": "volume", "axes": [{"name": n, "type": "space", "unit": "nanometer"} for n in "zyx"],
        "datasets": [{"path": "s0", "coordinateTransformations": transforms}]}]}
    return folder


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Smooth noise, uint16."""
    rng = np.random.default_rng(seed)
    coarse = rng.random([-(-n // 6) for n in shape])
    return (np.kron(coarse, np.ones((6, 6, 6)))[tuple(slice(0, n) for n in shape)] * 60_000).astype(np.uint16)


def extract(volume: Path, out: Path, **fields: object) -> str:
    """Run a small job in this process; returns its output."""
    values = {"model": "vitt16", "weights": "random", "no_ray": True, "window_px": 64, "halo_px": 16, **fields}
    return extract_volume(ExtractVolumeJob(sources=(str(volume),), out=str(out), **values), say=lambda line: None).out


def averaged(volume: np.ndarray, grid: VolumeGrid, spec: ArraySpec) -> np.ndarray:
    """What a perfect network would store of a volume that is constant in each voxel: its mean over the box of every token,
    repeated as the features of an array."""
    values = volume.astype(np.float64)
    for axis in range(3):
        edges = np.arange(grid.shape[axis] + 1) * grid.voxel_nm[axis]
        lines = np.moveaxis(values, axis, -1)
        sums = np.concatenate([np.zeros((*lines.shape[:-1], 1)), np.cumsum(lines, axis=-1)], axis=-1)
        borders = np.minimum(np.arange(spec.shape[axis] + 1) * spec.pitch_nm[axis], edges[-1])
        at = np.apply_along_axis(lambda line, x=borders, e=edges: np.interp(x, e, line), -1, sums * grid.voxel_nm[axis])
        values = np.moveaxis(np.diff(at, axis=-1) / np.diff(borders), -1, axis)
    return np.repeat(values[None], spec.dim, axis=0)
