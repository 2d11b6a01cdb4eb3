"""Three-plane tokens of one crop in memory: slices along z, y and x at native in-plane resolution, through the backbone.

As for whole volumes (io/volume_grid.py): target planes lie on the crop's target grid and are interpolated from raw along the
normal; pixels are square, the finer of the two voxel sizes in the plane; tokens have the pitch of a patch of them. Here a crop is
one window, its sides mirrored up to whole patches. Tokens stay at their own resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dinoray.io.volume_grid import NORMAL, parts
from dinoray.vision.backbone import Backbone
from dinoray.vision.voxel_grids import Shape, Triple, VoxelGrid, matrices, resample


def planes_for(raw: VoxelGrid) -> tuple[str, ...]:
    """All three planes; xy alone where voxels differ by more than 3x."""
    return tuple(NORMAL) if max(raw.pitch_nm) <= 3 * min(raw.pitch_nm) else ("xy",)


def pixel_grid(raw: VoxelGrid, target: VoxelGrid, plane: str) -> VoxelGrid:
    """The grid of a plane's pixels: target planes along its normal, square pixels from raw's outer face on in the plane."""
    normal = NORMAL[plane]
    pixel = min(raw.pitch_nm[a] for a in range(3) if a != normal)
    shape, first, pitch = list(target.shape), list(target.first_nm), list(target.pitch_nm)
    for a in range(3):
        if a != normal:
            shape[a], pitch[a] = parts(raw.extent_nm[a], pixel), pixel
            first[a] = raw.first_nm[a] - raw.pitch_nm[a] / 2 + pixel / 2
    return VoxelGrid(tuple(shape), tuple(first), tuple(pitch))  # type: ignore[arg-type]


def token_grid(raw: VoxelGrid, target: VoxelGrid, plane: str, patch: int) -> VoxelGrid:
    """The grid of a plane's tokens: patches of its pixels, the last ones reaching beyond the crop where it is no multiple."""
    pixels, normal = pixel_grid(raw, target, plane), NORMAL[plane]
    shape = tuple(n if a == normal else -(-n // patch) for a, n in enumerate(pixels.shape))
    first = tuple(f if a == normal else f + (patch - 1) / 2 * p
                  for a, (f, p) in enumerate(zip(pixels.first_nm, pixels.pitch_nm, strict=True)))
    pitch = tuple(p if a == normal else p * patch for a, p in enumerate(pixels.pitch_nm))
    return VoxelGrid(shape, first, pitch)  # type: ignore[arg-type]


def plane_pixels(raw: torch.Tensor, raw_grid: VoxelGrid, target: VoxelGrid, plane: str, patch: int) -> torch.Tensor:
    """[B, slices, rows, cols], sides multiples of `patch`, from raw [B, Z, Y, X] float."""
    pixels, normal = pixel_grid(raw_grid, target, plane), NORMAL[plane]
    through = [m if m is None else m.to(raw) for m in matrices(raw_grid, pixels, edges="extrapolate")]
    values = resample(raw[:, None], tuple(through))[:, 0].movedim(normal + 1, 1)  # type: ignore[arg-type]
    pads = [-n % patch for n in values.shape[2:]]
    for axis, more in zip((-2, -1), pads, strict=True):
        while more:  # a mirror is no wider than what it mirrors
            step = min(more, values.shape[axis] - 1)
            if step == 0:
                values = values.repeat_interleave(patch, axis)
                break
            pad = (0, 0, 0, step) if axis == -2 else (0, step, 0, 0)
            values = F.pad(values, pad, mode="reflect")
            more -= step
    return values


@torch.no_grad()
def crop_tokens(backbone: Backbone, raw: torch.Tensor, raw_grid: VoxelGrid, target: VoxelGrid, *, planes: Sequence[str],
                slice_batch: int) -> tuple[dict[str, torch.Tensor], dict[str, VoxelGrid]]:
    """(plane -> tokens [B, C, z, y, x] in the backbone's dtype, plane -> their grid) of raw [B, Z, Y, X] scaled to about 0..1.

    `slice_batch` slices go through the backbone at once; beside the tokens, no more than the slices of one plane are held.
    """
    config, dtype = backbone.config, next(backbone.parameters()).dtype
    mean, std = (torch.tensor(values, device=raw.device).view(1, 3, 1, 1) for values in (config.mean, config.std))
    tokens, grids = {}, {}
    for plane in planes:
        pixels = plane_pixels(raw, raw_grid, target, plane, config.patch_size)
        batch, slices, height, width = pixels.shape
        flat = pixels.reshape(-1, 1, height, width)
        found = torch.empty(batch * slices, height // config.patch_size, width // config.patch_size, config.dim, dtype=dtype,
                            device=raw.device)
        for i in range(0, len(flat), slice_batch):
            given = ((flat[i:i + slice_batch] - mean) / std).to(dtype)
            found[i:i + slice_batch] = backbone(given).patches
        # [B, normal, rows, cols, C] -> [B, C, z, y, x]
        tokens[plane] = found.unflatten(0, (batch, slices)).movedim(-1, 1).movedim(2, 2 + NORMAL[plane])
        grids[plane] = token_grid(raw_grid, target, plane, config.patch_size)
    return tokens, grids


def space_to_depth(raw: torch.Tensor, factor: Shape) -> torch.Tensor:
    """raw [B, Z, Y, X] -> [B, f_z f_y f_x, Z / f_z, Y / f_y, X / f_x]: the raw voxels of each label voxel as channels."""
    fz, fy, fx = factor
    b, z, y, x = raw.shape
    cells = raw.reshape(b, z // fz, fz, y // fy, fy, x // fx, fx)
    return cells.permute(0, 2, 4, 6, 1, 3, 5).reshape(b, fz * fy * fx, z // fz, y // fy, x // fx)


def context_target(crop: VoxelGrid, context_raw: VoxelGrid) -> VoxelGrid:
    """The target grid of a context: as many voxels as the crop has, over the whole of the context."""
    pitch: Triple = tuple(e / n for e, n in zip(context_raw.extent_nm, crop.shape, strict=True))  # type: ignore[assignment]
    first = tuple(f - r / 2 + p / 2 for f, r, p in zip(context_raw.first_nm, context_raw.pitch_nm, pitch, strict=True))
    return VoxelGrid(crop.shape, first, pitch)  # type: ignore[arg-type]
