"""The file that a cell of a table names: which texts are paths, and which are traps.

A table may come from anywhere. Its author decides which files of the reader's are opened, so what a cell
can say is kept to plain paths and the URLs of stores: no chained URLs (`zip://..::http://..`, which make
fsspec open and unpack on the way), no other machines' shares, no passwords (they would stand in the output).
"""

from __future__ import annotations

import posixpath
import re
from urllib.parse import unquote

from dinoray.errors import ItemError

_PROTOCOLS = {"file", "local", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "http", "https", "memory"}
_FILE_URL = re.compile(r"file:(?://(?P<host>[^/]*))?(?P<path>/.*)", re.DOTALL | re.IGNORECASE)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_PASSWORD = re.compile(r"(?<=://)[^/@]*:[^/@]*@")


def bad_path(what: str, text: str) -> ItemError:
    """The error of a cell that names no usable file; passwords in it are not repeated."""
    return ItemError("bad_path", f"{what}: {redact(text)[:200]!r}", todo="mend this row of the table")


def redact(text: str) -> str:
    """A URL without its user and password."""
    return _PASSWORD.sub("***@", text)


def from_cell(text: str, folder: str) -> str:
    """The path or URL that a non-empty cell names; relative ones start at `folder`.

    Raises ItemError `bad_path`: NUL, chained URLs and protocols that are no store, a `file://host/` of
    another machine, a password, a Windows path, a relative path that leaves its bucket.
    """
    if "\0" in text:
        raise bad_path("a path with a NUL", text)
    if _WINDOWS.match(text):
        raise bad_path("a Windows path, which this machine cannot open", text)
    url = _FILE_URL.fullmatch(text)
    if url is not None:
        if (url["host"] or "").lower() not in ("", "localhost"):
            raise bad_path("a file of another machine", text)
        if "://" in url["path"]:  # it would be taken for a URL
            raise bad_path("a URL within a URL", text)
        return url["path"]
    if "://" in text:
        protocol = text.split("://", 1)[0].lower()
        if "::" in text or protocol not in _PROTOCOLS:
            raise bad_path("a chained URL, or one of no store", text)
        if _PASSWORD.search(text):
            raise bad_path("a URL with a password (credentials belong into the environment)", text)
        return text
    if text.startswith(("/", "~")):
        return text
    protocol, mark, base = folder.rpartition("://")
    if mark and "::" in text:
        raise bad_path("a name with '::', which would be read as a chained URL", text)
    path = posixpath.normpath(posixpath.join(base, text))
    if mark and path.split("/", 1)[0] != base.split("/", 1)[0]:
        raise bad_path("a relative path that leaves the table's bucket", text)
    return protocol + mark + path


def inside(text: str, *, percent: bool = False) -> str:
    """The text when no part of it is `..`; with `percent` it is unquoted before (file URLs).

    Raises ItemError `bad_path`.
    """
    text = unquote(text) if percent else text
    if ".." in re.split(r"[/\\]", text):
        raise bad_path("a path with '..'", text)
    return text
