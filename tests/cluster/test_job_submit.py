"""The job as it is used on a cluster: a real head, `ray job submit -- python jobs/extract_images.py ...`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import check_whole, data_objects, run

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A Ray head with a job server on 127.0.0.1; ends with its own processes only."""
    dashboard = free_port()
    with tempfile.TemporaryDirectory(prefix="drh-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        env.pop("RAY_ADDRESS", None)
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--num-cpus=2",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
             f"--dashboard-agent-listen-port={free_port()}",  # its default is taken when another Ray runs here
             "--object-store-memory=100000000"],
            env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        address = f"http://127.0.0.1:{dashboard}"
        try:
            wait_for(address, process, env)
            yield {**env, "RAY_API_SERVER_ADDRESS": address}
        finally:
            children = descendants(process.pid)
            os.killpg(process.pid, signal.SIGKILL)
            for pid in children:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()
            process.stdout.close()


def descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def wait_for(address: str, process: subprocess.Popen[str], env: dict[str, str]) -> None:
    from urllib.error import URLError
    from urllib.request import urlopen

    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        try:
            with urlopen(f"{address}/api/jobs/", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("the job server did not answer")


def submit(env: dict[str, str], *arguments: str, name: str) -> subprocess.CompletedProcess[str]:
    argv = [RAY, "job", "submit", "--submission-id", name, "--", sys.executable, str(ROOT / "jobs/extract_images.py"),
            str(ROOT / "jobs/configs/extract_images.yaml"), *arguments]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, cwd="/tmp")
        # the job server answers before its agent has come up: nothing was submitted then
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


@pytest.mark.ray
def test_ray_job_submit_runs_the_same_job(head: dict[str, str], pictures: Path, tmp_path: Path) -> None:
    (pictures / "bad.png").write_bytes(b"bad")
    out = tmp_path / "out"
    job = ["model=vitt16", "weights=random", f"sources={pictures}", "unit_items=3", "workers=2"]
    done = submit(head, *job, f"out={out}", name="first")
    assert done.returncode == 0, done.stdout + done.stderr  # quarantine is no failure of the job
    assert "1 quarantined (1 not_image)" in done.stdout
    status = subprocess.run([RAY, "job", "status", "first"], env=head, capture_output=True, text=True, timeout=60)
    assert "succeeded" in status.stdout
    check_whole(out)
    run(pictures, tmp_path / "here", unit_items=3, channels="each")
    assert data_objects(tmp_path / "here") == data_objects(out)

    strict = submit(head, *job, f"out={out}", "strict=true", name="second")
    assert strict.returncode != 0
    status = subprocess.run([RAY, "job", "status", "second"], env=head, capture_output=True, text=True, timeout=60)
    assert "failed" in status.stdout
