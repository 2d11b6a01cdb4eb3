"""Same plan, same bytes: however often, with however many actors, killed or not, in float32 and bfloat16."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoray.ledger import Ledger
from dinoray.verification import open_run
from tests.conftest import texture
from tests.runs import (
    ALL_FEATURES,
    check_whole,
    command,
    complete,
    count,
    data_objects,
    environment,
    run,
    start_and_kill,
)

PRECISIONS = ("float32", "bfloat16")
FLAGS = ("--features", "cls,patch_mean,patches", "--unit-items", "2")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Enough pictures of 128 px that a run lasts long enough to be killed in the middle."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(31):
        Image.fromarray(texture((128, 128 + 16 * (i % 3)), i)).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_twice_and_with_other_thread_counts(pictures: Path, tmp_path: Path, precision: str) -> None:
    outs = []
    for i, threads in enumerate([(1, 1), (4, 2), (3, 5)]):
        outs.append(tmp_path / f"out{i}")
        run(pictures, outs[-1], precision=precision, features=ALL_FEATURES, unit_items=4, token_budget=64,
            decode_threads=threads[0], compute_threads=threads[1])
        check_whole(outs[-1])
    first = data_objects(outs[0])
    assert len(first) > 6
    assert data_objects(outs[1]) == first == data_objects(outs[2])


@pytest.mark.ray
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_actor_two_actors_and_no_ray(many: Path, tmp_path: Path, local_ray: None, precision: str) -> None:
    job = {"precision": precision, "features": ALL_FEATURES, "unit_items": 2, "token_budget": 200}
    run(many, tmp_path / "local", **job)
    expected = data_objects(tmp_path / "local")
    for workers in (1, 2):
        out = tmp_path / f"ray{workers}"
        run(many, out, no_ray=False, workers=str(workers), **job)
        check_whole(out)
        assert data_objects(out) == expected
        store, plan, ledger = open_run(str(out))
        pids = {receipt.worker["pid"] for receipt in ledger.receipts(plan.unit_ids)}
        assert len(pids) == workers, "the asked number of actors must really have run"
        assert os.getpid() not in pids


@pytest.mark.parametrize("precision", PRECISIONS)
def test_driver_killed_without_ray(many: Path, tmp_path: Path, precision: str) -> None:
    clean, out = tmp_path / "clean", tmp_path / "out"
    flags = (*FLAGS, "--precision", precision, "--no-ray")
    complete(command(many, clean, *flags))
    receipts = out / "_dinoray/receipts"
    for moment in (1, 5):
        start_and_kill(command(many, out, *flags), lambda moment=moment: count(receipts) >= moment)
    done_before = {path.stem for path in receipts.iterdir()}
    attempts_before = Ledger(open_run(str(out))[0]).attempts()
    assert 5 <= len(done_before) < 16
    complete(command(many, out, *flags))
    check_whole(out)
    assert data_objects(out) == data_objects(clean)
    attempts = Ledger(open_run(str(out))[0]).attempts()
    executed = {unit for unit in attempts if attempts[unit] > attempts_before.get(unit, 0)}
    assert executed == set(open_run(str(out))[1].unit_ids) - done_before


def test_killed_while_the_statistics_run(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stats = out / "_dinoray/stats/attempts"
    start_and_kill(command(many, out, *FLAGS, "--no-ray"), lambda: count(stats) >= 1)
    complete(command(many, out, *FLAGS, "--no-ray"))
    complete(command(many, tmp_path / "clean", *FLAGS, "--no-ray"))
    check_whole(out)
    assert data_objects(out) == data_objects(tmp_path / "clean")


@pytest.mark.ray
def test_actor_killed_and_driver_killed_under_ray(many: Path, tmp_path: Path) -> None:
    clean, out = tmp_path / "clean", tmp_path / "out"
    flags = (*FLAGS, "--precision", "bfloat16", "--workers", "2")
    complete(command(many, clean, *FLAGS, "--precision", "bfloat16", "--no-ray"))
    receipts = out / "_dinoray/receipts"

    start_and_kill(command(many, out, *flags), lambda: count(receipts) >= 2)  # the driver
    done_before = {path.stem for path in receipts.iterdir()}
    assert len(done_before) < 16
    attempts_before = Ledger(open_run(str(out))[0]).attempts()

    process = subprocess.Popen(command(many, out, *flags), env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
        kill_one_actor(out, attempts_before, process)
        printed = process.communicate(timeout=240)[0]
    finally:
        process.kill()
    assert process.returncode == 0, printed
    check_whole(out)
    assert data_objects(out) == data_objects(clean)
    attempts = Ledger(open_run(str(out))[0]).attempts()
    again = {unit for unit in attempts if attempts[unit] > attempts_before.get(unit, 0)}
    assert not again & done_before, "a unit that had a receipt was executed again"


def kill_one_actor(out: Path, before: dict[str, int], process: subprocess.Popen[str]) -> None:
    """kill -9 the actor that started the first new attempt."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        for marker in (out / "_dinoray/attempts").iterdir():
            unit, _, attempt = marker.name.rpartition("-")
            if int(attempt) > before.get(unit, 0):
                os.kill(json.loads(marker.read_text())["pid"], signal.SIGKILL)
                return
        time.sleep(0.002)
    raise AssertionError("no actor started a unit")


def test_resume_of_a_finished_run_executes_nothing(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "out", unit_items=3)
    before = data_objects(tmp_path / "out")
    again = run(pictures, tmp_path / "out", unit_items=3)
    assert again.executed_units == 0
    assert data_objects(tmp_path / "out") == before


def test_a_row_does_not_depend_on_what_shares_its_full_batch(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(texture((64, 64), i)).save(folder / f"{i}.png")
    job = {"precision": "bfloat16", "token_budget": 84, "scaling": "image"}  # 21 tokens an image: batches of 4
    run(folder, tmp_path / "a", **job)
    (folder / "0.png").unlink()
    Image.fromarray(texture((64, 64), 99)).save(folder / "0.png")
    run(folder, tmp_path / "b", **job)
    from dinoray import open_features

    a, b = (open_features(str(tmp_path / name)).matrix("cls") for name in "ab")
    assert np.array_equal(a[1:], b[1:])
    assert not np.array_equal(a[0], b[0])


def test_many_shapes_wait_within_a_bound_and_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoray.runners import gathering

    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(24):
        Image.fromarray(texture((32 + 16 * (i % 5), 48 + 16 * (i % 3)), i)).save(folder / f"{i:02d}.png")
    monkeypatch.setattr(gathering, "WAITING_BYTES", 12_000)
    held: list[int] = []
    add = gathering.Gathering.add

    def watched(self, *args):
        add(self, *args)
        held.append(self.waiting_bytes)

    monkeypatch.setattr(gathering.Gathering, "add", watched)
    run(folder, tmp_path / "a", features=ALL_FEATURES, compute_threads=1)
    run(folder, tmp_path / "b", features=ALL_FEATURES, compute_threads=3, decode_threads=4)
    assert 0 < max(held) <= 12_000
    check_whole(tmp_path / "a")
    assert data_objects(tmp_path / "a") == data_objects(tmp_path / "b")
