"""What a watcher tells of a training that runs elsewhere, and who may still write to an output."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dinoray.driver import Driver
from dinoray.errors import SystemicError, TransientError
from dinoray.io.stores import LocalStore, Store
from dinoray.training import standing
from dinoray.training.journal import Journal
from dinoray.training.loop import Progress
from dinoray.training.spec import TrainingSpec, refuse_other_output, still_ours
from dinoray.training.standing import PROGRESS_KEY, Watch, note_failure, read_progress, standing_lines
from tests.runs import DictStore


def note(store: Store, step: int, run: str = "me", **fields: object) -> None:
    values = {"step": step, "steps": 100, "run": run, "micro_batch": 0, "ended": "", "began": 40, **fields}
    store.put(PROGRESS_KEY, json.dumps(values).encode())


def wait_for(said: list[str], number: int) -> None:
    deadline = time.monotonic() + 10
    while len(said) < number:
        assert time.monotonic() < deadline, said
        time.sleep(0.01)


def test_a_watcher_tells_new_steps_of_its_own_run_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "WATCH_S", 0.005)
    monkeypatch.setattr(standing, "TELL_S", 0.02)
    store, said = DictStore(), []
    note(store, 50, run="an earlier one", ended="steps")
    with Watch(store, "me", said.append) as watch:
        time.sleep(0.05)
        assert said == [] and not watch.begun, "what another run noted is not told again"
        note(store, 40)
        wait_for(said, 1)
        assert said == ["going on from step 40"] and watch.begun
        note(store, 41, loss=0.5, lr=0.001)
        wait_for(said, 2)
        assert said[-1] == "step 41/100  loss 0.5  lr 0.001"
        note(store, 42, loss=0.4, micro_batch=2)
        wait_for(said, 4)
        assert said[2] == "a device ran out of memory: micro-batches of 2 from here on"
        broken = store.get
        store.get = lambda key: (_ for _ in ()).throw(TransientError("503"))  # type: ignore[method-assign]
        time.sleep(0.03)
        store.get = broken  # type: ignore[method-assign]
        monkeypatch.setattr(standing, "TELL_S", 1000.0)
        note(store, 43, loss=0.3, micro_batch=2)
        wait_for(said, 5)
        note(store, 100, loss=0.2, val_loss=0.1, micro_batch=2, ended="steps")
        time.sleep(0.03)
        assert len(said) == 5, "not more often than TELL_S"
    assert said[-1] == "step 100/100  loss 0.2  validation loss 0.1"


def test_a_watcher_tells_that_workers_began_anew_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    store, said = DictStore(), []
    watch = Watch(store, "me", said.append)
    note(store, 43, workers=2, starts=1)
    watch._look()
    note_failure(store, "an earlier run", "long ago", 3)
    note_failure(store, "me", "ActorDiedError: gone", 3)
    note(store, 30, workers=2, starts=2, began=30)
    watch._look()
    note(store, 38, workers=4, starts=3, began=30)  # looked at late: it has gone on since
    watch._look()
    note_failure(store, "me", "503", -1)
    note(store, 33, workers=4, starts=4, began=33)
    watch._look()
    assert said == ["going on from step 40", "a worker failed (ActorDiedError: gone): going on from step 30, restart 1 of 3",
                    "started again with 4 workers: going on from step 30",
                    "a worker failed (503): going on from step 33, restart 2"]


def test_a_first_look_that_comes_late_does_not_call_a_new_training_one_that_goes_on() -> None:
    store, said = DictStore(), []
    watch = Watch(store, "me", said.append)
    note(store, 3, began=0)
    watch._look()
    assert watch.begun and said == []


def test_the_starts_of_a_run_are_counted(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    for run, expected in (("a", 1), ("a", 2), ("a", 3), ("b", 1)):
        Journal(store, Progress(), 10, 2, run).close()
        assert read_progress(store)["starts"] == expected
    Journal(store, Progress(step=4), 10, 2, "b").close()
    assert read_progress(store)["began"] == 4
    assert "the workers of this run were started 2 times" in standing_lines(store, {"fingerprint": "f0", "kind": "train x"})


def test_status_of_a_training(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    record = {"fingerprint": "f0", "kind": "train distance-map", "command": "dinoray train distance-map job.yaml"}
    assert list(standing_lines(store, record)) == [f"f0  train distance-map  {store.url}", "no step yet"]
    note(store, 7, loss=0.5, best_step=5, best_loss=0.25, seconds=12.4, workers=2)
    assert list(standing_lines(store, record))[1:] == ["step 7/100  loss 0.5  12 s so far on 2 workers",
                                                       "best validation loss 0.25 at step 5",
                                                       "not finished; resume with: dinoray train distance-map job.yaml"]
    with Driver(store, "x", lambda line: None):
        lines = list(standing_lines(store, record))
    assert lines[1].startswith("at work: process ") and not any("resume" in line for line in lines)


def test_only_the_workers_of_the_driver_that_holds_the_output_may_write(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    with Driver(store, "first", lambda line: None) as first:
        mine = still_ours(TrainingSpec("toy", str(tmp_path), "f", token=first.token), store)
        mine()
        with Driver(store, "second", lambda line: None, takeover=True) as second, pytest.raises(SystemicError, match="took this"):
            mine()
        assert second.token != first.token
    with pytest.raises(SystemicError, match="or ours is gone"):
        mine()
    still_ours(TrainingSpec("toy", str(tmp_path), "f"), store)()  # no driver: nothing to ask


def test_a_worker_that_sees_another_folder_says_so(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    spec = TrainingSpec("toy", str(tmp_path), "f", token="t")
    with pytest.raises(SystemicError, match="does not see the output.*\\n.*a folder that all of them share"):
        refuse_other_output(spec, store)
    store.put("_dinoray/job.json", b'{"fingerprint": "other"}')
    with pytest.raises(SystemicError, match="does not see the output"):
        refuse_other_output(spec, store)
    store.put("_dinoray/job.json", b'{"fingerprint": "f"}')
    refuse_other_output(spec, store)
