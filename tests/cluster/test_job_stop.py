"""A run is stopped in mid-run, by `ray job stop` and by `dinoray stop --drain`; the same command resumes it."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dinoray.ledger import Ledger
from dinoray.verification import open_run
from tests.cluster.test_job_submit import ROOT, head, submit  # noqa: F401 (head is a fixture)
from tests.conftest import texture
from tests.runs import check_whole, command, complete, count, data_objects, environment, run

SLOW = {"DINORAY_FAILPOINTS": "item.load=sleep:0.2@*"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(16):
        Image.fromarray(texture((64, 64), i)).save(folder / f"{i:02d}.png")
    (folder / "bad.png").write_bytes(b"bad")
    return folder


def wait(until: Callable[[], bool], failed: Callable[[], str | None] = lambda: None, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not until():
        trouble = failed()
        assert trouble is None, trouble
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def state_of(out: Path) -> tuple[set[str], dict[str, int]]:
    """Units with a receipt, and how often each was started."""
    ledger = Ledger(open_run(str(out))[0])
    return ledger.done(), ledger.attempts()


def check_resumed(images: Path, out: Path, before: tuple[set[str], dict[str, int]], clean: Path) -> None:
    done, attempts = before
    assert 0 < len(done) < len(open_run(str(out))[1]), "stopped in the middle"
    check_whole(out)
    now = state_of(out)[1]
    assert all(now[unit] == attempts[unit] for unit in done), "a unit that had its receipt was started again"
    run(images, clean, unit_items=2, scaling="image")
    assert data_objects(out) == data_objects(clean)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_job_stop_and_the_same_command_again(head: dict[str, str], images: Path, tmp_path: Path) -> None:  # noqa: F811
    from ray.job_submission import JobStatus, JobSubmissionClient

    out = tmp_path / "out"
    job = ["model=vitt16", "weights=random", f"sources={images}", f"out={out}", "unit_items=2", "workers=2", "scaling=image",
           "channels=auto"]
    client = JobSubmissionClient(head["RAY_API_SERVER_ADDRESS"])

    def started() -> bool:  # the job server answers before its agent has come up
        try:
            client.submit_job(entrypoint=shlex.join([sys.executable, f"{ROOT}/jobs/extract_images.py",
                                                     f"{ROOT}/jobs/configs/extract_images.yaml", *job]),
                              submission_id="first", runtime_env={"env_vars": {"DINORAY_FAILPOINTS": "item.load=sleep:1@*"}})
        except RuntimeError as error:
            assert "No available agent" in str(error), error
            return False
        return True

    def ended() -> str | None:
        return client.get_job_logs("first") if client.get_job_status("first").is_terminal() else None

    wait(started)
    wait(lambda: count(out / "_dinoray/receipts") >= 2, ended)
    assert client.stop_job("first")  # what `ray job stop` calls, without the seconds that the command takes to start
    wait(lambda: client.get_job_status("first").is_terminal())
    assert client.get_job_status("first") == JobStatus.STOPPED
    assert "stopped by SIGTERM; resume with: dinoray extract images" in client.get_job_logs("first")
    before = state_of(out)
    again = submit(head, *job, name="second")
    assert again.returncode == 0, again.stdout + again.stderr
    assert client.get_job_status("second") == JobStatus.SUCCEEDED
    last = [line for line in client.get_job_logs("second").splitlines() if line.strip()][-1]
    assert "complete: 17 images" in last and "1 quarantined (1 not_image)" in last
    check_resumed(images, out, before, tmp_path / "clean")


@pytest.mark.parametrize("flags", [("--no-ray",), pytest.param(("--workers", "2"), marks=[pytest.mark.slow, pytest.mark.ray])])
def test_drain_ends_after_the_units_in_work_and_the_same_command_resumes(images: Path, tmp_path: Path,
                                                                         flags: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    argv = command(images, out, "--unit-items", "2", "--scaling", "image", "--decode-threads", "1", *flags)
    with subprocess.Popen(argv, env={**environment(), **SLOW}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        try:
            wait(lambda: count(out / "_dinoray/receipts") >= 1,
                 lambda: None if process.poll() is None else process.stdout.read())
            said = complete([sys.executable, "-m", "dinoray.cli", "stop", str(out), "--drain"])
            printed = process.communicate(timeout=120)[0]
        finally:
            process.kill()
    assert process.returncode == 1, printed
    assert f"asked process {process.pid} on " in said and "stopped" in said
    assert "stopped as asked, after the units that were in work" in printed
    assert f"resume with: dinoray extract images {images}" in printed
    assert not (out / "_dinoray/driver.json").exists()
    before = state_of(out)
    assert before[0] == set(before[1]), "what was begun was finished"
    assert "quarantined" in complete(argv, code=3)
    check_resumed(images, out, before, tmp_path / "clean")
