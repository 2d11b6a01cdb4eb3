"""The README's S3 line over real HTTP: s3:// in, s3:// out, resumed, read back (moto's server on 127.0.0.1)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from dinoray import open_features
from tests.runs import data_objects, environment, run


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> Iterator[str]:
    """A bucket that holds the pictures under images/."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
                        "AWS_SECRET_ACCESS_KEY": "secret-that-must-not-leak", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    s3 = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    s3.create_bucket(Bucket="pics")
    for path in sorted(pictures.rglob("*.*")):
        s3.upload_file(str(path), "pics", f"images/{path.relative_to(pictures).as_posix()}")
    yield "pics"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


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
