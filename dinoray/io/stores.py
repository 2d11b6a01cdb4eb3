"""One way to address local folders, `s3://...`, `memory://...`: the only code that puts objects.

Guarantees, relied on by the ledger:

* `put` is atomic: a reader sees the old object, the new one, or none, never a torn one. Locally the
  bytes go to a scratch file in `<root>/_dinoray/tmp/` (so that a kill leaves nothing beside the data),
  are fsynced, and renamed; on object stores a PUT is atomic by itself.
* `put_if_absent` creates the object or says that it is there already, and never replaces it: a hard link
  locally, `If-None-Match: *` on S3. Where a store has neither, it is check-then-put, said once in the log.
* Trouble that may pass is retried (retries.py), and what is left is TransientError, SystemicError or, for what is
  absent, FileNotFoundError: no other OSError leaves a store (storage_errors.py).
* Keys are relative POSIX paths; `safe_join` refuses everything that would leave the root.
"""

from __future__ import annotations

import os

from dinoray.io.local_store import LocalStore
from dinoray.io.remote_store import FsspecStore, filesystem, on_inputs, read_object
from dinoray.io.retries import retried
from dinoray.io.storage_errors import store_errors
from dinoray.io.store_base import TMP_FOLDER, Store, is_local, local_path, safe_join

__all__ = ["TMP_FOLDER", "FsspecStore", "LocalStore", "Store", "filesystem", "is_local", "local_path", "on_inputs", "open_store",
           "read_bytes", "read_versioned", "safe_join"]


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store of an output URL or local path; nothing is created yet. Raises BadRequest for an unknown kind of URL."""
    text = os.fspath(url)
    return LocalStore(text) if is_local(text) else FsspecStore(text)


def read_bytes(uri: str) -> bytes:
    """All bytes of one input file, retried. Raises FileNotFoundError, TransientError, SystemicError."""
    with store_errors(uri):
        if is_local(uri):
            return retried(local_path(uri).read_bytes, uri)
        return retried(lambda: read_versioned(uri)[0], uri)


def read_versioned(uri: str) -> tuple[bytes, str | None]:
    """(all bytes of one remote file, its ETag where the store says it with the bytes): one try, errors as they come."""
    path = filesystem(uri)[1]
    return on_inputs(uri, lambda fs: read_object(fs, path))
