"""Reading stored arrays back over every kind of store: parts of shards, errors with the shard's key, threads, retries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.retries import RetryCount, counting
from dinoray.io.stores import LocalStore, Store, open_store
from dinoray.io.volume_arrays import create_arrays, shard_key
from dinoray.io.volume_grid import ArraySpec
from dinoray.io.zarr_reading import box_of, open_array
from tests.faults.s3_proxy import Proxy, Rule, aws_environment, moto_server, s3_proxy
from tests.io.test_volume_arrays import written
from tests.runs import DictStore

SPEC = ArraySpec("xz", (11, 9, 13), 2, "float32", (70.0, 128.0, 128.0), (1.0, 2.0, 3.0), (4, 2, 4), (8, 4, 4))


def filled(store: Store, spec: ArraySpec = SPEC) -> np.ndarray:
    create_arrays(store, [spec], {})
    return written(store, spec)


@pytest.fixture(scope="module")
def s3() -> Iterator[Proxy]:
    with pytest.MonkeyPatch.context() as patch, moto_server() as upstream, s3_proxy(upstream) as proxy:
        for name, value in aws_environment(proxy.url).items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        boto3.client("s3", endpoint_url=upstream).create_bucket(Bucket="volumes")
        yield proxy
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_box_is_what_was_written(data) -> None:
    store = DictStore()
    values = filled(store)
    reader = open_array(store, SPEC)
    ends = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in SPEC.shape]
    box = tuple(slice(*e) for e in ends)
    part = reader.read(*(n for e in ends for n in e))
    assert part.dtype == np.float32 and np.array_equal(part, values[(slice(None), *box)])
    assert np.array_equal(reader[box], part)


@pytest.mark.parametrize("url", ["local", "memory://volumes/read", "s3"])
def test_every_store(request: pytest.FixtureRequest, tmp_path: Path, url: str) -> None:
    if url == "s3":
        request.getfixturevalue("s3")
    store = open_store({"local": str(tmp_path), "s3": "s3://volumes/every"}.get(url, url))
    spec = replace(SPEC, dtype="float16")
    values = filled(store, spec)
    reader = open_array(store, "xz")
    assert (reader.dim, reader.shape, reader.dtype) == (2, SPEC.shape, np.float16)
    assert np.array_equal(reader[...], values)
    assert np.array_equal(reader[5:7, 3, -1], values[:, 5:7, 3, -1])
    store.delete(shard_key(spec, (0, 1, 0)))
    values[:, :8, 4:8, :4] = np.nan
    assert np.array_equal(reader[...], values, equal_nan=True), "an absent shard is NaN"
    store.put("some", b"0123456789")
    for begin, end, expected in ((0, 4, b"0123"), (8, 99, b"89"), (99, 100, b""), (-3, None, b"789"), (-99, None, b"0123456789"),
                                 (4, None, b"456789")):
        assert store.get_range("some", begin, end) == expected
    with pytest.raises(FileNotFoundError):
        store.get_range("none", 0, 1)


def test_one_chunk_costs_one_chunk(s3: Proxy) -> None:
    """A shard of 8 chunks of 1 MB each: its index and one chunk go over the wire, in two requests."""
    store = open_store("s3://volumes/ranges")
    spec = ArraySpec("xy", (8, 16, 16), 256, "float32", (1.0,) * 3, (0.0,) * 3, (4, 16, 16), (8, 16, 16))
    values = filled(store, spec)
    reader = open_array(store, spec)
    s3.seen.clear()
    assert np.array_equal(reader.read(4, 5, 0, 16, 0, 16), values[:, 4:5])
    asked = [r for r in s3.seen if "/c/0/" in r.path]
    assert [r.method for r in asked] == ["GET", "GET"]
    ranges = [r.headers["range"] for r in asked]
    assert ranges[0] == "bytes=-36" and ranges[1].startswith("bytes=")
    low, high = map(int, ranges[1].removeprefix("bytes=").split("-"))
    assert high - low < 1.1 * 2**20


def test_reads_are_retried_and_counted(s3: Proxy, waits: list[float]) -> None:
    store = open_store("s3://volumes/retries")
    values = filled(store)
    reader = open_array(store, "xz")
    count = RetryCount()
    s3.rules.append(Rule("slow_down", lambda r: r.path.endswith("c/0/1/2/3"), most=2))
    s3.rules.append(Rule("truncate", lambda r: r.path.endswith("c/0/1/2/3"), most=1))
    with counting(count):
        assert np.array_equal(reader.read(8, 9, 8, 9, 12, 13), values[:, 8:9, 8:9, 12:])
    s3.rules.clear()
    assert count.as_dict()["throttled"] == 2 and count.total == 3 == len(waits)


def test_aws_says_416_of_an_empty_shard(s3: Proxy) -> None:
    store = open_store("s3://volumes/empty")
    filled(store)
    store.put(shard_key(SPEC, (0, 0, 0)), b"")
    s3.rules.append(Rule("bad_range", lambda r: "range" in r.headers and r.path.endswith("c/0/0/0/0"), most=1))
    with pytest.raises(OutputDamaged, match="ends early"):
        open_array(store, "xz").read(0, 1, 0, 1, 0, 1)
    s3.rules.clear()


def test_threads_share_a_reader(tmp_path: Path) -> None:
    values = filled(LocalStore(tmp_path))
    reader = open_array(LocalStore(tmp_path), "xz")
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: reader.read(0, 11, i % 9, i % 9 + 1, 0, 13), range(64)))
    assert all(np.array_equal(part, values[:, :, i % 9:i % 9 + 1]) for i, part in enumerate(parts))


def damaged(data: bytes, how: str) -> bytes:
    middle = len(data) // 3
    return {"truncated": data[:-7], "half": data[:len(data) // 2], "empty": b"", "index": data[:-20] + b"\0" + data[-19:],
            "chunk": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:], "noise": bytes(range(256)) * 8,
            "headless": data[-100:]}[how]


DAMAGES = ("truncated", "half", "empty", "index", "chunk", "noise", "headless")


@pytest.mark.parametrize("how, kind", [*product(DAMAGES, ("dict", "local")), ("truncated", "s3"), ("empty", "s3")])
def test_a_damaged_shard_is_named(request: pytest.FixtureRequest, tmp_path: Path, how: str, kind: str) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    store = {"dict": DictStore, "local": lambda: LocalStore(tmp_path), "s3": lambda: open_store("s3://volumes/damaged")}[kind]()
    values = filled(store)
    key = shard_key(SPEC, (0, 1, 2))
    store.put(key, damaged(store.get(key), how))
    reader = open_array(store, SPEC)
    assert np.array_equal(reader[:, :4], values[:, :, :4]), "the others are read"
    for box in ((slice(0, 8), slice(4, 8), slice(8, 12)), (slice(0, 11), slice(0, 9), slice(0, 13))):
        with pytest.raises(OutputDamaged) as caught:
            reader[box]
        assert key in caught.value.where and caught.value.todo
    if how != "chunk":  # the flipped bit lies in one chunk alone
        with pytest.raises(OutputDamaged):
            reader[3, 5, 9]


def test_what_is_no_array_of_ours(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(BadRequest, match="no array 'xz'"):
        open_array(store, "xz")
    filled(store)
    with pytest.raises(OutputDamaged, match="plan says otherwise"):
        open_array(store, replace(SPEC, dim=3))
    meta = tmp_path / "dense/xz.zarr/0/zarr.json"
    good = json.loads(meta.read_bytes())
    for broken in (b"{", json.dumps({**good, "data_type": "int32"}).encode(), json.dumps({**good, "shape": [2, 11, 9]}).encode(),
                   json.dumps({**good, "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}).encode()):
        meta.write_bytes(broken)
        with pytest.raises(OutputDamaged, match="metadata|no array that dinoray wrote"):
            open_array(store, "xz")


@pytest.mark.parametrize("box", [(0, 0, 0, 9, 0, 13), (-1, 4, 0, 9, 0, 13), (0, 12, 0, 9, 0, 13), (5, 4, 0, 9, 0, 13)])
def test_a_box_outside_is_an_index_error(box: tuple[int, ...]) -> None:
    store = DictStore()
    filled(store)
    with pytest.raises(IndexError, match="outside"):
        open_array(store, SPEC).read(*box)


@given(data=st.data())
def test_indices_are_numpys(data) -> None:
    shape = (5, 1, 7)
    array = np.arange(35).reshape(shape)
    one = st.integers(-9, 9)
    index = data.draw(st.lists(one | st.builds(slice, st.none() | one, st.none() | one) | st.just(Ellipsis), max_size=3))
    index = tuple(p for i, p in enumerate(index) if p is not Ellipsis or Ellipsis not in index[:i])
    try:
        expected = array[index]
    except IndexError:
        expected = np.empty(0)
    if not expected.size:
        with pytest.raises(IndexError):
            box_of(index, shape)
        return
    start, stop, dropped = box_of(index, shape)
    assert np.array_equal(array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))][dropped], expected)


@pytest.mark.parametrize("index, error", [((1, 1, 1, 1), IndexError), ((..., ...), IndexError), (slice(0, 5, 2), BadRequest),
                                          ("x", BadRequest), (True, BadRequest), ([0, 1], BadRequest),
                                          (slice(4, 0, -1), BadRequest)])
def test_other_indices_are_refused(index, error: type[Exception]) -> None:
    with pytest.raises(error):
        box_of(index, (5, 5, 5))
