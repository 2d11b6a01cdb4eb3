"""Volumes on S3 over real HTTP (moto behind a proxy that injects faults): same voxels, counted retries, parts of shards."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest

from dinoray.errors import BadRequest, DinorayError, ItemError, SystemicError, TransientError
from dinoray.io import s3
from dinoray.io.retries import RetryCount, counting
from dinoray.io.volumes import VolumeRequest, open_volume
from tests.faults.s3_proxy import Proxy, Rule, aws_environment, moto_server, s3_proxy
from tests.io.test_volumes import FORMATS
from tests.io.volume_files import voxels, write_array

ON_S3 = ["ome-0.4", "ome-0.5-sharded", "zarr-3", "n5-gzip", "n5-blosc", "hdf5", "hdf5-chunks", "tiff", "tiff-zlib", "png"]


@pytest.fixture(scope="module")
def served() -> Iterator[Proxy]:
    with pytest.MonkeyPatch.context() as patch, moto_server() as upstream, s3_proxy(upstream) as running:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in aws_environment(running.url).items():
            patch.setenv(name, value)
        running.client = boto3.client("s3", endpoint_url=upstream)  # type: ignore[attr-defined]
        yield running


@pytest.fixture
def proxy(served: Proxy) -> Proxy:
    for memory in (s3._public, s3._told):
        memory.clear()
    served.rules, served.hits, served.most_per_path = [], {}, None
    served.reseed()
    served.bucket = f"b{uuid.uuid4().hex}"  # type: ignore[attr-defined]
    served.client.create_bucket(Bucket=served.bucket)  # type: ignore[attr-defined]
    served.seen.clear()
    return served


def uploaded(proxy: Proxy, path: str, top: Path) -> str:
    """The s3:// address of what lies at a local path below `top`, after its upload."""
    for file in sorted(p for p in top.rglob("*") if p.is_file()):
        proxy.client.upload_file(str(file), proxy.bucket, file.relative_to(top).as_posix())  # type: ignore[attr-defined]
    return f"s3://{proxy.bucket}/{Path(path).relative_to(top).as_posix()}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ON_S3)
def test_the_same_voxels_as_locally(name: str, proxy: Proxy, tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    data = voxels(dtype=dtype)
    local = write(tmp_path, data)
    request = replace(local, uri=uploaded(proxy, local.uri, tmp_path))
    with open_volume(request) as volume, open_volume(local) as other:
        assert volume.shape == other.shape and volume.voxel_size_nm == other.voxel_size_nm and volume.chunks == other.chunks
        assert volume.ref.uri == request.uri and volume.ref.size == other.ref.size and volume.ref.version != other.ref.version
        np.testing.assert_array_equal(volume.read(slice(0, 23), slice(0, 37), slice(0, 41)), data)
        np.testing.assert_array_equal(volume.read(np.array([1, 20]), slice(3, 4), slice(0, 41)), data[[1, 20], 3:4])
        assert open_volume(request).ref == volume.ref


@pytest.mark.parametrize(("name", "fault", "kind"), [
    *((name, "slow_down", "throttled") for name in ("ome-0.4", "ome-0.5-sharded", "n5-gzip", "hdf5-chunks", "png")),
    ("ome-0.5-sharded", "reset", "connection"), ("hdf5-chunks", "reset", "connection")])
def test_trouble_that_passes_is_retried_and_counted(name: str, fault: str, kind: str, proxy: Proxy, tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    data = voxels(dtype=dtype)
    local = write(tmp_path, data)
    request = replace(local, uri=uploaded(proxy, local.uri, tmp_path))
    proxy.rules = [Rule(fault, most=2)]
    with counting(RetryCount()) as count:
        volume = open_volume(request)
    assert count.as_dict()[kind] == count.total == 2
    proxy.rules = [Rule(fault, most=3)]
    with counting(RetryCount()) as count:
        np.testing.assert_array_equal(volume.read(slice(0, 23), slice(0, 37), slice(0, 41)), data)
    assert count.as_dict()[kind] == count.total == 3  # of the threads that fetch too
    volume.close()


@pytest.mark.parametrize(("name", "fault", "expected"), [
    *((name, "internal", TransientError) for name in ("ome-0.4", "n5-gzip", "hdf5-chunks", "png")),
    ("ome-0.5-sharded", "denied", SystemicError), ("hdf5-chunks", "denied", SystemicError)]
)
def test_trouble_that_stays_has_its_class(name: str, fault: str, expected: type[DinorayError], proxy: Proxy,
                                          tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    local = write(tmp_path, voxels(dtype=dtype))
    request = replace(local, uri=uploaded(proxy, local.uri, tmp_path))
    with open_volume(request) as volume:
        proxy.rules = [Rule(fault)]
        with pytest.raises(expected):
            volume.read(slice(0, 23), slice(0, 37), slice(0, 41))
        with pytest.raises(BadRequest if fault == "denied" else TransientError):
            open_volume(request)
        proxy.rules = []
        assert volume.read(slice(0, 23), slice(0, 37), slice(0, 41)).shape == (23, 37, 41)  # and it goes on when it passed


@pytest.mark.parametrize("name", ["ome-0.4", "ome-0.5-sharded", "hdf5-chunks", "png"])
def test_a_volume_that_was_replaced_is_changed(name: str, proxy: Proxy, tmp_path: Path) -> None:
    write, dtype = FORMATS[name]
    (tmp_path / "a").mkdir()
    local = write(tmp_path / "a", voxels(dtype=dtype))
    request = replace(local, uri=uploaded(proxy, local.uri, tmp_path / "a"))
    with open_volume(request) as volume:
        (tmp_path / "b").mkdir()
        uploaded(proxy, write(tmp_path / "b", voxels(dtype=dtype, seed=1)).uri, tmp_path / "b")
        assert open_volume(request).ref != volume.ref
        with pytest.raises(ItemError) as caught:
            volume.read(slice(0, 23), slice(0, 37), slice(0, 41))
        assert caught.value.reason == "changed"


def test_of_a_shard_only_the_chunks_are_read_that_are_asked_for(proxy: Proxy, tmp_path: Path) -> None:
    data = voxels((64, 64, 64), "uint8")
    path = write_array(tmp_path / "a.zarr", data, 3, chunks=(16, 16, 16), shards=(64, 64, 64), compressors=None)
    with open_volume(VolumeRequest(uploaded(proxy, str(path), tmp_path), raw_voxel_nm=1)) as volume:
        proxy.seen.clear()
        np.testing.assert_array_equal(volume.read(slice(3, 4), slice(0, 64), slice(16, 48)), data[3:4, :, 16:48])
        gets = [request.headers["range"] for request in proxy.seen if request.method == "GET"]
        sizes = [int(stop) - int(start) + 1 for start, stop in (r.removeprefix("bytes=").split("-") for r in gets)]
        assert sizes.count(16**3) == 8 and sum(sizes) < 8 * 16**3 + 8 * (16 * 64 + 4) + 1  # and the index


@pytest.mark.parametrize("path", ["no.zarr", "no.n5", "no.h5", "no.tif", "folder", "*.png"])
def test_nothing_there(path: str, proxy: Proxy) -> None:
    with pytest.raises(BadRequest):
        open_volume(VolumeRequest(f"s3://{proxy.bucket}/{path}", raw_voxel_nm=1))  # type: ignore[attr-defined]
