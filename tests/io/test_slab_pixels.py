"""Pixels of slabs: reflection, half-pixel centres, the rules along the normal, equal bytes whatever the slab."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.io.slab_pixels import linear_taps, pixel_taps, plane_taps, slab_taps
from dinoray.io.volume_grid import VolumeGrid, reflect


def grid(shape=(40, 50, 60), voxel=(8.0, 8.0, 8.0), target=(32.0, 32.0, 32.0), window=64, halo=16, batch=2) -> VolumeGrid:
    return VolumeGrid(shape, voxel, (0.0, 0.0, 0.0), target, 16, ("xy", "xz", "yz"), window, halo, batch, 4, "float32")


def reader(volume: np.ndarray):
    """`Volume.read` of an array; index arrays must be sorted and inside, as the contract says."""

    def read(z, y, x):
        for axis, s in enumerate((z, y, x)):
            if isinstance(s, slice):
                assert 0 <= s.start < s.stop <= volume.shape[axis] and s.step is None
            else:
                assert (np.diff(s) > 0).all() and s[0] >= 0 and s[-1] < volume.shape[axis]
        ranges = [np.arange(s.start, s.stop) if isinstance(s, slice) else s for s in (z, y, x)]
        return volume[np.ix_(*ranges)]

    return read


@given(st.integers(1, 40), st.integers(0, 90), st.integers(0, 90))
def test_reflect_is_that_of_numpy_pad(size: int, before: int, after: int) -> None:
    padded = np.pad(np.arange(size), (before, after), mode="reflect") if size > 1 else np.zeros(size + before + after, int)
    np.testing.assert_array_equal(reflect(np.arange(-before, size + after), size), padded)


def test_linear_taps_are_one_voxel_on_its_centre_and_two_between() -> None:
    on = linear_taps(np.array([3.0, 4.0 + 1e-9]), 10)
    assert on.is_plain and on.indices[:, 0].tolist() == [3, 4]
    between = linear_taps(np.array([1.5, 2.25]), 10)
    np.testing.assert_allclose((between.indices * between.weights).sum(axis=1), [1.5, 2.25])
    np.testing.assert_allclose(between.weights.sum(axis=1), 1)


def test_the_line_goes_on_in_the_outer_half_of_border_voxels_and_is_reflected_beyond() -> None:
    taps = linear_taps(np.array([-0.5, -0.25, 9.4, 9.5]), 10)
    np.testing.assert_allclose((taps.indices * taps.weights).sum(axis=1), [-0.5, -0.25, 9.4, 9.5], atol=1e-6)
    beyond = linear_taps(np.array([-1.25, 10.5]), 10)
    np.testing.assert_allclose((beyond.indices * beyond.weights).sum(axis=1), [1.25, 7.5], atol=1e-6)
    assert linear_taps(np.array([-0.25, 0.3]), 1).indices.max() == 0


def test_a_last_plane_beyond_the_volume_is_taken_at_its_face() -> None:
    plane = grid((41, 50, 60)).plane("xy")  # G = 4 R: the centre of plane 10 is at 41.5, the face at 40.5
    for rule, place in (("interpolate", 40.5), ("nearest", 40), ("antialias", 40.5)):
        taps = plane_taps(plane, 10, 11, rule)
        assert (taps.indices * taps.weights).sum() == pytest.approx(place), rule
        assert taps.indices.max() <= 40


def test_target_planes_are_the_mean_of_the_two_nearest_slices_at_ties() -> None:
    taps = plane_taps(grid().plane("xy"), 0, 10, "interpolate")  # G = 4 R: centres at 4 k + 1.5
    np.testing.assert_array_equal(taps.indices, [[4 * k + 1, 4 * k + 2] for k in range(10)])
    np.testing.assert_array_equal(taps.weights, np.full((10, 2), 0.5))
    assert taps.used().tolist() == sorted({i for k in range(10) for i in (4 * k + 1, 4 * k + 2)})


def test_nearest_takes_the_lower_slice_at_ties_and_is_off_by_half_a_voxel_at_most() -> None:
    taps = plane_taps(grid().plane("xy"), 0, 10, "nearest")
    assert taps.indices[:, 0].tolist() == [4 * k + 1 for k in range(10)]
    other = grid(target=(13.0, 13.0, 13.0)).plane("xy")
    centres = (np.arange(other.shape[0]) + 0.5) * 13 / 8 - 0.5
    inside = centres <= 39
    assert np.abs(plane_taps(other, 0, other.shape[0], "nearest").indices[:, 0] - centres)[inside].max() <= 0.5


def test_antialias_is_the_mean_over_the_thickness_of_the_plane() -> None:
    volume = np.random.default_rng(0).normal(size=(40, 50, 60)).astype(np.float32)
    plane = grid().plane("xy")
    taps = slab_taps(plane, (0, 10), (0, 50), (0, 60), "antialias")
    np.testing.assert_allclose(taps.pixels(taps.read_raw(reader(volume))), volume.reshape(10, 4, 50, 60).mean(axis=1), atol=1e-6)
    uneven = plane_taps(grid(target=(20.0, 20.0, 20.0)).plane("xy"), 0, 4, "antialias")  # 2.5 voxels
    # voxels 2.5 to 5: half of voxel 2, moved a little so that the centre of mass is at 3.25 (voxel centres are integers)
    np.testing.assert_allclose(uneven.weights[1] * 2.5, [0.5 - 0.0625, 1, 1 + 0.0625, 0], atol=1e-6)
    assert uneven.indices[1, :3].tolist() == [2, 3, 4] and uneven.weights[1] @ uneven.indices[1] == pytest.approx(3.25)


def test_linspace_is_the_rule_of_the_original() -> None:
    taps = plane_taps(grid().plane("xy"), 2, 7, "linspace")
    assert taps.indices[:, 0].tolist() == np.linspace(0, 39, 10, dtype=int)[2:7].tolist()


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule"):
        plane_taps(grid().plane("xy"), 0, 1, "cubic")


@pytest.mark.parametrize("plane", ["xy", "xz", "yz"])
def test_native_pixels_are_the_voxels_padded_by_reflection(plane: str) -> None:
    volume = np.random.default_rng(1).integers(0, 65535, (40, 50, 60), dtype=np.uint16)
    lattice = grid().plane(plane)
    (row, col), normal = lattice.axes, lattice.normal
    n_rows, n_cols = volume.shape[row], volume.shape[col]
    taps = slab_taps(lattice, (1, 4), (-48, n_rows + 30), (-16, n_cols + 48), "interpolate")
    pixels = taps.pixels(taps.read_raw(reader(volume)))
    moved = np.moveaxis(volume, normal, 0).astype(np.float32)
    slices = np.stack([(moved[4 * k + 1] + moved[4 * k + 2]) / 2 for k in range(1, 4)])
    np.testing.assert_array_equal(pixels, np.pad(slices, ((0, 0), (48, 30), (16, 48)), mode="reflect"))
    assert pixels.dtype == np.float32 and pixels.flags.c_contiguous


def test_anisotropic_planes_are_resampled_to_square_pixels_at_half_pixel_centres() -> None:
    lattice = grid(voxel=(20.0, 8.0, 8.0), target=(40.0, 40.0, 40.0)).plane("xz")
    assert lattice.pixel_nm == 8
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None], (40, 50, 60))
    taps = slab_taps(lattice, (0, 2), (0, 100), (0, 60), "interpolate")
    pixels = taps.pixels(taps.read_raw(reader(ramp)))
    centres_nm = (np.arange(100) + 0.5) * 8
    expected = centres_nm / 20 - 0.5
    inside = (expected >= 0) & (expected <= 39)
    assert inside.sum() > 90
    np.testing.assert_allclose(pixels[0, inside, 5], expected[inside], atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_pixel_is_bit_equal_whatever_slab_it_is_made_for(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    volume = rng.normal(size=(23, 31, 37)).astype(np.float32)
    voxel = data.draw(st.sampled_from([(8.0, 8.0, 8.0), (12.0, 8.0, 8.0), (7.0, 11.0, 13.0)]))
    rule = data.draw(st.sampled_from(["interpolate", "nearest", "antialias", "linspace"]))
    plane = grid(volume.shape, voxel, data.draw(st.sampled_from([(16.0,) * 3, (19.0,) * 3]))).plane(
        data.draw(st.sampled_from(["xy", "xz", "yz"])))
    depth, low, high = plane.shape[plane.normal], -20, 60
    whole_taps = slab_taps(plane, (0, depth), (low, high), (low, high), rule)
    whole = whole_taps.pixels(whole_taps.read_raw(reader(volume)))
    k = data.draw(st.integers(0, depth - 1))
    a = data.draw(st.integers(low, high - 1))
    b = data.draw(st.integers(a + 1, high))
    part_taps = slab_taps(plane, (k, k + 1), (a, b), (a, b), rule)
    part = part_taps.pixels(part_taps.read_raw(reader(volume)))
    assert part.tobytes() == np.ascontiguousarray(whole[k:k + 1, a - low:b - low, a - low:b - low]).tobytes()


def test_slices_between_the_wanted_ones_are_not_read() -> None:
    asked = []
    volume = np.zeros((40, 50, 60), np.uint8)

    def read(z, y, x):
        asked.append(z)
        return reader(volume)(z, y, x)

    taps = slab_taps(grid().plane("xy"), (0, 4), (0, 50), (0, 60), "interpolate")
    taps.read_raw(read)
    assert asked[0].tolist() == [1, 2, 5, 6, 9, 10, 13, 14]
    assert pixel_taps(grid().plane("xy"), 1, 0, 50).is_plain
