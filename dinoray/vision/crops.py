"""Square crops around points, sub-pixel exact: which source pixels a crop needs, and how they are resampled.

Coordinates. A centroid is given as skimage, scipy and CellProfiler give it: the centre of the first pixel is 0. A
frame has its origin at the first pixel's outer edge, so pixel i covers [i, i + 1) and its centre lies at i + 0.5: a
centroid c lies at c + 0.5 of the frame. The square of `side` source px reaches from c + 0.5 - side / 2 to
c + 0.5 + side / 2, never rounded to whole pixels.

Resampling to `out_px` is separable: bilinear, and a triangle of the scale's width where that shrinks ("antialias"),
which is the filter of Pillow and of torch's `interpolate(mode="bilinear", antialias=True)`. The difference: pixels
beyond the crop are there, so nothing is cut off at its borders. Beyond the image's border lies its mirror image
with the border pixel repeated (numpy's "symmetric": cba|abc|cba), as often as the crop needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Place:
    """Where one crop lies: a block of `size` x `size` source px from (`first_y`, `first_x`), perhaps outside the
    image, that holds all that the square needs; the square begins at (`offset_y`, `offset_x`) of the block's frame."""

    first_y: int
    first_x: int
    size: int
    offset_y: float
    offset_x: float
    side: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """y0, x0, y1, x1: the source pixels (half-open) that the square touches; they may lie outside the image."""
        y, x = self.first_y + self.offset_y, self.first_x + self.offset_x
        return math.floor(y), math.floor(x), math.ceil(y + self.side), math.ceil(x + self.side)


def _reach(side: float, out_px: int) -> float:
    """How far the filter reaches from a sample, in source px."""
    return max(side / out_px, 1.0)


def block_size(side: float, out_px: int) -> int:
    """Side of the block that holds any square of `side` px with the filter's reach: equal for all crops of one side."""
    return math.ceil(side - side / out_px + 2 * _reach(side, out_px)) + 1


def place(y: float, x: float, side: float, out_px: int) -> Place:
    """The place of the square of `side` source px around a centroid (y, x)."""
    reach = _reach(side, out_px)

    def axis(centre: float) -> tuple[int, float]:
        start = centre + 0.5 - side / 2
        first = math.floor(start + side / out_px / 2 - reach - 0.5) + 1  # the first pixel whose centre is in reach
        return first, start - first

    (first_y, offset_y), (first_x, offset_x) = axis(y), axis(x)
    return Place(first_y, first_x, block_size(side, out_px), offset_y, offset_x, side)


def mirrored(first: int, size: int, length: int) -> np.ndarray:
    """Indices into an axis of `length` px for pixels first .. first + size - 1 of its endless mirror images."""
    index = np.arange(first, first + size) % (2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)


def cut(planes: np.ndarray, where: Place) -> np.ndarray:
    """The block of a place from planes [..., Y, X]: [..., size, size], contiguous, in their dtype."""
    height, width = planes.shape[-2:]
    y, x, n = where.first_y, where.first_x, where.size
    if y >= 0 and x >= 0 and y + n <= height and x + n <= width:
        return np.ascontiguousarray(planes[..., y:y + n, x:x + n])
    return np.ascontiguousarray(planes[..., mirrored(y, n, height)[:, None], mirrored(x, n, width)[None, :]])


def filter_weights(offset: float, side: float, size: int, out_px: int) -> np.ndarray:
    """Weights float32 [out_px, size] that turn an axis of a block into the square's samples; rows sum to 1."""
    scale, reach = side / out_px, _reach(side, out_px)
    centres = offset + (np.arange(out_px) + 0.5) * scale
    distance = np.abs(np.arange(size)[None, :] + 0.5 - centres[:, None])
    weights = np.maximum(0.0, 1.0 - distance / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)


def objects_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids int64, y float64, x float64, area int64) of a label image [Y, X] of non-negative integers, by rising id.

    y, x: the mean of the object's pixel indices, as skimage's `regionprops` has it; area in px.
    """
    flat = labels.reshape(-1)
    inside = np.flatnonzero(flat)
    values = flat[inside]
    if len(values) and int(values.max()) <= 4 * flat.size:  # counting needs no sort
        counts = np.bincount(values)
        ids = np.flatnonzero(counts)
        rank = np.zeros(len(counts), np.int64)
        rank[ids] = np.arange(len(ids))
        inverse = rank[values]
    else:
        ids, inverse = np.unique(values, return_inverse=True)
    y, x = np.divmod(inside, labels.shape[1])
    area = np.bincount(inverse, minlength=len(ids))
    with np.errstate(invalid="ignore"):
        centre_y = np.bincount(inverse, weights=y, minlength=len(ids)) / area
        centre_x = np.bincount(inverse, weights=x, minlength=len(ids)) / area
    return ids.astype(np.int64), centre_y, centre_x, area.astype(np.int64)
