"""`open_features(OUT)` of a volume: boxes in voxels and nm, from the planes or from the fused array, on every store."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray import open_features
from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.stores import LocalStore, open_store
from dinoray.io.volume_arrays import create_arrays, shard_key
from dinoray.io.volume_features import VolumeFeatures
from dinoray.io.volume_grid import VolumeGrid
from tests.faults.s3_proxy import aws_environment, moto_server
from tests.io.volumes import centres, put_array, put_volume, random_tokens

GRID = VolumeGrid(shape=(37, 150, 203), voxel_nm=(30.0, 8.0, 8.0), translation_nm=(515.0, 44.0, -396.0),
                  target_nm=(64.0, 50.0, 33.0), patch=16, planes=("xy", "xz", "yz"), window_px=128, halo_px=16, micro_batch=4,
                  dim=3, dtype="float32")
"""A crop of an anisotropic volume; no size is a multiple of another."""


def put_fused(store, grid: VolumeGrid, values: np.ndarray) -> None:
    create_arrays(store, [grid.fused], {"grid": grid.as_dict()})
    put_array(store, grid.fused, values)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output whose tokens are the nm of their centres."""
    folder = tmp_path_factory.mktemp("volume")
    put_volume(LocalStore(folder), GRID)
    return folder


def test_features_lie_where_the_raw_volume_lies(out: Path) -> None:
    features = open_features(str(out))
    assert isinstance(features, VolumeFeatures) and isinstance(open_features(out), VolumeFeatures)
    assert features.grid == GRID and features.facts["model"] == "fake"
    assert (features.shape, features.dim, features.planes) == ((18, 24, 50), 3, ("xy", "xz", "yz"))
    assert features.voxel_size_nm == (64.0, 50.0, 33.0)
    assert features.translation_nm == (515 + 17, 44 + 21, -396 + 12.5)
    found = features[...]
    assert found.dtype == np.float32 and found.shape == (3, 18, 24, 50)
    # three feature channels: the nm of the place itself, at every target voxel, borders included
    worst = np.abs(found - centres(GRID.fused)).max(axis=(1, 2, 3))
    assert (worst <= 0.01 * np.array(GRID.voxel_nm)).all()


def test_clamp_repeats_the_outermost_tokens(tmp_path: Path) -> None:
    grid = replace(GRID, edges="clamp")
    put_volume(LocalStore(tmp_path), grid)
    expected = np.zeros((3, *grid.target_shape))
    for name in grid.planes:
        spec, planes = grid.plane(name).array, centres(grid.fused)
        for axis in set(range(3)) - {grid.plane(name).normal}:
            first = spec.translation_nm[axis]
            planes[axis] = np.clip(planes[axis], first, first + (spec.shape[axis] - 1) * spec.pitch_nm[axis])
        expected += planes / 3
    assert np.abs(open_features(tmp_path)[...] - expected).max() <= 0.01 * 8


def test_boxes_in_voxels_are_numpys(out: Path) -> None:
    features = open_features(out)
    whole = features[...]
    for index in ((slice(3, 9), slice(None), slice(-7, None)), (slice(2, 4),), (..., slice(0, 1)), (5, slice(1, 3), -1), 17,
                  (np.int64(2), 3, slice(None, 99))):
        full = index if isinstance(index, tuple) else (index,)
        assert np.array_equal(features[index], whole[(slice(None), *full)]), index
    assert np.array_equal(features.read((1, 2, 3), (4, 5, 6)), whole[:, 1:4, 2:5, 3:6])


def test_boxes_in_nm_and_raw_voxels_hold_the_centres(out: Path) -> None:
    features = open_features(out)
    whole = features[...]
    # centres: z 532 + 64 k, y 65 + 50 k, x -383.5 + 33 k
    assert np.array_equal(features[532.0:596.0, 65.1:166.0, -383.5:-350.5], whole[:, 0:1, 1:3, 0:1]), "the end is left out"
    assert np.array_equal(features[1000.0:, :200.0, 4], whole[:, 8:, :3, 4])
    assert np.array_equal(features[..., -383.6:0.0], whole[..., 0:12])
    assert np.array_equal(features[3:5, ..., 0.0:100.0], whole[:, 3:5, :, 12:15])
    assert np.array_equal(features.read((500, 60, -400), (600, 120, -300), "nm"), whole[:, :2, :2, :3])
    # raw voxels of 30, 8, 8 nm from the corner of the crop: z 0..4 cover 0..120 nm, the first centres lie at 32 and 96
    assert np.array_equal(features.read((0, 10, 20), (4, 20, 40), "raw"), whole[:, 0:2, 2:3, 5:10])
    # the grid covers the volume: its last voxels along z and x have their centres beyond it
    assert np.array_equal(features.read((0, 0, 0), GRID.shape, "raw"), whole[:, :17, :, :49])
    for read in (lambda: features[0.0:100.0], lambda: features.read((0, 0, 0), (1, 1, 1), "raw"), lambda: features[533.0:590.0],
                 lambda: features[5:5], lambda: features[18], lambda: features[20:30], lambda: features[0, 0, 0, 0],
                 lambda: features.read((0, 0, 0), (19, 1, 1)), lambda: features.read((0, 4, 0), (1, 4, 1)),
                 lambda: features[1e6:2e6]):
        with pytest.raises(IndexError, match="empty|outside|centre|axes"):
            read()
    for read in (lambda: features[::2], lambda: features[0.0:700.0:2], lambda: features[532.0], lambda: features["x"],
                 lambda: features.read((0, 0, 0), (1, 1, 1), "um"), lambda: features.read((0, 0), (1, 1)),
                 lambda: features.read((0.5, 0, 0), (1, 1, 1)), lambda: features[float("nan"):1.0]):
        with pytest.raises(BadRequest):
            read()


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_box_in_nm_is_the_voxels_whose_centres_it_holds(out: Path, data) -> None:
    features = open_features(out)
    where = centres(GRID.fused)
    low, high = ([data.draw(st.floats(t - 50, t + 600).map(lambda n: round(n, 1))) for t in GRID.translation_nm] for _ in range(2))
    inside = np.all([(where[a] >= low[a]) & (where[a] < high[a]) for a in range(3)], axis=0)
    if not inside.any():
        with pytest.raises(IndexError):
            features.read(low, high, "nm")
        return
    found = features.read(low, high, "nm")
    assert found[0].size == inside.sum()
    assert np.abs(found[:, 0, 0, 0] - where[:, inside][:, 0]).max() < 0.1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fused_array_and_planes_give_the_same(tmp_path: Path, dtype: str) -> None:
    grid = replace(GRID, dtype=dtype, dim=5)
    put_volume(LocalStore(tmp_path / "planes"), grid, random_tokens(grid))
    flying = open_features(tmp_path / "planes")
    put_fused(LocalStore(tmp_path / "fused"), grid, flying[...])
    stored = open_features(tmp_path / "fused")
    assert (stored.stored, flying.stored) == (("fused",), ("xy", "xz", "yz"))
    assert (stored.grid, stored.shape, stored.translation_nm) == (flying.grid, flying.shape, flying.translation_nm)
    for box in ((slice(2, 9), slice(5, 20), slice(30, 50)), (slice(None), 3, slice(0.0, 500.0))):
        assert stored[box].dtype == np.float32
        if dtype == "float32":
            assert np.array_equal(stored[box], flying[box])
        else:
            assert np.allclose(stored[box], flying[box], rtol=2**-11, atol=2**-24)
    with pytest.raises(BadRequest, match="no array 'xy'"):
        stored.tokens("xy")


def test_native_tokens(out: Path) -> None:
    features = open_features(out)
    for name in ("xy", "xz", "yz"):
        truth = centres(GRID.plane(name).array).astype("float32")
        assert np.array_equal(features.tokens(name)[...], truth)
        assert np.array_equal(features.tokens(name)[-1, :, 0:1], truth[:, -1, :, 0:1])
    with pytest.raises(BadRequest, match="xy, xz, yz"):
        features.tokens("fused")


def test_what_was_not_computed_is_nan_and_a_damaged_shard_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    put_volume(store, GRID)
    key = shard_key(GRID.plane("xy").array, (1, 0, 0))
    data = store.get(key)
    store.delete(key)
    missing = np.isnan(open_features(tmp_path)[...]).all(axis=0)
    assert missing[8:16].any() and not missing[:8].any() and not missing[16:].any()
    store.put(key, data[:len(data) // 2])
    features = open_features(tmp_path)
    assert np.isfinite(features[:8]).all()
    with pytest.raises(OutputDamaged) as caught:
        features[7:9, 0, 0]
    assert key in caught.value.where


def test_what_rows_have_is_refused_with_what_to_do_instead(out: Path) -> None:
    features = open_features(out)
    for name in ("table", "batches", "matrix"):
        with pytest.raises(BadRequest, match=rf"features of a volume, which has no rows for .{name}\(\)") as caught:
            getattr(features, name)("cls", plate="p")
        assert "features[z0:z1, y0:y1, x0:x1]" in caught.value.todo


def test_what_is_no_volume(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no features here"):
        open_features(tmp_path)
    with pytest.raises(BadRequest, match="no features of a volume"):
        VolumeFeatures(str(tmp_path))
    put_volume(LocalStore(tmp_path), GRID)
    path = tmp_path / "dense/xy.zarr/0/zarr.json"
    array = path.read_bytes()
    path.write_text(json.dumps({**json.loads(array), "shape": [3, 18, 9, 14]}))
    with pytest.raises(OutputDamaged, match="its grid says"):
        open_features(tmp_path)[0:1]
    path.write_bytes(array)
    path = tmp_path / "dense/xy.zarr/zarr.json"
    document = json.loads(path.read_bytes())
    for change in ({}, {"dinoray": {}}, {"dinoray": {"grid": {"shape": [1, 2, 3]}}},
                   {"dinoray": {"grid": {**GRID.as_dict(), "halo_px": 1000}}}):
        path.write_text(json.dumps({**document, "attributes": change}))
        with pytest.raises(OutputDamaged, match="grid"):
            open_features(tmp_path)


def test_threads_and_pickles_share_features(out: Path) -> None:
    features = open_features(out)
    whole = features[...]
    assert np.array_equal(pickle.loads(pickle.dumps(features))[3:5], whole[:, 3:5])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: features[i % 18, :, 10:20], range(36)))
    assert all(np.array_equal(part, whole[:, i % 18, :, 10:20]) for i, part in enumerate(found))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with moto_server() as url:
        for name, value in aws_environment(url).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="volumes")
        yield "s3://volumes/out"
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_s3(bucket: str, out: Path) -> None:
    local, remote = LocalStore(out), open_store(bucket)
    for key, _ in local.list():
        remote.put(key, local.get(key))
    box = (slice(4, 7), slice(100.0, 300.0), slice(5, 9))
    assert np.array_equal(open_features(bucket)[box], open_features(out)[box])
    assert open_features(bucket).tokens("xz")[0].shape[0] == 3


def test_the_documented_ways_to_read(tmp_path: Path) -> None:
    """The code of docs/volumes-out.md, and what it places in napari (world = scale * index + translate)."""
    grid = replace(GRID, shape=(80, 150, 203), translation_nm=(15.0, 4.0, 4.0))
    put_volume(LocalStore(tmp_path), grid)
    text = (Path(__file__).resolve().parents[2] / "docs/volumes-out.md").read_text()
    blocks = [part.partition("```")[0].replace("OUT/", f"{tmp_path}/").replace('"OUT"', f'"{tmp_path}"')
              for part in text.split("```python")[1:]]
    assert [block.split()[1] for block in blocks] == ["dinoray", "zarr", "tensorstore", "napari"]
    names: dict = {}
    exec(blocks[0], names)
    assert names["box"].shape == (3, 30, 10, 15) and names["tokens"].shape == (3, 4, 10, 13)
    read = []
    for block in blocks[1:3]:
        exec(block, names)
        read.append(names["values"])
    assert np.array_equal(*read) and np.array_equal(read[0], names["tokens"])
    index = np.moveaxis(np.indices(read[0].shape[1:]), 0, -1)
    world = index * names["scale"]["scale"][1:] + names["move"]["translation"][1:]
    assert np.abs(np.moveaxis(world, -1, 0) - read[0]).max() < 0.01
