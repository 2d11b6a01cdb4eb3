"""What a place for outputs can do, found out by trying: `probe_storage(url)`, for `dinoray doctor`.

A store may call itself S3 and ignore `If-None-Match`; a folder may lie on a file server. Nothing here is read off a
name where it can be tried.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from dinoray.errors import DinorayError
from dinoray.io.local_store import LocalStore
from dinoray.io.store_base import TMP_FOLDER, Store
from dinoray.io.stores import open_store

ROUNDS = 5
"""Puts and gets that the medians are taken over."""
SIZE = 65_536
"""Bytes of a probe object."""
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "afs", "9p", "ocfs2", "gfs2", "pvfs", "orangefs",
            "weka", "davfs", "fuse.sshfs", "fuse.s3", "fuse.goofys", "fuse.rclone", "fuse.gcsfuse", "fuse.mount-s3", "fuse.juicefs")


@dataclass(frozen=True)
class StorageFacts:
    """What was seen at `url`. Seconds are medians over ROUNDS objects of SIZE bytes."""

    url: str
    protocol: str
    """`file` for a folder."""
    atomic_put: bool
    """No reader saw a mixture while an object was replaced again and again."""
    put_if_absent: bool
    """An object is created only where there is none, by the store itself; False: check-then-put (docs/storage.md)."""
    read_after_write: bool
    """A second client reads what the first has just put."""
    list_after_write: bool
    """A second client lists what the first has just put, with its size, and no longer what was deleted."""
    put_s: float
    get_s: float
    free_bytes: int | None
    """Of a folder's file system; None for object stores."""
    file_system: str | None
    """Type of a folder's file system (`ext4`, `nfs4`); None for object stores and where the system does not say."""
    network_file_system: bool
    """Whether the folder is on a file server: slower fsync, and clocks that may differ."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def probe_storage(url: str) -> StorageFacts:
    """Write, read, list and remove a few small objects below `<url>/_dinoray/tmp/` and say what was seen.

    Takes about 30 requests. Leaves nothing behind (what a kill leaves is swept by the next run). Raises SystemicError
    where one may not write or read (the message says which credentials were used), TransientError where the store does
    not answer, BadRequest for an unknown kind of URL.
    """
    store, other = open_store(url), open_store(url)
    made = _absent_folders(store)
    prefix = f"{TMP_FOLDER}/{socket.gethostname()}-{os.getpid()}"  # of the form that LocalStore.sweep knows
    keys = [f"{prefix}-{i}-{os.urandom(4).hex()}" for i in range(ROUNDS + 2)]
    try:
        puts, gets, read_back = [], [], True
        for key in keys[:ROUNDS]:
            data = os.urandom(SIZE)
            puts.append(_seconds(lambda key=key, data=data: store.put(key, data)))
            got: list[bytes] = []
            gets.append(_seconds(lambda key=key, got=got: got.append(other.get(key))))
            read_back &= got == [data]
        listed = dict(other.list(TMP_FOLDER))
        list_back = all(listed.get(key) == SIZE for key in keys[:ROUNDS])
        store.delete(keys[0])
        list_back &= keys[0] not in dict(other.list(TMP_FOLDER))
        exclusive = _creates_only_once(store, other, keys[ROUNDS])
        atomic = _never_torn(store, other, keys[ROUNDS + 1])
    finally:
        with contextlib.suppress(DinorayError):  # what went wrong above is what is told; a rest is swept later
            for key in keys:
                store.delete(key)
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                folder.rmdir()
    local = store.root if isinstance(store, LocalStore) else None
    kind = _file_system(local) if local else None
    return StorageFacts(
        url=store.url, protocol="file" if local else url.partition("://")[0], atomic_put=atomic, put_if_absent=exclusive,
        read_after_write=read_back, list_after_write=list_back, put_s=statistics.median(puts), get_s=statistics.median(gets),
        free_bytes=shutil.disk_usage(_existing(local)).free if local else None, file_system=kind,
        network_file_system=bool(kind) and kind.lower().startswith(_NETWORK))


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _creates_only_once(store: Store, other: Store, key: str) -> bool:
    """Whether the store itself refuses the second creation."""
    won = [store.put_if_absent(key, b"first"), other.put_if_absent(key, b"second")]
    able = all(getattr(each, "has_put_if_absent", True) for each in (store, other))
    return able and won == [True, False] and store.get(key) == b"first"


def _never_torn(store: Store, other: Store, key: str) -> bool:
    """Replace an object while another client reads it: only whole values may be seen."""
    values = [bytes([65 + i]) * SIZE for i in range(4)]
    store.put(key, values[0])
    stop = threading.Event()

    def read() -> int:
        torn = 0
        while not stop.is_set():
            torn += other.get(key) not in values
        return torn

    with ThreadPoolExecutor(1, thread_name_prefix="probe") as pool:
        reader = pool.submit(read)
        try:
            for value in values * 2:
                store.put(key, value)
        finally:
            stop.set()
        return reader.result() == 0


def _absent_folders(store: Store) -> list[Path]:
    """The folders that the probe will make, the deepest first."""
    if not isinstance(store, LocalStore):
        return []
    folder, absent = store.root / TMP_FOLDER, []
    while not folder.exists() and folder != folder.parent:
        absent.append(folder)
        folder = folder.parent
    return absent


def _existing(path: Path) -> Path:
    """The deepest folder of a path that is there."""
    while not path.exists():
        path = path.parent
    return path


def _file_system(path: Path) -> str | None:
    """Type of the file system that a path lies on, by the longest mount point above it."""
    real = os.path.realpath(_existing(path))
    mounts = [p for p in psutil.disk_partitions(all=True) if os.path.commonpath([real, p.mountpoint]) == p.mountpoint]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype or None if mounts else None
