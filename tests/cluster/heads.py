"""A Ray head of its own for a test: on 127.0.0.1, and ended with its own processes only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import psutil

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def start_head(*, gpus: int = 0, **settings: str) -> Iterator[dict[str, str]]:
    """A head with a job server; yields the environment of its clients. `settings` are added to the environment."""
    dashboard, port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="drh-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", **settings}
        env.pop("RAY_ADDRESS", None)
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2",
             f"--num-gpus={gpus}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
             f"--dashboard-agent-listen-port={free_port()}",  # its default is taken when another Ray runs here
             "--object-store-memory=100000000"],
            env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        address = f"http://127.0.0.1:{dashboard}"
        try:
            _wait_for(address, process)
            yield {**env, "RAY_API_SERVER_ADDRESS": address, "GCS_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            os.killpg(process.pid, signal.SIGKILL)
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def _wait_for(address: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        try:
            with urlopen(f"{address}/api/jobs/", timeout=2) as answer:
                if answer.status == 200:
                    return
        except HTTPError as error:
            if error.code == 401:  # it is up, and asks for a token
                return
        except (URLError, OSError):
            pass
        time.sleep(0.5)
    raise AssertionError("the job server did not answer")
