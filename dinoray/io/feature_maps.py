"""Dense features of a unit as Zarr v3: one array [n, h, w, D] per grid shape, written shard by shard.

Every object is encoded in memory and handed to `put`, so each is atomic and enters the receipt with its
checksum; nothing else may write into the folder. Memory: one shard per grid shape. The arrays' metadata come
last, when the number of rows is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

SHARD_BYTES = 64 * 2**20
"""Uncompressed bytes a shard aims at: what a writer holds per grid shape."""
CHUNK_BYTES = 2**20
"""Uncompressed bytes a chunk (what a reader decodes at least) aims at, never less than one row."""


@dataclass
class _Array:
    shape: tuple[int, int, int]
    chunk_rows: int
    shard_rows: int
    rows: list[np.ndarray] = field(default_factory=list)
    num_rows: int = 0
    num_shards: int = 0


class DenseWriter:
    """Writes `<key>/<name>` arrays through `put(key, bytes)`; `add` rows in order, then `close`."""

    def __init__(self, key: str, put: Callable[[str, bytes], None], *, dtype: str, attributes: dict[str, Any]):
        self.key, self._put, self.dtype, self.attributes = key, put, np.dtype(dtype), attributes
        self._arrays: dict[str, _Array] = {}

    def add(self, grid: np.ndarray, layer: int | None = None) -> tuple[str, int]:
        """Append a patch grid [h, w, D] (already of the array's dtype); returns (array name, row index)."""
        h, w, _ = grid.shape
        name = f"{h}x{w}" if layer is None else f"l{layer:02d}/{h}x{w}"
        array = self._arrays.get(name)
        if array is None:
            row = int(np.prod(grid.shape)) * self.dtype.itemsize
            chunk = max(1, CHUNK_BYTES // row)
            array = self._arrays[name] = _Array(grid.shape, chunk, max(1, SHARD_BYTES // (row * chunk)) * chunk)
        array.rows.append(grid)
        array.num_rows += 1
        if len(array.rows) == array.shard_rows:
            self._flush(name, array)
        return name, array.num_rows - 1

    def close(self) -> None:
        """Write what is left and the metadata; a unit without a row writes nothing."""
        for name, array in self._arrays.items():
            if array.rows:
                self._flush(name, array)
            self._put(f"{self.key}/{name}/zarr.json", _array_objects(array, self.dtype, None)["zarr.json"])
        groups = {""} if self._arrays else set()
        groups |= {name.rpartition("/")[0] for name in self._arrays}
        for group in sorted(groups):
            content = {"zarr_format": 3, "node_type": "group", "attributes": self.attributes if not group else {}}
            path = f"{self.key}/{group}/zarr.json" if group else f"{self.key}/zarr.json"
            self._put(path, json.dumps(content, sort_keys=True).encode())

    def _flush(self, name: str, array: _Array) -> None:
        encoded = _array_objects(array, self.dtype, np.stack(array.rows))
        self._put(f"{self.key}/{name}/c/{array.num_shards}/0/0/0", encoded["c/0/0/0/0"])
        array.num_shards += 1
        array.rows.clear()


def _array_objects(array: _Array, dtype: np.dtype, rows: np.ndarray | None) -> dict[str, bytes]:
    """Encode one shard (or, with `rows` None, the metadata of the whole array) with zarr itself."""
    memory: dict[str, Any] = {}
    count = array.num_rows if rows is None else len(rows)
    target = zarr.create_array(
        MemoryStore(memory), shape=(count, *array.shape), dtype=dtype, chunks=(array.chunk_rows, *array.shape),
        shards=(array.shard_rows, *array.shape), fill_value=0, dimension_names=("row", "y", "x", "feature"),
        compressors=zarr.codecs.ZstdCodec(level=1), config={"write_empty_chunks": True})
    if rows is not None:
        target[:] = rows
    return {key: value.to_bytes() for key, value in memory.items()}


def read_group(url: str) -> zarr.Group:
    """Open a unit's dense features (`OUT/dense/part-<unit>.zarr`) for reading."""
    return zarr.open_group(url, mode="r")



