"""One chunk of a Zarr array (v2, v3, inside a shard too): fetched, checked, decoded from memory.

Each chunk is handed to tensorstore as one of an array in memory, with metadata that zarr_arrays.py let through; for chunks
of 32^3 that is over four times as fast as zarr, which decodes what tensorstore does not know (lz4). Of a shard only the index
and the chunks that are asked for are read: shards are often larger than what an actor may hold.
"""

from __future__ import annotations

import json
import queue
import threading
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import tensorstore
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from dinoray.errors import DinorayError, ItemError
from dinoray.io.items import FileRef
from dinoray.io.volume_objects import ChunkObjects
from dinoray.io.zarr_arrays import ArrayInfo, check_object, shard_index, shard_index_place

_SLOTS = 64
"""Chunks that are decoded at once, at most."""
_INDEXES = 256
"""Indexes of shards that are kept."""


class ZarrChunks:
    """Chunks of an array; places count in pieces of `info.inner`, over all its axes. Safe to share between threads."""

    def __init__(self, info: ArrayInfo, objects: ChunkObjects):
        self.info, self._objects = info, objects
        self._one = one_chunk(info)
        self._decoder = _TensorStoreDecoder.for_chunks_of(self._one) or _ZarrDecoder(self._one)
        self._per_object = tuple(outer // part for outer, part in zip(info.chunks, info.inner, strict=True))
        self._indexes: OrderedDict[str, tuple[FileRef, np.ndarray] | None] = OrderedDict()
        self._lock = threading.Lock()

    def decode(self, place: tuple[int, ...]) -> np.ndarray:
        """The values of a piece, over all axes; the fill value where nothing is stored.

        Raises ItemError `decode`, `truncated`, `too_large` and what reading raises.
        """
        outer = tuple(p // n for p, n in zip(place, self._per_object, strict=True))
        key = self.info.key(outer)
        data = self._of_shard(key, place) if self.info.sharded else self._objects.get(key)
        where = f"{self._objects.uri}/{key}"
        if data is not None:
            check_object(self._one, data, where)
        try:
            return self._decoder.decode(data)
        except DinorayError:
            raise
        except MemoryError as error:
            raise ItemError("too_large", "decoding asked for more memory than there is", where=where) from error
        except Exception as error:  # both raise several types for damaged chunks
            raise ItemError("decode", f"the chunk cannot be decoded: {type(error).__name__}: {error}"[:300], where=where,
                            todo="copy the chunk again") from error

    def _of_shard(self, key: str, place: tuple[int, ...]) -> bytes | None:
        """The stored bytes of a piece of a shard."""
        found = self._index(key)
        if found is None:
            return None
        ref, index = found
        inside = tuple(p % n for p, n in zip(place, self._per_object, strict=True))
        offset, length = (int(n) for n in index[np.ravel_multi_index(inside, self._per_object)])
        return None if offset == length == 2**64 - 1 else self._objects.part(ref, offset, offset + length)

    def _index(self, key: str) -> tuple[FileRef, np.ndarray] | None:
        with self._lock:
            if key in self._indexes:
                self._indexes.move_to_end(key)
                return self._indexes[key]
        ref = self._objects.ref(key)
        found = None
        if ref is not None:
            begin, end = shard_index_place(self.info, ref.size, ref.uri)
            found = ref, shard_index(self.info, self._objects.part(ref, begin, end), ref.uri)
        with self._lock:
            self._indexes[key] = found
            while len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        return found


class _ZarrDecoder:
    """A chunk as an array of zarr. Raises ItemError `decode` for metadata that zarr refuses."""

    def __init__(self, one: ArrayInfo):
        self._one = one
        try:
            self._array({})
        except Exception as error:  # zarr raises several types
            raise ItemError("decode", f"the array's metadata are not understood: {error}"[:300]) from error

    def _array(self, chunks: dict[str, bytes]) -> zarr.Array:
        make = default_buffer_prototype().buffer.from_bytes
        contents = {name: make(data) for name, data in {self._one.name: self._one.document, **chunks}.items()}
        return zarr.open_array(MemoryStore(contents), mode="r", zarr_format=2 if self._one.name == ".zarray" else 3)

    def decode(self, data: bytes | None) -> np.ndarray:
        """The values; the fill value for None. Raises what zarr and its codecs raise."""
        return np.asarray(self._array({} if data is None else {self._one.key((0,) * len(self._one.shape)): data})[...])


class _TensorStoreDecoder:
    """A chunk as one of an array of _SLOTS chunks in memory: a thread puts it into a free place, reads it and takes it out."""

    def __init__(self, one: ArrayInfo, document: dict):
        self._one = one
        context = tensorstore.Context()  # of its own, without a cache: each array has its own memory
        self._memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
        self._memory[one.name] = json.dumps(document).encode()
        self._array = tensorstore.open({"driver": "zarr" if one.name == ".zarray" else "zarr3", "kvstore": {"driver": "memory"}},
                                       context=context, open=True, read=True).result()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(_SLOTS):
            self._free.put(slot)

    @classmethod
    def for_chunks_of(cls, one: ArrayInfo) -> _TensorStoreDecoder | None:
        """None for what tensorstore does not decode."""
        document = json.loads(one.document)
        document["shape"][0] *= _SLOTS
        compressor = document.get("compressor")
        if compressor and compressor["id"] == "zstd":  # numcodecs writes `checksum` too, which only a writer needs
            document["compressor"] = {"id": "zstd", "level": 0}
        try:
            return cls(one, document)
        except (ValueError, NotImplementedError):  # a codec or a setting that it does not know: zarr's turn
            return None

    def decode(self, data: bytes | None) -> np.ndarray:
        """The values; the fill value for None. Raises what tensorstore raises (ValueError)."""
        slot = self._free.get()
        key, size = self._one.key((slot, *(0,) * (len(self._one.shape) - 1))), self._one.shape[0]
        try:
            if data is not None:
                self._memory[key] = data
            return self._array[slot * size:(slot + 1) * size].read().result()
        finally:
            if data is not None:
                del self._memory[key]
            self._free.put(slot)


def one_chunk(info: ArrayInfo) -> ArrayInfo:
    """The array of one inner chunk, coded as in `info`."""
    document = json.loads(info.document)
    document["shape"] = list(info.inner)
    if info.name == ".zarray":
        document["chunks"] = list(info.inner)
    else:
        document["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": list(info.inner)}}
        if info.sharded:
            document["codecs"] = document["codecs"][-1]["configuration"]["codecs"]
    return replace(info, shape=info.inner, chunks=info.inner, sharded=False, document=json.dumps(document).encode())
