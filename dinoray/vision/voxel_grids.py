"""Regular grids in nanometres, and the matrices that carry values from one to another, axis by axis.

A grid says where the centres of its voxels lie; nothing is aligned by corners or by index. A crop of raw voxels, the
labels, the tokens of a plane and a wider, coarser context are grids of one space, so the part of the context that covers
the crop is a matter of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dinoray.io.fusion import neighbours

Shape = tuple[int, int, int]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class VoxelGrid:
    """`shape` voxels along z, y, x; `first_nm` is the centre of the first one, `pitch_nm` the distance of centres."""

    shape: Shape
    first_nm: Triple
    pitch_nm: Triple

    def centres(self, axis: int) -> np.ndarray:
        """Centres along an axis, nm, float64."""
        return self.first_nm[axis] + self.pitch_nm[axis] * np.arange(self.shape[axis], dtype=np.float64)

    @property
    def centre_nm(self) -> Triple:
        """The middle of the grid."""
        return tuple(f + p * (n - 1) / 2 for f, p, n in zip(self.first_nm, self.pitch_nm, self.shape, strict=True))  # type: ignore[return-value]

    @property
    def extent_nm(self) -> Triple:
        """From outer face to outer face."""
        return tuple(p * n for p, n in zip(self.pitch_nm, self.shape, strict=True))  # type: ignore[return-value]

    def pooled(self, factors: Sequence[int]) -> VoxelGrid:
        """The grid of boxes of `factors` voxels; what is left over at the far ends is dropped."""
        return VoxelGrid(tuple(n // f for n, f in zip(self.shape, factors, strict=True)),  # type: ignore[arg-type]
                         tuple(a + p * (f - 1) / 2 for a, p, f in zip(self.first_nm, self.pitch_nm, factors, strict=True)),  # type: ignore[arg-type]
                         tuple(p * f for p, f in zip(self.pitch_nm, factors, strict=True)))  # type: ignore[arg-type]

    def part(self, start: Shape, shape: Shape) -> VoxelGrid:
        """The grid of voxels [start, start + shape); they may lie outside."""
        return VoxelGrid(shape, tuple(f + s * p for f, s, p in zip(self.first_nm, start, self.pitch_nm, strict=True)),  # type: ignore[arg-type]
                         self.pitch_nm)


def linear_matrix(source: VoxelGrid, target: VoxelGrid, axis: int, *, pool: int = 1, edges: str = "clamp") -> np.ndarray:
    """[target voxels / pool, source voxels] float32: along one axis, values linear between the source's centres, read at the
    target's centres, and the mean of each `pool` of them. Rows sum to 1.

    `edges`: beyond the outermost centres the outermost value repeats (`clamp`) or the line goes on (`extrapolate`).
    """
    count = source.shape[axis]
    positions = np.round((target.centres(axis) - source.first_nm[axis]) / source.pitch_nm[axis], 9)
    low, high, weight = neighbours(count, positions, edges)
    matrix = np.zeros((len(positions), count))
    rows = np.arange(len(positions))
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, high), weight)
    if pool > 1:
        usable = len(positions) // pool * pool
        matrix = matrix[:usable].reshape(-1, pool, count).mean(axis=1)
    return matrix.astype(np.float32)


Matrices = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""For z, y, x: [B, out, in], None where nothing changes."""


def matrices(source: VoxelGrid, target: VoxelGrid, *, pool: Sequence[int] = (1, 1, 1), edges: str = "clamp") -> Matrices:
    """One matrix [1, out, in] per axis that carries values of `source` to `target`, or to boxes of `pool` of its voxels."""
    return tuple(None if pool[a] == 1 and same_axis(source, target, a) else
                 torch.from_numpy(linear_matrix(source, target, a, pool=pool[a], edges=edges))[None] for a in range(3))  # type: ignore[return-value]


def same_axis(a: VoxelGrid, b: VoxelGrid, axis: int) -> bool:
    """Whether two grids have the same voxels along an axis, up to rounding."""
    tolerance = 1e-9 * a.pitch_nm[axis]
    return (a.shape[axis] == b.shape[axis] and abs(a.first_nm[axis] - b.first_nm[axis]) <= 1e-6 * a.pitch_nm[axis]
            and abs(a.pitch_nm[axis] - b.pitch_nm[axis]) <= tolerance)


def stacked(each: Sequence[Matrices]) -> Matrices:
    """The matrices of several samples as one batch. Raises ValueError when their sizes differ."""
    found: list[torch.Tensor | None] = []
    for of_axis in zip(*each, strict=True):
        if all(m is None for m in of_axis):
            found.append(None)
            continue
        size = next(m.shape for m in of_axis if m is not None)
        found.append(torch.cat([torch.eye(size[1], size[2])[None] if m is None else m for m in of_axis]))
    return tuple(found)  # type: ignore[return-value]


def resample(values: torch.Tensor, through: Matrices) -> torch.Tensor:
    """values [B, C, z, y, x] through one matrix [B or 1, out, in] per axis -> [B, C, z', y', x'].

    Axes that grow least come first, which costs least.
    """
    given = {axis: m for axis, m in enumerate(through) if m is not None}
    for axis in sorted(given, key=lambda a: given[a].shape[1] / given[a].shape[2]):
        matrix = given[axis].to(values.dtype).expand(len(values), -1, -1)
        moved = values.movedim(axis + 2, -1)  # [B, C, a, b, in]
        product = torch.bmm(moved.reshape(len(values), -1, moved.shape[-1]), matrix.transpose(1, 2))
        values = product.reshape(*moved.shape[:-1], -1).movedim(-1, axis + 2)
    return values
