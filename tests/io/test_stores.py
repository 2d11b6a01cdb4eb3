"""Stores: atomic puts, put-if-absent with exactly one winner, listing, keys that cannot leave the root.

The same contract is checked for local folders, memory:// and S3 (moto's server on this machine).
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import posixpath
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, SystemicError, TransientError
from dinoray.io.retries import RetryCount, counting
from dinoray.io.stores import (
    TMP_FOLDER,
    FsspecStore,
    LocalStore,
    Store,
    is_local,
    local_path,
    open_store,
    read_bytes,
    safe_join,
)

KINDS = ["local", "memory", "s3"]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """moto's S3 on 127.0.0.1 with one empty bucket and dummy credentials in the environment."""
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    values = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
              "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield values["AWS_ENDPOINT_URL"]
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "out")
    if request.param == "memory":
        return open_store(f"memory://{uuid.uuid4().hex}/out")
    request.getfixturevalue("s3_server")
    return open_store(f"s3://bucket/{uuid.uuid4().hex}/out")


# ---------------------------------------------------------------- the contract


def test_what_is_put_is_got(store: Store) -> None:
    values = {"a": b"", "b/c": b"abc", "b/ü 中 %2F.parquet": os.urandom(3000), "b/c.d/e=f": b"x"}
    for key, data in values.items():
        assert not store.exists(key)
        store.put(key, data)
        assert store.exists(key)
    assert {key: store.get(key) for key in values} == values
    assert {key: size for key, size in store.list() if not key.startswith(TMP_FOLDER)} == {
        key: len(data) for key, data in values.items()}
    with store.open("b/c") as file:
        file.seek(-1, os.SEEK_END)
        assert file.read() == b"c"
    store.put("b/c", memoryview(b"replaced")[2:])
    assert store.get("b/c") == b"placed"


def test_absent_objects(store: Store) -> None:
    for key in ("none", "none/at/all"):
        assert not store.exists(key)
        with pytest.raises(FileNotFoundError):
            store.get(key)
        with pytest.raises(FileNotFoundError), store.open(key) as file:
            file.read()
        store.delete(key)
    assert list(store.list()) == []
    assert list(store.list("none/at")) == []


def test_listing_is_of_a_folder_not_of_a_prefix_of_names(store: Store) -> None:
    for key in ("a/x", "a/b/y", "ab/z", "a.txt"):
        store.put(key, b"1")
    assert sorted(key for key, _ in store.list("a")) == ["a/b/y", "a/x"]
    assert sorted(key for key, _ in store.list("a/b")) == ["a/b/y"]
    assert not store.exists("a"), "a folder is not an object"


def test_listing_sees_what_another_process_changed(store: Store) -> None:
    other = open_store(store.url)
    assert list(store.list("r")) == []
    other.put("r/1", b"1")
    assert store.exists("r/1")
    assert sorted(store.list("r")) == [("r/1", 1)]
    other.put("r/1", b"longer")
    other.put("r/2", b"")
    assert sorted(store.list("r")) == [("r/1", 6), ("r/2", 0)]
    assert store.get("r/1") == b"longer"
    other.delete("r/1")
    assert not store.exists("r/1")
    assert sorted(store.list("r")) == [("r/2", 0)]


def test_delete(store: Store) -> None:
    store.put("a/b", b"1")
    store.put("a/c", b"1")
    store.delete("a/b")
    assert [key for key, _ in store.list("a")] == ["a/c"]
    assert store.put_if_absent("a/b", b"2")


def test_put_if_absent_never_replaces(store: Store) -> None:
    assert store.put_if_absent("r/u.json", b"first")
    assert not store.put_if_absent("r/u.json", b"second")
    store.put("r/v.json", b"put")
    assert not store.put_if_absent("r/v.json", b"second")
    assert (store.get("r/u.json"), store.get("r/v.json")) == (b"first", b"put")


def test_exactly_one_thread_wins(store: Store) -> None:
    threads, rounds = 6, 5
    barrier = threading.Barrier(threads)

    def race(number: int) -> list[bool]:
        won = []
        for i in range(rounds):
            barrier.wait()
            won.append(store.put_if_absent(f"race/{i}", f"{number}".encode() * 100))
        return won

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(race, range(threads)))
    for i in range(rounds):
        winners = [number for number, won in enumerate(results) if won[i]]
        assert len(winners) == 1
        assert store.get(f"race/{i}") == f"{winners[0]}".encode() * 100


def race_in_process(url: str, number: int, start: float, won: object) -> None:
    store = open_store(url)
    time.sleep(max(0.0, start - time.time()))
    for i in range(30):
        if store.put_if_absent(f"race/{i}", f"{number}".encode() * 1000):
            won.put((i, number))  # type: ignore[attr-defined]
    won.put(None)  # type: ignore[attr-defined]


def test_exactly_one_process_wins_locally(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=race_in_process, args=(str(tmp_path), n, time.time() + 0.3, queue))
                 for n in range(3)]
    for process in processes:
        process.start()
    winners: dict[int, int] = {}
    ended = 0
    while ended < len(processes):
        entry = queue.get()
        if entry is None:
            ended += 1
            continue
        assert entry[0] not in winners
        winners[entry[0]] = entry[1]
    for process in processes:
        process.join()
    assert set(winners) == set(range(30))
    for i, number in winners.items():
        assert LocalStore(tmp_path).get(f"race/{i}") == f"{number}".encode() * 1000


def test_readers_see_old_or_new_never_torn(store: Store) -> None:
    values = [bytes([65 + i]) * 40_000 for i in range(4)]
    store.put("k", values[0])
    stop = threading.Event()
    torn: list[int] = []

    def read() -> None:
        while not stop.is_set():
            data = store.get("k")
            if data not in values:
                torn.append(len(data))

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for i in range(12):
            store.put("k", values[i % 4])
        stop.set()
        for reader in readers:
            reader.result()
    assert torn == []


def test_keys_that_leave_the_root_are_refused_by_every_method(store: Store) -> None:
    for key in ("../x", "a/../../x", "/etc/passwd", "a//b", "a/", ".", "", "a\0b", "a\\b"):
        for call in (store.get, store.exists, store.delete, store.open, lambda k: store.put(k, b"1"),
                     lambda k: store.put_if_absent(k, b"1"), *([lambda k: list(store.list(k))] if key else [])):
            with pytest.raises(BadRequest):
                call(key)
    assert list(store.list()) == []


# ---------------------------------------------------------------- safe_join

PARTS = st.lists(st.text("ab./\\\0~ é", max_size=6) | st.sampled_from(["..", ".", "/", "a/../b", "...", "a", "~", "-"]),
                 min_size=1, max_size=4)


@settings(deadline=None, max_examples=400)
@given(PARTS)
def test_safe_join_stays_below_the_root_or_refuses(parts: list[str]) -> None:
    try:
        key = safe_join(*parts)
    except BadRequest as error:
        assert "relative names" in error.todo
        names = [name for part in parts for name in part.split("/")]
        assert {"", ".", ".."} & set(names) or any(c in "".join(parts) for c in "\0\\")
        return
    assert key == "/".join(parts)
    root = "/base/out"
    assert posixpath.normpath(posixpath.join(root, key)) == f"{root}/{key}"


# ---------------------------------------------------------------- local folders


def test_a_failed_put_leaves_the_old_object_and_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.put("a/k", b"old")

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(TransientError, match="input/output"):
                store.put("a/k", b"new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        with pytest.raises(TransientError, match="input/output"):
            store.put_if_absent("a/new", b"new")
    assert dict(store.list()) == {"a/k": 3}
    assert store.get("a/k") == b"old"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN])
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "link", "scandir", "stat"])
def test_a_local_hiccup_is_retried_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"1")
    real, left = getattr(os, call), [3]

    def sometimes(*args: object, **kwargs: object):
        if left[0] and str(tmp_path) in str(args[0]) or left[0] and call == "fsync":
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, counting(RetryCount()) as count:
        patch.setattr(os, call, sometimes)
        store.put("a/b", b"new")
        assert store.put_if_absent("a/c", b"2")
        assert store.exists("a/b")
        listed = dict(store.list("a"))
    assert left == [0] and count.total == 3
    assert listed == {"a/b": 3, "a/c": 1} and store.get("a/b") == b"new"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_system_without_hard_links_is_told_once(tmp_path: Path, monkeypatch, caplog, number: int) -> None:
    def no_links(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_links)
    caplog.set_level(logging.WARNING, logger="dinoray.io.local_store")  # Ray, once started in this process, changes levels
    monkeypatch.setattr(logging.getLogger("dinoray.io.local_store"), "disabled", False)
    store = LocalStore(tmp_path / "out")
    assert store.put_if_absent("a", b"first") and not store.put_if_absent("a", b"second")
    assert LocalStore(tmp_path / "out").put_if_absent("b", b"1")
    assert store.get("a") == b"first" and not store.has_put_if_absent
    assert sum("without hard links" in record.message for record in caplog.records) == 1
    assert dict(store.list()) == {"a": 5, "b": 1}
    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(lambda n: store.put_if_absent("raced", b"%d" % n), range(6))) == 1


def test_no_raw_error_leaves_a_local_store(tmp_path: Path) -> None:
    (tmp_path / "out" / "folder").mkdir(parents=True)
    (tmp_path / "out" / "file").write_bytes(b"1")
    store = LocalStore(tmp_path / "out")
    for call in (store.get, store.open):
        with pytest.raises(FileNotFoundError):
            call("folder")
        with pytest.raises(NotADirectoryError):  # how a run learns that its output lies below a file
            call("file/below")
    for put in (store.put, store.put_if_absent):
        with pytest.raises(SystemicError, match="cannot write the output"):
            put("file/below", b"1")
    with pytest.raises(SystemicError, match="cannot write the output"):
        store.put("folder", b"1")
    assert not store.exists("file/below") and list(store.list("file/below")) == []
    store.delete("file/below")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_no_space_and_no_rights_are_systemic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int,
                                             call: str) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"1")

    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(SystemicError) as caught:
            store.put("a/k", b"new")
    assert os.strerror(number) in caught.value.what
    assert "run the same command again" in caught.value.todo
    assert dict(store.list()) == {"a/b": 1}


def test_the_data_is_on_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    LocalStore(tmp_path).put("k", b"1")
    LocalStore(tmp_path).put_if_absent("l", b"1")
    assert calls == ["fsync", "replace", "fsync", "link"]


def test_folders_removed_under_a_running_store_are_made_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "out")
    store.put("features/p/a", b"1")
    shutil.rmtree(tmp_path / "out" / "features")
    store.put("features/p/b", b"2")
    assert store.put_if_absent("features/p/c", b"3")
    shutil.rmtree(tmp_path / "out")
    store.put("features/p/d", b"4")
    assert dict(store.list()) == {"features/p/d": 1}


def test_nothing_is_created_by_looking(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "out")
    store.exists("a")
    assert list(store.list()) == []
    store.delete("a")
    store.sweep()
    assert not (tmp_path / "out").exists()


def test_sweep_removes_what_dead_processes_left(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    folder = tmp_path / TMP_FOLDER
    folder.mkdir(parents=True)
    files = {"dead": f"{host}-{dead.pid}-12-abcd", "alive": f"{host}-{os.getpid()}-12-abcd",
             "other host": "some-other-host-1-12-abcd", "old of other host": "some-other-host-2-12-abcd",
             "no such name": "x"}
    for name in files.values():
        (folder / name).write_bytes(b"1")
    os.utime(folder / files["old of other host"], (1, time.time() - 100_000))
    store.sweep()
    left = {name for name, file in files.items() if (folder / file).exists()}
    assert left == {"alive", "other host", "no such name"}


def test_a_link_to_a_folder_is_not_followed_when_listing(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"1")
    store = LocalStore(tmp_path / "out")
    store.put("features/a", b"1")
    (tmp_path / "out" / "features" / "loop").symlink_to(tmp_path / "out")
    assert "features/a" in dict(store.list())
    assert len(list(store.list("features"))) == 2


# ---------------------------------------------------------------- URLs


@pytest.mark.parametrize(("url", "local"), [
    ("/a/b", True), ("a", True), ("file:///a", True), ("~/x", True), ("C:/x", True), ("s3://b/k", False),
    ("memory://x", False), ("https://h/x", False),
])
def test_is_local(url: str, local: bool) -> None:
    assert is_local(url) is local


def test_local_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("a/../b") == tmp_path / "b"
    assert local_path("file:///x/y") == Path("/x/y")
    assert local_path("~/y") == Path("/home/me/y")
    for path in (tmp_path / "a b ü%20#?", Path("/x\udcff")):  # the last byte is no UTF-8
        assert local_path(path.as_uri()) == local_path(str(path)) == path
    assert local_path("file:///x%00y") == Path("/x%00y")
    assert local_path("local:///x%20y") == Path("/x%20y")
    assert open_store("out").url == str(tmp_path / "out")
    assert isinstance(open_store("memory://x"), FsspecStore)


def test_unknown_protocols_are_bad_requests() -> None:
    url = "nosuchprotocol://x/y"
    with pytest.raises(BadRequest) as caught:
        open_store(url)
    assert caught.value.where == url
    assert caught.value.todo


def test_read_bytes(tmp_path: Path, store: Store) -> None:
    (tmp_path / "ü.bin").write_bytes(b"123")
    assert read_bytes(str(tmp_path / "ü.bin")) == b"123"
    assert read_bytes(f"file://{tmp_path}/ü.bin") == b"123"
    store.put("a/b", b"xyz")
    assert read_bytes(f"{store.url}/a/b") == b"xyz"
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{store.url}/none")


# ---------------------------------------------------------------- S3 alone


def test_no_access_is_systemic(s3_server: str) -> None:
    store = open_store(f"s3://no-such-bucket-{uuid.uuid4().hex}/out")
    for call in (lambda: store.put("k", b"1"), lambda: store.put_if_absent("k", b"1"), lambda: store.get("k"),
                 lambda: list(store.list())):
        with pytest.raises(SystemicError, match="bucket") as caught:
            call()
        assert "bucket's name" in caught.value.todo


def test_denied_credentials_are_systemic(monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    store = open_store("s3://bucket/x")

    def deny(*args: object, **kwargs: object) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(store.fs, "pipe_file", deny)
    for put in (store.put, store.put_if_absent):
        with pytest.raises(SystemicError, match="denied") as caught:
            put("k", b"1")
        assert "credentials" in caught.value.todo
