"""Label images as files: compressed int32 TIFF, or OME-Zarr 0.5 labels; 0 is background, cells are 1..n.

Always int32: 16 bits would silently fold the ids of a field of more than 65,535 objects. Nothing in the files depends on
when or where they were written: the same labels give the same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tifffile
import zarr
from zarr.storage import MemoryStore

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.stores import Store

TILE_PX = 256
"""Side of a TIFF's tiles: what a viewer reads at least."""
CHUNK_PX, CHUNKS_PER_SHARD = 512, 8
"""Side of a Zarr chunk, and chunks along a side of a shard (one object of at most 4096 x 4096 px)."""
SUFFIXES = {"tiff": ".tif", "zarr": ".zarr"}


def mask_key(path: str, kind: str) -> str:
    """The key of a mask in an output: `masks/<path>.tif` or `.zarr` (a folder)."""
    return f"masks/{path}{SUFFIXES[kind]}"


def mask_objects(labels: np.ndarray, key: str, pixel_size_um: float | None) -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of all objects of the mask `key` (as `mask_key` names it) of labels int32 [Y, X], in a fixed order."""
    if labels.dtype != np.int32 or labels.ndim != 2:
        raise BadRequest(f"labels of {labels.dtype} {labels.shape}", where=key, todo="give int32 [Y, X]")
    if key.endswith(SUFFIXES["tiff"]):
        yield key, encode_tiff(labels, pixel_size_um)
    else:
        for name, data in sorted(encode_zarr(labels, pixel_size_um).items()):
            yield f"{key}/{name}", data


def encode_tiff(labels: np.ndarray, pixel_size_um: float | None = None) -> bytes:
    """Labels int32 [Y, X] as a deflated tiled TIFF; the pixel size as a resolution in px per cm."""
    sink = io.BytesIO()
    resolution = {} if pixel_size_um is None else {"resolution": (1e4 / pixel_size_um,) * 2, "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(sink, labels, compression="zlib", compressionargs={"level": 6}, tile=(TILE_PX, TILE_PX), metadata=None,
                     software=False, photometric="minisblack", **resolution)
    return sink.getvalue()


def encode_zarr(labels: np.ndarray, pixel_size_um: float | None = None) -> dict[str, bytes]:
    """Labels int32 [Y, X] as the objects of an OME-Zarr 0.5 image-label group (one level), by name."""
    chunks = tuple(min(CHUNK_PX, side) for side in labels.shape)
    shards = tuple(chunk * min(CHUNKS_PER_SHARD, -(-side // chunk)) for chunk, side in zip(chunks, labels.shape, strict=True))
    memory: dict[str, Any] = {}
    array = zarr.create_array(MemoryStore(memory), shape=labels.shape, dtype="int32", chunks=chunks, shards=shards, fill_value=0,
                              dimension_names=("y", "x"), compressors=zarr.codecs.ZstdCodec(level=5),
                              config={"write_empty_chunks": True})  # an empty image has its objects too
    array[:] = labels
    unit = {} if pixel_size_um is None else {"unit": "micrometer"}
    scale = [1.0 if pixel_size_um is None else float(pixel_size_um)] * 2
    ome = {"version": "0.5", "image-label": {"version": "0.5"}, "multiscales": [{
        "name": "cells", "axes": [{"name": name, "type": "space", **unit} for name in "yx"],
        "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}]}]}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}
    pixels = {f"0/{key}": value.to_bytes() for key, value in memory.items()}
    return {"zarr.json": json.dumps(group, sort_keys=True).encode(), **pixels}


def read_mask(store: Store, key: str) -> np.ndarray:
    """The mask `key` of an output as int32 [Y, X]. Raises OutputDamaged when it is missing or cannot be read."""
    with _told(store, key):
        labels = tifffile.imread(io.BytesIO(store.get(key))) if key.endswith(SUFFIXES["tiff"]) else _zarr(store, key)[:]
        return np.ascontiguousarray(labels, np.int32)


def read_mask_part(store: Store, key: str, rows: slice, columns: slice) -> np.ndarray:
    """A part of the mask `key` as int32 [y, x], for masks that are too large to be decoded whole. Memory: the compressed mask,
    and the tiles that the part touches. Raises OutputDamaged as `read_mask`."""
    with _told(store, key):
        if not key.endswith(SUFFIXES["tiff"]):
            return np.ascontiguousarray(_zarr(store, key)[rows, columns], np.int32)
        with tifffile.TiffFile(io.BytesIO(store.get(key))) as file:
            tiles = zarr.open_array(file.pages[0].aszarr(), mode="r")  # type: ignore[union-attr]
            return np.ascontiguousarray(tiles[rows, columns], np.int32)


def _zarr(store: Store, key: str) -> zarr.Array:
    """The pixels of an OME-Zarr mask, undecoded in memory."""
    objects = {name.removeprefix(f"{key}/0/"): store.get(name) for name, _ in store.list(f"{key}/0")}
    memory = {name: zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(data) for name, data in objects.items()}
    return zarr.open_array(MemoryStore(memory), mode="r")


@contextmanager
def _told(store: Store, key: str) -> Iterator[None]:
    """Raises OutputDamaged for whatever shows that a mask is missing or damaged."""
    where, todo = f"{store.url}/{key}", "`dinoray verify --deep` lists all damage"
    try:
        yield
    except FileNotFoundError as error:
        raise OutputDamaged("a mask is missing", where=where, todo=todo) from error
    except (ValueError, OSError, KeyError, IndexError, RuntimeError, tifffile.TiffFileError) as error:
        raise OutputDamaged(f"a mask cannot be read: {error!r}", where=where, todo=todo) from error
