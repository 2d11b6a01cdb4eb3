"""From the tokens of three planes to features of a box of the target grid: resample each plane, take the mean.

Everything is centred on half pixels: target voxel k has its centre at (k + 1/2) G from the volume's corner, which is
(k + 1/2) G / pitch - 1/2 in tokens, counted from the centre of the first one. Between the centres of tokens the values are
linear; beyond the outermost ones the line goes on (`extrapolate`) or the outermost token repeats (`clamp`). Along a plane's
normal its target planes are the target voxels.

A voxel's value depends on the grid alone: any box that contains it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dinoray.io.volume_grid import NORMAL, PlaneGrid, Shape, VolumeGrid

Read = Callable[[int, int, int, int, int, int], np.ndarray]
"""(z0, z1, y0, y1, x0, x1) of an array's tokens -> [dim, z, y, x]."""
SLAB_PLANES = 8
"""Most target planes of one plane that are held beside the fused box."""


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
    grid = plane.grid
    ranges, where = [(int(a), int(b)) for a, b in zip(start, stop, strict=True)], {}
    for axis in plane.axes:
        positions = token_positions(start[axis], stop[axis], grid.target_nm[axis], plane.pitch_nm[axis])
        low, high, _ = neighbours(plane.shape[axis], positions, grid.edges)
        ranges[axis], where[axis] = (int(low.min()), int(high.max()) + 1), positions
    values = read(*(n for each in ranges for n in each))
    for axis in plane.axes:
        values = resample_axis(values, axis + 1, plane.shape[axis], where[axis], grid.edges, ranges[axis][0])
    return values


def fuse_box(readers: Mapping[str, Read], grid: VolumeGrid, start: Shape, stop: Shape) -> np.ndarray:
    """Mean over the planes of target voxels [start, stop) as [dim, z, y, x] float32; NaN where any plane is NaN.

    `readers` has a reader for each of grid.planes. A running sum in the order xy, xz, yz: beside the box itself, at most
    SLAB_PLANES target planes of one plane are in memory (with their tokens, and twice while they are resampled).
    """
    planes = [grid.plane(name) for name in NORMAL if name in grid.planes]
    total = np.empty((grid.dim, *(b - a for a, b in zip(start, stop, strict=True))), np.float32)
    for plane in planes:
        normal = plane.normal
        depth = min(plane.array.chunks[normal], SLAB_PLANES)
        first = start[normal]
        while first < stop[normal]:
            last = min(stop[normal], (first // depth + 1) * depth)  # at borders of chunks, so that each is decoded once
            low = tuple(first if a == normal else n for a, n in enumerate(start))
            high = tuple(last if a == normal else n for a, n in enumerate(stop))
            slab = plane_to_grid(readers[plane.name], plane, low, high)
            inside = total[(slice(None), *(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True)))]
            if plane is planes[0]:
                inside[...] = slab
            else:
                inside += slab
            del slab  # or it would live beside the next one
            first = last
    total /= np.float32(len(planes))
    return total
