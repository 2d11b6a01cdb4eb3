"""From the tokens of three planes to features of a box of the target grid: resample each plane, take the mean.

Everything is centred on half pixels: target voxel k has its centre at (k + 1/2) G from the volume's corner, which is
(k + 1/2) G / pitch - 1/2 in tokens, counted from the centre of the first one. Between the centres of tokens the values are
linear; beyond the outermost ones the line goes on (`extrapolate`) or the outermost token repeats (`clamp`). Along a plane's
normal its target planes are the target voxels.

A voxel's value depends on the grid alone: any box that contains it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod

import numpy as np

from dinoray.io.volume_grid import NORMAL, PlaneGrid, Shape, VolumeGrid

Read = Callable[[int, int, int, int, int, int], np.ndarray]
"""(z0, z1, y0, y1, x0, x1) of an array's tokens -> [dim, z, y, x]."""
SLAB_PLANES = 8
"""Most target planes of one plane whose tokens are held beside the fused box."""
BLOCK_BYTES = 2**20
"""Bytes of features that are resampled at a time: what a core's cache holds."""


def token_positions(start: int, stop: int, target_nm: float, pitch_nm: float) -> np.ndarray:
    """Where the centres of target voxels [start, stop) lie along an axis, in tokens from the first one's centre; float64."""
    # a billionth of a token is rounding, and must not give weight to a token that has none
    return np.round((np.arange(start, stop) + 0.5) * (target_nm / pitch_nm) - 0.5, 9)


def neighbours(tokens: int, positions: np.ndarray, edges: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token a, token b, weight of b) of every position on an axis of `tokens` tokens; a is b where one has all the weight.

    Weights are below 0 or above 1 beyond the outermost centres (`extrapolate`). Raises ValueError for other `edges`.
    """
    if edges not in ("extrapolate", "clamp"):
        raise ValueError(f"edges are extrapolate or clamp, not {edges!r}")
    if edges == "clamp" or tokens == 1:
        positions = np.clip(positions, 0, tokens - 1)
    low = np.clip(np.floor(positions).astype(np.int64), 0, max(0, tokens - 2))
    weight = positions - low
    low = np.where(weight == 1, low + 1, low)
    weight = np.where(weight == 1, 0.0, weight)
    return low, np.where(weight == 0, low, low + 1), weight


def resample_axis(values: np.ndarray, axis: int, tokens: int, positions: np.ndarray, edges: str, first: int = 0) -> np.ndarray:
    """Values of tokens along `axis`, read linearly at `positions` (see token_positions); float32.

    `values` hold the tokens from number `first` on of an axis that has `tokens` of them in all; those that the positions
    need must be among them. A NaN token gives NaN wherever it has weight.
    """
    low, high, weight = neighbours(tokens, positions, edges)
    values = values.astype(np.float32, copy=False)
    at = np.take(values, low - first, axis)
    if not weight.any():
        return at
    step = np.take(values, high - first, axis)
    step -= at
    step *= weight.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    at += step  # a + (b - a) w: constant fields stay constant to the bit
    return at


def plane_to_grid(read: Read, plane: PlaneGrid, start: Shape, stop: Shape) -> np.ndarray:
    """Target voxels [start, stop) as [dim, z, y, x] float32 from the tokens of one plane; only what it needs is read.

    Raises what `read` raises.
    """
    box = _PlaneBox(plane, start, stop)
    return box.resample(box.read(read))


def fuse_box(readers: Mapping[str, Read], grid: VolumeGrid, start: Shape, stop: Shape) -> np.ndarray:
    """Mean over the planes of target voxels [start, stop) as [dim, z, y, x] float32; NaN where any plane is NaN.

    `readers` has a reader for each of grid.planes. A running sum in the order xy, xz, yz: beside the box itself, the tokens of
    at most SLAB_PLANES target planes of one plane are in memory, and of them BLOCK_BYTES resampled.
    """
    planes = [grid.plane(name) for name in NORMAL if name in grid.planes]
    total = np.empty((grid.dim, *(b - a for a, b in zip(start, stop, strict=True))), np.float32)
    for plane in planes:
        for low, high in _slabs(plane, start, stop):
            box = _PlaneBox(plane, low, high)
            tokens = box.read(readers[plane.name])
            inside = total[(slice(None), *(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True)))]
            channels = max(1, BLOCK_BYTES // (4 * prod(inside.shape[1:])))
            for c in range(0, grid.dim, channels):
                part, block = inside[c:c + channels], box.resample(tokens[c:c + channels])
                if plane is planes[0]:
                    part[...] = block
                else:
                    part += block
            del tokens  # or they would live beside the next ones
    total /= np.float32(len(planes))
    return total


def _slabs(plane: PlaneGrid, start: Shape, stop: Shape) -> Iterator[tuple[Shape, Shape]]:
    """A box cut along the plane's normal, at borders of chunks where they are thin enough, so that each is decoded once."""
    normal, chunk = plane.normal, plane.array.chunks[plane.normal]
    depth = max(1, SLAB_PLANES // chunk) * min(chunk, SLAB_PLANES)
    first = start[normal]
    while first < stop[normal]:
        last = min(stop[normal], (first // depth + 1) * depth)
        yield _with(start, normal, first), _with(stop, normal, last)
        first = last


def _with(place: Shape, axis: int, value: int) -> Shape:
    return tuple(value if a == axis else n for a, n in enumerate(place))  # type: ignore[return-value]


class _PlaneBox:
    """Target voxels [start, stop) as one plane sees them: which tokens they need, and where they lie among them."""

    def __init__(self, plane: PlaneGrid, start: Shape, stop: Shape):
        self.plane, grid = plane, plane.grid
        self.ranges = [(int(a), int(b)) for a, b in zip(start, stop, strict=True)]
        self.positions: dict[int, np.ndarray] = {}
        for axis in plane.axes:
            positions = token_positions(start[axis], stop[axis], grid.target_nm[axis], plane.pitch_nm[axis])
            low, high, _ = neighbours(plane.shape[axis], positions, grid.edges)
            self.ranges[axis], self.positions[axis] = (int(low.min()), int(high.max()) + 1), positions

    def read(self, read: Read) -> np.ndarray:
        """The tokens."""
        return read(*(n for each in self.ranges for n in each))

    def resample(self, tokens: np.ndarray) -> np.ndarray:
        """Any of their channels at the target voxels. The last axis comes first: single elements are gathered along it,
        rows along the other."""
        for axis in reversed(self.plane.axes):
            tokens = resample_axis(tokens, axis + 1, self.plane.shape[axis], self.positions[axis], self.plane.grid.edges,
                                   self.ranges[axis][0])
        return tokens
