"""The README's S3 line over real HTTP: s3:// in, s3:// out, resumed, read back (moto's server on 127.0.0.1)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
import tifffile

from dinoray import open_features
from tests.conftest import texture
from tests.faults.s3_proxy import NO_OTHER_CREDENTIALS, Proxy, Request, Rule, aws_environment, filled_bucket, moto_server, s3_proxy
from tests.runs import data_objects, environment, run


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> Iterator[str]:
    """A bucket that holds the pictures under images/."""
    with filled_bucket("pics", pictures, "images") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield "pics"


def test_s3_to_s3_equals_local_to_local(bucket: str, pictures: Path, tmp_path: Path) -> None:
    out = f"s3://{bucket}/features"
    features = ("cls", "patch_mean", "patches")
    # per-image scaling: the scaling group of a root folder differs in name only, but ids and uris differ anyway
    first = run(f"s3://{bucket}/images", out, unit_items=4, features=features)
    assert first.exit_code == 0 and first.executed_units == 3
    again = run(f"s3://{bucket}/images", out, unit_items=4, features=features)
    assert again.executed_units == 0
    run(pictures, tmp_path / "local", unit_items=4, features=features)
    remote, local = open_features(out), open_features(str(tmp_path / "local"))
    columns = ["item_id", "channel", "cls", "patch_mean", "p50"]
    a, b = (f.table(columns).sort_by([("item_id", "ascending"), ("channel", "ascending")]) for f in (remote, local))
    assert a.equals(b)
    row = remote.table(["dense_array", "dense_index"]).to_pylist()[0]
    assert remote.dense(row["dense_array"], row["dense_index"]).shape[-1] == 192
    assert all(key.startswith(("features/", "dense/")) for key in data_objects(out))


def test_the_command_line_over_s3_leaks_no_secret(bucket: str) -> None:
    out = f"s3://{bucket}/cli"
    done = subprocess.run(
        [sys.executable, "-m", "dinoray.cli", "extract", "images", f"s3://{bucket}/images/a/*.png", "--out", out,
         "--model", "vitt16", "--weights", "random", "--no-ray"], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    fs = fsspec.filesystem("s3")
    stored = b"".join(fs.cat_file(path) for path in fs.find(f"{bucket}/cli"))
    assert b"secret-that-must-not-leak" not in stored + done.stdout.encode() + done.stderr.encode()
    verified = subprocess.run([sys.executable, "-m", "dinoray.cli", "verify", out, "--deep"], env=environment(),
                              capture_output=True, text=True, timeout=120)
    assert verified.returncode == 0 and "5 images" in verified.stdout, verified.stdout + verified.stderr


def test_a_bucket_that_is_not_there_is_a_bad_request(bucket: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dinoray.cli", "extract", "images", "s3://no-such-bucket/x", "--out", f"s3://{bucket}/o",
         "--model", "vitt16", "--weights", "random", "--no-ray"], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no-such-bucket" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------- storage that fails under the real command
#
# Every run here is the real command line in a process of its own, over HTTP, through a proxy that injects faults.


@pytest.fixture(scope="module")
def behind() -> Iterator[tuple[Proxy, str]]:
    """(proxy, bucket with small images under images/): moto behind the proxy."""
    with moto_server() as upstream, s3_proxy(upstream, seed=11) as proxy, tempfile.TemporaryDirectory() as folder:
        client = boto3.client("s3", endpoint_url=upstream, region_name="us-east-1", aws_access_key_id="x",
                              aws_secret_access_key="x")
        client.create_bucket(Bucket="e2e-lab")
        client.create_bucket(Bucket="e2e-public", ACL="public-read")
        for i in range(12):
            path = Path(folder) / f"{i:02d}.tif"
            tifffile.imwrite(path, texture((48, 64), i, "uint16"), photometric="minisblack")
            client.upload_file(str(path), "e2e-lab", f"images/{path.name}")
            client.upload_file(str(path), "e2e-public", f"images/{path.name}", ExtraArgs={"ACL": "public-read"})
        proxy.client = client  # type: ignore[attr-defined]
        yield proxy, "e2e-lab"


def objects(proxy: Proxy, prefix: str) -> dict[str, bytes]:
    """{key below the prefix: bytes}, read past the proxy."""
    pages = proxy.client.get_paginator("list_objects_v2").paginate(Bucket="e2e-lab", Prefix=f"{prefix}/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key[len(prefix) + 1:]: proxy.client.get_object(Bucket="e2e-lab", Key=key)["Body"].read() for key in keys}


def data_of(found: dict[str, bytes]) -> dict[str, bytes]:
    return {key: data for key, data in found.items() if key.startswith(("features/", "dense/"))}


def receipts_of(found: dict[str, bytes]) -> list[dict]:
    return [json.loads(data) for key, data in found.items() if "/receipts/" in key]


def extract(source: str, out: str, *, env: dict[str, str], flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """The command, in a process of its own."""
    argv = [sys.executable, "-m", "dinoray.cli", "extract", "images", source, "--out", out, "--no-ray", "--model", "vitt16",
            "--weights", "random", "--unit-items", "3", *flags]
    kept = {name: value for name, value in environment().items() if not name.startswith("AWS_")}
    return subprocess.run(argv, env={**kept, **env}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def calm(behind: tuple[Proxy, str]) -> dict[str, bytes]:
    """The output of a run that nothing disturbs. Outputs of one source have the same bytes wherever they lie."""
    proxy, _ = behind
    done = extract("s3://e2e-lab/images", "s3://e2e-lab/calm", env=aws_environment(proxy.url))
    assert done.returncode == 0, done.stdout + done.stderr
    found = objects(proxy, "calm")
    assert all(sum(receipt.get("retries", {}).values()) == 0 for receipt in receipts_of(found))
    return found


def put_of_data(request: Request) -> bool:
    return request.method == "PUT" and "/features/" in request.path


@pytest.fixture(autouse=True)
def _no_rules(request: pytest.FixtureRequest) -> Iterator[None]:
    """Rules of one test do not reach the next."""
    yield
    if "behind" in request.fixturenames:
        request.getfixturevalue("behind")[0].rules = []


def test_flaky_and_throttled_s3_completes_with_the_same_bytes_and_counted_retries(behind, calm) -> None:
    proxy, _ = behind
    proxy.reseed()
    proxy.hits.clear()
    proxy.seen.clear()
    proxy.most_per_path = 2
    proxy.rules = [Rule(fault, share=0.07, seconds=0.02) for fault in
                   ("slow_down", "internal", "reset", "lost_answer", "truncate", "latency")]
    proxy.rules.append(Rule("stall", lambda r: r.method == "GET", share=0.1, seconds=4, most=3))
    # each unit meets one for certain
    proxy.rules.insert(0, Rule("slow_down", put_of_data, most=2))
    env = {**aws_environment(proxy.url), "DINORAY_STORAGE_TIMEOUT_S": "2"}
    done = extract("s3://e2e-lab/images", "s3://e2e-lab/flaky", env=env)
    proxy.rules, proxy.most_per_path = [], None
    assert done.returncode == 0, done.stdout + done.stderr
    found = objects(proxy, "flaky")
    assert data_of(found) == data_of(calm)
    receipts = receipts_of(found)
    kinds = {kind for receipt in receipts for kind in receipt["retries"]}
    # a busy machine adds time-outs of its own
    total = sum(n for receipt in receipts for kind, n in receipt["retries"].items() if kind != "timeout")
    assert kinds <= {"throttled", "server_error", "timeout", "connection", "truncated"}
    assert 2 <= total <= sum(proxy.hits.values()) + 5, (total, proxy.hits)
    assert sum(receipt["quarantined"] for receipt in receipts) == 0


@pytest.mark.parametrize("fault", ["expired", pytest.param("denied", marks=pytest.mark.slow)])
def test_credentials_revoked_midway_stop_the_run_and_it_completes_when_they_are_back(behind, calm, fault: str) -> None:
    proxy, _ = behind
    out = f"s3://e2e-lab/{fault}"
    stored: list[int] = []

    def after_the_first_data(request: Request) -> bool:
        if put_of_data(request):
            stored.append(request.number)
        return len(stored) > 1

    proxy.rules = [Rule(fault, after_the_first_data)]
    done = extract("s3://e2e-lab/images", out, env=aws_environment(proxy.url))
    proxy.rules = []
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SystemicError" in done.stderr and "Traceback" not in done.stderr
    assert "AWS_ACCESS_KEY_ID" in done.stderr and "run the same command again" in done.stderr
    assert "secret-that-must-not-leak" not in done.stdout + done.stderr
    before = objects(proxy, fault)
    assert not [key for key in before if "/quarantine/" in key] and "_SUCCESS" not in before
    done = extract("s3://e2e-lab/images", out, env=aws_environment(proxy.url))
    assert done.returncode == 0, done.stdout + done.stderr
    after = objects(proxy, fault)
    assert data_of(after) == data_of(calm) and "_SUCCESS" in after
    assert {key: data for key, data in after.items() if key in before and "/receipts/" in key} == {
        key: data for key, data in before.items() if "/receipts/" in key}


def test_a_public_bucket_without_any_credentials_to_a_local_folder(behind, tmp_path: Path) -> None:
    proxy, _ = behind
    proxy.seen.clear()
    proxy.rules = [Rule("denied", lambda request: request.signed)]
    anonymous = {"AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1", **NO_OTHER_CREDENTIALS}
    done = extract("s3://e2e-public/images", str(tmp_path / "out"), env=anonymous)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("s3://e2e-public is read anonymously") == 1
    assert proxy.seen and not any(request.signed for request in proxy.seen)
    done = extract("s3://e2e-public/images", "s3://e2e-public/out", env=anonymous)
    assert done.returncode == 1 and "writing to S3 needs credentials" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_public_bucket_that_refuses_our_credentials_and_an_own_one_in_one_run(behind, calm) -> None:
    proxy, _ = behind
    proxy.rules = [Rule("denied", lambda request: request.signed and request.path.startswith("/e2e-public")),
                   Rule("denied", lambda request: not request.signed and not request.path.startswith("/e2e-public"))]
    done = extract("s3://e2e-public/images", "s3://e2e-lab/from_public", env=aws_environment(proxy.url))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(receipts_of(objects(proxy, "from_public"))) == len(receipts_of(calm))


def test_presigned_sources_are_refused_without_repeating_them(tmp_path: Path) -> None:
    url = "https://b.s3.amazonaws.com/a.tif?X-Amz-Credential=AKIA%2Fx&X-Amz-Signature=0badc0de"
    done = extract(url, str(tmp_path / "out"), env={})
    assert done.returncode == 2 and "a URL holds a secret" in done.stderr, done.stderr
    assert "0badc0de" not in done.stdout + done.stderr and not (tmp_path / "out").exists()
