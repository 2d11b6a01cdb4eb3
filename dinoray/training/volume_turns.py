"""Turns and mirrorings of crops that keep voxels on voxels, for arrays, their grids and the tokens of three planes alike.

A turn takes axis `order[i]` for axis i, then mirrors axis i where `mirror[i]`. Tokens of the plane normal to axis a become those
of the plane normal to the axis that a became: three-plane features can be turned without being computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from dinoray.io.volume_grid import NORMAL
from dinoray.vision.voxel_grids import VoxelGrid

PLANE_OF = {axis: name for name, axis in NORMAL.items()}


@dataclass(frozen=True)
class Turn:
    """One of the 48 symmetries of the cube."""

    order: tuple[int, int, int] = (0, 1, 2)
    mirror: tuple[bool, bool, bool] = (False, False, False)

    def array(self, values: np.ndarray) -> np.ndarray:
        """The last three axes turned; a view."""
        lead = values.ndim - 3
        turned = values.transpose(*range(lead), *(lead + a for a in self.order))
        return turned[(..., *(slice(None, None, -1 if m else 1) for m in self.mirror))]

    def axes(self, parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One array per axis, along it."""
        return tuple(parts[a][::-1] if m else parts[a] for a, m in zip(self.order, self.mirror, strict=True))  # type: ignore[return-value]

    def grid(self, grid: VoxelGrid) -> VoxelGrid:
        """A grid about the origin, turned about it."""
        shape, pitch = (tuple(values[a] for a in self.order) for values in (grid.shape, grid.pitch_nm))
        first = tuple(-(grid.first_nm[a] + (grid.shape[a] - 1) * grid.pitch_nm[a]) if m else grid.first_nm[a]
                      for a, m in zip(self.order, self.mirror, strict=True))
        return VoxelGrid(shape, first, pitch)  # type: ignore[arg-type]

    def tokens(self, planes: Mapping[str, tuple[np.ndarray, VoxelGrid]]) -> dict[str, tuple[np.ndarray, VoxelGrid]]:
        """plane -> (tokens [C, z, y, x], their grid about the origin)."""
        return {PLANE_OF[self.order.index(NORMAL[name])]: (self.array(values), self.grid(grid))
                for name, (values, grid) in planes.items()}


def turns(kind: str, shape: tuple[int, int, int], sizes: list[tuple[float, float, float]]) -> list[Turn]:
    """The turns that a crop of `shape` allows: `cube`, `plane` (z stays z), `flips`, `none`, or `auto`, as many as voxels of all
    `sizes` (nm) have. Turns that would change the shape or the voxels are left out."""
    def alike(a: int, b: int) -> bool:
        return all(abs(s[a] - s[b]) <= 1e-3 * s[a] for s in sizes)

    if kind == "auto":
        kind = "cube" if alike(0, 1) and alike(1, 2) else "plane" if alike(1, 2) else "flips"
    if kind == "none":
        return [Turn()]
    orders = {"cube": list(permutations(range(3))), "plane": [(0, 1, 2), (0, 2, 1)], "flips": [(0, 1, 2)]}[kind]
    def kept(order: tuple[int, ...]) -> bool:
        """Whether a turn leaves the crop's shape and all voxel sizes as they are: samples of a batch have one grid."""
        return tuple(shape[a] for a in order) == tuple(shape) and all(alike(a, b) for a, b in enumerate(order))

    return [Turn(order, mirror) for order in orders if kept(order)  # type: ignore[arg-type]
            for mirror in product((False, True), repeat=3)]
