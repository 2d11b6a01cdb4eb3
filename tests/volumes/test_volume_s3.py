"""A volume on S3, its features on S3 (moto behind a proxy that injects faults): the bytes of a local run, or a clear stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import fsspec
import pytest

from dinoray.errors import SystemicError
from dinoray.io import retries
from dinoray.io.stores import open_store
from dinoray.units import Plan
from tests.faults.s3_proxy import Proxy, Request, Rule, aws_environment, moto_server, s3_proxy
from tests.runs import data_objects
from tests.volumes.making import SHALLOW, check_volume, make_volume, receipts_of, run_volume, use_backbone


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Path, dict[str, bytes]]]:
    """(proxy, the volume as a local folder, its features computed from there); the volume is s3://vols/v.zarr too."""
    folder = tmp_path_factory.mktemp("s3")
    source = make_volume(folder / "v.zarr", translation_nm=(100, 20, 3))
    with pytest.MonkeyPatch.context() as patch:
        use_backbone(patch, SHALLOW)
        run_volume(source, folder / "out", output="fused")
        local = check_volume(folder / "out")
        patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")  # pages of a listing
        with moto_server() as upstream, s3_proxy(upstream, seed=5) as proxy:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in aws_environment(proxy.url).items():
                patch.setenv(name, value)
            patch.setattr(retries, "FIRST_WAIT_S", 0.001)
            patch.setattr(retries, "LONGEST_WAIT_S", 0.01)
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            client = boto3.client("s3", endpoint_url=upstream)
            client.create_bucket(Bucket="vols")
            for path in source.rglob("*"):
                if path.is_file():
                    client.upload_file(str(path), "vols", f"v.zarr/{path.relative_to(source).as_posix()}")
            yield proxy, source, local
            fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def proxy(served: tuple[Proxy, Path, dict[str, bytes]]) -> Iterator[Proxy]:
    """The proxy without rules, before and after."""
    proxy = served[0]
    proxy.rules, proxy.hits, proxy.most_per_path = [], {}, None
    proxy.reseed()
    yield proxy
    proxy.rules = []


def voxels(request: Request) -> bool:
    """A chunk of the input is read."""
    return request.method == "GET" and "/v.zarr/0/c/" in request.path


def shard_put(request: Request) -> bool:
    return request.method == "PUT" and "/dense/" in request.path and "/c/" in request.path


def run(out: str, **fields: object):
    return run_volume("s3://vols/v.zarr", out, output="fused", **fields)


def test_from_s3_to_s3_gives_the_bytes_of_a_local_run(served, proxy: Proxy) -> None:
    first = run("s3://vols/calm")
    assert first.exit_code == 0 and first.executed_units == first.num_units > 5
    assert check_volume("s3://vols/calm") == served[2]
    assert not any(sum(receipt.retries.values()) for receipt in receipts_of("s3://vols/calm"))
    assert run("s3://vols/calm").executed_units == 0


@pytest.mark.slow
def test_throttled_and_broken_requests_are_repeated_and_counted(served, proxy: Proxy) -> None:
    proxy.most_per_path = 2
    proxy.rules = [Rule("slow_down", shard_put, most=2), Rule("truncate", voxels, most=3),
                   *(Rule(fault, share=0.05) for fault in ("slow_down", "internal", "reset", "lost_answer"))]
    assert run("s3://vols/flaky").exit_code == 0
    assert check_volume("s3://vols/flaky") == served[2]
    receipts = receipts_of("s3://vols/flaky")
    counted = {kind: sum(r.retries.get(kind, 0) for r in receipts) for kind in ("throttled", "truncated")}
    assert counted["throttled"] >= 2 and proxy.hits["truncate"] == 3, (counted, proxy.hits)
    assert sum(receipt.quarantined for receipt in receipts) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "when", "after"), [("reads", voxels, 70), ("writes", shard_put, 2)])
def test_credentials_that_end_midway_stop_the_run_and_quarantine_nothing(served, proxy: Proxy, name: str,
                                                                         when: Callable[[Request], bool], after: int) -> None:
    out, met = f"s3://vols/{name}", []

    def later(request: Request) -> bool:
        met.extend([request] if when(request) else [])
        return len(met) > after

    proxy.rules = [Rule("expired", later)]
    with pytest.raises(SystemicError) as caught:
        run(out)
    proxy.rules = []
    assert "credential" in f"{caught.value.what} {caught.value.todo}".lower()
    store = open_store(out)
    assert not list(store.list("_dinoray/quarantine")) and not store.exists("_SUCCESS")
    assert Plan.exists(store), "it was at work on units"
    shards = [key for key in data_objects(out) if "/c/" in key]
    assert len(shards) < len([key for key in served[2] if "/c/" in key])
    # what it held could not be released, and its process, this one, is alive
    assert run(out, takeover=True).exit_code == 0
    assert check_volume(out) == served[2]
