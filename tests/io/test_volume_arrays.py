"""The stored arrays of a volume: deterministic objects that zarr, tensorstore and OME-Zarr's own models accept."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05 import Image

from dinoray.errors import OutputDamaged
from dinoray.io.stores import LocalStore
from dinoray.io.volume_arrays import check_arrays, create_arrays, encode_shard, metadata_objects, shard_key, shards_of
from dinoray.io.volume_grid import ArraySpec, VolumeGrid
from tests.runs import DictStore

GRID = VolumeGrid(shape=(37, 100, 131), voxel_nm=(30.0, 8.0, 8.0), translation_nm=(500.0, 44.0, -12.0),
                  target_nm=(70.0, 64.0, 64.0), patch=16, planes=("xy", "xz", "yz"), window_px=128, halo_px=16,
                  micro_batch=4, dim=3, dtype="float32")
SPEC = ArraySpec("xy", (9, 11, 13), 2, "float32", (70.0, 128.0, 128.0), (1.0, 2.0, 3.0), (2, 4, 4), (4, 8, 4))
ATTRIBUTES = {"grid": GRID.as_dict(), "model": "é"}


def written(store, spec: ArraySpec, seed: int = 0) -> np.ndarray:
    """Random values, put shard by shard."""
    values = np.random.default_rng(seed).normal(size=(spec.dim, *spec.shape)).astype(spec.dtype)
    for place, low, high in shards_of(spec, (0, 0, 0), spec.shape):
        part = values[(slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))]
        store.put(shard_key(spec, place), encode_shard(spec, part))
    return values


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_zarr_and_tensorstore_read_what_was_put(tmp_path: Path, dtype: str) -> None:
    store = LocalStore(tmp_path)
    for spec in replace(GRID, dtype=dtype).arrays(fused=True):
        create_arrays(store, [spec], ATTRIBUTES)
        values = written(store, spec)
        path = tmp_path / "dense" / f"{spec.name}.zarr"
        array = zarr.open_group(str(path), mode="r")["0"]
        assert array.dtype == dtype and array.metadata.dimension_names == ("c", "z", "y", "x")
        assert np.array_equal(array[:], values)
        read = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "0")}}, open=True).result()
        assert read.domain.labels == ("c", "z", "y", "x")
        assert np.array_equal(read.read().result(), values)


def test_the_metadata_are_a_valid_image_that_lies_on_the_raw_volume(tmp_path: Path) -> None:
    create_arrays(LocalStore(tmp_path), GRID.arrays(fused=True), ATTRIBUTES)
    expected = {  # scale, translation: the centre of a first token is (patch-1)/2 pixels beyond that of its first voxel
        "xy": ([1, 70, 128, 128], [0, 500 + 20, 44 + 7.5 * 8, -12 + 7.5 * 8]),
        "xz": ([1, 128, 64, 128], [0, 500 + (128 - 30) / 2, 44 + 28, -12 + 60]),
        "yz": ([1, 128, 128, 64], [0, 500 + (128 - 30) / 2, 44 + 60, -12 + 28]),
        "fused": ([1, 70, 64, 64], [0, 520, 44 + 28, -12 + 28])}
    for name, (scale, translation) in expected.items():
        group = zarr.open_group(str(tmp_path / "dense" / f"{name}.zarr"), mode="r")
        image = Image.from_zarr(group)
        (multiscale,) = image.ome_attributes.multiscales
        assert [(a.name, a.type, a.unit) for a in multiscale.axes] == [
            ("c", "channel", None), *((a, "space", "nanometer") for a in "zyx")]
        (level,) = multiscale.datasets
        scaled, moved = level.coordinateTransformations
        assert scaled.scale == scale and moved.translation == translation
        assert VolumeGrid.read(group.attrs["dinoray"]["grid"]) == GRID and group.attrs["dinoray"]["model"] == "é"


def test_what_nobody_computed_reads_as_nan(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    create_arrays(store, [SPEC], {})
    store.put(shard_key(SPEC, (1, 0, 1)), encode_shard(SPEC, np.zeros((2, 4, 8, 4), np.float32)))
    array = zarr.open_array(str(tmp_path / "dense/xy.zarr/0"), mode="r")[:]
    assert (array[:, 4:8, :8, 4:8] == 0).all()
    assert np.isnan(array).sum() == array.size - 2 * 4 * 8 * 4


def test_a_shard_holds_all_its_chunks_whatever_their_values() -> None:
    for values in (np.zeros((2, 4, 8, 4), np.float32), np.full((2, 1, 1, 1), np.nan, np.float32)):
        data = encode_shard(SPEC, values)
        index = np.frombuffer(data[-(16 * 4 + 4):-4], "<u8").reshape(4, 2)
        assert (index[:, 1] > 0).all() and index.sum(axis=1).max() == len(data) - 16 * 4 - 4
    with pytest.raises(ValueError, match="float64"):
        encode_shard(SPEC, np.zeros((2, 4, 8, 4)))
    for shape in ((1, 4, 8, 4), (2, 5, 8, 4), (2, 0, 8, 4), (4, 8, 4)):
        with pytest.raises(ValueError, match="shard"):
            encode_shard(SPEC, np.zeros(shape, np.float32))


def digest_of_objects(grid: VolumeGrid, attributes: dict) -> str:
    spec = replace(grid.plane("xy").array, shape=(9, 11, 13), chunks=(2, 4, 4), shards=(4, 8, 4))
    values = np.arange(3 * 3 * 8 * 4, dtype="float32").reshape(3, 3, 8, 4)
    objects = [*metadata_objects(spec, attributes).values(), encode_shard(spec, values)]
    return hashlib.sha256(b"".join(objects)).hexdigest()


def test_the_same_arguments_give_the_same_bytes_in_another_process() -> None:
    here = digest_of_objects(GRID, ATTRIBUTES)
    code = "from tests.io.test_volume_arrays import ATTRIBUTES, GRID, digest_of_objects as d; print(d(GRID, ATTRIBUTES))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here
    assert digest_of_objects(GRID, dict(reversed(ATTRIBUTES.items()))) == here


def test_resume_compares_and_never_writes() -> None:
    store = DictStore()
    recorded = create_arrays(store, [SPEC, GRID.fused], ATTRIBUTES)
    assert [r["key"] for r in recorded] == ["dense/xy.zarr/zarr.json", "dense/xy.zarr/0/zarr.json",
                                            "dense/fused.zarr/zarr.json", "dense/fused.zarr/0/zarr.json"]
    assert json.loads(json.dumps(recorded)) == recorded
    before = dict(store.objects)
    store.order.clear()
    check_arrays(store, recorded)
    assert store.objects == before and not store.order
    key = recorded[1]["key"]
    store.objects[key] = before[key].replace(b"float32", b"float16")
    with pytest.raises(OutputDamaged, match="changed") as caught:
        check_arrays(store, recorded)
    assert key in caught.value.where
    del store.objects[key]
    with pytest.raises(OutputDamaged, match="gone"):
        check_arrays(store, recorded)
    assert not store.order


SIZES = st.tuples(*[st.integers(1, 20)] * 3)


@settings(deadline=None, max_examples=100)
@given(shape=SIZES, shards=st.tuples(*[st.integers(1, 7)] * 3), data=st.data())
def test_shards_of_a_box_cover_it_once_and_no_other_box(shape, shards, data) -> None:
    spec = ArraySpec("xy", shape, 1, "float32", (1.0,) * 3, (0.0,) * 3, shards, shards)
    borders = [sorted({*range(0, n, s), n}) for n, s in zip(shape, shards, strict=True)]
    pairs = [sorted(data.draw(st.lists(st.sampled_from(b), min_size=2, max_size=2, unique=True))) for b in borders]
    start, stop = zip(*pairs, strict=True)
    seen = np.zeros(shape, int)
    for place, low, high in shards_of(spec, start, stop):
        assert low == tuple(i * s for i, s in zip(place, shards, strict=True))
        seen[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] += 1
    inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert (seen[inside] == 1).all() and seen.sum() == seen[inside].size


@pytest.mark.parametrize("start, stop", [((1, 0, 0), (9, 11, 13)), ((0, 0, 0), (9, 9, 13)), ((0, 0, 0), (9, 11, 14)),
                                         ((4, 0, 0), (4, 11, 13)), ((-4, 0, 0), (4, 8, 4))])
def test_a_box_that_shares_a_shard_is_refused_before_anything_is_done(start, stop) -> None:
    with pytest.raises(ValueError, match="whole shards"):
        shards_of(SPEC, start, stop)


def test_keys() -> None:
    assert shard_key(SPEC, (1, 2, 3)) == "dense/xy.zarr/0/c/0/1/2/3"
