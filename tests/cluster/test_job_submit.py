"""Jobs as they are used on a cluster: a real head, `ray job submit -- python jobs/extract_images.py ...`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinoray.vision.distance_model import load_segmenter
from tests.checkpoints import run_segment
from tests.cluster.heads import RAY, ROOT, start_head
from tests.runs import check_whole, data_objects, run
from tests.training.toys import disc_job, make_discs, write_job


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A Ray head with a job server on 127.0.0.1."""
    with start_head() as env:
        yield env


def submit(env: dict[str, str], *arguments: str, name: str, script: str = "extract_images",
           config: Path | None = None) -> subprocess.CompletedProcess[str]:
    argv = [RAY, "job", "submit", "--submission-id", name, "--", sys.executable, str(ROOT / f"jobs/{script}.py"),
            str(config or ROOT / f"jobs/configs/{script}.yaml"), *arguments]
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


@pytest.mark.ray
@pytest.mark.slow
def test_ray_job_submit_trains_and_segments(head: dict[str, str], tmp_path: Path) -> None:
    discs, trained = make_discs(tmp_path / "in"), tmp_path / "trained"
    write_job(tmp_path / "job.yaml", disc_job(discs, trained, no_ray=False, workers="2"))
    done = submit(head, "steps=9", name="train", script="train_distance_map", config=tmp_path / "job.yaml")
    assert done.returncode == 0 and "complete: 9 steps" in done.stdout, done.stdout + done.stderr
    assert load_segmenter(str(trained / "checkpoint"))[1].training["steps"] == 9

    out, sources = tmp_path / "masks", f"{discs}/*_img.png"
    job = {"diameter_px": 12.0, "peak": 0.1, "fill": 0.05, "unit_items": 3}
    done = submit(head, f"sources={sources}", f"checkpoint={trained}/checkpoint", f"out={out}", "workers=2",
                  *(f"{k}={v}" for k, v in job.items()), name="segment", script="segment_cells")
    assert done.returncode == 0 and "complete: 8 images" in done.stdout, done.stdout + done.stderr
    check_whole(out)
    run_segment(sources, trained / "checkpoint", tmp_path / "here", **job)
    assert data_objects(tmp_path / "here") == data_objects(out)
