"""Poison: a file that kills or hangs its process is the only thing quarantined; who kills processes from outside
quarantines nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from dinoray.ledger import Ledger, Receipt
from dinoray.runners.build import RunnerSpec
from dinoray.runners.isolation import run_isolated
from dinoray.verification import open_run
from tests.conftest import texture
from tests.runs import ALL_FEATURES, check_whole, command, complete, data_objects, environment, run

POISON = "2.png"
FLAGS = ("--features", ",".join(ALL_FEATURES), "--unit-items", "4", "--scaling", "image")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two units of four; the poison is in the first."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(texture((64, 64 + 16 * (i % 2)), i)).save(folder / f"{i}.png")
    return folder


def as_if_corrupt(images: Path, out: Path) -> dict[str, bytes]:
    """The data of a run for which the poison is merely corrupt: same name, size and time, so the same item."""
    path = images / POISON
    good, info = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(good)))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    run(images, out, features=ALL_FEATURES, unit_items=4, scaling="image")
    path.write_bytes(good)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    return data_objects(out)


def receipts(out: Path) -> list[Receipt]:
    plan, ledger = open_run(str(out))[1:]
    return list(ledger.receipts(plan.unit_ids))


def check_only_poison_is_out(out: Path, reason: str, expected: dict[str, bytes]) -> None:
    check_whole(out)
    table = Ledger(open_run(str(out))[0]).quarantine(receipts(out))
    assert table["item_id"].to_pylist() == [POISON]
    assert table["reason"].to_pylist() == [reason]
    assert data_objects(out) == expected
    assert [receipt.isolated for receipt in receipts(out)] == [True, False]


# ---------------------------------------------------------------- a file that kills


def test_a_file_that_kills_its_process_is_alone_quarantined_after_a_few_runs(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    env = {**environment(), "DINORAY_FAILPOINTS": f"item.load~{POISON}=kill@*"}
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        assert len(codes) < 4, "the same command again and again does not end"
        done = subprocess.run(command(images, out, *FLAGS, "--no-ray"), env=env, capture_output=True, text=True, timeout=240)
        codes.append(done.returncode)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 3], done.stdout + done.stderr
    assert "1 quarantined (1 crashed)" in done.stdout
    check_only_poison_is_out(out, "crashed", as_if_corrupt(images, tmp_path / "corrupt"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_file_that_kills_its_actor_is_alone_quarantined_in_one_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    env = {**environment(), "DINORAY_FAILPOINTS": f"item.load~{POISON}=kill@*"}
    done = subprocess.run(command(images, out, *FLAGS, "--workers", "1"), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stdout + done.stderr
    check_only_poison_is_out(out, "crashed", as_if_corrupt(images, tmp_path / "corrupt"))
    assert Ledger(open_run(str(out))[0]).attempts()[open_run(str(out))[1].unit_ids[0]] == 3


@pytest.mark.slow
def test_a_file_that_kills_the_statistics_pass_is_quarantined_by_the_main_pass(images: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "out", ("--unit-items", "4", "--no-ray")
    env = {**environment(), "DINORAY_FAILPOINTS": f"item.load~{POISON}=kill@*"}
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        done = subprocess.run(command(images, out, *flags), env=env, capture_output=True, text=True, timeout=240)
        codes.append(done.returncode)
        assert len(codes) < 7
    assert codes[-1] == 3, done.stdout + done.stderr
    assert codes[:-1] == [-signal.SIGKILL] * 4  # two in the statistics, two in the main pass
    check_whole(out)
    assert Ledger(open_run(str(out))[0]).quarantine(receipts(out))["item_id"].to_pylist() == [POISON]


# ---------------------------------------------------------------- kills from outside


def markers(out: Path, unit_id: str) -> list[dict]:
    """What the starts of a unit noted, first to last."""
    found = []
    while (path := out / "_dinoray/attempts" / f"{unit_id}-{len(found) + 1}").exists():
        found.append(json.loads(path.read_text()))
    return found


def wait(until, process: subprocess.Popen[str], timeout_s: float = 180):
    """What `until` returns as soon as it is true; fails if the process ends before."""
    deadline = time.monotonic() + timeout_s
    while not (value := until()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)
    return value


def first_unit(out: Path) -> str | None:
    return open_run(str(out))[1].unit_ids[0] if (out / "_dinoray/plan/index.parquet").exists() else None


def isolated_children(pid: int) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(pid).children() if "dinoray.runners.isolation" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def kill_while_at_work(out: Path, start: int, process: subprocess.Popen[str]) -> psutil.Process | None:
    """SIGKILL to the process at work on the first unit, at its start number `start`; returns the isolated child, if any."""
    unit = wait(lambda: first_unit(out), process)
    note = wait(lambda: (markers(out, unit) + [None] * start)[start - 1], process)
    child = wait(lambda: isolated_children(note["pid"]), process)[0] if start > 2 else None
    os.kill(note["pid"], signal.SIGKILL)
    return child


def check_healthy(images: Path, out: Path, children: list[psutil.Process | None], clean: Path) -> None:
    for child in filter(None, children):
        child.wait(timeout=30)  # a child whose parent is gone ends too
    check_whole(out)
    first = receipts(out)[0]
    assert (first.quarantined, first.isolated, first.attempt) == (0, True, 6)
    run(images, clean, features=ALL_FEATURES, unit_items=4, scaling="image")
    assert data_objects(out) == data_objects(clean)


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every item takes its time, so that a unit is at work for long enough to be killed."""
    monkeypatch.setenv("DINORAY_FAILPOINTS", "item.load=sleep:0.25@*")
    yield


def test_a_healthy_unit_whose_driver_is_killed_five_times_is_complete(images: Path, tmp_path: Path, slowly: None) -> None:
    out, argv = tmp_path / "out", command(images, tmp_path / "out", *FLAGS, "--no-ray", "--decode-threads", "1")
    children = []
    for start in range(1, 6):
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()) as process:
            children.append(kill_while_at_work(out, start, process))
    complete(argv)
    check_healthy(images, out, children, tmp_path / "clean")


@pytest.mark.slow
@pytest.mark.ray
def test_a_healthy_unit_whose_actor_is_killed_five_times_is_complete_in_one_run(images: Path, tmp_path: Path,
                                                                               slowly: None) -> None:
    out = tmp_path / "out"
    argv = command(images, out, *FLAGS, "--workers", "1", "--decode-threads", "1")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()) as process:
        try:
            children = [kill_while_at_work(out, start, process) for start in range(1, 6)]
            printed = process.communicate(timeout=240)[0]
        finally:
            process.kill()
    assert process.returncode == 0, printed
    check_healthy(images, out, children, tmp_path / "clean")


# ---------------------------------------------------------------- an item that hangs


@pytest.mark.slow
def test_an_item_that_hangs_is_quarantined_as_timeout(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = ("import sys, dinoray.runners.build as build; build.MIN_ITEM_TIMEOUT_S = 4.0\n"
              "from dinoray.cli import main; sys.argv[0] = 'dinoray'; main()")
    argv = [sys.executable, "-c", script, *command(images, out, *FLAGS, "--no-ray", "--stall-timeout-s", "1")[3:]]
    env = {**environment(), "DINORAY_FAILPOINTS": f"item.load~{POISON}=sleep:10000@*"}
    for start in (1, 2):
        with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            unit = wait(lambda: first_unit(out), process)
            wait(lambda unit=unit, start=start: len(markers(out, unit)) == start, process)
            process.kill()  # whoever waits for it loses patience
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "1 quarantined (1 timeout)" in done.stdout
    check_only_poison_is_out(out, "timeout", as_if_corrupt(images, tmp_path / "corrupt"))


# ---------------------------------------------------------------- the child itself


def spec_of(out: Path) -> RunnerSpec:
    return RunnerSpec("image-features", str(out), job=json.loads((out / "_dinoray/job.json").read_text())["job"],
                      weights="random:0", digest=open_run(str(out))[1].facts["described"]["weights_digest"])


@pytest.mark.slow
def test_a_slow_start_and_a_slow_unit_are_no_hang(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child needs seconds to load, and the unit as a whole takes longer than an item may be silent."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setenv("DINORAY_FAILPOINTS", "unit.begin=raise")
        with pytest.raises(OSError, match="failpoint"):
            run(images, out, unit_items=4, scaling="image")
    monkeypatch.setenv("DINORAY_FAILPOINTS", "item.load=sleep:1.6@*")
    began: list[int] = []
    receipt = run_isolated(spec_of(out), 0, 3, lambda: began.append(1), item_timeout_s=5)
    assert (receipt.quarantined, receipt.row_items, receipt.isolated) == (0, 4, True)
    assert len(began) > 5, "a beat a second while the child works"


def test_the_child_tells_what_kind_of_error_ended_it(images: Path, tmp_path: Path) -> None:
    from dinoray.errors import OutputDamaged

    out = tmp_path / "out"
    run(images, out, unit_items=4, scaling="plate")
    (out / "_dinoray/plan/scaling.parquet").unlink()
    beats: list[int] = []
    with pytest.raises(OutputDamaged, match="scaling"):
        run_isolated(spec_of(out), 0, 3, lambda: beats.append(1), item_timeout_s=60)
    assert beats, "the watchdog must see that the parent of a child lives"
