"""What raw voxels of a training crop and of its context go through: lost and slipped sections, blur, tone, noise.

Everything random comes from one generator that the caller keys by the sample's number, and as many numbers are drawn whatever they
are. Values are about 0..1 before and after.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from dinoray.config.fusion import VolumeAugmentation
from dinoray.vision.voxel_grids import VoxelGrid

_NAMES = ("p_missing", "missing", "p_shifted", "shifted", "shift_y", "shift_x", "p_tone", "contrast", "brightness", "gamma",
          "p_blur", "blur", "p_noise", "noise")
"""One uniform number each, in this order; a new one goes to the end."""


def spoil(raw: np.ndarray, raw_grid: VoxelGrid, context: np.ndarray | None, context_grid: VoxelGrid | None,
          config: VolumeAugmentation, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """(raw, context), both float32 [z, y, x], with new tones and damaged sections. Grids are about the crop's centre, nm.

    Sections are planes of constant z, so this comes before crops are turned.
    """
    drawn = dict(zip(_NAMES, (float(v) for v in rng.random(len(_NAMES))), strict=True))
    seeds = rng.integers(2**63, size=2)
    volumes = [raw.copy()] if context is None else [raw.copy(), context.copy()]
    grids = [raw_grid, context_grid]
    if drawn["p_missing"] < config.p_missing:
        k = int(drawn["missing"] * raw.shape[0])
        at = raw_grid.centres(0)[k]
        for values, grid in zip(volumes, grids, strict=False):
            assert grid is not None  # of a context's pixel, which is a mean of sections, only its share is lost
            values[int(np.argmin(np.abs(grid.centres(0) - at)))] *= 1 - raw_grid.pitch_nm[0] / grid.pitch_nm[0]
    if drawn["p_shifted"] < config.p_shifted:
        k = int(drawn["shifted"] * raw.shape[0])
        by = [round((2 * drawn[name] - 1) * config.shift) for name in ("shift_y", "shift_x")]
        volumes[0][k] = _slipped(volumes[0][k], *by)
    if drawn["p_blur"] < config.p_blur:
        sigma = drawn["blur"] * config.blur_sigma
        for values, grid in zip(volumes, grids, strict=False):
            assert grid is not None
            in_plane = [sigma * raw_grid.pitch_nm[a] / grid.pitch_nm[a] for a in (1, 2)]
            ndimage.gaussian_filter(values, (0, *in_plane), output=values, mode="reflect")
    if drawn["p_tone"] < config.p_tone:
        low, high = config.contrast
        contrast = low * (high / low) ** drawn["contrast"]
        gamma = config.gamma[0] * (config.gamma[1] / config.gamma[0]) ** drawn["gamma"]
        mean = float(volumes[0].mean(dtype=np.float64))  # one for both: the same voxel keeps the same tone in the context
        for values in volumes:
            np.power(np.clip(values, 0, 1, out=values), np.float32(gamma), out=values)
            values -= np.float32(mean)
            values *= np.float32(contrast)
            values += np.float32(mean + (2 * drawn["brightness"] - 1) * config.brightness)
    if drawn["p_noise"] < config.p_noise:
        for values, seed in zip(volumes, seeds, strict=False):
            noise = np.random.default_rng(int(seed)).standard_normal(values.shape, np.float32)
            values += noise * np.float32(drawn["noise"] * config.noise)
    found = [np.clip(values, 0, 1, out=values) for values in volumes]
    return found[0], found[1] if len(found) > 1 else None


def _slipped(section: np.ndarray, by_y: int, by_x: int) -> np.ndarray:
    """A section moved by whole pixels, mirrored where it left."""
    pads = [(max(0, by_y), max(0, -by_y)), (max(0, by_x), max(0, -by_x))]
    limited = [tuple(min(p, n - 1) for p in pad) for pad, n in zip(pads, section.shape, strict=True)]
    padded = np.pad(section, limited, mode="reflect")
    y0, x0 = limited[0][1], limited[1][1]
    return padded[y0:y0 + section.shape[0], x0:x0 + section.shape[1]]
