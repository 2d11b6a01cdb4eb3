"""Raw voxels -> the pixels of a slab's target planes: float32 [planes, rows, cols], square, with their padding.

Every pixel is a function of its absolute place in the volume: positions are half-pixel-centred, the volume is continued
by reflection beyond its borders, and each value is one fixed sequence of float32 operations. So a pixel is bit-equal
whichever slab it is made for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor

import numpy as np

from dinoray.io.volume_grid import PlaneGrid, reflect

Read = Callable[..., np.ndarray]
"""`Volume.read`: (z, y, x), each a slice or a sorted index array, to [z, y, x] of the volume's dtype."""
_EXACT = 1e-7
"""A position so close (in voxels) to a voxel's centre is on it; the difference is rounding."""


@dataclass(frozen=True)
class Taps:
    """Weighted sums of raw indices: output i is the sum over t of weights[i, t] * raw[indices[i, t]] (float32)."""

    indices: np.ndarray
    weights: np.ndarray

    @property
    def is_plain(self) -> bool:
        """Each output is one raw value."""
        return self.indices.shape[1] == 1

    def used(self) -> np.ndarray:
        """The raw indices with weight, sorted, each once."""
        return np.unique(self.indices[self.weights != 0])

    def apply(self, raw: np.ndarray, have: np.ndarray, axis: int) -> np.ndarray:
        """Along `axis` of `raw`, whose entries there are the raw indices `have` (sorted): float32."""
        places = np.searchsorted(have, np.where(self.weights != 0, self.indices, have[0]))
        if self.is_plain and np.array_equal(places[:, 0], np.arange(len(have))):
            return raw.astype(np.float32, copy=False)
        shape = [1] * raw.ndim
        shape[axis] = -1
        out = raw.take(places[:, 0], axis=axis).astype(np.float32, copy=False)
        if self.is_plain:
            return out
        out = out * self.weights[:, 0].reshape(shape)
        for tap in range(1, self.indices.shape[1]):
            weight = self.weights[:, tap]
            term = raw.take(places[:, tap], axis=axis).astype(np.float32, copy=False) * weight.reshape(shape)
            # a voxel without weight must not matter, NaN included
            out = out + (term if weight.all() else np.where(weight.reshape(shape) != 0, term, np.float32(0)))
        return out


def linear_taps(positions: np.ndarray, size: int) -> Taps:
    """Between the two nearest voxels; on a voxel's centre that voxel alone. In the outer half of the first and the last
    voxel the line goes on, so that places are exact up to the volume's faces; beyond them the volume is reflected."""
    nearest = np.rint(positions)
    positions = np.where(np.abs(positions - nearest) < _EXACT, nearest, positions)
    low = np.floor(positions).astype(np.int64)
    if size > 1:
        low = np.where((positions < 0) & (positions > -0.5 - _EXACT), 0, low)
        low = np.where((positions > size - 1) & (positions < size - 0.5 + _EXACT), size - 2, low)
    share = (positions - low).astype(np.float32)
    if not share.any():
        return Taps(reflect(low, size)[:, None], np.ones((len(low), 1), np.float32))
    return Taps(np.stack([reflect(low, size), reflect(low + 1, size)], axis=1),
                np.stack([np.float32(1) - share, share], axis=1))


def pixel_taps(plane: PlaneGrid, axis: int, first: int, count: int) -> Taps:
    """Square pixels [first, first + count) along one axis of the plane; negative ones are padding."""
    ratio = plane.pixel_nm / plane.grid.voxel_nm[axis]
    pixels = np.arange(first, first + count)
    positions = pixels.astype(np.float64) if ratio == 1 else (pixels + 0.5) * ratio - 0.5
    return linear_taps(positions, plane.grid.shape[axis])


def plane_taps(plane: PlaneGrid, first: int, stop: int, rule: str) -> Taps:
    """Target planes [first, stop) by the job's `slice_sampling`. A last plane whose centre lies beyond the volume (its size is
    no multiple of G) is taken at the volume's face."""
    axis = plane.normal
    size, ratio = plane.grid.shape[axis], plane.grid.target_nm[axis] / plane.grid.voxel_nm[axis]
    planes = np.arange(first, stop)
    centres = np.clip((planes + 0.5) * ratio - 0.5, -0.5, size - 0.5)
    if rule == "interpolate":
        return linear_taps(centres, size)
    if rule == "nearest":  # the lower one of two equally near
        nearest = np.clip(np.ceil(centres - 0.5 - _EXACT).astype(np.int64), 0, size - 1)
        return Taps(nearest[:, None], np.ones((len(planes), 1), np.float32))
    if rule == "linspace":
        return Taps(np.linspace(0, size - 1, plane.shape[axis], dtype=int)[planes][:, None], np.ones((len(planes), 1), np.float32))
    if rule == "antialias":
        return _box_taps(planes, centres, ratio, size)
    raise ValueError(f"no rule is called {rule!r}")


def _box_taps(planes: np.ndarray, centres: np.ndarray, ratio: float, size: int) -> Taps:
    """The mean over [k ratio, (k + 1) ratio) voxels, as far as they are there: by how much of each voxel lies in it.

    Where a border cuts a voxel, its centre is not that of the part inside; the weights of the first and the last voxel
    make up for it, so that the centre of mass is the plane's own.
    """
    count = max(2, ceil(ratio - _EXACT) + 1)
    indices, weights = np.zeros((len(planes), count), np.int64), np.zeros((len(planes), count), np.float32)
    for row, (k, centre) in enumerate(zip(planes.tolist(), centres.tolist(), strict=True)):
        low, high = k * ratio, (k + 1) * ratio
        start = floor(low + _EXACT)
        voxels = np.arange(start, start + count)
        share = np.clip(np.minimum(voxels + 1, min(high, size)) - np.maximum(voxels, low), 0, None)
        share[share < _EXACT] = 0
        inside = np.flatnonzero(share)
        if len(inside) < 2:  # within one voxel: between the two nearest
            taps = linear_taps(np.array([centre]), size)
            voxels, share = np.zeros(count, np.int64), np.zeros(count)
            voxels[:taps.indices.shape[1]], share[:taps.indices.shape[1]] = taps.indices[0], taps.weights[0]
        else:
            share /= share.sum()
            shift = (centre - share @ voxels) / (inside[-1] - inside[0])
            if abs(shift) > _EXACT:
                share[inside[0]] -= shift
                share[inside[-1]] += shift
        indices[row], weights[row] = np.where(share != 0, voxels, 0), share
    return Taps(indices, weights)


@dataclass(frozen=True)
class SlabTaps:
    """What a slab's pixels are made of: taps along the normal, the rows and the columns of a plane."""

    plane: PlaneGrid
    taps: tuple[Taps, Taps, Taps]

    def _order(self) -> tuple[int, int, int]:
        return (self.plane.normal, *self.plane.axes)

    def indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raw indices that are read along the normal, rows and columns: rows and columns without gaps."""
        along = self.taps[0].used()
        in_plane = [np.arange(used.min(), used.max() + 1) for used in (tap.used() for tap in self.taps[1:])]
        return (along, *in_plane)  # type: ignore[return-value]

    def num_voxels(self) -> int:
        """Raw voxels that are read."""
        return int(np.prod([len(i) for i in self.indices()], dtype=np.int64))

    def read_raw(self, read: Read) -> np.ndarray:
        """The raw voxels [normal, rows, cols] in the volume's dtype."""
        selection: list[slice | np.ndarray] = [slice(0, 0)] * 3
        for axis, indices in zip(self._order(), self.indices(), strict=True):
            dense = int(indices[-1]) - int(indices[0]) + 1 == len(indices)
            selection[axis] = slice(int(indices[0]), int(indices[-1]) + 1) if dense else indices
        return np.moveaxis(read(*selection), self.plane.normal, 0)

    def pixels(self, raw: np.ndarray) -> np.ndarray:
        """float32 [planes, rows, cols] from `read_raw`."""
        for axis, (taps, have) in enumerate(zip(self.taps, self.indices(), strict=True)):
            raw = taps.apply(raw, have, axis)
        return np.ascontiguousarray(raw, dtype=np.float32)


def slab_taps(plane: PlaneGrid, planes: tuple[int, int], rows: tuple[int, int], cols: tuple[int, int], rule: str) -> SlabTaps:
    """Target planes [first, stop), square-pixel rows and columns [first, stop) of a plane."""
    in_plane = [pixel_taps(plane, axis, a, b - a) for axis, (a, b) in zip(plane.axes, (rows, cols), strict=True)]
    return SlabTaps(plane, (plane_taps(plane, *planes, rule), *in_plane))  # type: ignore[arg-type]
