"""The objects of a Zarr group without zarr: small documents, and listings with sizes and versions.

Links inside a group are not followed: whoever wrote the group would choose which files of the reader are
opened. FIFOs and devices are never opened.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from dinoray.errors import ItemError
from dinoray.io.stores import is_local, local_path, on_inputs
from dinoray.io.walk import RemoteTree

MAX_DOCUMENT = 2**24
"""Bytes of a metadata document; parsed JSON takes some ten times as many."""
MAX_OBJECTS = 2**18
"""Chunk objects of one image."""


@dataclass(frozen=True)
class ZarrObject:
    """One chunk as the listing saw it; `name` is its path below the listed array."""

    name: str
    size: int
    version: str


def read_document(uri: str, name: str) -> bytes | None:
    """The bytes of the document `name` of the group at `uri`; None when there is none.

    Raises ItemError `too_large`, or `bad_path` for a link or a special file; OSError of storage as it comes.
    """
    if is_local(uri):
        path = local_path(uri) / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if path.is_symlink():
                raise _link(str(path)) from error
            raise
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ItemError("bad_path", "a document of a Zarr group is no plain file", where=str(path))
            data = file.read(MAX_DOCUMENT + 1)
    else:
        path = f"{RemoteTree(uri).path.rstrip('/')}/{name}"
        try:
            data = on_inputs(f"{uri}/{name}", lambda fs: fs.cat_file(path, start=0, end=MAX_DOCUMENT + 1))
        except FileNotFoundError:
            return None
    if len(data) > MAX_DOCUMENT:
        raise ItemError("too_large", f"a metadata document of over {MAX_DOCUMENT:,} bytes", where=f"{uri}/{name}")
    return data


def list_objects(uri: str) -> list[ZarrObject]:
    """All objects below the array at `uri`, sorted by name; versions are ETags, or mtimes in ns.

    Raises ItemError `too_large` for more than MAX_OBJECTS, `bad_path` for links and special files; OSError.
    """
    found = _list_local(uri) if is_local(uri) else _list_remote(uri)
    return sorted(found, key=lambda each: each.name)


def _list_local(uri: str) -> list[ZarrObject]:
    top = str(local_path(uri))
    found: list[ZarrObject] = []
    pending = [top]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise _link(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                    continue
                info = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(info.st_mode):
                    raise ItemError("bad_path", "a chunk is no plain file", where=entry.path)
                found.append(ZarrObject(os.path.relpath(entry.path, top), info.st_size, str(info.st_mtime_ns)))
                _check_number(found, uri)
    return found


def _list_remote(uri: str) -> list[ZarrObject]:
    tree = RemoteTree(uri)
    path = tree.path.rstrip("/")
    found = []
    for name, info in on_inputs(uri, lambda fs: fs.find(path, detail=True)).items():
        if info["type"] == "file" and name.startswith(path + "/"):
            ref = tree.to_ref(name, info)
            found.append(ZarrObject(name[len(path) + 1:], ref.size, ref.version))
            _check_number(found, uri)
    return found


def _check_number(found: list[ZarrObject], uri: str) -> None:
    if len(found) > MAX_OBJECTS:
        raise ItemError("too_large", f"more than {MAX_OBJECTS:,} chunks", where=uri,
                        todo="this is a volume, or its chunks are too small for an image")


def _link(path: str) -> ItemError:
    return ItemError("bad_path", "a link inside a Zarr group is not followed", where=path,
                     todo="copy what it points to into the group")


def leads_out(uri: str, top: str) -> bool:
    """Whether a local folder below `top` lies elsewhere in truth, because a part of its path is a link."""
    if not is_local(uri):
        return False
    real, real_top = os.path.realpath(local_path(uri)), os.path.realpath(local_path(top))
    return real != real_top and not real.startswith(real_top.rstrip("/") + "/")
