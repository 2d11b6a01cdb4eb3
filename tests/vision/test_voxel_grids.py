"""Grids in nm: coordinates carried from one to another are where the centres are, whatever the offsets and pitches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.vision.voxel_grids import VoxelGrid, linear_matrix, matrices, resample, same_axis, stacked

sizes, places, counts = st.floats(0.5, 60), st.floats(-500, 500), st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(st.tuples(sizes, sizes), st.tuples(places, places), st.tuples(counts, counts), st.sampled_from(["clamp", "extrapolate"]))
def test_positions_land_on_positions(pitches, firsts, numbers, edges) -> None:
    source, target = (VoxelGrid((n, 1, 1), (f, 0.0, 0.0), (p, 1.0, 1.0)) for n, f, p in zip(numbers, firsts, pitches, strict=True))
    matrix = linear_matrix(source, target, 0, edges=edges).astype(np.float64)
    assert matrix.shape == (numbers[1], numbers[0])
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-3 if edges == "extrapolate" else 1e-6)
    if edges == "clamp":
        wanted = np.clip(target.centres(0), *sorted((source.centres(0)[0], source.centres(0)[-1])))
        np.testing.assert_allclose(matrix @ source.centres(0), wanted, atol=1e-4 * (1 + np.abs(wanted).max()))


def test_a_part_of_a_coarse_field_lies_on_a_fine_grid_in_its_middle() -> None:
    fine = VoxelGrid((8, 8, 8), (1000.0, 2000.0, 3000.0), (4.0, 4.0, 4.0))
    coarse = VoxelGrid((8, 8, 8), tuple(c - 3.5 * 16 for c in fine.centre_nm), (16.0, 16.0, 16.0))
    z, y, x = np.meshgrid(*(coarse.centres(a) for a in range(3)), indexing="ij")
    field = torch.from_numpy(np.stack([z, y, x]))[None]
    found = resample(field, matrices(coarse, fine))[0].numpy()
    for axis in range(3):
        wanted = np.moveaxis(np.broadcast_to(fine.centres(axis), (8, 8, 8)), -1, axis)
        np.testing.assert_allclose(found[axis], wanted, atol=0.01)
    by_index = field[0].numpy()
    assert np.abs(by_index[0, 0, 0, 0] - fine.centres(0)[0]) > 40, "voxel (0, 0, 0) of one is nowhere near that of the other"
    pooled = resample(field, matrices(coarse, fine, pool=(2, 4, 1)))[0].numpy()
    assert pooled.shape == (3, 4, 2, 8)
    np.testing.assert_allclose(pooled[0, :, 0, 0], fine.pooled((2, 4, 1)).centres(0), atol=0.01)
    np.testing.assert_allclose(pooled[1, 0, :, 0], fine.pooled((2, 4, 1)).centres(1), atol=0.01)


def test_axes_that_do_not_change_have_no_matrix() -> None:
    grid = VoxelGrid((4, 5, 6), (0.0, 1.0, 2.0), (3.0, 4.0, 5.0))
    other = VoxelGrid((4, 5, 3), (0.0, 1.0 + 1e-9, 2.0), (3.0, 4.0, 10.0))
    assert [m is None for m in matrices(grid, other)] == [True, True, False]
    assert same_axis(grid, other, 1) and not same_axis(grid, other, 2)
    values = torch.randn(2, 3, 4, 5, 6)
    assert resample(values, matrices(grid, grid)) is values


def test_samples_of_a_batch_keep_their_own_matrices() -> None:
    a, b = (VoxelGrid((3, 1, 1), (f, 0.0, 0.0), (1.0, 1.0, 1.0)) for f in (0.0, 0.5))
    target = VoxelGrid((3, 1, 1), (0.5, 0.0, 0.0), (1.0, 1.0, 1.0))
    together = stacked([matrices(a, target), matrices(b, target)])
    values = torch.arange(3.0).reshape(1, 1, 3, 1, 1).expand(2, 1, 3, 1, 1)
    assert resample(values, together)[:, 0, :, 0, 0].tolist() == [[0.5, 1.5, 2.0], [0.0, 1.0, 2.0]]


def test_parts_and_pooled_grids() -> None:
    grid = VoxelGrid((10, 10, 10), (5.0, 5.0, 5.0), (10.0, 10.0, 10.0))
    assert grid.part((2, 0, -1), (4, 4, 4)).first_nm == (25.0, 5.0, -5.0)
    assert grid.pooled((2, 5, 3)).shape == (5, 2, 3) and grid.pooled((2, 5, 3)).first_nm == (10.0, 25.0, 15.0)
    assert grid.centre_nm == (50.0, 50.0, 50.0) and grid.extent_nm == (100.0, 100.0, 100.0)
    assert pytest.approx(grid.pooled((2, 2, 2)).centre_nm) == grid.centre_nm
