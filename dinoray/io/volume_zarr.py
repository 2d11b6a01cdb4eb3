"""A Zarr folder -> the array that is read as a volume: OME-Zarr (a level by nanometres), or a plain array of v2 or v3."""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoray.errors import BadRequest, ItemError
from dinoray.io import ome_zarr
from dinoray.io.volume_attributes import plain_level
from dinoray.io.volume_chunks import ZarrChunks
from dinoray.io.volume_folders import choices, refuse_labels_path
from dinoray.io.volume_grid import Shape
from dinoray.io.volume_levels import Level, choose_level, named_level, unstated
from dinoray.io.volume_objects import ChunkObjects
from dinoray.io.volume_ome import Multiscale, axis_name, parse_axes, parse_multiscale
from dinoray.io.volume_source import About, Source, VolumeRequest, check_array, check_piece, labels_error, pick
from dinoray.io.zarr_arrays import ArrayInfo, parse_array
from dinoray.io.zarr_objects import leads_out, read_document

_ABOVE = 4
"""Groups above an array that may say its scale."""


@dataclass(frozen=True)
class Node:
    """A group or array of Zarr: its documents as stored (for the identity) and parsed."""

    uri: str
    is_array: bool
    document: dict[str, Any]
    attributes: dict[str, Any]
    stored: tuple[bytes, ...]


@dataclass(frozen=True)
class _Found:
    """An array and what is known of it."""

    array: Node
    axes: str
    level: Level
    notes: tuple[str, ...]
    channel_names: Sequence[str] | None
    above: tuple[bytes, ...] = ()
    """The documents of the group that says its scale."""


def open_zarr(uri: str, request: VolumeRequest) -> Source:
    """The Source of a volume in the Zarr folder at `uri`. Raises BadRequest, ItemError (of metadata), errors of storage."""
    target = uri if request.dataset is None else f"{uri}/{ome_zarr.path_below(request.dataset.strip('/'), uri)}"
    refuse_labels_path(uri, request)
    node = read_node(target)
    if node is None:
        raise BadRequest("no Zarr group or array is there", where=target, todo=choices(uri))
    found = _in_array(node, uri, request) if node.is_array else _in_group(node, uri, request)
    if leads_out(found.array.uri, uri):
        raise BadRequest("a link that leads out of the Zarr group", where=found.array.uri,
                         todo="copy what it points to into the group")
    return _source(uri, found, request)


def read_node(uri: str) -> Node | None:
    """What is at `uri`; None when it is neither a group nor an array. Raises ItemError, errors of storage."""
    data = read_document(uri, "zarr.json")
    if data is not None:
        document = ome_zarr.parse_json(data, uri)
        inner = document.get("attributes", {})
        return Node(uri, document.get("node_type") == "array", document, inner if isinstance(inner, dict) else {}, (data,))
    array, more = read_document(uri, ".zarray"), read_document(uri, ".zattrs")
    attributes = {} if more is None else ome_zarr.parse_json(more, uri)
    if array is not None:
        return Node(uri, True, ome_zarr.parse_json(array, uri), attributes, (array, more or b""))
    if more is not None or read_document(uri, ".zgroup") is not None:
        return Node(uri, False, {}, attributes, (more or b"",))
    return None


def _ome(node: Node) -> dict[str, Any]:
    """The OME attributes of a group."""
    inner = node.attributes.get("ome")
    return inner if isinstance(inner, dict) and node.document.get("zarr_format") == 3 else node.attributes


def _in_group(node: Node, top: str, request: VolumeRequest, *, inside_series: bool = False) -> _Found:
    attributes = _ome(node)
    if "plate" in attributes or "well" in attributes:
        raise BadRequest("an OME-Zarr plate or well, not one volume", where=node.uri,
                         todo="name the image of one field (such as plate.zarr/A/1/0); plates are read by `dinoray extract images`")
    if "image-label" in attributes and not request.mask:
        raise labels_error("a label image", node.uri)
    if "multiscales" in attributes:
        multiscale = parse_multiscale(attributes, node.uri)
        level, notes = _level(multiscale, request.raw_voxel_nm, node.uri)
        array = _array_at(node.uri, level.name)
        return _Found(array, multiscale.axes, level, notes, multiscale.channel_names, node.stored)
    if "bioformats2raw.layout" in attributes and not inside_series:
        return _in_group(_only_series(node), top, request, inside_series=True)
    raise BadRequest("a Zarr group without a multiscale image", where=node.uri, todo=choices(node.uri, top))


def _array_at(group: str, path: str) -> Node:
    array = read_node(f"{group}/{path}")
    if array is None or not array.is_array:
        raise ItemError("missing", f"the level {path!r} that the metadata name is not there", where=group, todo="copy it again")
    return array


def _only_series(node: Node) -> Node:
    """The one image of a bioformats2raw group. Raises BadRequest for none or several."""
    info = read_node(f"{node.uri}/OME")
    names = ome_zarr.parse_series(_ome(info) if info else {}, node.uri)
    images = {name: image for name in names or ["0", "1"] if (image := read_node(f"{node.uri}/{name}")) is not None}
    if len(images) != 1:
        listed = ", ".join(list(images)[:20]) + (", ..." if not names else "")
        raise BadRequest(f"{len(images) if names or not images else 'several'} images in a bioformats2raw group", where=node.uri,
                         todo=f"choose one with --dataset: {listed}" if images else "copy it again")
    return next(iter(images.values()))


def _level(multiscale: Multiscale, wanted: Any, where: str) -> tuple[Level, tuple[str, ...]]:
    """The level that is read."""
    levels = multiscale.in_nm(where)
    if levels is not None:
        return choose_level(levels, wanted, where)
    first = multiscale.levels[0]
    if all(level.scale for level in multiscale.levels):
        first = min(multiscale.levels, key=lambda each: math.prod(multiscale.spatial(each.scale or ())))
    return _unstated(multiscale, first.path, wanted, where)


def _unstated(multiscale: Multiscale, path: str, wanted: Any, where: str) -> tuple[Level, tuple[str, ...]]:
    """The level at `path` of an image without scale or units: what the user says."""
    level = next(each for each in multiscale.levels if each.path == path)
    if level.scale is None:
        return unstated(path, None, None, wanted, f"level {path} has no scale", where)
    units = ", ".join(f"{a}: {u or 'none'}" for a, u in zip("zyx", multiscale.units, strict=True))
    return unstated(path, multiscale.spatial(level.scale), multiscale.spatial(level.translation), wanted,
                    f"the axes have no unit of length ({units})", where)


def _in_array(node: Node, top: str, request: VolumeRequest) -> _Found:
    """An array that was named: a level of a multiscale above it, or a plain one."""
    if "image-label" in node.attributes and not request.mask:
        raise labels_error("a label image", node.uri)
    for group, path in _groups_above(node.uri, top, request.dataset is not None):
        above = read_node(group)
        attributes = {} if above is None or above.is_array else _ome(above)
        if "image-label" in attributes and not request.mask:
            raise labels_error("a level of a label image", node.uri)
        if above is not None and "multiscales" in attributes:
            multiscale = parse_multiscale(attributes, group)
            if any(level.path == path for level in multiscale.levels):
                levels = multiscale.in_nm(group)
                if levels is None:
                    level, notes = _unstated(multiscale, path, request.raw_voxel_nm, group)
                else:
                    level = next(each for each in levels if each.name == path)
                    level, notes = named_level(level, request.raw_voxel_nm, node.uri), ()
                return _Found(node, multiscale.axes, level, notes, multiscale.channel_names, above.stored)
    shape = node.document.get("shape")
    axes = _plain_axes(node, len(shape) if isinstance(shape, list) else 0)
    level, notes = plain_level(node.attributes, axes, posixpath.basename(node.uri), request.raw_voxel_nm, node.uri)
    return _Found(node, axes, level, notes, None)


def _groups_above(uri: str, top: str, named: bool) -> list[tuple[str, str]]:
    """(group, path below it) of the groups above an array that are part of its container, the nearest first."""
    found, path = [], uri
    for _ in range(_ABOVE):
        path = path.rpartition("/")[0]
        if not (path == top or path.startswith(top + "/") if named else ".zarr" in path.lower()):
            break
        found.append((path, uri[len(path) + 1:]))
    return found


def _plain_axes(node: Node, ndim: int) -> str:
    """Axes by `dimension_names`, `_ARRAY_DIMENSIONS` (xarray), `axis_names` or `axes` (funlib); else z, y, x."""
    stated = [node.attributes.get(key) for key in ("_ARRAY_DIMENSIONS", "axis_names", "axes")]
    for names in (node.document.get("dimension_names"), *stated):
        if isinstance(names, str | list) and len(names) == ndim and not all(name is None for name in names):
            return parse_axes([axis_name(name) for name in names][:16], node.uri)
    if ndim == 3:
        return "zyx"
    if ndim < 3:
        raise BadRequest(f"an array of {ndim} axes, not a volume", where=node.uri,
                         todo=f"images are read by `dinoray extract images`; {choices(node.uri.rpartition('/')[0])}")
    raise BadRequest(f"an array of {ndim} axes without names", where=node.uri,
                     todo="name them in dimension_names (v3) or _ARRAY_DIMENSIONS, from t, c, z, y, x; or write it as OME-Zarr")


def _source(top: str, found: _Found, request: VolumeRequest) -> Source:
    node, axes = found.array, found.axes
    shape = node.document.get("shape")
    if isinstance(shape, list) and 0 in shape:
        check_array(shape, np.dtype("u1"), node.uri)  # says that an axis is empty
    info = parse_array(node.stored[0], node.uri)
    if len(info.shape) != len(axes):
        raise ItemError("decode", f"axes {axes} for an array of {len(info.shape)} axes", where=node.uri)
    check_array(info.shape, info.dtype, node.uri, mask=request.mask)
    check_piece(info.inner, info.dtype, node.uri)
    fixed = {}
    for axis, kind, names, wanted in (("c", "channel", found.channel_names, request.channel), ("t", "time", None, request.time)):
        size = info.shape[axes.index(axis)] if axis in axes else None
        number = pick(kind, size, names if names and len(names) == size else None, wanted, node.uri)
        if size is not None:
            fixed[axes.index(axis)] = number
    where = {a: axes.index(a) for a in "zyx"}
    sizes: dict[str, Shape] = {name: tuple(getattr(info, name)[where[a]] for a in "zyx") for name in ("shape", "inner")}  # type: ignore[misc]
    objects = ChunkObjects(node.uri, 2 * math.prod(info.inner) * info.dtype.itemsize + 2**20)
    ref, notes = objects.identify(
        top, [*found.above, *node.stored], below=_common_folder(info, fixed), count=_count_listed(info, fixed),
        num_wanted=math.prod(math.ceil(info.shape[i] / info.chunks[i]) for i in range(len(info.shape)) if i not in fixed),
        wanted=lambda key: _is_wanted(info, key, fixed), fill=json.loads(info.document)["fill_value"] or 0,
        decoded_bytes=math.prod(sizes["shape"]) * info.dtype.itemsize)
    level = found.level
    about = About(sizes["shape"], info.dtype.newbyteorder("="), sizes["inner"], level.voxel_size_nm, level.translation_nm, ref,
                  (*found.notes, *notes), level.name)
    return ZarrSource(about, ZarrChunks(info, objects), axes, fixed)


def _common_folder(info: ArrayInfo, fixed: dict[int, int]) -> str:
    """The folder below the array that holds all objects of a time point and channel, where their keys say so."""
    if info.separator != "/":
        return ""
    parts = [info.prefix] if info.prefix else []
    for axis in range(len(info.shape) - 1):
        if axis not in fixed:
            break
        parts.append(str(fixed[axis] // info.chunks[axis]))
    return "/".join(parts)


def _count_listed(info: ArrayInfo, fixed: dict[int, int]) -> int:
    """How many objects may lie in that folder."""
    depth = _common_folder(info, fixed).count("/") + 1 - bool(info.prefix) if _common_folder(info, fixed) else 0
    return math.prod(math.ceil(n / c) for n, c in list(zip(info.shape, info.chunks, strict=True))[depth:])


def _is_wanted(info: ArrayInfo, key: str, fixed: dict[int, int]) -> bool:
    """Whether a key is that of a chunk of the array at the fixed places."""
    parts = key.split(info.separator)
    if info.prefix:
        if parts[0] != info.prefix:
            return False
        parts = parts[1:]
    return len(parts) == len(info.shape) and all(p.isascii() and p.isdigit() for p in parts) and all(
        parts[axis] == str(at // info.chunks[axis]) for axis, at in fixed.items())


class ZarrSource(Source):
    """z, y, x of an array whose other axes are fixed: `fixed` is {axis number: index}."""

    def __init__(self, about: About, chunks: ZarrChunks, axes: str, fixed: dict[int, int]):
        self.about, self._chunks, self._axes, self._fixed = about, chunks, axes, fixed

    def piece(self, place: Shape) -> np.ndarray:
        inner, spatial = self._chunks.info.inner, dict(zip("zyx", place, strict=True))
        at = tuple(self._fixed[i] // inner[i] if i in self._fixed else spatial[a] for i, a in enumerate(self._axes))
        values = self._chunks.decode(at)[tuple(
            self._fixed[i] % inner[i] if i in self._fixed else slice(None) for i in range(len(inner)))]
        left = [a for i, a in enumerate(self._axes) if i not in self._fixed]
        return values.transpose([left.index(a) for a in "zyx"])
