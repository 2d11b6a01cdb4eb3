"""Images and label images at another size, with the centres of pixels kept in place.

Geometry: pixel i of n covers [i, i + 1) of an axis that n pixels fill, so its centre lies at i + 0.5, and output pixel j
of m has its centre at (j + 0.5) * n / m (`align_corners=False` elsewhere). Nothing is shifted: what is segmented at
another size and brought back lies where it was.
"""

from __future__ import annotations

import math

import numpy as np
from skimage import transform

from dinoray.errors import BadRequest


def scaled_shape(shape: tuple[int, int], scale: float) -> tuple[int, int]:
    """(y, x) of an image of `shape` (Y, X) at a factor: rounded (halves up), at least 1 px a side.

    Raises BadRequest when the factor is not a positive finite number.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise BadRequest(f"a factor of {scale} cannot resample an image", todo="check the pixel sizes and diameters")
    return max(1, math.floor(shape[0] * scale + 0.5)), max(1, math.floor(shape[1] * scale + 0.5))


def blur_sigma(scale: float) -> float:
    """Sigma in source px of the Gaussian that keeps finer detail than the new pixels from aliasing; 0 when enlarging.

    The rule of `skimage.transform.resize`: (1 / scale - 1) / 2.
    """
    return max(0.0, (1.0 / scale - 1.0) / 2.0)


def resample(image: np.ndarray, scale: float | tuple[int, int]) -> np.ndarray:
    """`image` float32 [C, Y, X] at a factor (see `scaled_shape`) or at a size (y, x): float32 [C, y, x].

    Linear, after a Gaussian of `blur_sigma` along an axis that shrinks; beyond the border lies the mirror image. The very
    pixels (a copy) where the size stays. One channel is worked on at a time.

    Raises BadRequest when the factor is not positive or a side would be below 1 px.
    """
    shape = _checked(scale) if isinstance(scale, tuple) else scaled_shape(image.shape[-2:], scale)
    if shape == image.shape[-2:]:
        return image.astype(np.float32)
    out = np.empty((len(image), *shape), np.float32)
    factors = [new / old for new, old in zip(shape, image.shape[-2:], strict=True)]
    sigma = tuple(blur_sigma(factor) for factor in factors)
    for channel, into in zip(image, out, strict=True):
        into[:] = transform.resize(channel.astype(np.float32, copy=False), shape, order=1, mode="symmetric", clip=True,
                                   preserve_range=True, anti_aliasing=any(sigma), anti_aliasing_sigma=sigma if any(sigma) else None)
    return out


def resample_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`labels` [Y, X] at a size (y, x), dtype kept: each output pixel has the id of the pixel in which its centre lies.

    No id is made up; an object smaller than the new pixels may vanish. A copy where the size stays. Raises BadRequest
    when a side would be below 1 px.
    """
    height, width = _checked(shape)
    rows = (2 * np.arange(height) + 1) * labels.shape[0] // (2 * height)  # whole numbers: no rounding to differ
    columns = (2 * np.arange(width) + 1) * labels.shape[1] // (2 * width)
    return labels[rows[:, None], columns[None, :]]


def _checked(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise BadRequest(f"an image cannot have the size {shape}", todo="give (y, x) of at least 1 px")
    return int(shape[0]), int(shape[1])
