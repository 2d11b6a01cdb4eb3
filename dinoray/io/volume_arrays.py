"""The stored arrays of a volume's features: Zarr v3 with shards, placed in nm by OME-Zarr 0.5. Nothing here reads values.

An array `OUT/dense/<name>.zarr` is [channel, z, y, x]; labels are `OUT/labels.zarr`, [z, y, x], which OME-Zarr calls an
image-label. Metadata are put once, by the driver, and compared on resume; a shard is one object that one unit encodes in memory and
puts whole, so that it is never half written. An element that nobody computed reads as the fill value, NaN, or 0 of integers: an
absent shard, and what lies in a shard beyond the array's end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from dinoray.errors import OutputDamaged
from dinoray.io.stores import Store
from dinoray.io.volume_grid import ArraySpec, Shape

DENSE = "dense"
"""The folder of all dense features of an output."""
LEVEL = "0"
"""The only level of the multiscale image."""
AXES = ("c", "z", "y", "x")
LABELS = "labels"
"""The name of the only array that has no channel axis."""


def group_key(name: str) -> str:
    """The OME-Zarr group of the array `name`."""
    return f"{LABELS}.zarr" if name == LABELS else f"{DENSE}/{name}.zarr"


def array_key(name: str) -> str:
    """The Zarr array of the array `name`."""
    return f"{group_key(name)}/{LEVEL}"


def shard_key(spec: ArraySpec, place: tuple[int, int, int]) -> str:
    """The object of a shard; `place` counts shards along z, y, x."""
    return "/".join([array_key(spec.name), "c", *([] if spec.name == LABELS else ["0"]), *map(str, place)])


def metadata_objects(spec: ArraySpec, attributes: dict[str, Any]) -> dict[str, bytes]:
    """Key below the output -> JSON of the group and of the array; `attributes` stand in the group under `dinoray`.

    The same arguments give the same bytes.
    """
    memory = _encode(spec, spec.shape if spec.name == LABELS else (spec.dim, *spec.shape), None)
    ome = _multiscales(spec) | ({"image-label": {"version": "0.5"}} if spec.name == LABELS else {})
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome, "dinoray": attributes}}
    return {f"{group_key(spec.name)}/zarr.json": _json(group),
            f"{array_key(spec.name)}/zarr.json": _json(json.loads(memory["zarr.json"]))}


def create_arrays(store: Store, specs: Sequence[ArraySpec], attributes: dict[str, Any]) -> list[dict[str, Any]]:
    """Put the metadata of the arrays; returns {"key", "bytes", "sha256"} of each object, for the plan.

    Raises what the store raises (TransientError, SystemicError).
    """
    recorded = []
    for spec in specs:
        for key, data in metadata_objects(spec, attributes).items():
            store.put(key, data)
            recorded.append({"key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    return recorded


def check_arrays(store: Store, recorded: Sequence[dict[str, Any]]) -> None:
    """Compare what `create_arrays` recorded with what is stored; nothing is written.

    Raises OutputDamaged for an object that is missing or different.
    """
    for entry in recorded:
        where, todo = f"{store.url}/{entry['key']}", "put the file back, or start anew in an empty folder"
        try:
            data = store.get(entry["key"])
        except FileNotFoundError as error:
            raise OutputDamaged("the metadata of a feature array are gone", where=where, todo=todo) from error
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise OutputDamaged("the metadata of a feature array were changed since the plan was made", where=where, todo=todo)


def shards_of(spec: ArraySpec, start: Shape, stop: Shape) -> Iterator[tuple[tuple[int, int, int], Shape, Shape]]:
    """(place, start, stop) of the shards of the box [start, stop), in C order; the last ones are cut at the array's end.

    Raises ValueError for a box that is empty, or that would share a shard with another: its corners must lie on borders of
    shards or at the array's end.
    """
    for low, high, size, shard in zip(start, stop, spec.shape, spec.shards, strict=True):
        if not 0 <= low < high <= size or low % shard or high % shard and high != size:
            raise ValueError(f"the box {tuple(start)}..{tuple(stop)} of {spec.name} {spec.shape} is not made of whole shards "
                             f"of {spec.shards}")
    return _shards_of(spec, start, stop)


def _shards_of(spec: ArraySpec, start: Shape, stop: Shape) -> Iterator[tuple[tuple[int, int, int], Shape, Shape]]:
    places = [range(low // s, -(-high // s)) for low, high, s in zip(start, stop, spec.shards, strict=True)]
    for place in product(*places):
        low = tuple(i * s for i, s in zip(place, spec.shards, strict=True))
        yield place, low, tuple(min(a + s, n) for a, s, n in zip(low, spec.shards, spec.shape, strict=True))  # type: ignore[misc]


def encode_shard(spec: ArraySpec, values: np.ndarray) -> bytes:
    """One whole shard from `values` [dim, z, y, x] (labels: [z, y, x]) of spec.dtype: what the array has of it, from the shard's
    first element on.

    Every chunk is in it, those beyond the array's end as the fill value. The same values give the same bytes. Raises ValueError
    for other shapes and dtypes.
    """
    full = spec.shards if spec.name == LABELS else (spec.dim, *spec.shards)
    if values.dtype != np.dtype(spec.dtype) or values.ndim != len(full) or values.ndim == 4 and values.shape[0] != spec.dim \
            or any(not 0 < n <= most for n, most in zip(values.shape, full, strict=True)):
        raise ValueError(f"a shard of {spec.name} holds {full} {spec.dtype} at most, not {values.shape} {values.dtype}")
    if values.shape != full:
        padded = np.full(full, fill_value(spec), values.dtype)
        padded[tuple(slice(0, n) for n in values.shape)] = values
        values = padded
    return _encode(spec, full, values)["/".join(["c", *["0"] * len(full)])]


def fill_value(spec: ArraySpec) -> Any:
    """What an element is that nobody computed: NaN, or 0 of integers."""
    return np.nan if np.dtype(spec.dtype).kind == "f" else 0


def _encode(spec: ArraySpec, shape: tuple[int, ...], values: np.ndarray | None) -> dict[str, bytes]:
    """The objects that zarr itself makes of an array of `shape` (its metadata alone when there are no values). With zstd's own
    checksum a flipped bit in a chunk is found by every reader; the index of a shard has a crc32c."""
    memory: dict[str, Any] = {}
    lead = () if spec.name == LABELS else (spec.dim,)
    target = zarr.create_array(
        MemoryStore(memory), shape=shape, dtype=spec.dtype, chunks=(*lead, *spec.chunks), shards=(*lead, *spec.shards),
        fill_value=fill_value(spec), dimension_names=AXES[1 - len(lead):],
        compressors=zarr.codecs.ZstdCodec(level=1, checksum=True), config={"write_empty_chunks": True})
    if values is not None:
        target[:] = values
    return {key: value.to_bytes() for key, value in memory.items()}


def _multiscales(spec: ArraySpec) -> dict[str, Any]:
    """The `ome` attributes (https://ngff.openmicroscopy.org/0.5): one level, its first voxel's centre at translation_nm."""
    has_channels = spec.name != LABELS
    axes = [{"name": "c", "type": "channel"}][:has_channels] + [{"name": a, "type": "space", "unit": "nanometer"} for a in AXES[1:]]
    transforms = [{"type": "scale", "scale": [1.0][:has_channels] + [*map(float, spec.pitch_nm)]},
                  {"type": "translation", "translation": [0.0][:has_channels] + [*map(float, spec.translation_nm)]}]
    level = {"path": LEVEL, "coordinateTransformations": transforms}
    return {"version": "0.5", "multiscales": [{"name": spec.name, "axes": axes, "datasets": [level]}]}


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1).encode()
