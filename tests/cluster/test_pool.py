"""The pool: leases, rounds, actors that stop moving, actors that cannot be built."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from dinoray.cluster.pool import leases
from dinoray.errors import SystemicError
from dinoray.verification import open_run
from tests.conftest import texture
from tests.runs import check_whole, command, data_objects, environment, run


def test_leases_are_single_up_to_2000_pending_then_grow_to_8() -> None:
    assert leases(range(3)) == ["0", "1", "2"]
    assert len(leases(range(2000))) == 2000
    assert leases(range(2001))[:2] == ["0,1", "2,3"]
    assert max(len(lease.split(",")) for lease in leases(range(100_000))) == 8
    assert [int(n) for lease in leases([5, 7, 11]) for n in lease.split(",")] == [5, 7, 11]
    assert leases([]) == []


@pytest.mark.ray
def test_an_actor_that_hangs_is_replaced(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(texture((128, 128), i)).save(folder / f"{i:02d}.png")
    argv = command(folder, out, "--unit-items", "1", "--workers", "1", "--stall-timeout-s", "6")
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        attempts = out / "_dinoray/attempts"
        deadline = time.monotonic() + 120
        while not (attempts.is_dir() and any(attempts.iterdir())):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(json.loads(next(attempts.iterdir()).read_text())["pid"], signal.SIGSTOP)
        printed = process.communicate(timeout=180)[0]
    finally:
        process.kill()
    assert process.returncode == 0, printed
    assert "no actor has moved" in printed
    check_whole(out)
    run(folder, tmp_path / "clean", unit_items=1)
    assert data_objects(out) == data_objects(tmp_path / "clean")
    store, plan, ledger = open_run(str(out))
    assert len({receipt.worker["pid"] for receipt in ledger.receipts(plan.unit_ids)}) <= 2


@pytest.mark.ray
def test_wrong_staged_weights_stop_the_run_at_once(pictures: Path, tmp_path: Path, local_ray: None) -> None:
    import dinoray

    folder = tmp_path / "weights"
    dinoray.save_backbone(dinoray.load_backbone("vitt16", weights="random:3"), folder)
    digest = dinoray.load_backbone("vitt16", weights=str(folder)).digest
    staged = tmp_path / "stage/_dinoray/weights" / digest
    dinoray.save_backbone(dinoray.load_backbone("vitt16", weights="random:4"), staged)
    (staged / "STAGED").touch()
    job = {"no_ray": False, "weights": str(folder), "workers": "1"}
    with pytest.raises(SystemicError, match="digest"):
        run(pictures, tmp_path / "out", staging=str(tmp_path / "stage"), **job)
    assert not open_run(str(tmp_path / "out"))[2].done()
    assert run(pictures, tmp_path / "out", **job).exit_code == 0  # staged afresh beside the output
    check_whole(tmp_path / "out")


@pytest.mark.ray
def test_sigterm_under_ray_leaves_with_the_resume_command(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(60):
        Image.fromarray(texture((256, 256), i)).save(folder / f"{i:02d}.png")
    process = subprocess.Popen(command(folder, out, "--unit-items", "1"), env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    attempts = out / "_dinoray/attempts"
    deadline = time.monotonic() + 120
    while not (attempts.is_dir() and any(attempts.iterdir())):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 2
    assert process.returncode == 1, printed
    assert f"stopped by SIGTERM; resume with: dinoray extract images {folder}" in printed
