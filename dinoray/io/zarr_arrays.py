"""A Zarr array's metadata (v2, v3) and chunks, checked before zarr sees them.

zarr decodes what the metadata ask for: it would unpickle object arrays, load any codec by name, and believe
a chunk's header about its decoded size. So only numbers and the codecs below are let through, and every
compressed chunk must declare (or, where the format declares nothing, prove) at most the bytes of its shape.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import google_crc32c
import imagecodecs
import numpy as np

from dinoray.errors import ItemError
from dinoray.io.ome_zarr import parse_json

_V2_DTYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f[248])")
_V3_DTYPES = {"bool": "b1"} | {f"{k}int{8 * n}": f"{k[:1] or 'i'}{n}" for k in ("", "u") for n in (1, 2, 4, 8)} \
    | {f"float{8 * n}": f"f{n}" for n in (2, 4, 8)}
_COMPRESSORS = {"blosc", "zstd", "gzip", "zlib", "lz4"}
_FILL = re.compile(r"-?Infinity|NaN|0x[0-9a-fA-F]{2,16}")
_TODO = "write it with blosc, zstd, gzip or no compression"


@dataclass(frozen=True)
class ArrayInfo:
    """What an array declares. `chunks` is the shape of one stored object, `inner` of one compressed piece (they
    differ in shards). `document` is its metadata reduced to what is known to be harmless, for zarr."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    inner: tuple[int, ...]
    dtype: np.dtype
    compressor: str | None
    name: str
    document: bytes
    separator: str
    prefix: str = ""
    checksum: bool = False
    """A CRC32C of 4 bytes stands behind each compressed piece."""
    sharded: bool = False
    """An object holds several compressed pieces and an index."""
    index_at_start: bool = False

    def key(self, place: tuple[int, ...]) -> str:
        """The name of the object of a chunk."""
        return self.separator.join([*([self.prefix] if self.prefix else []), *map(str, place)])


def parse_array(data: bytes, where: str) -> ArrayInfo:
    """The metadata of an array: a `.zarray` or `zarr.json`.

    Raises ItemError: `decode` for what contradicts itself, `unsupported` for codecs, types, filters.
    """
    document = parse_json(data, where)
    try:
        return _v3(document, where) if document.get("zarr_format") == 3 else _v2(document, where)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ItemError("decode", f"the array's metadata are not understood: {error!r}"[:300], where=where) from error


def _v2(document: dict[str, Any], where: str) -> ArrayInfo:
    shape, chunks = _sizes(document["shape"]), _sizes(document["chunks"])
    dtype, compressor = document["dtype"], document.get("compressor")
    separator = document.get("dimension_separator", ".")
    if document.get("filters"):
        raise ItemError("unsupported", "a Zarr array with filters", where=where, todo=_TODO)
    if not isinstance(dtype, str) or not _V2_DTYPE.fullmatch(dtype):
        raise ItemError("unsupported", f"a Zarr array of type {str(dtype)[:100]!r}", where=where)
    if document["zarr_format"] != 2 or len(shape) != len(chunks) or separator not in (".", "/") \
            or document.get("order", "C") not in ("C", "F"):
        raise ValueError("format, shape, chunks, order or separator")
    name = None if compressor is None else _codec_name(compressor["id"], where)
    known = {"zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": dtype, "compressor": compressor,
             "fill_value": _fill(document.get("fill_value")), "order": document.get("order", "C"), "filters": None,
             "dimension_separator": separator}
    return ArrayInfo(shape, chunks, chunks, np.dtype(dtype), name, ".zarray", json.dumps(known).encode(), separator)


def _v3(document: dict[str, Any], where: str) -> ArrayInfo:
    shape, grid = _sizes(document["shape"]), document["chunk_grid"]
    if document["node_type"] != "array" or grid["name"] != "regular" or document.get("storage_transformers"):
        raise ItemError("unsupported", "a Zarr array with an irregular grid or storage transformers", where=where)
    chunks = inner = _sizes(grid["configuration"]["chunk_shape"])
    data_type = document["data_type"]
    if not isinstance(data_type, str) or data_type not in _V3_DTYPES:
        raise ItemError("unsupported", f"a Zarr array of type {str(data_type)[:100]!r}", where=where)
    encoding = document.get("chunk_key_encoding", {"name": "default"})
    default = encoding["name"] == "default"
    separator = encoding.get("configuration", {}).get("separator", "/" if default else ".")
    if encoding["name"] not in ("default", "v2") or separator not in (".", "/"):
        raise ValueError("chunk_key_encoding")
    codecs, at_start = list(document["codecs"]), False
    sharded = codecs[-1]["name"] == "sharding_indexed"
    if sharded:
        shard = codecs[-1]["configuration"]
        inner, at_start = _sizes(shard["chunk_shape"]), shard.get("index_location", "end") == "start"
        index = [codec["name"] for codec in shard["index_codecs"]]
        if len(codecs) != 1 or index != ["bytes", "crc32c"] or shard["index_codecs"][0]["configuration"]["endian"] != "little":
            raise ItemError("unsupported", "a sharded Zarr array with unusual codecs", where=where, todo=_TODO)
        if any(outer % part for outer, part in zip(chunks, inner, strict=True)):
            raise ValueError("chunks that do not divide their shard")
        codecs = list(shard["codecs"])
    if not len(shape) == len(chunks) == len(inner):
        raise ValueError("shape and chunks")
    names = [codec["name"] for codec in codecs]
    plain = names[1:] if names[0] == "transpose" else names
    if plain[0] != "bytes":
        raise ItemError("unsupported", f"Zarr codecs {', '.join(map(str, names))[:100]}", where=where, todo=_TODO)
    checksum = plain[-1] == "crc32c"
    packed = plain[1:-1] if checksum else plain[1:]
    if len(packed) > 1:
        raise ItemError("unsupported", f"Zarr codecs {', '.join(map(str, names))[:100]}", where=where, todo=_TODO)
    compressor = _codec_name(packed[0], where) if packed else None
    known = {"zarr_format": 3, "node_type": "array", "shape": shape, "data_type": data_type, "chunk_grid": grid,
             "chunk_key_encoding": {"name": encoding["name"], "configuration": {"separator": separator}},
             "fill_value": _fill(document["fill_value"]), "codecs": document["codecs"], "attributes": {}}
    return ArrayInfo(shape, chunks, inner, np.dtype(_V3_DTYPES[data_type]), compressor, "zarr.json",
                     json.dumps(known).encode(), separator, "c" if default else "", checksum, sharded, at_start)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= 8 or any(
            isinstance(n, bool) or not isinstance(n, int) or not 0 < n < 2**40 for n in value):
        raise ValueError(f"sizes {str(value)[:100]}")
    return tuple(value)


def _fill(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float) and abs(value) < 2**64 or value != value \
            or isinstance(value, str) and _FILL.fullmatch(value):
        return value
    raise ValueError(f"fill_value {str(value)[:100]}")


def _codec_name(name: Any, where: str) -> str:
    if name not in _COMPRESSORS:
        raise ItemError("unsupported", f"a Zarr array with the codec {str(name)[:100]!r}", where=where, todo=_TODO)
    return name


def check_object(info: ArrayInfo, data: bytes, where: str) -> None:
    """Compare the decoded sizes that a stored object declares with its shape, piece by piece.

    Raises ItemError `too_large` or `truncated`. Costs a second decoding only for gzip, zlib and zstd without a size.
    """
    nbytes = prod(info.inner) * info.dtype.itemsize
    for piece in _pieces(info, data, where) if info.sharded else [memoryview(data)]:
        if info.checksum:
            piece = piece[:-4]
        if info.compressor == "blosc":  # which reads as many bytes as its header says, wherever the buffer ends
            stored = struct.unpack_from("<I", piece, 12)[0] if len(piece) >= 16 else -1
            if stored != len(piece):
                raise ItemError("truncated", f"a blosc chunk of {len(piece):,} bytes instead of {stored:,}", where=where)
        if declared_bytes(info.compressor, bytes(piece), nbytes) > nbytes:
            raise ItemError("too_large", f"a chunk that decodes to more than the {nbytes:,} bytes of its shape",
                            where=where)


def _pieces(info: ArrayInfo, data: bytes, where: str) -> list[memoryview]:
    """The compressed chunks inside a shard, by its index of (offset, bytes) pairs."""
    count = prod(ceil(outer / part) for outer, part in zip(info.chunks, info.inner, strict=True))
    size = 16 * count + 4
    if size > len(data):
        raise ItemError("truncated", "a shard ends within its index", where=where)
    index = np.frombuffer(data, "<u8", 2 * count, 0 if info.index_at_start else len(data) - size).reshape(-1, 2)
    view, pieces = memoryview(data), []
    for offset, length in index.tolist():
        if offset == length == 2**64 - 1:
            continue
        if offset + length > len(data):
            raise ItemError("truncated", "a shard ends before a chunk of its index", where=where)
        pieces.append(view[offset:offset + length])
    return pieces


def shard_index_place(info: ArrayInfo, num_bytes: int, where: str) -> tuple[int, int]:
    """The bytes [begin, end) of the index in a shard of `num_bytes`. Raises ItemError `truncated`."""
    size = 16 * prod(outer // part for outer, part in zip(info.chunks, info.inner, strict=True)) + 4
    if num_bytes < size:
        raise ItemError("truncated", "a shard ends within its index", where=where)
    return (0, size) if info.index_at_start else (num_bytes - size, num_bytes)


def shard_index(info: ArrayInfo, data: bytes, where: str) -> np.ndarray:
    """The index of a shard [pieces, 2] uint64: offset and bytes of each piece in C order, all ones where none is stored.

    Raises ItemError `decode` when its checksum says otherwise.
    """
    if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ItemError("decode", "the index of a shard is damaged", where=where, todo="copy the shard again")
    index = np.frombuffer(data, "<u8", (len(data) - 4) // 8).reshape(-1, 2)
    if np.any((index[:, 0] >= 2**62) & (index[:, 0] < 2**64 - 1)) or np.any((index[:, 1] >= 2**62) & (index[:, 1] < 2**64 - 1)):
        raise ItemError("decode", "the index of a shard points behind its end", where=where)
    return index


def declared_bytes(compressor: str | None, data: bytes, limit: int) -> int:
    """Decoded bytes of a compressed piece, or any number over `limit`."""
    if compressor is None:
        return len(data)
    if compressor == "blosc":
        return struct.unpack_from("<I", data, 4)[0] if len(data) >= 16 else 0
    if compressor == "lz4":
        return struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
    if compressor in ("gzip", "zlib"):
        return _inflated(data, limit, 31 if compressor == "gzip" else 15)
    return _zstd(data, limit)


def _inflated(data: bytes, limit: int, wbits: int) -> int:
    total = 0
    while data and total <= limit:
        stream = zlib.decompressobj(wbits)
        try:
            total += len(stream.decompress(data, limit + 1 - total))
        except zlib.error:
            return total  # the decoder will say so
        if stream.unconsumed_tail:
            return limit + 1
        data = stream.unused_data  # gzip files may be chained
    return total


def _zstd(data: bytes, limit: int) -> int:
    """The content size in the header of the (first) frame; by a bounded decoding when there is none."""
    if len(data) < 6 or data[:4] != b"\x28\xb5\x2f\xfd":
        return 0
    flags = data[4]
    single = flags >> 5 & 1
    width = (1 if single else 0, 2, 4, 8)[flags >> 6]
    at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    if width:
        return int.from_bytes(data[at:at + width], "little") + (256 if width == 2 else 0)
    try:
        return len(imagecodecs.zstd_decode(data, out=limit + 1))
    except imagecodecs.ZstdError:
        return limit + 1  # it did not fit, or is damaged: refused in either case
