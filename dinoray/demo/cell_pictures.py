"""The demo's pictures of cells: drawn here, with their true masks, the same everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage
from skimage.filters import gaussian

from dinoray.demo.noise import smooth_noise

SIDE_PX, PIXEL_UM = 128, 0.5
TRIES = 90
"""Places that are tried for a cell in a picture."""


def write_cells(folder: Path, number: int, seed: int) -> Path:
    """`images/` (uint8 OME-TIFF that states its pixel size) and `labels/` (uint16 TIFF) of this many pictures below `folder`.
    Pictures that are there already are left alone (a run may depend on them)."""
    if not folder.exists():
        making = folder.with_name(f"{folder.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        for name in ("images", "labels"):
            (making / name).mkdir(parents=True)
        for i in range(number):
            pixels, labels = draw_cells(SIDE_PX, seed + i)
            tifffile.imwrite(making / "images" / f"field{i:02d}.ome.tif", pixels, compression="zlib", metadata={
                "axes": "YX", "PhysicalSizeX": PIXEL_UM, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": PIXEL_UM,
                "PhysicalSizeYUnit": "µm"})
            tifffile.imwrite(making / "labels" / f"field{i:02d}.tif", labels, compression="zlib")
        making.rename(folder)  # last: then it is whole
    return folder


def draw_cells(side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Something like a fluorescence image of nuclei: uint8 [side, side] and its labels, uint16 [side, side].

    Ellipses of 8 to 24 px, many of which touch; each has its own brightness, grain, and a dimmer edge; the background is
    uneven, and there is shot noise. The same seed gives the same picture.
    """
    rng = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.uint16)
    yx = np.mgrid[:side, :side].astype(np.float32)
    for _ in range(TRIES):
        cell = _ellipse(rng, yx, labels)
        if cell is not None:
            labels[cell] = labels.max() + 1
    light = 0.08 + 0.015 * smooth_noise(rng, labels.shape, side / 5)
    grain = smooth_noise(rng, labels.shape, 1.2)
    for number in range(1, int(labels.max()) + 1):
        cell = labels == number
        depth = ndimage.distance_transform_edt(np.pad(cell, 1))[1:-1, 1:-1][cell]
        light[cell] += rng.uniform(0.25, 0.7) * (1 - 0.45 * np.exp(-depth / 1.5)) * (1 + 0.12 * grain[cell])
    light = rng.poisson(np.clip(gaussian(light, 0.7), 0, 1) * 120) / 120
    return (np.clip(light, 0, 1) * 255).astype(np.uint8), labels


def _ellipse(rng: np.random.Generator, yx: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Pixels of one more cell [side, side] bool, or None where there is no room: it may lose a tenth of itself to a neighbour
    that it then touches. Every second try is next to a cell that is there."""
    side, (a, b), turn = len(labels), rng.uniform(4.0, 12.0) * np.array([1.0, rng.uniform(0.65, 1.0)]), rng.uniform(0, np.pi)
    y, x = rng.uniform(0, side, 2)
    if labels.any() and rng.random() < 0.5:
        near = np.argwhere(labels)[rng.integers(np.count_nonzero(labels))]
        angle = rng.uniform(0, 2 * np.pi)
        y, x = near + (a + b) * np.array([np.sin(angle), np.cos(angle)])
    dy, dx = yx[0] - y, yx[1] - x
    inside = ((dy * np.sin(turn) + dx * np.cos(turn)) / a) ** 2 + ((dy * np.cos(turn) - dx * np.sin(turn)) / b) ** 2 < 1
    free = inside & (labels == 0)
    whole, left = np.count_nonzero(inside), np.count_nonzero(free)
    return free if left > 40 and left > 0.9 * whole and ndimage.label(free)[1] == 1 else None
