"""Reading the arrays of volume_arrays.py over dinoray's own stores: local, s3, memory, retried and with our errors.

zarr decodes; `StoreForZarr` fetches for it, only the pieces of a shard that are asked for. zarr takes an object that ends
too early for one that was never written, and a damaged one ends in whatever error the codec raises: so a box is read
shard by shard, short answers are refused, and what cannot be decoded is OutputDamaged with the key of the shard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from itertools import product
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype

from dinoray.errors import BadRequest, ItemError, OutputDamaged
from dinoray.io.stores import Store
from dinoray.io.volume_arrays import LABELS, array_key
from dinoray.io.volume_grid import ArraySpec, Shape
from dinoray.io.zarr_arrays import parse_array

_TODO = "delete this shard and its unit's receipt and run the same command again, or fetch the file anew"


class ArrayReader:
    """A stored array [dim, z, y, x], opened by `open_array`. Safe to use from several threads at once."""

    def __init__(self, store: Store, name: str):
        key = array_key(name)
        self.name, self.where = name, f"{store.url}/{key}"
        try:
            info = parse_array(store.get(f"{key}/zarr.json"), self.where)
        except FileNotFoundError as error:
            raise BadRequest(f"there is no array {name!r} here", where=self.where,
                             todo="give the --out of `dinoray extract volume` or `dinoray segment volume`") from error
        except ItemError as error:
            raise OutputDamaged(f"the metadata of the array cannot be used: {error.what}", where=self.where,
                                todo="put the file zarr.json back") from error
        self._lead: tuple[slice, ...] = () if name == LABELS else (slice(None),)
        if len(info.shape) != 3 + len(self._lead) or not info.sharded or info.dtype.kind not in "fu" \
                or self._lead and info.chunks[0] != info.shape[0]:
            raise OutputDamaged("this is no array that dinoray wrote for a volume", where=self.where,
                                todo="put the file zarr.json back")
        self.dim = info.shape[0] if self._lead else 1
        self.shape, self.shards = info.shape[len(self._lead):], info.chunks[len(self._lead):]
        self.dtype = np.dtype(info.dtype)
        self._array = zarr.open_array(StoreForZarr(store), path=key, mode="r", zarr_format=3)

    def read(self, z0: int, z1: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Tokens [z0, z1) x [y0, y1) x [x0, x1) as [dim, z, y, x] (labels: [1, z, y, x]) in the array's dtype; NaN, or 0 of
        integers, where nobody computed them.

        Raises IndexError outside the array, OutputDamaged with the key of a shard that cannot be decoded, TransientError,
        SystemicError.
        """
        start, stop = (z0, y0, x0), (z1, y1, x1)
        if any(not 0 <= a < b <= n for a, b, n in zip(start, stop, self.shape, strict=True)):
            raise IndexError(f"{start}..{stop} is empty or outside of the array {self.shape} [{self.where}]")
        out = np.empty((self.dim, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        for place in product(*(range(a // s, -(-b // s)) for a, b, s in zip(start, stop, self.shards, strict=True))):
            low = [max(a, i * s) for a, i, s in zip(start, place, self.shards, strict=True)]
            high = [min(b, (i + 1) * s) for b, i, s in zip(stop, place, self.shards, strict=True)]
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))
            out[(slice(None), *inside)] = self._part(place, tuple(slice(a, b) for a, b in zip(low, high, strict=True)))
        return out

    def _part(self, place: Iterable[int], box: tuple[slice, ...]) -> np.ndarray:
        """A box that lies in one shard."""
        try:
            found = self._array[(*self._lead, *box)]
            return found if self._lead else found[None]  # type: ignore[return-value, index]
        except (ValueError, RuntimeError, TypeError, IndexError, OverflowError) as error:
            key = "/".join(["c", *["0"] * len(self._lead), *map(str, place)])
            raise OutputDamaged(f"a shard cannot be decoded: {error}", where=f"{self.where}/{key}", todo=_TODO) from error

    def __getitem__(self, index: Any) -> np.ndarray:
        """Tokens [dim, z, y, x] by slices of z, y, x as in numpy; an integer drops its axis."""
        start, stop, dropped = box_of(index, self.shape)
        return self.read(*(n for pair in zip(start, stop, strict=True) for n in pair))[(slice(None), *dropped)]


def open_array(store: Store, which: ArraySpec | str) -> ArrayReader:
    """The stored array of a spec, or of a name (`xy`, `fused`).

    Raises BadRequest where there is none, OutputDamaged for one that differs from the spec or whose metadata are broken,
    TransientError, SystemicError.
    """
    if isinstance(which, str):
        return ArrayReader(store, which)
    reader = ArrayReader(store, which.name)
    found = (reader.dim, reader.shape, reader.shards, reader.dtype)
    if found != (which.dim, which.shape, which.shards, np.dtype(which.dtype)):
        raise OutputDamaged(f"the array has dim, shape, shards and dtype {found}, the plan says otherwise", where=reader.where,
                            todo="put the file zarr.json back")
    return reader


def box_of(index: Any, shape: Shape) -> tuple[Shape, Shape, tuple[slice | int, ...]]:
    """(start, stop, what drops the axes of integers) of an index of slices, integers and an Ellipsis, as numpy reads it.

    Raises IndexError for an empty box, an integer outside or too many indices, BadRequest for steps and other things.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at:at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    if len(parts) > len(shape) or any(part is Ellipsis for part in parts):
        raise IndexError(f"{index!r} does not fit the axes z, y, x of {shape}")
    start, stop, dropped = [], [], []
    for part, size, axis in zip([*parts, *[slice(None)] * (len(shape) - len(parts))], shape, "zyx", strict=True):
        if isinstance(part, slice):
            if part.step not in (None, 1):
                raise BadRequest(f"steps are not read: {part}", todo="read the box, then take every n-th of it")
            low, high, _ = part.indices(size)
        elif isinstance(part, int | np.integer) and not isinstance(part, bool):
            low = int(part) + size if part < 0 else int(part)
            high = low + 1
        else:
            raise BadRequest(f"not an index of the axis {axis}: {part!r}", todo="use slices and integers")
        if not 0 <= low < high <= size:
            raise IndexError(f"{part} of the axis {axis} is empty or outside: there are {size}")
        start.append(low)
        stop.append(high)
        dropped.append(slice(None) if isinstance(part, slice) else 0)
    return tuple(start), tuple(stop), tuple(dropped)  # type: ignore[return-value]


class StoreForZarr(ZarrStore):
    """A dinoray store as zarr wants it, for reading alone. Requests run in threads; their retries count for the caller."""

    supports_writes = supports_deletes = supports_listing = False  # type: ignore[assignment]

    def __init__(self, store: Store):
        super().__init__(read_only=True)
        self._store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreForZarr) and other._store is self._store

    __hash__ = None  # type: ignore[assignment]

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of an object or of a range of it; None when it is absent."""
        try:
            data = await asyncio.to_thread(self._fetch, key, byte_range)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(data)

    def _fetch(self, key: str, byte_range: ByteRequest | None) -> bytes:
        store, wanted = self._store, 1
        if byte_range is None:
            data = store.get(key)
        elif isinstance(byte_range, RangeByteRequest):
            wanted = byte_range.end - byte_range.start
            data = store.get_range(key, byte_range.start, byte_range.end)
        elif isinstance(byte_range, SuffixByteRequest):
            wanted = byte_range.suffix
            data = store.get_range(key, -byte_range.suffix)
        elif isinstance(byte_range, OffsetByteRequest):
            data = store.get_range(key, byte_range.offset)
        else:
            raise NotImplementedError(f"zarr asked for {byte_range!r}")
        if len(data) < wanted:  # zarr would take it for a chunk that was never written
            raise OutputDamaged(f"an object ends early: {len(data):,} bytes where {wanted:,} are looked for",
                                where=f"{store.url}/{key}", todo=_TODO)
        return data

    async def get_partial_values(self, prototype: BufferPrototype,
                                 key_ranges: Iterable[tuple[str, ByteRequest | None]]) -> list[Buffer | None]:
        """Several ranges."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether the object is there."""
        return await asyncio.to_thread(self._store.exists, key)

    async def set(self, key: str, value: Buffer) -> None:
        """Never: dinoray puts whole objects by itself."""
        raise ValueError(f"opened for reading: {key} is not written")

    async def delete(self, key: str) -> None:
        """Never."""
        raise ValueError(f"opened for reading: {key} is not deleted")

    def list(self) -> AsyncIterator[str]:
        """Not needed to read arrays."""
        raise NotImplementedError("the keys of a dinoray store are listed by the store itself")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """As `list`."""
        return self.list()

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """As `list`."""
        return self.list()
