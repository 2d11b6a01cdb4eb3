"""Tokens of crops: where they lie (a backbone that returns positions), equal to those of whole volumes, and projected early."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dinoray.io.volume_grid import NORMAL
from dinoray.vision.crop_features import (
    context_target,
    crop_tokens,
    pixel_grid,
    plane_pixels,
    planes_for,
    space_to_depth,
    token_grid,
)
from dinoray.vision.voxel_grids import VoxelGrid, matrices, resample
from tests.runs import TINY, tiny_backbone


class MeanOfPatches(nn.Module):
    """The mean of each patch's first channel, as a token of width 1."""

    def __init__(self, patch: int = 4):
        super().__init__()
        self.config = SimpleNamespace(patch_size=patch, dim=1, mean=(0.0,) * 3, std=(1.0,) * 3)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
        found = nn.functional.avg_pool2d(pixels[:, :1], self.config.patch_size)
        return SimpleNamespace(patches=found.movedim(1, -1))


def coordinates(grid: VoxelGrid, axis: int) -> np.ndarray:
    """Of each voxel's centre, along an axis."""
    return np.meshgrid(*(grid.centres(a) for a in range(3)), indexing="ij")[axis]


@pytest.mark.parametrize("voxel", [(8.0, 8.0, 8.0), (10.0, 5.0, 5.0), (4.0, 6.0, 8.0)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_tokens_lie_where_their_grids_say(voxel, factor) -> None:
    """On a volume of coordinates, the mean of a patch is the coordinate of its centre: inside, to 0.01 raw voxel."""
    raw_grid = VoxelGrid((24, 24, 24), (100.0, -50.0, 7.0), voxel)
    target = raw_grid.pooled((factor,) * 3)
    for axis in range(3):
        raw = torch.from_numpy(coordinates(raw_grid, axis))[None]
        tokens, grids = crop_tokens(MeanOfPatches().double(), raw, raw_grid, target, planes=("xy", "xz", "yz"), slice_batch=5)
        for plane, values in tokens.items():
            assert values.shape == (1, 1, *grids[plane].shape)
            off = np.abs(values[0, 0].numpy() - coordinates(grids[plane], axis)) / voxel[axis]
            mirrored = axis != NORMAL[plane] and pixel_grid(raw_grid, target, plane).shape[axis] % 4 != 0
            inside = tuple(slice(0, -1) if mirrored and a == axis else slice(None) for a in range(3))
            assert off[inside].max() <= 0.01, (plane, axis)
            if not mirrored:
                back = resample(values, matrices(grids[plane], target, edges="extrapolate"))[0, 0].numpy()
                assert np.abs(back - coordinates(target, axis)).max() / voxel[axis] <= 0.01


def test_projection_before_resampling_is_the_projection_of_fused_features() -> None:
    """What spares features of every voxel: both orders give the same."""
    backbone = tiny_backbone()
    raw_grid = VoxelGrid((32, 32, 32), (0.0, 0.0, 0.0), (8.0, 8.0, 8.0))
    target, raw = raw_grid.pooled((2, 2, 2)), torch.rand(2, 32, 32, 32)
    tokens, grids = crop_tokens(backbone, raw, raw_grid, target, planes=("xy", "xz", "yz"), slice_batch=8)
    weight = torch.randn(5, TINY.dim)
    fused = sum(resample(t, matrices(grids[p], target)) for p, t in tokens.items()) / 3
    late = torch.einsum("oc,bczyx->bozyx", weight, fused)
    early = sum(resample(torch.einsum("oc,bczyx->bozyx", weight, t), matrices(grids[p], target)) for p, t in tokens.items()) / 3
    torch.testing.assert_close(early, late, atol=1e-4, rtol=1e-4)


def test_batches_of_slices_do_not_matter() -> None:
    raw_grid = VoxelGrid((20, 24, 28), (0.0, 0.0, 0.0), (8.0, 8.0, 8.0))
    raw = torch.rand(1, 20, 24, 28)
    found = [crop_tokens(tiny_backbone(), raw, raw_grid, raw_grid, planes=("xz",), slice_batch=n)[0]["xz"] for n in (1, 7, 100)]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=1e-5, rtol=1e-5)


def test_sides_that_are_no_whole_patches_are_mirrored() -> None:
    grid = VoxelGrid((3, 5, 9), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    raw = torch.arange(3 * 5 * 9, dtype=torch.float32).reshape(1, 3, 5, 9)
    pixels = plane_pixels(raw, grid, grid, "xy", 8)
    assert pixels.shape == (1, 3, 8, 16)
    np.testing.assert_array_equal(pixels[0, 1].numpy(), np.pad(raw[0, 1].numpy(), ((0, 3), (0, 7)), mode="reflect"))
    assert plane_pixels(raw[:, :, :1], VoxelGrid((3, 1, 9), (0.0,) * 3, (1.0,) * 3), VoxelGrid((3, 1, 9), (0.0,) * 3, (1.0,) * 3),
                        "xy", 8).shape == (1, 3, 8, 16)
    assert token_grid(grid, grid, "yz", 8).shape == (1, 1, 9)


def test_planes_by_anisotropy() -> None:
    assert planes_for(VoxelGrid((1, 1, 1), (0.0,) * 3, (24.0, 8.0, 8.0))) == ("xy", "xz", "yz")
    assert planes_for(VoxelGrid((1, 1, 1), (0.0,) * 3, (25.0, 8.0, 8.0))) == ("xy",)


def test_raw_voxels_of_a_label_voxel_become_its_channels() -> None:
    raw = torch.arange(2 * 4 * 6, dtype=torch.float32).reshape(1, 2, 4, 6)
    cells = space_to_depth(raw, (1, 2, 3))
    assert cells.shape == (1, 6, 2, 2, 2)
    assert cells[0, :, 1, 1, 0].tolist() == raw[0, 1, 2:4, 0:3].ravel().tolist()


def test_the_target_grid_of_a_context_covers_it() -> None:
    crop = VoxelGrid((16, 16, 16), (-60.0, -60.0, -60.0), (8.0, 8.0, 8.0))
    context = VoxelGrid((32, 32, 32), (-248.0, -248.0, -248.0), (16.0, 16.0, 16.0))
    target = context_target(crop, context)
    assert target.shape == crop.shape and target.pitch_nm == (32.0,) * 3 and target.extent_nm == context.extent_nm
    assert target.centre_nm == pytest.approx(context.centre_nm)
