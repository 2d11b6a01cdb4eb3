"""Tokens to the target grid: exact coordinates, NaN only where there is weight, the same bits for any box, little memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.io.fusion import SLAB_PLANES, fuse_box, neighbours, plane_to_grid, resample_axis, token_positions
from dinoray.io.volume_grid import VolumeGrid
from tests.io.volumes import centres, from_memory, random_tokens

GRID = VolumeGrid(shape=(41, 150, 203), voxel_nm=(16.0, 16.0, 16.0), translation_nm=(0.0, 0.0, 0.0), target_nm=(64.0, 64.0, 64.0),
                  patch=16, planes=("xy", "xz", "yz"), window_px=512, halo_px=32, micro_batch=4, dim=3, dtype="float32")


EDGES = st.sampled_from(["extrapolate", "clamp"])


@st.composite
def volumes(draw, edges=EDGES) -> VolumeGrid:
    """Sizes that are multiples of nothing, anisotropic voxels, crop offsets, sides of one token."""
    return replace(
        GRID, shape=tuple(draw(st.integers(1, 130)) for _ in range(3)),
        voxel_nm=tuple(draw(st.sampled_from([4.0, 6.5, 8.0, 11.3])) for _ in range(3)),
        translation_nm=tuple(draw(st.sampled_from([0.0, 3000.7, -812.25])) for _ in range(3)),
        target_nm=tuple(draw(st.sampled_from([19.0, 32.0, 47.3, 130.0])) for _ in range(3)), patch=draw(st.sampled_from([8, 16])),
        planes=draw(st.sampled_from([("xy",), ("xz", "yz"), ("xy", "xz", "yz"), ("yz", "xy")])), edges=draw(edges))


@settings(deadline=None, max_examples=120)
@given(grid=volumes())
def test_a_plane_gives_back_coordinates_everywhere(grid: VolumeGrid) -> None:
    """Before averaging: 0.01 raw voxel at every target voxel, borders included; clamp repeats the outermost tokens."""
    truth, shape = centres(grid.fused), grid.target_shape
    for name in grid.planes:
        plane = grid.plane(name)
        found = plane_to_grid(from_memory(centres(plane.array)), plane, (0, 0, 0), shape)
        assert found.dtype == np.float32 and found.shape == (3, *shape)
        for axis in range(3):
            expected = truth[axis]
            first, pitch, count = plane.array.translation_nm[axis], plane.pitch_nm[axis], plane.shape[axis]
            if axis != plane.normal and (count == 1 or grid.edges == "clamp"):
                expected = np.clip(expected, first, first + (count - 1) * pitch)
            assert np.abs(found[axis] - expected).max() <= 0.01 * grid.voxel_nm[axis], (name, axis)


@settings(deadline=None, max_examples=60)
@given(grid=volumes(st.just("extrapolate")))
def test_fused_coordinates_are_those_of_the_target_voxels(grid: VolumeGrid) -> None:
    grid = replace(grid, shape=tuple(max(n, 2 * grid.patch * 3) for n in grid.shape))
    found = fuse_box({n: from_memory(centres(grid.plane(n).array)) for n in grid.planes}, grid, (0, 0, 0), grid.target_shape)
    worst = np.abs(found - centres(grid.fused)).max(axis=(1, 2, 3))
    assert (worst <= 0.01 * np.array(grid.voxel_nm)).all()


def test_align_corners_would_fail_this() -> None:
    """The measure has teeth: positions that align the corners of the grids are off by more than a raw voxel."""
    plane = GRID.plane("xy")
    count, size = plane.shape[2], GRID.target_shape[2]
    tokens = centres(plane.array)[2, 0, 0]
    truth = centres(GRID.fused)[2, 0, 0]
    right = resample_axis(tokens, 0, count, token_positions(0, size, 64.0, 256.0), "extrapolate")
    wrong = resample_axis(tokens, 0, count, np.linspace(0, count - 1, size), "extrapolate")
    assert np.abs(right - truth).max() < 0.01 * 16 and np.abs(wrong - truth).max() > 16


@settings(deadline=None, max_examples=60)
@given(grid=volumes(), data=st.data())
def test_a_voxel_does_not_depend_on_the_box(grid: VolumeGrid, data) -> None:
    tokens = random_tokens(grid)
    for values in tokens.values():
        values[:, data.draw(st.integers(0, values.shape[1] - 1))] = np.nan
    readers = {name: from_memory(values) for name, values in tokens.items()}
    whole = fuse_box(readers, grid, (0, 0, 0), grid.target_shape)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in grid.target_shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, grid.target_shape, strict=True))
    part = fuse_box(readers, grid, start, stop)
    assert part.tobytes() == whole[(slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))].tobytes()


@settings(deadline=None, max_examples=60)
@given(grid=volumes())
def test_the_mean_is_that_of_the_planes_and_a_constant_stays_constant(grid: VolumeGrid) -> None:
    tokens, shape = random_tokens(grid), grid.target_shape
    planes = [plane_to_grid(from_memory(tokens[n]), grid.plane(n), (0, 0, 0), shape) for n in grid.planes]
    found = fuse_box({n: from_memory(v) for n, v in tokens.items()}, grid, (0, 0, 0), shape)
    assert np.allclose(found, np.mean(planes, axis=0, dtype=np.float64), atol=2e-6)
    same = {n: from_memory(np.full_like(v, 0.7)) for n, v in tokens.items()}
    assert np.allclose(fuse_box(same, grid, (0, 0, 0), shape), np.float32(0.7), rtol=2e-7)


def test_nan_spreads_where_it_has_weight_and_nowhere_else() -> None:
    tokens = np.arange(6, dtype=np.float32)
    tokens[2] = np.nan
    positions = np.array([0.5, 1.0, 1.25, 2.0, 2.75, 3.0, 3.5, 5.0, 5.3])
    found = resample_axis(tokens, 0, 6, positions, "extrapolate")
    assert np.isnan(found).tolist() == [False, False, True, True, True, False, False, False, False]
    assert np.allclose(found[~np.isnan(found)], positions[~np.isnan(found)])
    tokens[:] = [0, 1, 2, 3, np.nan, 5]
    assert np.isnan(resample_axis(tokens, 0, 6, np.array([3.0, 5.0, 5.4]), "extrapolate")).tolist() == [False, False, True]
    assert np.isnan(resample_axis(tokens, 0, 6, np.array([3.0, 5.0, 5.4]), "clamp")).tolist() == [False, False, False]
    # G a whole fraction of the pitch: rounding gives no weight to the neighbour of a token that is read exactly
    for target, pitch, count in ((0.1, 0.3, 3000), (64.0, 64.0, 50), (4.04, 64.64, 20000)):
        low, high, _ = neighbours(10**6, token_positions(0, count, target, pitch), "extrapolate")
        assert (low == high).sum() == (0 if round(pitch / target) % 2 == 0 else count // round(pitch / target))


def test_nan_in_one_plane_is_nan_in_the_mean() -> None:
    tokens = random_tokens(GRID)
    readers = {n: from_memory(v) for n, v in tokens.items()}
    assert np.isfinite(fuse_box(readers, GRID, (0, 0, 0), GRID.target_shape)).all()
    tokens["xz"][:, 0, 5, 2] = np.nan
    found = np.isnan(fuse_box(readers, GRID, (0, 0, 0), GRID.target_shape))
    assert found.any() and not found[:, :, :5].any() and not found[:, :, 6:].any()
    assert found[0].sum() == found[0, :, 5].sum() < found[0, :, 5].size


@pytest.mark.parametrize("edges, expected", [("extrapolate", [-0.5, 0.0, 1.5, 2.5]), ("clamp", [0.0, 0.0, 1.5, 2.0])])
def test_edges(edges: str, expected: list[float]) -> None:
    values = np.arange(3, dtype=np.float16).reshape(1, 3, 1)
    found = resample_axis(values, 1, 3, np.array([-0.5, 0.0, 1.5, 2.5]), edges)
    assert found.dtype == np.float32 and found.ravel().tolist() == expected
    assert resample_axis(values[:, :1], 1, 1, np.array([-0.4, 0.0, 0.4]), edges).ravel().tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="edges"):
        resample_axis(values, 1, 3, np.array([0.0]), "wrap")


def test_only_the_tokens_needed_are_read() -> None:
    asked = []

    def read(*box: int) -> np.ndarray:
        asked.append(box)
        z0, z1, y0, y1, x0, x1 = box
        return np.zeros((3, z1 - z0, y1 - y0, x1 - x0), np.float32)

    plane_to_grid(read, GRID.plane("xz"), (4, 10, 20), (8, 12, 24))
    # z: voxels 4..7 of 64 nm lie at 0.625..1.375 tokens of 256 nm, x: 20..23 at 4.625..5.375
    assert asked == [(0, 3, 10, 12, 4, 7)]
    asked.clear()
    fuse_box(dict.fromkeys(GRID.planes, read), GRID, (0, 1, 2), GRID.target_shape)
    for name, normal in (("xy", 0), ("xz", 1), ("yz", 2)):
        slabs = [box for box in asked if box[2 * normal + 1] - box[2 * normal] <= SLAB_PLANES]
        assert len(slabs) >= -(-GRID.target_shape[normal] // SLAB_PLANES), name


def test_memory_is_one_copy_and_one_slab() -> None:
    """Of 94 MB of features: no second copy, and no third of a copy for each plane."""
    grid = replace(GRID, shape=(320, 320, 320), dim=48)
    tokens = random_tokens(grid)
    fused = 4 * 48 * 80**3
    slab = fused * SLAB_PLANES // 80
    readers = {n: from_memory(v) for n, v in tokens.items()}
    tracemalloc.start()
    try:
        found = fuse_box(readers, grid, (0, 0, 0), (80, 80, 80))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.nbytes == fused
    assert fused < peak <= fused + 2.5 * slab, "a slab, and once more while it is resampled"
