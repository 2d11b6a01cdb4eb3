"""The demo's volume: something like an electron micrograph, made here, and its features."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from skimage.filters import gaussian

from dinoray.config import ExtractVolumeJob
from dinoray.demo.noise import smooth_noise
from dinoray.report.html import write_report
from dinoray.volume_extraction import extract_volume

MODEL, WEIGHTS = "vits16", "random:0"
VOLUME_SHAPE, VOXEL_NM = (96, 128, 128), 16.0
CELLS = 40
"""Cells in the volume."""


def show_volume(folder: Path, *, no_ray: bool, say: Callable[[str], None]) -> None:
    """Make the volume, its features, and their report, below `folder`."""
    say(f"-- a volume of membranes and vesicles, {' x '.join(map(str, VOLUME_SHAPE))} voxels of {VOXEL_NM:g} nm, made here")
    raw = write_volume(folder / "volume.zarr")
    job = ExtractVolumeJob(sources=(str(raw),), out=str(folder / "volume_features"), model=MODEL, weights=WEIGHTS, output="fused",
                           voxel_size=(4 * VOXEL_NM,), no_ray=no_ray)
    outcome = extract_volume(job, say)
    say(f"look at {write_report(outcome.out, str(folder / 'volume_report.html'))}")
    say(f"the features: python -c \"import dinoray; f = dinoray.open_features('{outcome.out}'); "
        "print(f.shape, f.voxel_size_nm, f[8:16, 8:16, 8:16].mean())\"")


def write_volume(folder: Path) -> Path:
    """The demo's volume as OME-Zarr 0.5; one that is there already is left alone (a run may depend on it)."""
    done = folder / "zarr.json"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    zarr.create_array(str(folder / "0"), shape=VOLUME_SHAPE, chunks=(32, 64, 64), dtype="uint8")[:] = draw_volume(VOLUME_SHAPE)
    transform = {"type": "scale", "scale": [VOXEL_NM] * 3}
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    ome = {"version": "0.5", "multiscales": [{"name": "demo", "axes": axes, "datasets": [
        {"path": "0", "coordinateTransformations": [transform]}]}]}
    done.write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}))  # last: then it is whole
    return folder


def draw_volume(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Something like an electron micrograph, uint8 [z, y, x]: cells with dark membranes (borders of warped Voronoi cells) of
    different cytoplasm, dark round vesicles in some of them, and noise. The same seed gives the same volume."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))
    for axis in range(3):
        grid[axis] += smooth_noise(rng, shape, 9.0) * 7
    centres = rng.random((CELLS, 3)).astype(np.float32) * shape
    nearest = np.full(shape, np.inf, np.float32)
    second, cell = nearest.copy(), np.zeros(shape, np.int64)
    for number, centre in enumerate(centres):
        distance = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(axis=0))
        cell = np.where(distance < nearest, number, cell)
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    gray = (0.62 + 0.16 * rng.random(CELLS).astype(np.float32))[cell]
    speckled = (rng.random(CELLS) < 0.4)[cell]
    gray -= np.where(speckled, 0.3 * (smooth_noise(rng, shape, 2.2) > 1.1), 0)  # vesicles
    gray -= 0.08 * speckled * smooth_noise(rng, shape, 1.2)
    gray -= 0.5 * np.exp(-((second - nearest) / 2.2) ** 2)  # membranes
    gray = gaussian(gray, 0.7) + 0.05 * rng.standard_normal(shape, dtype=np.float32)
    return (np.clip(gray, 0, 1) * 255).astype(np.uint8)
