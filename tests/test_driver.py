"""One driver per output: who holds it, who takes over, who is refused, and how a run is asked to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dinoray import driver as module
from dinoray.driver import KEY, STOP_KEY, Driver, OutputHeld, stop
from dinoray.errors import Stopped, SystemicError, TransientError
from dinoray.io.stores import LocalStore
from tests.runs import DictStore

OTHER = {"token": "other", "pid": 1, "host": "node7", "started": 1.0, "machine": "another boot", "beat": 3, "since": "noon"}


def make(store, said: list[str] | None = None, **settings) -> Driver:
    return Driver(store, "dinoray extract ...", (said if said is not None else []).append,
                  **{"stale_s": 0.3, "heartbeat_s": 0.05, **settings})


def note(store) -> dict:
    return json.loads(store.get(KEY))


def test_it_holds_the_output_and_gives_it_up(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with make(store):
        first = note(store)
        assert (first["pid"], first["beat"]) == (os.getpid(), 0)
        deadline = time.monotonic() + 10
        while note(store)["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not store.exists(KEY)


def test_a_live_driver_of_this_machine_is_respected_at_once() -> None:
    store = DictStore()
    with make(store):
        began = time.monotonic()
        with pytest.raises(OutputHeld, match=f"process {os.getpid()} on ") as caught:
            make(store, stale_s=60).__enter__()
        assert time.monotonic() - began < 5
        assert caught.value.exit_code == 2 and "dinoray stop" in caught.value.todo
    with make(store):
        pass


def test_a_dead_process_of_this_machine_is_replaced_at_once() -> None:
    store = DictStore()
    dead = subprocess.run([sys.executable, "-c", "from dinoray.driver import _process; import json; print(json.dumps(_process()))"],
                          capture_output=True, text=True, check=True)
    store.put(KEY, json.dumps({"token": "x", **json.loads(dead.stdout)}).encode())
    said: list[str] = []
    began = time.monotonic()
    with make(store, said, stale_s=60):
        assert note(store)["pid"] == os.getpid()
    assert time.monotonic() - began < 5 and not said


def test_a_pid_that_was_used_again_is_another_process() -> None:
    store = DictStore()
    store.put(KEY, json.dumps({**module._process(), "started": 5.0, "token": "x"}).encode())
    with make(store, stale_s=60):
        assert note(store)["token"] != "x"


def test_a_silent_driver_elsewhere_goes_stale_and_this_is_said() -> None:
    store, said = DictStore(), []
    store.put(KEY, json.dumps(OTHER).encode())
    began = time.monotonic()
    with make(store, said):
        assert time.monotonic() - began >= 0.3
    assert len(said) == 1 and "process 1 on node7 since noon" in said[0] and "--takeover" in said[0]


def test_a_driver_elsewhere_that_moves_is_respected() -> None:
    store = DictStore()
    store.put(KEY, json.dumps(OTHER).encode())
    timer = threading.Timer(0.1, lambda: store.put(KEY, json.dumps({**OTHER, "beat": 4}).encode()))
    timer.start()
    with pytest.raises(OutputHeld, match="node7"):
        make(store, stale_s=30).__enter__()
    timer.join()
    assert note(store)["beat"] == 4


def test_takeover_does_not_wait_and_the_other_notices() -> None:
    store = DictStore()
    with make(store, heartbeat_s=0.05) as first:
        second = make(store, takeover=True, stale_s=0.3)
        second.__enter__()
        deadline = time.monotonic() + 10
        while not first._lost:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(SystemicError, match="took this output over"):
            first.check_lost()
        second.__exit__(None, None, None)


@pytest.mark.parametrize("text", [b"", b"not json", b"[1]", b"{}"])
def test_a_garbled_note_goes_stale(text: bytes) -> None:
    store = DictStore({KEY: text})
    with make(store):
        assert note(store)["pid"] == os.getpid()


def test_trouble_with_the_heartbeat_does_not_end_the_run() -> None:
    class Flaky(DictStore):
        failed = 0

        def put(self, key: str, data: bytes | memoryview) -> None:
            self.failed += 1
            raise TransientError("503")

    store = Flaky()
    with make(store) as driver:
        deadline = time.monotonic() + 10
        while store.failed < 3:  # it tries again at the next beat
            assert time.monotonic() < deadline
            time.sleep(0.01)
        driver.check()
        assert note(store)["token"] == driver.note["token"]
    assert not store.exists(KEY)


def test_many_drivers_at_once_and_one_gets_it(tmp_path: Path) -> None:
    store, held, refused = LocalStore(tmp_path), [], []
    start = threading.Barrier(6)

    def attempt() -> None:
        driver = make(store, stale_s=60)
        start.wait()
        try:
            driver._acquire()
            held.append(driver)
        except OutputHeld:
            refused.append(driver)

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 5


def test_drain_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    store, said = DictStore(), []
    with make(store, said) as driver:
        driver.check()
        store.put(STOP_KEY, b'{"mode": "drain"}')
        deadline = time.monotonic() + 10
        while not driver._drain:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(Stopped, match="as asked"):
            driver.check()
    assert "asked to stop" in said[-1]
    with make(store):  # the request was for the driver that is gone
        assert not store.exists(STOP_KEY)


def test_stop_now_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    store, left = DictStore(), threading.Event()
    driver = make(store)
    driver.leave = lambda why: left.set()
    with driver:
        store.put(STOP_KEY, b'{"mode": "now"}')
        assert left.wait(10)


def test_stop_when_nothing_runs() -> None:
    said: list[str] = []
    assert stop(DictStore(), drain=True, say=said.append)
    assert "no run is at work" in said[0]


def test_stop_waits_for_the_driver_and_can_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    store, said = DictStore(), []
    driver = make(store)
    driver.__enter__()
    assert not stop(store, drain=True, say=said.append, timeout_s=0.1, work="the step in work")
    assert said[-1].endswith("to stop after the step in work")
    timer = threading.Timer(0.2, lambda: driver.__exit__(None, None, None))
    timer.start()
    assert stop(store, drain=True, say=said.append)
    timer.join()
    assert said[-1] == "stopped"


def test_sigterm_gives_the_output_up(tmp_path: Path) -> None:
    code = ("import sys, time\nfrom dinoray.cli import with_signals\nfrom dinoray.driver import Driver\n"
            "from dinoray.io.stores import LocalStore\nwith_signals('again')\n"
            f"with Driver(LocalStore({str(tmp_path)!r}), 'x', print):\n    print('held', flush=True)\n    time.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert (tmp_path / KEY).exists()
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "stopped by SIGTERM; resume with: again" in printed
    assert not (tmp_path / KEY).exists()
