"""One way to address local folders, `s3://...`, `memory://...`: the only code that puts objects.

Guarantees, relied on by the ledger:

* `put` is atomic: a reader sees the old object, the new one, or none, never a torn one. Locally the
  bytes go to a scratch file in `<root>/_dinoray/tmp/` (so that a kill leaves nothing beside the data),
  are fsynced, and renamed; on object stores a PUT is atomic by itself.
* `put_if_absent` creates the object or says that it is there already, and never replaces it: a hard link
  locally, `If-None-Match: *` on S3.
* Keys are relative POSIX paths; `safe_join` refuses everything that would leave the root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import psutil
from fsspec.core import url_to_fs

from dinoray.errors import BadRequest, SystemicError

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
    """The absolute local path of a plain path or file:// URL (links in it are kept as they are)."""
    bare = url.split("://", 1)[1] if "://" in url else url
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

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Create or replace the object, atomically."""
        raise NotImplementedError(type(self).__name__)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the object; False (and nothing changed) when it exists already."""
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


class LocalStore(Store):
    """A folder of the local (or network) file system."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = local_path(os.fspath(root))
        self.url = str(self.root)
        self._made: set[str] = set()

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.root / safe_join(key)

    def get(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def open(self, key: str) -> BinaryIO:
        return self.path(key).open("rb")

    def put(self, key: str, data: bytes | memoryview) -> None:
        target = self.path(key)
        with self._scratch(data, target.parent) as scratch:
            _place(os.replace, scratch, target)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self.path(key)
        if target.exists():
            return False
        with self._scratch(data, target.parent) as scratch:
            try:
                _place(os.link, scratch, target)
            except FileExistsError:
                return False
        return True

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        top = self.root / safe_join(prefix) if prefix else self.root
        pending = [str(top)]
        while pending:
            folder = pending.pop()
            try:
                entries = os.scandir(folder)
            except (FileNotFoundError, NotADirectoryError):
                continue
            with entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                        continue
                    with contextlib.suppress(FileNotFoundError):  # removed by another process while we list
                        size = entry.stat().st_size
                        yield os.path.relpath(entry.path, self.root).replace(os.sep, "/"), size

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove scratch files that killed processes left: of this host when the process is gone, else when a day old."""
        try:
            entries = list(os.scandir(self.root / TMP_FOLDER))
        except FileNotFoundError:
            return
        for entry in entries:
            host, _, rest = entry.name.rpartition("-")[0].rpartition("-")[0].rpartition("-")
            mine = host == socket.gethostname() and rest.isdigit()
            with contextlib.suppress(FileNotFoundError):
                if not psutil.pid_exists(int(rest)) if mine else time.time() - entry.stat().st_mtime > 86_400:
                    os.unlink(entry.path)

    @contextlib.contextmanager
    def _scratch(self, data: bytes | memoryview, folder: Path) -> Iterator[str]:
        """A complete, fsynced scratch file that is removed afterwards unless it was renamed away."""
        name = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}-{os.urandom(4).hex()}"
        scratch = self.root / TMP_FOLDER / name
        try:
            for needed in (scratch.parent, folder):
                if str(needed) not in self._made:
                    needed.mkdir(parents=True, exist_ok=True)
                    self._made.add(str(needed))
            try:
                descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileNotFoundError:  # the folder was removed since we made it
                self._made.clear()
                folder.mkdir(parents=True, exist_ok=True)
                scratch.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield str(scratch)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
                               errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR):
                raise SystemicError(
                    f"cannot write the output: {error.strerror}", where=str(folder),
                    todo="free space or mend the permissions, then run the same command again: it resumes",
                ) from error
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch)


def _place(move: Callable[[str, Path], None], scratch: str, target: Path) -> None:
    """Rename or link a scratch file to its name; makes its folder again if that was removed meanwhile."""
    try:
        move(scratch, target)
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        move(scratch, target)


class FsspecStore(Store):
    """Any other URL that fsspec knows: `s3://bucket/prefix` (extra `s3`), `memory://x`, `gs://...`."""

    def __init__(self, url: str):
        self.fs, self.prefix = filesystem(url)
        self.prefix = self.prefix.rstrip("/")
        self.url = url.rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self.prefix}/{safe_join(key)}"

    def get(self, key: str) -> bytes:
        return self.fs.cat_file(self._path(key))

    def open(self, key: str) -> BinaryIO:
        return self.fs.open(self._path(key), "rb")

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._pipe(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        try:
            self._pipe(key, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:  # s3fs maps 412 Precondition Failed / 409 Conflict to plain OSErrors
            if self.exists(key):
                return False
            raise SystemicError(f"cannot write the output: {error}", where=f"{self.url}/{key}") from error
        return True

    def _pipe(self, key: str, data: bytes | memoryview, **kwargs: Any) -> None:
        try:
            self.fs.pipe_file(self._path(key), bytes(data), **kwargs)
        except (PermissionError, FileNotFoundError) as error:
            raise SystemicError(
                f"cannot write the output: {error}", where=f"{self.url}/{key}",
                todo="check the bucket's name, the credentials and the bucket's policy, then run the same command again",
            ) from error

    def exists(self, key: str) -> bool:
        # not fs.exists: its listing cache may be older than another process's put
        self.fs.invalidate_cache(self._path(key))
        return self.fs.isfile(self._path(key))

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        top = f"{self.prefix}/{safe_join(prefix)}" if prefix else self.prefix
        self.fs.invalidate_cache()
        cut = len(self.fs._strip_protocol(self.prefix)) + 1
        found = self.fs.find(top, detail=True)
        for path, info in found.items():
            if info["type"] == "file":
                yield path[cut:], info["size"]

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(key))


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of a URL and the path in it; a missing driver is said in plain words.

    Instances are cached by fsspec. Credentials come from the environment, as for every S3 client.
    Raises BadRequest for an unknown protocol or a driver that is not installed.
    """
    protocol = url.split("://", 1)[0] if "://" in url else "file"
    options: dict[str, Any] = {"use_listings_cache": False} if protocol in ("s3", "s3a") else {}
    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        raise BadRequest(f"reading {protocol}:// needs another package: {error}", where=url,
                         todo="pip install s3fs for S3, or the package named above") from error
    except ValueError as error:
        raise BadRequest(f"unknown kind of URL: {error}", where=url,
                         todo="use a local path, s3://, gs://, or another protocol of fsspec") from error


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store of an output URL or local path; nothing is created yet."""
    text = os.fspath(url)
    return LocalStore(text) if is_local(text) else FsspecStore(text)


def read_bytes(uri: str) -> bytes:
    """All bytes of one input file. Raises FileNotFoundError, PermissionError, OSError as they come."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    fs, path = filesystem(uri)
    return fs.cat_file(path)
