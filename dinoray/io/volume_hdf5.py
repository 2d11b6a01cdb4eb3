"""A dataset of an HDF5 file -> a volume, through h5py; on an object store through ranges of the file, each retried.

What leads out of the file (external links, external storage, virtual datasets) is refused, and so are filters that are not
built in: they would be loaded by name. HDF5 reads in one thread at a time, whoever asks.
"""

from __future__ import annotations

import json
import re
import weakref
from typing import Any

import h5py
import numpy as np

from dinoray.errors import BadRequest, DinorayError, ItemError
from dinoray.io.items import FileRef
from dinoray.io.ome_zarr import path_below
from dinoray.io.storage_errors import storage_errors
from dinoray.io.stores import is_local
from dinoray.io.volume_attributes import plain_level
from dinoray.io.volume_folders import refuse_labels_path
from dinoray.io.volume_grid import Shape
from dinoray.io.volume_objects import check_same, ref_of
from dinoray.io.volume_ome import axis_name, parse_axes
from dinoray.io.volume_ranged import RangedFile
from dinoray.io.volume_source import About, Source, VolumeRequest, check_array, check_piece, pick

_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
_PIECE_BYTES = 2**18
"""Small chunks are read several at a time; contiguous data in rows of about four times this."""
_MOST_OBJECTS = 10_000
_ERRNO = re.compile(r"errno = (\d+)")


def open_hdf5(uri: str, request: VolumeRequest) -> Source:
    """The Source of a dataset. Raises BadRequest, ItemError (of metadata), errors of storage."""
    refuse_labels_path(uri, request)
    ref = ref_of(uri)
    bytes_in = None if is_local(uri) else RangedFile(ref)
    try:
        file = h5py.File(uri if bytes_in is None else bytes_in, "r", **({"locking": False} if bytes_in is None else {}))
    except Exception as error:  # h5py raises OSError for files that are none, and what RangedFile raised
        raise _reading_error(error, bytes_in, uri) from error
    try:
        dataset = _dataset(file, request.dataset, uri)
        return _source(uri, ref, file, dataset, bytes_in, request)
    except DinorayError:
        file.close()
        raise
    except Exception as error:  # damaged metadata end in a dozen types
        file.close()
        raise _reading_error(error, bytes_in, uri) from error


def _reading_error(error: Exception, bytes_in: RangedFile | None, where: str) -> Exception:
    """What a failed call of h5py means: the storage's own trouble, else damage of the file."""
    if bytes_in is not None and bytes_in.failure is not None:
        failure, bytes_in.failure = bytes_in.failure, None
        return failure
    number = _ERRNO.search(str(error)) if isinstance(error, OSError) else None
    if number and number[1] != "0":
        try:
            with storage_errors(where):
                raise OSError(int(number[1]), str(error)[:300])
        except DinorayError as typed:
            return typed
    return ItemError("decode", f"the HDF5 file cannot be read: {type(error).__name__}: {error}"[:300], where=where,
                     todo="copy it again, or check it with h5dump")


def _dataset(file: h5py.File, name: str | None, uri: str) -> h5py.Dataset:
    """The dataset that is asked for, else the only one with 3 to 5 axes. Raises BadRequest."""
    if name is not None:
        name = path_below(name.strip("/"), uri)
        group: Any = file
        for part in name.split("/"):
            link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
            if link is None:
                raise BadRequest(f"no dataset {name!r}", where=uri, todo=_choose(_volumes(file)))
            if not isinstance(link, h5py.HardLink):
                raise BadRequest(f"{name!r} is reached through a link", where=uri, todo="name the dataset itself")
            group = group[part]
        if not isinstance(group, h5py.Dataset):
            raise BadRequest(f"{name!r} is a group", where=uri, todo=_choose(_volumes(file)))
        return group
    found = _volumes(file)
    if len(found) != 1:
        raise BadRequest(f"{len(found) or 'no'} volumes in the HDF5 file", where=uri,
                         todo=_choose(found) if found else "name a file with a dataset of three axes")
    return file[found[0]]


def _volumes(file: h5py.File) -> list[str]:
    """The paths of all datasets with 3 to 5 axes; links are not followed."""
    found: list[str] = []
    seen = [0]

    def look(name: str, each: Any) -> bool | None:
        seen[0] += 1
        if isinstance(each, h5py.Dataset) and each.shape is not None and 3 <= len(each.shape) <= 5:
            found.append(name)
        return True if seen[0] >= _MOST_OBJECTS else None

    file.visititems(look)
    return sorted(found)


def _choose(found: list[str]) -> str:
    return f"choose with --dataset: {', '.join(found[:20])}" if found else "the file holds no dataset with three axes"


def _attributes(dataset: h5py.Dataset) -> dict[str, Any]:
    """Attributes as JSON would hold them."""
    found: dict[str, Any] = {}
    for key in ("element_size_um", "resolution", "voxel_size", "offset", "units", "unit", "axes", "axis_names", "axistags",
                "_ARRAY_DIMENSIONS"):
        if key in dataset.attrs:
            value = dataset.attrs[key]
            value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
            value = list(value) if isinstance(value, tuple) else value
            found[key] = [_text(v) for v in value] if isinstance(value, list) else _text(value)
    return found


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _axes(dataset: h5py.Dataset, attributes: dict[str, Any], where: str) -> str:
    """Axes by ilastik's axistags, attributes, or the labels of the dimensions; else z, y, x."""
    ndim = len(dataset.shape)
    labels = [dataset.dims[i].label for i in range(ndim)]
    try:
        tags = [axis["key"] for axis in json.loads(attributes["axistags"])["axes"]] if "axistags" in attributes else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadRequest("the attribute axistags is not understood", where=where, todo="mend or remove it") from error
    for names in (tags, *(attributes.get(k) for k in ("axis_names", "axes", "_ARRAY_DIMENSIONS")), labels):
        if isinstance(names, str | list) and len(names) == ndim and any(names):
            return parse_axes([axis_name(name) for name in names], where)
    if ndim == 3:
        return "zyx"
    raise BadRequest(f"a dataset of {ndim} axes" + ("" if ndim < 3 else " without names"), where=where,
                     todo="name a dataset of z, y, x, or label its axes (attribute axes, such as c, z, y, x)")


def _source(uri: str, ref: FileRef, file: h5py.File, dataset: h5py.Dataset, bytes_in: RangedFile | None, request: VolumeRequest
            ) -> Source:
    where = f"{uri}:{dataset.name}"
    if dataset.shape is None:
        raise BadRequest("an empty dataset", where=where, todo="name a dataset with voxels")
    if dataset.external or dataset.is_virtual:
        raise BadRequest("a dataset whose voxels lie in other files", where=where, todo="copy it into one file (h5repack, h5py)")
    filters = dataset.id.get_create_plist()
    unknown = [n for n in (filters.get_filter(i)[0] for i in range(filters.get_nfilters())) if n not in _FILTERS]
    if unknown:
        raise BadRequest(f"an HDF5 filter of number {unknown[0]}", where=where, todo="write it with gzip or lzf compression")
    attributes = _attributes(dataset)
    axes = _axes(dataset, attributes, where)
    check_array(dataset.shape, dataset.dtype, where, mask=request.mask)
    fixed = {}
    for axis, kind, wanted in (("c", "channel", request.channel), ("t", "time", request.time)):
        size = dataset.shape[axes.index(axis)] if axis in axes else None
        number = pick(kind, size, None, wanted, where)
        if size is not None:
            fixed[axes.index(axis)] = number
    if "element_size_um" in attributes:
        attributes = {"resolution": attributes["element_size_um"], "units": "um"}
    level, notes = plain_level(attributes, axes, dataset.name.strip("/"), request.raw_voxel_nm, where)
    shape: Shape = tuple(dataset.shape[axes.index(a)] for a in "zyx")  # type: ignore[assignment]
    stored = None if dataset.chunks is None else tuple(dataset.chunks[axes.index(a)] for a in "zyx")
    if dataset.chunks is not None:
        check_piece(dataset.chunks, dataset.dtype, where)
    chunks = _pieces(shape, stored, dataset.dtype.itemsize)
    about = About(shape, dataset.dtype.newbyteorder("="), chunks, level.voxel_size_nm, level.translation_nm, ref, notes, level.name)
    return Hdf5Source(about, file, dataset, bytes_in, axes, fixed)


def _pieces(shape: Shape, stored: Shape | None, itemsize: int) -> Shape:
    """What is read at a time: rows of contiguous data, a chunk, or so many small chunks of a slice."""
    if stored is None:
        return (1, min(shape[1], max(1, 4 * _PIECE_BYTES // (shape[2] * itemsize))), shape[2])
    z, y, x = stored
    while z * y * x * itemsize < _PIECE_BYTES and (x < shape[2] or y < shape[1]):
        y, x = (y, 2 * x) if x < shape[2] and (x <= y or y >= shape[1]) else (2 * y, x)
    return (z, y, x)


class Hdf5Source(Source):
    """z, y, x of a dataset whose other axes are fixed: `fixed` is {axis number: index}."""

    def __init__(self, about: About, file: h5py.File, dataset: h5py.Dataset, bytes_in: RangedFile | None, axes: str,
                 fixed: dict[int, int]):
        self.about, self._dataset, self._bytes_in, self._axes, self._fixed = about, dataset, bytes_in, axes, fixed
        # a file over a Python object that is still open when the interpreter ends takes it down with a segmentation fault
        self._closed = weakref.finalize(self, file.close)

    def check(self) -> None:
        check_same(self.about.ref)

    def piece(self, place: Shape) -> np.ndarray:
        about = self.about
        at = {a: slice(p * c, min((p + 1) * c, n)) for a, p, c, n in zip("zyx", place, about.chunks, about.shape, strict=True)}
        where = f"{self.about.ref.uri}:{self._dataset.name}"
        try:
            values = self._dataset[tuple(self._fixed[i] if i in self._fixed else at[a] for i, a in enumerate(self._axes))]
        except MemoryError as error:
            raise ItemError("too_large", "decoding asked for more memory than there is", where=where) from error
        except Exception as error:  # h5py: OSError for damaged chunks; and what RangedFile raised
            raise _reading_error(error, self._bytes_in, where) from error
        left = [a for i, a in enumerate(self._axes) if i not in self._fixed]
        return values.transpose([left.index(a) for a in "zyx"])

    def close(self) -> None:
        self._closed()
