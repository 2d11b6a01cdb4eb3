"""The geometry of a volume's features: windows blend to 1, shards fit units and byte targets, transforms are exact."""

from __future__ import annotations

import json
from dataclasses import replace
from math import lcm, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest
from dinoray.io.volume_grid import CHUNK_BYTES, FUSED_SHARD_BYTES, SHARD_BYTES, Lattice, VolumeGrid, parts, reflect

GRID = VolumeGrid(shape=(64, 80, 96), voxel_nm=(16.0, 16.0, 16.0), translation_nm=(0.0, 0.0, 0.0), target_nm=(64.0, 64.0, 64.0),
                  patch=16, planes=("xy", "xz", "yz"), window_px=512, halo_px=32, micro_batch=8, dim=384, dtype="float32")


@st.composite
def grids(draw, most_voxels: int = 3000) -> VolumeGrid:
    patch = draw(st.sampled_from([8, 16]))
    halo = draw(st.integers(0, 3))
    return VolumeGrid(
        shape=tuple(draw(st.integers(1, most_voxels)) for _ in range(3)),
        voxel_nm=tuple(draw(st.sampled_from([4.0, 8.0, 9.7, 16.0, 30.0])) for _ in range(3)),
        translation_nm=tuple(draw(st.sampled_from([0.0, -1234.5, 77.25])) for _ in range(3)),
        target_nm=tuple(draw(st.sampled_from([33.0, 64.0, 100.1])) for _ in range(3)), patch=patch,
        planes=("xy", "xz", "yz"), window_px=patch * draw(st.integers(max(1, 4 * halo), 66)), halo_px=patch * halo,
        micro_batch=draw(st.integers(1, 12)), dim=draw(st.sampled_from([3, 192, 384, 768, 1024])),
        dtype=draw(st.sampled_from(["float16", "float32"])))


@st.composite
def lattices(draw) -> Lattice:
    """Lattices as planes have them."""
    grid = draw(grids())
    plane = grid.plane(draw(st.sampled_from(["xy", "xz", "yz"])))
    return plane.lattice(draw(st.sampled_from(plane.axes)))


@settings(deadline=None, max_examples=150)
@given(lattice=lattices(), data=st.data())
def test_weights_add_up_to_one_and_touching_names_who_has_weight(lattice: Lattice, data) -> None:
    total = np.zeros(lattice.tokens, np.float32)
    owners: list[set[int]] = [set() for _ in range(lattice.tokens)]
    for w in range(lattice.count):
        weights, start = lattice.weights(w), lattice.start(w)
        assert weights.shape == (lattice.window,) and weights.dtype == np.float32
        inside = np.arange(start, start + lattice.window)
        kept = (inside >= 0) & (inside < lattice.tokens)
        assert (weights[kept] > 0).all()
        total[inside[kept]] += weights[kept]
        for token in inside[kept]:
            owners[token].add(w)
    assert np.abs(total - 1).max() <= 2e-7
    assert max(map(len, owners)) <= 2
    first = data.draw(st.integers(0, lattice.tokens - 1))
    stop = data.draw(st.integers(first + 1, lattice.tokens))
    assert set(lattice.touching(first, stop)) == set.union(*owners[first:stop])


@settings(deadline=None, max_examples=100)
@given(lattice=lattices())
def test_a_window_is_at_one_place_whatever_asks_for_it(lattice: Lattice) -> None:
    assert lattice.stride >= max(1, 2 * lattice.halo) or lattice.count == 1
    assert lattice.start(0) == -lattice.offset - lattice.halo <= 0
    assert lattice.start(lattice.count - 1) + lattice.window >= lattice.tokens, "the last token is covered"
    assert lattice.start(lattice.count - 1) + lattice.halo < lattice.tokens, "no window whose core holds padding alone"


@settings(deadline=None, max_examples=200)
@given(grid=grids())
def test_shards_fit_units_and_chunks_fit_shards(grid: VolumeGrid) -> None:
    for name in grid.planes:
        plane, spec = grid.plane(name), grid.plane(name).array
        for axis in range(3):
            shard, size = spec.shards[axis], spec.shape[axis]
            assert shard % spec.chunks[axis] == 0 and spec.chunks[axis] <= size
            assert shard < size + spec.chunks[axis], "no whole chunk beyond the array's end"
            step = plane.planes_per_shard if axis == plane.normal else plane.lattice(axis).stride
            # units are boxes of whole strides: m of them, m a multiple of shard / stride, cut at the array's end
            assert shard >= size or step % shard == 0 or shard % step == 0
            assert shard >= size or lcm(step, shard) == max(step, shard)
        assert plane.planes_per_shard % grid.micro_batch == 0
    for spec in grid.arrays(fused=True):
        assert all(s % c == 0 for s, c in zip(spec.shards, spec.chunks, strict=True))
        assert spec.nbytes == prod(spec.shape) * spec.dim * np.dtype(spec.dtype).itemsize


@settings(deadline=None, max_examples=200)
@given(grid=grids(), dim=st.sampled_from([192, 384, 768, 1024, 4096]), micro_batch=st.sampled_from([1, 3, 8, 16]))
def test_shards_and_chunks_keep_to_their_bytes(grid: VolumeGrid, dim: int, micro_batch: int) -> None:
    """At the strides of even windows; those of odd ones may be prime, and then a shard is as wide as they are."""
    grid = replace(grid, dim=dim, micro_batch=micro_batch, window_px=grid.patch * 32, halo_px=grid.patch * 2,
                   shape=tuple(n + 600 for n in grid.shape))
    for spec in grid.arrays(fused=True):
        piece = spec.dim * np.dtype(spec.dtype).itemsize
        assert piece * prod(spec.shards) <= (FUSED_SHARD_BYTES if spec.name == "fused" else SHARD_BYTES)
        most = CHUNK_BYTES if spec.name == "fused" or dim < 4096 else 4 * CHUNK_BYTES
        assert piece * prod(spec.chunks) <= most
        if min(spec.shape) > 32:
            assert piece * prod(spec.chunks) >= CHUNK_BYTES / 16


def test_the_usual_model_gets_the_usual_sizes() -> None:
    grid = replace(GRID, shape=(8000,) * 3, dim=1024)
    spec = grid.plane("xz").array
    assert (spec.shards, spec.chunks) == ((28, 8, 28), (14, 4, 14))
    assert (grid.fused.shards, grid.fused.chunks) == ((32,) * 3, (8,) * 3)
    assert replace(grid, dim=4096, micro_batch=32).plane("xy").array.shards == (32, 14, 14)
    wide = replace(grid, window_px=78 * 16, shape=(629 * 16,) * 3)
    assert wide.plane("xy").array.shards == (8, 37, 37), "2 * 37 tokens are no single shard"


def test_windows_share_a_side_evenly_and_are_none_larger_than_asked_for() -> None:
    """Two windows of 512 px for a side of 512 would lie in the padding for half of their length."""
    def sides(n: int, **fields: int) -> list[tuple[int, int]]:
        lattice = replace(GRID, shape=(n,) * 3, voxel_nm=(8.0,) * 3, **fields).plane("xy").lattice(1)
        return lattice.count, 16 * lattice.window, 16 * lattice.offset

    assert sides(300) == (1, 19 * 16 + 64, 0), "one window: the side and both halos"
    assert sides(448) == (1, 512, 0)
    assert sides(512) == (2, 320, 0)
    assert sides(1000) == (3, 416, 0)
    assert sides(250, window_px=128) == (4, 128, 0)
    assert sides(8960) == (21, 512, 224), "a long side begins half a stride before the origin"


@settings(deadline=None, max_examples=150)
@given(grid=grids())
def test_arrays_cover_the_volume_and_lie_on_it(grid: VolumeGrid) -> None:
    for spec in grid.arrays(fused=True):
        for n, r, t, tokens, pitch, first in zip(grid.shape, grid.voxel_nm, grid.translation_nm, spec.shape, spec.pitch_nm,
                                                 spec.translation_nm, strict=True):
            assert tokens * pitch >= n * r * (1 - 1e-9) and ((tokens - 1) * pitch < n * r or tokens == 1)
            corner = t - r / 2
            assert first == pytest.approx(corner + pitch / 2, abs=1e-9)
    assert grid.fused.shape == grid.target_shape
    for name, normal in (("xy", 0), ("xz", 1), ("yz", 2)):
        plane = grid.plane(name)
        assert plane.normal == normal and plane.shape[normal] == grid.target_shape[normal]
        assert plane.pitch_nm[normal] == grid.target_nm[normal]
        first, second = plane.axes
        assert plane.pitch_nm[first] == plane.pitch_nm[second] == grid.patch * min(grid.voxel_nm[first], grid.voxel_nm[second])


def test_design_4_3() -> None:
    """Token axes: scale p R, translation + (p-1)/2 R; the normal and the fused grid: scale G, translation + (G-R)/2."""
    grid = replace(GRID, translation_nm=(1000.0, 2000.0, 3000.0))
    assert grid.plane("xy").array.pitch_nm == (64.0, 256.0, 256.0)
    assert grid.plane("xy").array.translation_nm == (1000 + 24, 2000 + 7.5 * 16, 3000 + 7.5 * 16)
    assert grid.fused.translation_nm == (1024, 2024, 3024)


@pytest.mark.parametrize("length, pitch, expected", [(64.0, 64.0, 1), (64.1, 64.0, 2), (0.3 * 3, 0.3, 3), (1.0, 64.0, 1),
                                                     (10**7 * 0.1, 0.1, 10**7), (128 * 4.04, 4 * 4.04, 32)])
def test_parts(length: float, pitch: float, expected: int) -> None:
    assert parts(length, pitch) == expected


@given(size=st.integers(1, 9), before=st.integers(0, 40), after=st.integers(0, 40))
def test_reflect_is_numpys(size: int, before: int, after: int) -> None:
    assert np.array_equal(reflect(np.arange(-before, size + after), size), np.pad(np.arange(size), (before, after), "reflect"))


@settings(deadline=None)
@given(grid=grids())
def test_a_grid_survives_json(grid: VolumeGrid) -> None:
    again = VolumeGrid.read(json.loads(json.dumps(grid.as_dict())))
    assert again == grid and again.arrays(fused=True) == grid.arrays(fused=True)


@pytest.mark.parametrize("wrong, word", [
    ({"window_px": 96, "halo_px": 32}, "halo"), ({"window_px": 64, "halo_px": 32}, "halo"), ({"halo_px": 24}, "patches"),
    ({"window_px": 500}, "patches"), ({"window_px": 8}, "patches"), ({"halo_px": -16}, "patches"), ({"planes": ()}, "planes"),
    ({"planes": ("zx",)}, "planes"), ({"planes": ("xy", "xy")}, "planes"), ({"shape": (4, 0, 4)}, "shape"),
    ({"target_nm": (0.0, 1.0, 1.0)}, "shape")])
def test_what_cannot_be_blended_or_laid_out_is_refused(wrong: dict, word: str) -> None:
    with pytest.raises(BadRequest, match=word):
        replace(GRID, **wrong)
