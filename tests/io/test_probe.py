"""probe_storage: what is found out by trying, on stores that behave and on stores that do not."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import psutil
import pytest

from dinoray.errors import BadRequest, SystemicError, TransientError
from dinoray.io import probe
from dinoray.io.local_store import LocalStore
from dinoray.io.probe import probe_storage
from dinoray.io.stores import FsspecStore


def test_a_local_folder(tmp_path: Path) -> None:
    facts = probe_storage(str(tmp_path))
    assert facts.protocol == "file" and facts.url == str(tmp_path)
    assert facts.atomic_put and facts.put_if_absent and facts.read_after_write and facts.list_after_write
    assert 0 < facts.put_s < 10 and 0 < facts.get_s < 10
    assert facts.free_bytes == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.1)
    assert facts.file_system and facts.as_dict()["put_if_absent"] is True
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_folders_that_were_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    probe_storage(str(tmp_path / "a" / "b" / "out"))
    assert not list((tmp_path / "a").iterdir())


def test_a_store_of_objects() -> None:
    url = f"memory://{uuid.uuid4().hex}/out"
    facts = probe_storage(url)
    assert (facts.protocol, facts.free_bytes, facts.file_system, facts.network_file_system) == ("memory", None, None, False)
    assert facts.atomic_put and facts.put_if_absent and facts.read_after_write and facts.list_after_write
    assert not list(FsspecStore(url).list())


def test_stores_that_do_not_behave_are_seen_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(self: LocalStore, key: str, data: bytes) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start in range(0, len(data), 1024):
                file.write(data[start:start + 1024])
                file.flush()

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", torn)
        facts = probe_storage(str(tmp_path))
        assert not facts.atomic_put and facts.read_after_write
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put_if_absent", lambda self, key, data: self.put(key, data) or True)
        facts = probe_storage(str(tmp_path))
        assert facts.atomic_put and not facts.put_if_absent
    real = LocalStore.list
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "list", lambda self, prefix="": list(real(self, prefix))[1:])
        assert not probe_storage(str(tmp_path)).list_after_write
    stale: dict[str, bytes] = {}
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "get", lambda self, key: stale.setdefault("old", b"old"))
        assert not probe_storage(str(tmp_path)).read_after_write
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "network"), [("nfs4", True), ("cifs", True), ("lustre", True), ("fuse.s3fs", True),
                                               ("ext4", False), ("fuse", False), ("", False)])
def test_file_servers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, network: bool) -> None:
    part = type(psutil.disk_partitions(all=True)[0])
    mounts = [part("a", "/", "overlay", ""), part("b", str(tmp_path), kind, ""), part("c", str(tmp_path) + "x", "nfs", "")]
    monkeypatch.setattr(probe.psutil, "disk_partitions", lambda all: mounts)
    facts = probe_storage(str(tmp_path / "out"))
    assert (facts.file_system, facts.network_file_system) == (kind or None, network)


def test_trouble_is_told_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest):
        probe_storage("nosuchprotocol://x")
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(SystemicError, match="cannot write the output"):
        probe_storage(str(tmp_path / "file"))

    def slow(*args: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(TransientError):
        probe_storage(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
