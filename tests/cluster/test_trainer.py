"""Trainings on Ray Train: real groups of two gloo workers, killed, failing, elastic; the shape of workers; whose error is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dinoray.cluster.trainer import first_cause, ray_storage
from dinoray.cluster.worker_shape import WorkerShape, fitted
from dinoray.config import TrainDistanceMapJob
from dinoray.errors import BadRequest, SystemicError
from dinoray.io.stores import LocalStore
from dinoray.train import train_distance_map
from dinoray.training.standing import read_progress
from tests.runs import complete, environment
from tests.training.toys import assert_same_training, disc_job, last_state, make_discs, write_job

CPU8 = {"CPU": 8.0}


@pytest.mark.parametrize(("low", "high", "nodes", "grows", "expected"), [
    (2, 2, [CPU8], False, (2, 2, 4, 0)),
    (2, 2, [{"CPU": 2.0}], False, (2, 2, 1, 0)),
    (3, 3, [CPU8], False, (3, 3, 2, 0)),
    (2, 2, [CPU8] * 4, False, (2, 2, 8, 0)),  # a worker is on one node, however many there are
    (3, 3, [{"CPU": 8.0}, {"CPU": 3.0}], False, (3, 3, 3, 0)),
    (1, 4, [{"CPU": 2.0}], False, (1, 4, 1, 0)),  # elastic: two start
    (1, 4, [CPU8], True, (1, 4, 8, 0)),  # more workers mean more nodes
    (2, 2, [{"CPU": 0.0}], True, (2, 2, 1, 0)),
])
def test_shape_of_workers_on_cpu(low: int, high: int, nodes: list, grows: bool, expected: tuple) -> None:
    assert fitted(low, high, nodes, on_cuda=False, data_threads=2, grows=grows) == WorkerShape(*expected)


@pytest.mark.parametrize(("nodes", "threads", "cpus"), [
    ([{"CPU": 16.0, "GPU": 2.0}], 4, 5), ([{"CPU": 4.0, "GPU": 2.0}], 4, 2), ([{"CPU": 1.0, "GPU": 2.0}], 4, 1),
    ([CPU8, {"CPU": 8.0, "GPU": 4.0}], 1, 2)])
def test_shape_of_workers_on_cuda(nodes: list, threads: int, cpus: int) -> None:
    shape = fitted(2, 2, nodes, on_cuda=True, data_threads=threads, grows=False)
    assert shape == WorkerShape(2, 2, cpus, 1)
    scaling = shape.scaling()
    assert (scaling.num_workers, scaling.use_gpu, scaling.resources_per_worker) == (2, True, {"CPU": cpus, "GPU": 1})
    assert WorkerShape(1, 4, 2, 0).scaling().num_workers == (1, 4)
    assert str(WorkerShape(2, 4, 3, 1)) == "2 workers of 3 CPUs and 1 GPU each"


def test_workers_that_can_never_fit_are_refused() -> None:
    with pytest.raises(BadRequest, match="3 workers of one CPU each do not fit 2 CPUs"):
        fitted(3, 3, [{"CPU": 2.0}], on_cuda=False, data_threads=1, grows=False)
    with pytest.raises(BadRequest, match="do not fit 0 GPUs"):
        fitted(1, 1, [CPU8], on_cuda=True, data_threads=1, grows=False)
    assert fitted(3, 3, [{"CPU": 2.0}], on_cuda=False, data_threads=1, grows=True).num_cpus == 1


def test_the_error_that_began_it_is_told_not_the_broken_connections() -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1")
    ours, other = SystemicError("no space"), ValueError("x")
    assert first_cause({0: gloo, 1: ours}) is ours
    assert first_cause({0: gloo, 1: other}) is other
    assert first_cause({1: other, 0: ours}) is ours
    assert first_cause({0: gloo}) is gloo


def test_ray_keeps_its_notes_below_the_output() -> None:
    assert ray_storage("/data/out") == {"storage_path": "/data/out/_dinoray/ray"}
    memory = ray_storage("memory://bucket/out")
    assert memory["storage_path"].endswith("bucket/out/_dinoray/ray")
    memory["storage_filesystem"].create_dir("bucket/out/_dinoray/ray")


def job(images: Path, out: Path, **fields: Any) -> dict[str, Any]:
    return disc_job(images, out, no_ray=False, workers="2", **fields)


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    return make_discs(tmp_path / "in")


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_equal_one_and_a_killed_one_is_replaced(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    printed = complete(write_job(tmp_path / "a.yaml", job(discs, tmp_path / "two")))
    assert read_progress(LocalStore(str(tmp_path / "two")))["workers"] == 2, "as many as asked for really ran"
    assert not [line for line in printed.splitlines() if "pid=" in line or "Traceback" in line or "WARNING" in line], printed
    complete(write_job(tmp_path / "b.yaml", disc_job(discs, tmp_path / "one")))
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")]
    assert len(histories[0]) == len(histories[1]) == 8 + 3
    for a, b in zip(*histories, strict=True):
        for name in a.keys() & {"loss", "val_loss"}:
            assert abs(a[name] - b[name]) <= 1e-4 * abs(a[name]), (a, b)

    once = tmp_path / "once"
    once.mkdir()
    argv = write_job(tmp_path / "k.yaml", job(discs, tmp_path / "killed"))
    env = {**environment(), "DINORAY_FAILPOINTS": "train.step=kill@5", "DINORAY_FAILPOINT_DIR": str(once)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(once.iterdir()), "one worker was killed"
    again = [line for line in done.stdout.splitlines() if "going on from step" in line]
    assert len(again) == 1 and again[0].startswith("a worker failed (") and again[0].endswith("from step 3, restart 1 of 3"), again
    assert read_progress(LocalStore(str(tmp_path / "killed")))["starts"] == 2
    assert_same_training(tmp_path / "two", tmp_path / "killed")


@pytest.mark.ray
@pytest.mark.slow
def test_what_trying_again_cannot_mend_ends_it_at_once(discs: Path, tmp_path: Path, local_ray: None) -> None:
    began = time.monotonic()
    with pytest.raises(SystemicError, match="^the (loss of a step|gradient's norm) is ") as caught:
        train_distance_map(TrainDistanceMapJob(**job(discs, tmp_path / "out", learning_rate=1e30, max_restarts=-1)),
                           say=lambda line: None)
    assert "lower learning_rate" in str(caught.value) and "Traceback" not in str(caught.value)
    assert time.monotonic() - began < 200
    with pytest.raises(BadRequest, match="5 workers of one CPU each do not fit 2 CPUs"):
        train_distance_map(TrainDistanceMapJob(**job(discs, tmp_path / "many") | {"workers": "5"}), say=lambda line: None)


@pytest.mark.ray
@pytest.mark.slow
def test_more_failures_than_allowed_end_with_the_workers_own_words(discs: Path, tmp_path: Path) -> None:
    argv = write_job(tmp_path / "f.yaml", job(discs, tmp_path / "out", max_restarts=1))
    done = subprocess.run(argv, env={**environment(), "DINORAY_FAILPOINTS": "train.step=raise@*"}, capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 1
    assert "SystemicError: the workers failed 2 times, the last time with: OSError: [Errno 5] failpoint train.step" in done.stderr
    assert "Traceback" not in done.stderr and "same command again" in done.stderr
    assert "complete: 8 steps" in complete(argv), "the cause mended, it goes on"


@pytest.mark.ray
@pytest.mark.slow
def test_an_elastic_group_starts_with_what_is_there(discs: Path, tmp_path: Path) -> None:
    values = job(discs, tmp_path / "out") | {"workers": "1,4"}
    assert "complete: 8 steps" in complete(write_job(tmp_path / "e.yaml", values))
    there = read_progress(LocalStore(str(tmp_path / "out")))["workers"]
    assert there == min(4, os.cpu_count() or 1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("how", ["drain", "SIGKILL"])
def test_ended_from_outside_it_leaves_no_worker_and_resumes(how: str, discs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = write_job(tmp_path / "s.yaml", job(discs, out, steps=2000, checkpoint_every=2, validate_every=1000))
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 240
        while not (out / "_dinoray/states/last.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.05)
        # Ray's own agents notice a minute later that they are alone, and end too
        workers = [child for child in psutil.Process(process.pid).children(recursive=True)
                   if " ".join(child.cmdline()).startswith(("ray::RayTrainWorker", "ray::TrainController"))]
        assert len(workers) == 3
        if how == "drain":
            assert "stopped" in complete([*argv[:3], "stop", str(out), "--drain"])
        else:
            process.send_signal(signal.Signals[how])
        printed = process.communicate(timeout=120)[0]
    assert process.returncode == (-9 if how == "SIGKILL" else 1), printed
    if how == "drain":
        assert "asked to stop: a state is saved, then the training ends" in printed
        assert "Stopped: training stopped at step" in printed
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, [child.cmdline() for child in alive]
    step = last_state(out)["progress"]["step"]
    values = job(discs, out, steps=2000, checkpoint_every=2, validate_every=1000) | {"no_ray": True, "stop_after_s": 1}
    done = subprocess.run(write_job(tmp_path / "r.yaml", values), env=environment(), capture_output=True, text=True, timeout=240)
    going_on = re.search(r"going on from step (\d+)", done.stdout)
    assert done.returncode == 1 and going_on is not None, done.stdout + done.stderr
    assert int(going_on[1]) == step, printed + done.stdout + done.stderr
    assert "Stopped: training stopped at step" in done.stderr
    assert last_state(out)["progress"]["step"] > step
