"""One OME-Zarr image (2D, full resolution) -> its identity at listing time, and its pixels.

The identity is a digest over the metadata documents and the listing of the level's chunk objects (names,
sizes, mtimes or ETags): no pixel is read for it, and a chunk that was replaced since is noticed. A chunk that
is not stored is the fill value, as Zarr has it; an image of which no chunk at all is stored is `missing`.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil, prod

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from dinoray.errors import DinorayError, ItemError
from dinoray.io import ome_zarr
from dinoray.io.decoded import DecodedImage, Limits, check_limits, finish
from dinoray.io.items import FileRef
from dinoray.io.reading import read_file
from dinoray.io.storage_errors import storage_errors
from dinoray.io.tiff_layout import STACK_TODO
from dinoray.io.zarr_arrays import ArrayInfo, check_object, parse_array
from dinoray.io.zarr_objects import MAX_OBJECTS, ZarrObject, list_objects, read_document

_MARK = "ome-zarr:"
UNREAD = _MARK + "unread"
"""The version of a group whose metadata were no good when it was listed."""
_LABELS = _MARK + "labels:"
"""Versions of groups that were listed as labels: marked as such (`image-label`) they are no images."""
_THREADS = 8
_PADDING_BYTES = 2**28
"""Decoded bytes that the chunks of a small image may take beyond four times its own."""


def is_ome_zarr(file: FileRef) -> bool:
    """Whether a FileRef is an image group of OME-Zarr, by its version."""
    return file.version.startswith(_MARK)


@dataclass(frozen=True)
class _Opened:
    """An image group's metadata and the listing of its level."""

    image: ome_zarr.ImageGroup
    array: ArrayInfo
    objects: dict[str, ZarrObject]
    ref: FileRef


@dataclass(frozen=True)
class StoredField:
    """The stored chunks of an image, not decoded yet."""

    uri: str
    image: ome_zarr.ImageGroup
    array: ArrayInfo
    chunks: dict[str, bytes]
    selection: tuple[int | slice, ...]
    axes: str
    """The axes that the selection leaves: of c, z, y, x."""


def field_ref(uri: str) -> FileRef:
    """The FileRef of the image group at `uri`; "missing" when there is no group.

    Raises ItemError when it is no image that could be read; errors of storage as they come.
    """
    group = _group_document(uri)
    return FileRef(uri, -1, "missing") if group is None else _open(uri, group).ref


def label_ref(uri: str) -> FileRef:
    """As `field_ref`, of a group that may be marked as labels (`image-label`, which no image is): reading it gives its labels."""
    group = _group_document(uri)
    return FileRef(uri, -1, "missing") if group is None else _open(uri, group, labels=True).ref


def group_attributes(uri: str) -> dict | None:
    """The OME attributes of a group; None when there is no group. Raises ItemError, errors of storage."""
    data = _group_document(uri)
    return None if data is None else ome_zarr.ome_attributes(ome_zarr.parse_json(data, uri), uri)


def _group_document(uri: str) -> bytes | None:
    data = read_document(uri, "zarr.json")
    return read_document(uri, ".zattrs") if data is None else data


def _open(uri: str, group: bytes, *, labels: bool = False) -> _Opened:
    image = ome_zarr.parse_image(ome_zarr.ome_attributes(ome_zarr.parse_json(group, uri), uri), uri, labels=labels)
    if image is None:
        raise ItemError("not_image", "a Zarr group without an OME-Zarr image", where=uri)
    level = f"{uri}/{image.level}"
    data = read_document(level, "zarr.json")
    data = read_document(level, ".zarray") if data is None else data
    if data is None:
        raise ItemError("missing", f"the image's full resolution level {image.level!r} is not there", where=uri)
    array = parse_array(data, level)
    if len(array.shape) != len(image.axes):
        raise ItemError("decode", f"axes {image.axes} for an array of {len(array.shape)} axes", where=uri)
    if prod(ceil(n / chunk) for n, chunk in zip(array.shape, array.chunks, strict=True)) > MAX_OBJECTS:
        raise ItemError("too_large", f"over {MAX_OBJECTS:,} chunks: this is a volume, not an image", where=uri)
    objects = [o for o in list_objects(level) if o.name not in (".zarray", ".zattrs", "zarr.json")]
    digest = blake2b(digest_size=16)
    for text in (group, data, *(f"{o.name}\0{o.size}\0{o.version}\n".encode("utf-8", "surrogateescape") for o in objects)):
        digest.update(len(text).to_bytes(8, "little") + text)
    size = len(group) + len(data) + sum(max(0, o.size) for o in objects)
    ref = FileRef(uri, size, (_LABELS if labels else _MARK) + digest.hexdigest())
    return _Opened(image, array, {o.name: o for o in objects}, ref)


def fetch(file: FileRef, limits: Limits, z_projection: str) -> StoredField:
    """Read the chunks of an image as stored; nothing is decoded.

    Raises ItemError: `changed`, `missing`, `stack` (T, or Z without a projection), `too_large` and what
    the metadata's checks say; TransientError and SystemicError for storage.
    """
    uri = file.uri
    with storage_errors(uri):
        group = _group_document(uri)
        opened = None if group is None else _open(uri, group, labels=file.version.startswith(_LABELS))
    if opened is None:
        raise ItemError("missing", "no such Zarr group", where=uri)
    if opened.ref != file:
        raise ItemError("changed", "the image is not the one that was listed", where=uri,
                        todo="extend or plan again with the new image")
    selection, axes = _selection(opened, limits, z_projection)
    array = opened.array
    places = itertools.product(*(
        range(at.start or 0, ceil(n / c)) if isinstance(at, slice) else (at // c,)
        for at, n, c in zip(selection, array.shape, array.chunks, strict=True)))
    stored = [o for place in places if (o := opened.objects.get(array.key(place)))]
    if not stored:
        strange = f"; there is {next(iter(opened.objects))[:100]!r} instead" if opened.objects else ""
        raise ItemError("missing", f"no chunk of the image is stored{strange}", where=uri,
                        todo="copy the image again")
    total = sum(o.size for o in stored)
    if total > limits.max_file_bytes:
        raise ItemError("too_large", f"chunks of {total:,} bytes; the limit is {limits.max_file_bytes:,}", where=uri)
    level = f"{uri}/{opened.image.level}"

    with ThreadPoolExecutor(_THREADS) as pool:
        reads = [pool.submit(copy_context().run, read_file, FileRef(f"{level}/{chunk.name}", chunk.size, chunk.version), limits)
                 for chunk in stored]  # with this thread's context: retries count for its unit
        chunks = {chunk.name: read.result() for chunk, read in zip(stored, reads, strict=True)}
    return StoredField(uri, opened.image, array, chunks, selection, axes)


def _selection(opened: _Opened, limits: Limits, z_projection: str) -> tuple[tuple[int | slice, ...], str]:
    """What of the array is read: [.., c, z, y, x] without T and (unless it is projected) Z."""
    shape, image, uri = opened.array.shape, opened.image, opened.ref.uri
    size = dict(zip(image.axes, shape, strict=True))
    planes = {"t": size.get("t", 1), "z": size.get("z", 1)}
    if planes["t"] > 1 or planes["z"] > 1 and z_projection not in ("max", "middle"):
        raise ItemError("stack", f"not one image but a stack: axes {image.axes}, {' x '.join(map(str, shape))}",
                        where=uri, todo=STACK_TODO + "; `dinoray extract volume` reads volumes")
    depth = planes["z"] if z_projection == "max" else 1
    channels = size.get("c", 1)
    check_limits(uri, limits, height=size["y"], width=size["x"], planes=channels * depth, itemsize=opened.array.dtype.itemsize)
    if channels > limits.max_channels:
        raise ItemError("too_large", f"{channels} channels, the limit is {limits.max_channels}", where=uri)
    at = {"t": 0, "z": planes["z"] // 2 if depth == 1 else slice(None)}
    selection = tuple(at.get(axis, slice(None)) for axis in image.axes)
    padded = prod(-(-(1 if isinstance(s, int) else n) // c) * c
                  for s, n, c in zip(selection, shape, opened.array.chunks, strict=True)) * opened.array.dtype.itemsize
    own = size["y"] * size["x"] * channels * depth * opened.array.dtype.itemsize
    if padded > max(4 * own, _PADDING_BYTES):
        raise ItemError("too_large", f"chunks of {' x '.join(map(str, opened.array.chunks))} for an image of "
                        f"{' x '.join(map(str, shape))}", where=uri, todo="write it with smaller chunks")
    return selection, "".join(a for a, s in zip(image.axes, selection, strict=True) if isinstance(s, slice))


def decode(field: StoredField, z_projection: str) -> DecodedImage:
    """Decode to pixels_CYX. Raises ItemError: `too_large`, `truncated`, `decode`, `unsupported`."""
    for name, data in field.chunks.items():
        check_object(field.array, data, f"{field.uri}/{field.image.level}/{name}")
    make = default_buffer_prototype().buffer.from_bytes
    contents = {field.array.name: field.array.document, **field.chunks}
    try:
        store = MemoryStore({name: make(data) for name, data in contents.items()})
        array = zarr.open_array(store, mode="r", zarr_format=2 if field.array.name == ".zarray" else 3)
        pixels = np.asarray(array[field.selection])
    except DinorayError:
        raise
    except MemoryError as error:
        raise ItemError("too_large", "decoding asked for more memory than there is", where=field.uri) from error
    except Exception as error:  # zarr and its codecs raise a dozen types for damaged chunks
        raise ItemError("decode", f"the chunks cannot be decoded: {type(error).__name__}: {error}"[:300],
                        where=field.uri) from error
    order = [field.axes.index(axis) for axis in "zcyx" if axis in field.axes]
    pixels = pixels.transpose(order)
    if "z" in field.axes:
        pixels = pixels.max(axis=0) if z_projection == "max" else pixels[0]
    return finish(pixels if pixels.ndim == 3 else pixels[None], field.uri, channel_names=field.image.channel_names,
                  pixel_size_um=field.image.pixel_size_um)
