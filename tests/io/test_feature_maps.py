"""Dense features: plain Zarr v3 that zarr reads back, written object by object, row order kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.io import feature_maps
from dinoray.io.feature_maps import DenseWriter, read_group
from dinoray.io.stores import LocalStore
from tests.runs import DictStore

PART = "dense/part-x.zarr"


def grid(seed: int, h: int, w: int, d: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(h, w, d)).astype(dtype)


def write(store, grids: list[tuple[int, int, int | None]], dtype: str = "float16", d: int = 4) -> list[tuple[str, int]]:
    writer = DenseWriter(PART, store.put, dtype=dtype, attributes={"dinoray": {"model": "é"}})
    names = [writer.add(grid(i, h, w, d, dtype), layer) for i, (h, w, layer) in enumerate(grids)]
    writer.close()
    return names


GRIDS = st.lists(st.tuples(st.sampled_from([1, 2, 5]), st.sampled_from([1, 3]), st.sampled_from([None, 0, 11])),
                 min_size=1, max_size=14)


@settings(deadline=None, max_examples=25)
@given(grids=GRIDS, dtype=st.sampled_from(["float16", "float32"]), chunk=st.sampled_from([1, 60, 200]),
       shard=st.sampled_from([1, 150, 500]))
def test_rows_come_back_where_add_said(tmp_path_factory, grids: list, dtype: str, chunk: int, shard: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_maps, "CHUNK_BYTES", chunk)
        patch.setattr(feature_maps, "SHARD_BYTES", shard)
        root = tmp_path_factory.mktemp("dense")
        names = write(LocalStore(root), grids, dtype)
    group = read_group(str(root / PART))
    counts: dict[str, int] = {}
    for i, ((h, w, layer), (name, row)) in enumerate(zip(grids, names, strict=True)):
        assert name == (f"{h}x{w}" if layer is None else f"l{layer:02d}/{h}x{w}")
        assert row == counts.get(name, 0)
        counts[name] = row + 1
        assert np.array_equal(group[name][row], grid(i, h, w, 4, dtype))
    for name, count in counts.items():
        assert group[name].shape[0] == count
        assert group[name].dtype == dtype


def test_the_layout_of_the_contract(tmp_path: Path) -> None:
    write(LocalStore(tmp_path), [(4, 6, 5), (4, 6, 5), (4, 6, None)], d=8)
    group = zarr.open_group(str(tmp_path / PART), mode="r")
    array = group["l05/4x6"]
    assert array.metadata.zarr_format == 3
    assert array.shape == (2, 4, 6, 8)
    assert array.metadata.dimension_names == ("row", "y", "x", "feature")
    assert array.dtype == np.float16
    assert group["4x6"].shape == (1, 4, 6, 8)
    assert group.attrs["dinoray"] == {"model": "é"}
    assert array.chunks[1:] == (4, 6, 8), "a chunk holds whole rows"
    assert array.shards is not None


def test_a_row_of_zeros_is_written_too(tmp_path: Path) -> None:
    writer = DenseWriter(PART, LocalStore(tmp_path).put, dtype="float16", attributes={})
    writer.add(np.zeros((2, 2, 4), np.float16))
    writer.close()
    assert sorted(p.name for p in (tmp_path / PART / "2x2").rglob("*") if p.is_file()) == ["0", "zarr.json"]
    assert (read_group(str(tmp_path / PART))["2x2"][:] == 0).all()


def test_shards_go_out_as_they_fill_and_metadata_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_maps, "CHUNK_BYTES", 1)
    monkeypatch.setattr(feature_maps, "SHARD_BYTES", 2 * 2 * 2 * 4 * 2)  # two rows
    store = DictStore()
    writer = DenseWriter(PART, store.put, dtype="float16", attributes={})
    for i in range(5):
        writer.add(grid(i, 2, 2, 4, "float16"))
        assert len(store.order) == (i + 1) // 2
        assert sum(len(a.rows) for a in writer._arrays.values()) < 2, "no more than a shard is held"
    writer.close()
    assert store.order == [*(f"{PART}/2x2/c/{i}/0/0/0" for i in range(3)), f"{PART}/2x2/zarr.json", f"{PART}/zarr.json"]


def test_the_same_rows_give_the_same_objects() -> None:
    stores = [DictStore(), DictStore()]
    for store in stores:
        write(store, [(2, 3, None), (1, 1, 4), (2, 3, None)])
    assert stores[0].objects == stores[1].objects
    for key, data in stores[0].objects.items():
        if key.endswith("zarr.json"):
            assert not any(word in json.dumps(json.loads(data)) for word in ("time", "date"))


def test_without_a_row_nothing_is_written() -> None:
    store = DictStore()
    DenseWriter(PART, store.put, dtype="float16", attributes={}).close()
    assert store.objects == {}


def test_large_rows_get_a_chunk_each() -> None:
    store = DictStore()
    row = np.ones((64, 64, 160), np.float16)  # 1.3 MB, above CHUNK_BYTES
    writer = DenseWriter(PART, store.put, dtype="float16", attributes={})
    writer.add(row)
    writer.add(row * 2)
    writer.close()
    meta = json.loads(store.objects[f"{PART}/64x64/zarr.json"])
    assert meta["codecs"][0]["configuration"]["chunk_shape"][0] == 1
