"""Volumes under Ray: the bytes of a run without it, also when actors and the driver are killed."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from dinoray.chaos.kills import Kill
from dinoray.chaos.striking import start_and_strike
from dinoray.io.stores import LocalStore
from tests.volumes.making import check_volume, make_volume, receipts_of, run_in_child, run_volume, volume_flags


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_volume(tmp_path_factory.mktemp("source") / "v.zarr")


@pytest.fixture(scope="module")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run without Ray writes."""
    out = tmp_path_factory.mktemp("clean") / "out"
    assert run_in_child("", source, out, shallow=False, output="fused") == 0
    return check_volume(out)


@pytest.mark.slow
@pytest.mark.ray
def test_two_actors_give_the_bytes_of_a_run_without_ray(source: Path, clean: dict[str, bytes], tmp_path: Path,
                                                        local_ray: None) -> None:
    run_volume(source, tmp_path / "out", output="fused", no_ray=False, workers="2", decode_threads=1, compute_threads=1)
    assert check_volume(tmp_path / "out") == clean
    receipts = receipts_of(tmp_path / "out")
    planes = {receipt.worker["pid"] for receipt in receipts if "/fused.zarr/" not in receipt.objects[0].key}
    assert len(planes) == 2 and os.getpid() not in planes, "the asked number of actors must really have run"
    assert all(receipt.memory["above_model"] > 0 and receipt.memory["predicted"] > 0 for receipt in receipts)


@pytest.mark.slow
@pytest.mark.ray
def test_killed_actors_and_a_killed_driver_under_ray(source: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    store, rng, struck = LocalStore(tmp_path / "out"), random.Random(4), []
    argv = [sys.executable, "-m", "dinoray.cli", "extract", "volume", str(source), "--out", str(tmp_path / "out"),
            *volume_flags(output="fused", no_ray=False, workers=2, decode_threads=1, compute_threads=1)]
    for kills in ([Kill("actor", "volume.data"), Kill("actor", "volume.receipt", 2), Kill("driver", "run.verify")],
                  []):
        start = start_and_strike(argv, store, kills, rng=rng, work_s=1, units=7)
        struck += start.carried_out
        assert start.code == (-signal.SIGKILL if kills else 0) and not start.again, start.printed
    assert len(struck) == 3, struck
    assert check_volume(tmp_path / "out") == clean
