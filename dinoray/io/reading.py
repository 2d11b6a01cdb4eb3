"""One listed file -> its bytes, or the reason why not: missing, changed since the listing, cut short on the way."""

from __future__ import annotations

import os

from dinoray.errors import ItemError
from dinoray.io.decoded import Limits
from dinoray.io.items import FileRef
from dinoray.io.retries import retried
from dinoray.io.storage_errors import TruncatedBody, storage_errors
from dinoray.io.stores import is_local, local_path, read_versioned
from dinoray.io.walk import LocalTree, RemoteTree


def read_file(file: FileRef, limits: Limits) -> bytes:
    """The bytes of a file, as the listing saw it; retried.

    Raises ItemError `missing`, `too_large`, `changed` (other bytes than those that were listed), TransientError,
    SystemicError.
    """
    if file.version == "missing":
        raise ItemError("missing", "no such file", where=file.uri)
    if file.size > limits.max_file_bytes:
        raise ItemError("too_large", f"a file of {file.size:,} bytes; the limit is {limits.max_file_bytes:,}",
                        where=file.uri)
    with storage_errors(file.uri):
        return retried(lambda: _read_once(file), file.uri)


def _read_once(file: FileRef) -> bytes:
    """One try of `read_file`. Raises ItemError `changed`, TruncatedBody, and what storage raises."""
    data, version = _fetch(file.uri)
    if version == file.version and file.size in (-1, len(data)):  # a size of -1 is one that the store did not tell
        return data
    now = LocalTree().ref(str(local_path(file.uri))) if is_local(file.uri) else RemoteTree(file.uri).named()
    if now.version == "missing":
        raise FileNotFoundError(file.uri)
    if now.version != file.version or min(now.size, file.size) >= 0 and now.size != file.size:
        raise ItemError("changed", f"the file is not the one that was listed ({now.size:,} bytes now, "
                        f"{file.size:,} then)", where=file.uri, todo="extend or plan again with the new file")
    if 0 <= file.size != len(data):
        raise TruncatedBody(f"only {len(data):,} of {file.size:,} bytes arrived")
    if version not in (None, file.version) and not file.uri.startswith("http"):  # web servers differ between GET and HEAD
        raise TruncatedBody("the file was replaced while it was read, and put back")
    return data


def _fetch(uri: str) -> tuple[bytes, str | None]:
    """The bytes, and the version that they are of: mtime in ns, ETag, None where the store does not say."""
    if is_local(uri):
        data = local_path(uri).read_bytes()
        return data, str(os.stat(local_path(uri)).st_mtime_ns)  # after reading: a change while we read is seen too
    return read_versioned(uri)

