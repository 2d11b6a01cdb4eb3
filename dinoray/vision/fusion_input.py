"""From crops in memory to what the context-fusion UNet takes: tokens, on the fly or stored, and the matrices that place them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dinoray.vision.decoders.context import PlaneTokens
from dinoray.vision.decoders.context_fusion import CELLS, CROP, FusionInput, skip_grid
from dinoray.vision.voxel_grids import Matrices, VoxelGrid, matrices, stacked


@dataclass(frozen=True)
class FusionShape:
    """What of a model decides on its inputs."""

    fusion: str
    levels: int
    cells: int
    own_tokens: bool


def padded_grid(crop: VoxelGrid, levels: int) -> VoxelGrid:
    """The crop's grid with its far ends padded to what the UNet halves `levels` times."""
    multiple = 2**levels
    return VoxelGrid(tuple(-(-n // multiple) * multiple for n in crop.shape), crop.first_nm, crop.pitch_nm)  # type: ignore[arg-type]


def crop_matrices(tokens: VoxelGrid, crop: VoxelGrid) -> dict[str, Matrices]:
    """Where a plane's own tokens go."""
    return {CROP: matrices(tokens, crop)}


def context_matrices(tokens: VoxelGrid, crop: VoxelGrid, context: VoxelGrid, shape: FusionShape) -> dict[str, Matrices]:
    """Where a plane's context tokens go: to the skips, level by level, and to the cells. `context`: the target grid of the context,
    which `index_gate` takes for the crop's."""
    found = {}
    if shape.fusion in ("full", "gate", "index_gate"):
        target = padded_grid(context if shape.fusion == "index_gate" else crop, shape.levels)
        found |= {skip_grid(level): matrices(tokens, target, pool=(2**level,) * 3) for level in range(shape.levels)}
    if shape.fusion in ("full", "attention"):
        found[CELLS] = matrices(tokens, context, pool=cell_voxels(context, shape.cells))
    return found


def cell_voxels(context: VoxelGrid, cells: int) -> tuple[int, int, int]:
    """Context voxels of a cell, for at most `cells` cells a side."""
    return tuple(max(1, -(-n // cells)) for n in context.shape)  # type: ignore[return-value]


def plane_tokens(tokens: dict[str, torch.Tensor], each: Sequence[dict[str, dict[str, Matrices]]]) -> PlaneTokens:
    """Tokens of a batch with the matrices of its samples; `each`: per sample plane -> grid -> matrices."""
    planes = list(tokens)
    grids = list(each[0][planes[0]])
    return PlaneTokens(tokens, {grid: {plane: stacked([sample[plane][grid] for sample in each]) for plane in planes}
                                for grid in grids})


def context_places(crops: Sequence[VoxelGrid], contexts: Sequence[VoxelGrid], inside: Sequence[tuple[np.ndarray, ...]], cells: int,
                   given: FusionInput) -> None:
    """Fill in what attention needs: centres, which cells hold some of the volume, and the unit of lengths. `inside`: per sample and
    axis, the pixels of the context within the volume."""
    sizes = cell_voxels(contexts[0], cells)
    grids = [context.pooled(sizes) for context in contexts]
    given.crop_nm = tuple(torch.from_numpy(np.stack([c.centres(a) for c in crops])) for a in range(3))
    given.cells_nm = tuple(torch.from_numpy(np.stack([g.centres(a) for g in grids])) for a in range(3))
    given.half_side_nm = torch.tensor([e / 2 for e in contexts[0].extent_nm], dtype=torch.float64)
    valid = []
    for context, grid, axes in zip(contexts, grids, inside, strict=True):
        per_axis = []
        for a, pixels in enumerate(axes):
            per_cell = np.zeros(grid.shape[a], bool)
            at = np.arange(len(pixels)) * context.shape[a] // len(pixels) // sizes[a]  # pixel -> context voxel -> cell
            np.logical_or.at(per_cell, at[at < grid.shape[a]], pixels[at < grid.shape[a]])
            per_axis.append(per_cell)
        valid.append((per_axis[0][:, None, None] & per_axis[1][None, :, None] & per_axis[2][None, None, :]).ravel())
    given.context_valid = torch.from_numpy(np.stack(valid))
