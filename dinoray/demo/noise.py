"""Smooth noise, which the demo's pictures are textured with."""

from __future__ import annotations

import numpy as np
from skimage.filters import gaussian


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Noise of this correlation length (voxels or pixels) with mean 0 and deviation 1, float32 [*shape]."""
    noise = gaussian(rng.standard_normal(shape, dtype=np.float32), sigma)
    return (noise - noise.mean()) / noise.std()
