"""What a store of objects is, and the names in it; the kinds are local_store.py and remote_store.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from dinoray.errors import BadRequest

TMP_FOLDER = "_dinoray/tmp"
"""Where the local store keeps scratch files until they are renamed into place."""


def safe_join(*parts: str) -> str:
    """Join key parts with `/`; refuse absolute parts, `..`, empty names, NUL and backslashes.

    Raises BadRequest, because such a key can only come from outside (a manifest, a plate name).
    """
    names: list[str] = []
    for part in parts:
        if not part or "\0" in part or "\\" in part or part.startswith("/"):
            raise BadRequest(f"not a usable key part: {part!r}", todo="use relative names without '..'")
        names += part.split("/")
    if any(name in ("", ".", "..") for name in names):
        raise BadRequest(f"not a usable key: {'/'.join(parts)!r}", todo="use relative names without '..'")
    return "/".join(names)


def is_local(url: str) -> bool:
    """True for a plain path or a file:// URL."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """The absolute local path of a plain path or file:// URL (links in it are kept as they are).

    %XX stands for a byte in file:// URLs (RFC 8089; `Path.as_uri()` writes them), and for itself everywhere else.
    """
    bare = url.split("://", 1)[1] if "://" in url else url
    if url.startswith("file://"):
        bare = os.fsdecode(unquote_to_bytes(os.fsencode(bare.replace("%00", "%2500"))))  # no file has a NUL in its name
    return Path(os.path.abspath(os.path.expanduser(bare)))


class Store:
    """A folder of objects. Keys are relative POSIX paths; values are bytes."""

    url: str

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError when it is absent."""
        raise NotImplementedError(type(self).__name__)

    def open(self, key: str) -> BinaryIO:
        """The object as a seekable file: for readers that want a part of it. Raises FileNotFoundError."""
        raise NotImplementedError(type(self).__name__)

    def get_range(self, key: str, begin: int, end: int | None = None) -> bytes:
        """Bytes [begin, end) of the object, or its last -begin ones (`begin` < 0, `end` None); fewer where it ends before.

        Raises FileNotFoundError when it is absent.
        """
        with self.open(key) as file:
            size = file.seek(0, 2)
            low, high = (max(0, size + begin), size) if begin < 0 else (begin, size if end is None else min(end, size))
            if low >= high:
                return b""
            file.seek(low)
            return file.read(high - low)

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Create or replace the object, atomically."""
        raise NotImplementedError(type(self).__name__)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the object; False (and nothing changed) when it exists already.

        Where the answer to a try was lost and the object is there at the next one with these very bytes, it is ours: True.
        """
        raise NotImplementedError(type(self).__name__)

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        raise NotImplementedError(type(self).__name__)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of every object below the folder `prefix`, in no particular order."""
        raise NotImplementedError(type(self).__name__)

    def delete(self, key: str) -> None:
        """Remove the object; an absent one is no error."""
        raise NotImplementedError(type(self).__name__)
