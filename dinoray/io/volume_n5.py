"""An N5 container -> the array that is read as a volume. Everything in N5 is in the order x, y, z; what leaves here is z, y, x.

Blocks are fetched as those of Zarr are, so that retries are counted and errors get their class, and decoded by tensorstore's
`n5` driver from memory. gzip, bzip2 and xz say nothing of the decoded size: they are unpacked here, up to the block's bytes.
"""

from __future__ import annotations

import bz2
import json
import lzma
import math
import re
import struct
import zlib
from typing import Any

import numpy as np
import tensorstore

from dinoray.errors import BadRequest, ItemError
from dinoray.io.grouping import natural
from dinoray.io.ome_zarr import parse_json, path_below
from dinoray.io.volume_folders import choices, folders, refuse_labels_path
from dinoray.io.volume_grid import Shape
from dinoray.io.volume_levels import Level, choose_level, named_level, unstated
from dinoray.io.volume_n5_levels import n5_level
from dinoray.io.volume_objects import ChunkObjects
from dinoray.io.volume_ome import axis_name, parse_axes
from dinoray.io.volume_source import About, Source, VolumeRequest, check_array, check_piece, labels_error, pick
from dinoray.io.zarr_arrays import declared_bytes
from dinoray.io.zarr_objects import leads_out, read_document

_DTYPES = {"uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32", "float64"}
_COMPRESSIONS = {"raw", "gzip", "bzip2", "xz", "blosc", "zstd"}
_LEVEL = re.compile(r"s\d{1,3}")
_XZ_MEMORY = 2**27


def open_n5(uri: str, request: VolumeRequest) -> Source:
    """The Source of a volume in the N5 folder at `uri`. Raises BadRequest, ItemError (of metadata), errors of storage."""
    target = uri if request.dataset is None else f"{uri}/{path_below(request.dataset.strip('/'), uri)}"
    refuse_labels_path(uri, request)
    attributes = _attributes(target)
    notes: tuple[str, ...] = ()
    if _is_array(attributes):
        group, path = target.rpartition("/")[::2]
        above, first = (_attributes(group), _attributes(f"{group}/s0")) if _LEVEL.fullmatch(path) else ({}, {})
        level = n5_level(path, attributes, above, first, target)
        if level is None:
            level, notes = unstated(path, None, None, request.raw_voxel_nm, "the array states no voxel size", target)
        else:
            level = named_level(level, request.raw_voxel_nm, target)
        stored = [above, first]
    else:
        group, above, names = _pyramid(target, attributes, uri)
        arrays = {name: _attributes(f"{group}/{name}") for name in names}
        first = arrays[names[0]]
        stored = [attributes, above, first]
        levels = [n5_level(name, arrays[name], above, first, group) for name in names]
        if all(levels):
            level, notes = choose_level([each for each in levels if each], request.raw_voxel_nm, group)
        else:
            level, notes = unstated(names[0], None, None, request.raw_voxel_nm, f"level {names[0]} states no voxel size", group)
        target, attributes = f"{group}/{level.name}", arrays[level.name]
    if leads_out(target, uri):
        raise BadRequest("a link that leads out of the N5 container", where=target, todo="copy what it points to into it")
    return _source(uri, target, attributes, level, notes, [json.dumps(each, sort_keys=True).encode() for each in stored], request)


def _attributes(uri: str) -> dict[str, Any]:
    data = read_document(uri, "attributes.json")
    return {} if data is None else parse_json(data, uri)


def _is_array(attributes: dict[str, Any]) -> bool:
    return {"dimensions", "blockSize", "dataType"} <= attributes.keys()


def _pyramid(uri: str, attributes: dict[str, Any], top: str) -> tuple[str, dict[str, Any], list[str]]:
    """(group, its attributes, names of its levels) of a multiscale group: s0, s1, ..., or those below `data` (Paintera)."""
    painted = attributes.get("painteraData")
    if isinstance(painted, dict) and "label" in str(painted.get("type", "")).lower():
        raise labels_error("Paintera labels", uri)
    for group in (uri, f"{uri}/data"):
        names = sorted((name for name in folders(group) if _LEVEL.fullmatch(name)), key=natural)
        names = [name for name in names if _is_array(_attributes(f"{group}/{name}"))]
        if names:
            inherited = attributes if group == uri else attributes | _attributes(group)
            return group, inherited, names
    raise BadRequest("an N5 group without levels (s0, s1, ...)", where=uri, todo=choices(uri, top))


def _sizes(value: Any, where: str, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= 8 or any(
            isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**40 for n in value):
        raise ItemError("decode", f"{name}: {str(value)[:100]}", where=where)
    return tuple(value)


def _source(top: str, uri: str, attributes: dict[str, Any], level: Level, notes: tuple[str, ...], stored: list[bytes],
            request: VolumeRequest) -> Source:
    dimensions, block = (_sizes(attributes[name], uri, name) for name in ("dimensions", "blockSize"))
    if len(dimensions) != len(block) or 0 in block:
        raise ItemError("decode", f"blocks of {block} in an array of {dimensions}", where=uri)
    if attributes["dataType"] not in tuple(_DTYPES):
        raise BadRequest(f"voxels of type {str(attributes['dataType'])[:60]!r}", where=uri,
                         todo="write it as uint8, uint16 or float32")
    dtype = np.dtype(attributes["dataType"])
    compression = attributes.get("compression", attributes.get("compressionType", "raw"))
    compression = compression if isinstance(compression, dict) else {"type": compression}
    if compression.get("type") not in tuple(_COMPRESSIONS):
        raise BadRequest(f"an N5 array with the compression {str(compression.get('type'))[:60]!r}", where=uri,
                         todo="write it with " + ", ".join(sorted(_COMPRESSIONS)))
    axes = _axes(attributes, len(dimensions), uri)
    check_array(dimensions, dtype, uri, mask=request.mask)
    check_piece(block, dtype, uri)
    fixed = {}
    for axis, kind, wanted in (("c", "channel", request.channel), ("t", "time", request.time)):
        size = dimensions[axes.index(axis)] if axis in axes else None
        number = pick(kind, size, None, wanted, uri)
        if size is not None:
            fixed[axes.index(axis)] = number
    shape, chunks = (tuple(sizes[axes.index(a)] for a in "zyx") for sizes in (dimensions, block))
    objects = ChunkObjects(uri, 2 * math.prod(block) * dtype.itemsize + 2**20)

    def is_wanted(key: str) -> bool:
        parts = key.split("/")
        return len(parts) == len(block) and all(p.isascii() and p.isdigit() for p in parts) and all(
            parts[i] == str(at // block[i]) for i, at in fixed.items())

    count = math.prod(math.ceil(n / b) for n, b in zip(dimensions, block, strict=True))
    document = json.dumps(attributes, sort_keys=True).encode()
    ref, more = objects.identify(top, [*stored, document], below="", count=count, wanted=is_wanted, fill=0,
                                 num_wanted=math.prod(math.ceil(n / b) for n, b in zip(shape, chunks, strict=True)),
                                 decoded_bytes=math.prod(shape) * dtype.itemsize)
    about = About(shape, dtype, chunks, level.voxel_size_nm, level.translation_nm, ref, (*notes, *more),  # type: ignore[arg-type]
                  level.name)
    return N5Source(about, objects, block, compression, axes, fixed)


def _axes(attributes: dict[str, Any], ndim: int, where: str) -> str:
    """The axes in N5's order (x first)."""
    names = attributes.get("axes")
    if ndim != 3 and isinstance(names, list) and len(names) == ndim:
        return parse_axes([axis_name(name) for name in names], where)
    if ndim == 3:
        return "xyz"
    raise BadRequest(f"an N5 array of {ndim} axes" + ("" if ndim < 3 else " without names"), where=where,
                     todo="name an array of x, y, z, or its axes in the attribute axes (such as x, y, z, c)")


class N5Source(Source):
    """z, y, x of an N5 array whose other axes are fixed: `fixed` is {axis number: index}."""

    def __init__(self, about: About, objects: ChunkObjects, block: tuple[int, ...], compression: dict[str, Any], axes: str,
                 fixed: dict[int, int]):
        self.about, self._objects, self._block, self._axes, self._fixed = about, objects, block, axes, fixed
        self._compression = compression

    def piece(self, place: Shape) -> np.ndarray:
        spatial = dict(zip("zyx", place, strict=True))
        at = tuple(self._fixed[i] // n if i in self._fixed else spatial[a]
                   for i, (a, n) in enumerate(zip(self._axes, self._block, strict=True)))
        key = "/".join(map(str, at))
        data = self._objects.get(key)
        if data is None:
            return np.zeros(self.about.chunks, self.about.dtype)
        values = self._decode(data, f"{self._objects.uri}/{key}")
        values = values[tuple(self._fixed[i] % n if i in self._fixed else slice(None) for i, n in enumerate(self._block))]
        left = [a for i, a in enumerate(self._axes) if i not in self._fixed]
        values = values.transpose([left.index(a) for a in "zyx"])
        # the part of the block inside the array: writers cut the last blocks or fill them up
        inside = tuple(min(c, n - p * c) for c, n, p in zip(self.about.chunks, self.about.shape, place, strict=True))
        if any(v < n for v, n in zip(values.shape, inside, strict=True)):
            raise ItemError("truncated", f"a block of {' x '.join(map(str, values.shape))} instead of "
                            f"{' x '.join(map(str, inside))} voxels (z, y, x)", where=f"{self._objects.uri}/{key}")
        return values

    def _decode(self, data: bytes, where: str) -> np.ndarray:
        """A block in N5's order of axes. Raises ItemError."""
        ndim = len(self._block)
        head = 4 + 4 * ndim
        if len(data) < head:
            raise ItemError("truncated", f"a block of {len(data)} bytes", where=where, todo="copy it again")
        mode, stated = struct.unpack_from(">HH", data)
        if mode != 0 or stated != ndim:
            raise ItemError("unsupported", f"a block of mode {mode} with {stated} axes", where=where)
        size = struct.unpack_from(f">{ndim}I", data, 4)
        if any(not 0 < n <= most for n, most in zip(size, self._block, strict=True)):
            raise ItemError("decode", f"a block of {size} voxels in blocks of {self._block}", where=where)
        if any(self._fixed[i] % self._block[i] >= size[i] for i in self._fixed):
            raise ItemError("truncated", f"a block of {size} voxels ends before the channel or time point", where=where)
        payload, compression = _unpacked(data[head:], self._compression, math.prod(size) * self.about.dtype.itemsize, where)
        context = tensorstore.Context()
        memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
        memory["attributes.json"] = json.dumps({
            "dimensions": size, "blockSize": size, "dataType": self.about.dtype.name, "compression": compression}).encode()
        memory["/".join("0" * ndim)] = data[:head] + payload
        try:
            return tensorstore.open({"driver": "n5", "kvstore": {"driver": "memory"}}, context=context, open=True,
                                    read=True).result().read().result()
        except Exception as error:  # tensorstore raises ValueError for most, and what Python's own types are near for others
            raise ItemError("decode", f"the block cannot be decoded: {error}"[:300], where=where, todo="copy it again") from error


def _unpacked(data: bytes, compression: dict[str, Any], nbytes: int, where: str) -> tuple[bytes, dict[str, Any]]:
    """(payload, its compression): unpacked where the format does not state its decoded size. Raises ItemError."""
    kind = compression["type"]
    if kind in ("blosc", "zstd", "raw"):
        if kind == "blosc" and (len(data) < 16 or struct.unpack_from("<I", data, 12)[0] != len(data)):
            raise ItemError("truncated", f"a blosc block of {len(data):,} bytes", where=where, todo="copy it again")
        if declared_bytes(None if kind == "raw" else kind, data, nbytes) > nbytes:
            raise ItemError("too_large", f"a block that decodes to more than the {nbytes:,} bytes of its shape", where=where)
        return data, compression
    try:
        if kind == "gzip":
            unpacked = zlib.decompressobj(15 if compression.get("useZlib") else 31).decompress(data, nbytes + 1)
        elif kind == "bzip2":
            unpacked = bz2.BZ2Decompressor().decompress(data, nbytes + 1)
        else:
            unpacked = lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(data, nbytes + 1)
    except (zlib.error, OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise ItemError("decode", f"the block cannot be unpacked: {error}"[:300], where=where, todo="copy it again") from error
    if len(unpacked) != nbytes:
        raise ItemError("too_large" if len(unpacked) > nbytes else "truncated",
                        f"a block that decodes to {len(unpacked):,} bytes (or more) instead of {nbytes:,}", where=where)
    return unpacked, {"type": "raw"}
