"""A folder as a store: scratch file, fsync, rename; hard links for put-if-absent; typed, retried errors."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import psutil

from dinoray.io.retries import RetriedFile, retried
from dinoray.io.storage_errors import classify, store_errors
from dinoray.io.store_base import TMP_FOLDER, Store, local_path, safe_join

logger = logging.getLogger(__name__)
T = TypeVar("T")
_CHECK_THEN_PUT = threading.Lock()
_WARNED: set[str] = set()


class LocalStore(Store):
    """A folder of the local (or network) file system."""

    has_put_if_absent = True
    """False once the file system turned out to have no hard links."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = local_path(os.fspath(root))
        self.url = str(self.root)
        self._made: set[str] = set()

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.root / safe_join(key)

    def _do(self, call: Callable[[], T], path: Path, *, writing: bool = False) -> T:
        with store_errors(str(path), writing=writing):
            return retried(call, str(path))

    def get(self, key: str) -> bytes:
        path = self.path(key)
        return self._do(path.read_bytes, path)

    def open(self, key: str) -> BinaryIO:
        path = self.path(key)
        return RetriedFile(self._do(lambda: path.open("rb"), path), str(path))  # type: ignore[return-value]

    def put(self, key: str, data: bytes | memoryview) -> None:
        target = self.path(key)

        def once() -> None:
            with self._scratch(data, target.parent) as scratch:
                _place(os.replace, scratch, target)

        self._do(once, target.parent, writing=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self.path(key)

        def once() -> bool:
            if target.exists():
                return False
            with self._scratch(data, target.parent) as scratch:
                try:
                    _place(os.link, scratch, target)
                except FileExistsError:
                    return False
                except OSError as error:  # exFAT, some FUSE and SMB mounts; EPERM is what Linux says there
                    if classify(error) not in ("unsupported", "denied"):
                        raise
                    return self._check_then_put(scratch, target)
            return True

        return self._do(once, target.parent, writing=True)

    def _check_then_put(self, scratch: str, target: Path) -> bool:
        """Without hard links: exact among the threads of this process, not between processes."""
        with _CHECK_THEN_PUT:
            if target.exists():
                return False
            _place(os.replace, scratch, target)
        self.has_put_if_absent = False
        if str(self.root) not in _WARNED:
            _WARNED.add(str(self.root))
            logger.warning("%s is on a file system without hard links: two runs at once on this output would not be locked "
                           "out of each other (docs/storage.md)", self.root)
        return True

    def exists(self, key: str) -> bool:
        path = self.path(key)

        def once() -> bool:
            try:
                return stat.S_ISREG(os.stat(path).st_mode)
            except (FileNotFoundError, NotADirectoryError):
                return False

        return self._do(once, path)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        top = self.root / safe_join(prefix) if prefix else self.root
        pending = [str(top)]
        while pending:
            folder = pending.pop()
            files, folders = self._do(lambda folder=folder: self._entries(folder), Path(folder))
            yield from files
            pending += folders

    def _entries(self, folder: str) -> tuple[list[tuple[str, int]], list[str]]:
        """((key, bytes) of the files of a folder, its sub-folders); nothing of one that is not there."""
        files, folders = [], []
        try:
            entries = os.scandir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed by another process while we list
                    size = entry.stat().st_size
                    files.append((os.path.relpath(entry.path, self.root).replace(os.sep, "/"), size))
        return files, folders

    def delete(self, key: str) -> None:
        path = self.path(key)

        def once() -> None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()

        self._do(once, path, writing=True)

    def sweep(self) -> None:
        """Remove scratch files that killed processes left: of this host when the process is gone, else when a day old."""
        with store_errors(str(self.root / TMP_FOLDER), writing=True):
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
