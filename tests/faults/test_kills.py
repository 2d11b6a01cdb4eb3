"""Kills of the driver and of actors at named points and at random moments; two drivers; torn objects."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinoray.chaos.command import ChaosSettings, run_chaos
from dinoray.chaos.kills import IN_ACTORS, STAGES, Kill, draw_kills
from dinoray.chaos.pictures import BROKEN, make_pictures
from dinoray.chaos.striking import Start, start_and_strike
from dinoray.driver import OutputHeld
from dinoray.errors import BadRequest
from dinoray.failpoints import POINTS
from dinoray.io.images import Limits, load_item
from dinoray.io.stores import LocalStore
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
    item_of_file,
    run,
    use_tiny_backbone,
)

FLAGS = ("--features", ",".join(ALL_FEATURES), "--unit-items", "2", "--no-ray")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(texture((64, 64 + 16 * (i % 2)), i)).save(folder / f"{i}.png")
    return folder


def killed_at(points: str, argv: list[str]) -> None:
    """Run a command that kills itself there."""
    done = subprocess.run(argv, env={**environment(), "DINORAY_FAILPOINTS": points}, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


# ---------------------------------------------------------------- which kills


@given(count=st.integers(1, 60), seed=st.integers(0, 1000), ray=st.booleans())
def test_a_seed_gives_its_kills_and_each_point_before_any_twice(count: int, seed: int, ray: bool) -> None:
    starts = draw_kills(count, seed, ray=ray)
    kills = [kill for start in starts for kill in start]
    assert len(kills) == count
    assert starts == draw_kills(count, seed, ray=ray)
    assert all(starts) and all(kill.point in POINTS for kill in kills if kill.point)
    assert all(kill.victim == "actor" for start in starts for kill in start[:-1]), "the driver's kill ends a start"
    for start in starts:
        assert len({kill.entry for kill in start if kill.point}) == sum(bool(kill.point) for kill in start)
    stages = Counter(f"{k.point}@2" if k.point.startswith("plan.") and k.passage == 2 else k.point for k in kills if k.point)
    if sum(stages.values()) >= len(STAGES):
        assert stages.keys() == set(STAGES)
    else:
        assert set(stages.values()) <= {1}
    victims = {kill.victim for kill in kills if kill.point in IN_ACTORS}
    assert victims <= ({"actor"} if ray else {"driver"})


def test_the_collection_has_8_and_16_bits_several_channels_and_one_broken_file(tmp_path: Path) -> None:
    assert make_pictures(tmp_path) == len([p for p in tmp_path.rglob("*") if p.is_file()])
    good = [path for folder in "ab" for path in sorted((tmp_path / folder).iterdir())]
    pixels = [load_item(item_of_file(path), Limits()).image.pixels for path in good]
    assert {(p.dtype, len(p)) for p in pixels} == {(np.dtype("uint8"), 1), (np.dtype("uint8"), 3), (np.dtype("uint16"), 1),
                                                   (np.dtype("uint16"), 3)}
    assert all(p.max() > p.min() for p in pixels)
    with pytest.raises(Exception, match="broken"):
        load_item(item_of_file(tmp_path / BROKEN), Limits())


# ---------------------------------------------------------------- kills


@pytest.mark.slow
def test_twenty_kills_of_the_driver_leave_the_bytes_of_a_clean_run() -> None:
    lines: list[str] = []
    assert run_chaos(ChaosSettings(kills=20, seed=1), lines.append) == 0, "\n".join(lines)
    said = [line for line in lines if line.startswith("kill ")]
    assert len(said) == 20
    for point in STAGES:
        assert any(f" at {point.split('@')[0]}, " in line for line in said), point
    assert sum("random moment" in line for line in said) == 5
    assert lines[-1].startswith("EQUAL: 20 kills")
    assert "outputs kept" not in "\n".join(lines)


@pytest.mark.slow
@pytest.mark.ray
def test_kills_of_actors_and_of_the_driver_under_ray_leave_the_bytes_of_a_clean_run(images: Path, tmp_path: Path) -> None:
    store, clean = LocalStore(tmp_path / "out"), tmp_path / "clean"
    run(images, clean, features=ALL_FEATURES, unit_items=1)
    flags = ("--features", ",".join(ALL_FEATURES), "--unit-items", "1", "--workers", "2", "--compute-threads", "1")
    rng, struck = random.Random(2), []
    starts = [[Kill("actor", "stats.receipt"), Kill("driver", "plan.seal", 2)],
              [Kill("actor", "unit.data"), Kill("actor", "unit.receipt"), Kill("actor", moment=0.3), Kill("driver", moment=0.4)],
              [Kill("actor", "unit.done"), Kill("driver", "run.verify")], []]
    for kills in starts:
        start = start_and_strike(command(images, tmp_path / "out", *flags), store, kills, rng=rng, work_s=1, units=8)
        struck += start.carried_out
        ends = any(kill.victim == "driver" for kill in start.carried_out)
        assert start.code == (-signal.SIGKILL if ends else 0), start.printed
        assert not start.again
    assert len(struck) >= 7, struck  # the random ones find no moment when a machine is very slow
    check_whole(tmp_path / "out")
    assert data_objects(tmp_path / "out") == data_objects(clean)


def test_a_difference_is_found_named_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoray.chaos import command as module

    def start(argv, store, kills, **rest):  # what a start of the command does, in this process
        outcome = run(folder, store.root, features=ALL_FEATURES, unit_items=2)
        if store.root.name != "clean":
            key = min(key for key, _ in store.list("features"))
            data = bytearray(store.get(key))
            data[8] ^= 1
            store.put(key, bytes(data))
        return Start(code=outcome.exit_code, carried_out=list(kills), done=2)

    lines: list[str] = []
    use_tiny_backbone(monkeypatch)
    monkeypatch.setattr(module, "start_and_strike", start)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(texture((32, 32), i)).save(folder / f"{i}.png")
    settings = ChaosSettings(kills=1, seed=5, out=str(tmp_path / "out"), source=str(folder))
    monkeypatch.setattr(module, "draw_kills", lambda *args, **kwargs: [[Kill("driver", "run.verify")]])
    assert run_chaos(settings, lines.append) == 1
    text = "\n".join(lines)
    assert "killed-1: differs: features/part-" in text and "sha256 differs" in text
    assert "NOT EQUAL: 1 kill " in text and f"outputs kept: {tmp_path / 'out'}" in text
    assert not (tmp_path / "out/killed-1/_SUCCESS").exists()


def test_chaos_refuses_a_folder_that_is_not_empty_and_a_job_that_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(BadRequest, match="not empty"):
        run_chaos(ChaosSettings(out=str(tmp_path)), print)
    assert "--kills" in complete([sys.executable, "-m", "dinoray.cli", "chaos", "--kills", "0"], code=2)
    with pytest.raises(BadRequest, match="does not even run"):
        run_chaos(ChaosSettings(model="vitnone", out=str(tmp_path / "new")), print)
    assert not (tmp_path / "new").exists()


def test_a_random_moment_comes_though_the_clean_run_was_much_slower(images: Path, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "out")
    start = start_and_strike(command(images, tmp_path / "out", *FLAGS), store, [Kill("driver", moment=0.5)], rng=random.Random(0),
                             work_s=3600, units=4)
    assert start.code == -signal.SIGKILL and len(start.carried_out) == 1, start.printed
    assert start.done >= 2  # half of the units: not at once


# ---------------------------------------------------------------- two drivers


def test_of_two_drivers_one_works_and_the_other_says_who_holds_the_output(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = command(images, out, *FLAGS)
    env = {**environment(), "DINORAY_FAILPOINTS": "unit.receipt=sleep:1@2"}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        while not count(out / "_dinoray/receipts"):
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # alive and in the middle, for as long as the second needs
        try:
            refused = complete(argv, code=2)
            with pytest.raises(OutputHeld, match=f"process {first.pid} on "):
                run(images, out, features=ALL_FEATURES, unit_items=2)
        finally:
            first.send_signal(signal.SIGCONT)
        printed = first.communicate(timeout=120)[0]
    assert first.returncode == 0, printed
    assert f"another driver works on this output: process {first.pid} on " in refused
    assert "dinoray stop" in refused
    check_whole(out)
    run(images, tmp_path / "clean", features=ALL_FEATURES, unit_items=2)
    assert data_objects(out) == data_objects(tmp_path / "clean")
    assert set(Ledger(LocalStore(out)).attempts().values()) == {1}, "the refused driver started nothing"


def test_what_a_killed_driver_held_is_taken_over_at_once_and_what_it_tore_is_replaced(images: Path, tmp_path: Path) -> None:
    out, clean = tmp_path / "out", tmp_path / "clean"
    run(images, clean, features=ALL_FEATURES, unit_items=2)
    expected = data_objects(clean)
    killed_at("unit.receipt=kill@2", command(images, out, *FLAGS))
    note = json.loads((out / "_dinoray/driver.json").read_text())
    store, plan, ledger = open_run(str(out))
    assert len(ledger.done()) < len(plan)
    left = [unit for unit in plan.unit_ids if unit not in ledger.done()]
    table = f"features/part-{left[0]}.parquet"
    assert table in data_objects(out), "killed between its data and its receipt"
    (out / table).write_bytes(expected[table][: len(expected[table]) // 2])  # half a Parquet
    wrong = out / f"features/part-{left[-1]}.parquet"
    wrong.write_bytes(b"wrong bytes of no known format")
    scratch = out / "_dinoray/tmp" / f"{note['host']}-{note['pid']}-1-abcd"
    scratch.write_bytes(b"torn")
    dense = next((key for key in data_objects(out) if key.startswith("dense/") and left[0] in key), None)
    assert dense is not None
    (out / dense).write_bytes(b"")
    printed = complete(command(images, out, *FLAGS))
    assert "waiting up to" not in printed
    assert not scratch.exists() and not (out / "_dinoray/driver.json").exists()
    check_whole(out)
    assert data_objects(out) == expected


def test_a_pid_that_belongs_to_another_process_now_holds_nothing(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_at("unit.receipt=kill", command(images, out, *FLAGS))
    note = json.loads((out / "_dinoray/driver.json").read_text())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:  # alive, with that number
        (out / "_dinoray/driver.json").write_text(json.dumps({**note, "pid": other.pid, "started": note["started"] - 3600}))
        run(images, out, features=ALL_FEATURES, unit_items=2)
        other.communicate(b"\n")
    check_whole(out)
    assert os.path.exists(out / "_SUCCESS")
