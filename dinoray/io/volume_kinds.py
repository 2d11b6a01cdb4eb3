"""What kind of volume a path holds -> its reader. Told by name and by what is there, never by trying one after the other."""

from __future__ import annotations

import os

from dinoray.errors import BadRequest
from dinoray.io.stores import is_local, local_path, on_inputs
from dinoray.io.volume_source import Source, VolumeRequest, opening
from dinoray.io.walk import RemoteTree, has_magic
from dinoray.io.zarr_objects import read_document

_HDF5 = (".h5", ".hdf5", ".hdf", ".he5", ".nwb")
_TIFF = (".tif", ".tiff", ".btf", ".tf8")


def open_source(request: VolumeRequest) -> Source:
    """The reader of a request's volume, opened. Raises BadRequest, TransientError, SystemicError."""
    uri = request.uri.rstrip("/") or request.uri
    uri = str(local_path(uri)) if is_local(uri) else uri
    if uri.startswith(("http://", "https://")) and not uri.lower().endswith(_TIFF + _HDF5):
        raise BadRequest("folders over http(s) cannot be listed", where=uri,
                         todo="use the s3:// address of the same data, or a copy")
    with opening(uri):
        what = _what(uri)
        if what == "file":
            lower = uri.lower()
            if lower.endswith(_TIFF):
                from dinoray.io.volume_tiff import open_tiff

                return open_tiff(uri, request)
            if lower.endswith(_HDF5):
                from dinoray.io.volume_hdf5 import open_hdf5

                return open_hdf5(uri, request)
            raise BadRequest("a file that is no volume by its name", where=uri,
                             todo="volumes are OME-Zarr, Zarr or N5 folders, .h5, .tif stacks, or a folder or glob of slices")
        if what == "folder" and _is_n5(uri):
            from dinoray.io.volume_n5 import open_n5

            return open_n5(uri, request)
        if what == "folder" and _is_zarr(uri):
            from dinoray.io.volume_zarr import open_zarr

            return open_zarr(uri, request)
        from dinoray.io.volume_slices import open_slices

        return open_slices(uri, request)


def _what(uri: str) -> str:
    """`file`, `folder` or `glob`. Raises BadRequest when nothing is there."""
    if is_local(uri):
        kind = "folder" if os.path.isdir(uri) else "file" if os.path.isfile(uri) else ""
    elif has_magic(RemoteTree(uri).path) and not uri.startswith("http"):
        kind = ""
    else:
        path = RemoteTree(uri).path
        kind = {"directory": "folder", "file": "file"}.get(on_inputs(uri, lambda fs: fs.info(path)["type"]), "")
    if kind:
        return kind
    if has_magic(uri):
        return "glob"
    raise BadRequest("no such file or folder", where=uri, todo="check the path; quote globs")


def _is_zarr(uri: str) -> bool:
    """Whether a folder is a Zarr group or array, or is named like one."""
    return uri.lower().endswith(".zarr") or any(read_document(uri, name) is not None
                                                for name in ("zarr.json", ".zattrs", ".zgroup", ".zarray"))


def _is_n5(uri: str) -> bool:
    """Whether a folder lies in an N5 container: named so, or with an N5 array's attributes."""
    return any(part.lower().endswith(".n5") for part in uri.split("/")) or read_document(uri, "attributes.json") is not None
