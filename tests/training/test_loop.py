"""The loop: a training taken up equals an undisturbed one to the bit, stops when asked, and says what it did."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoray.driver import STOP_KEY
from dinoray.errors import ChangedRequest, OutputDamaged, SystemicError
from dinoray.io.stores import LocalStore
from dinoray.training import loop
from dinoray.training.loop import Progress, fit
from dinoray.training.workers import Workers
from tests.training.toys import Toy, assert_same_state, last_state, outcome, timeless, toy_job

POINTS = ("train.step@1", "train.step@5", "train.step@10", "train.state@1", "train.state@2", "train.state@4", "train.state@6")


def train(out: Path, toy: Toy | None = None, **fields: Any) -> Progress:
    keywords = {name: fields.pop(name) for name in ("report", "check", "run_name") if name in fields}
    return fit(toy_job(out, **fields), toy or Toy(), Workers(), LocalStore(str(out)), **keywords)


@pytest.mark.parametrize(("precision", "ema", "dropout", "every"), [
    ("float32", 0.0, 0.0, (4, 1)), ("float32", 0.9, 0.5, (5, 3)), ("bfloat16", 0.9, 0.2, (4, 3))])
def test_interrupted_anywhere_it_ends_the_same(precision: str, ema: float, dropout: float, every: tuple[int, int], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """`every`: steps between states (5: the last one falls on the end, which is saved twice) and between rows of the history."""
    rhythm = {"checkpoint_every": every[0], "log_every": every[1]}

    def toy() -> Toy:
        return Toy(torch.float32, dropout)

    whole = train(tmp_path / "whole", toy(), precision=precision, ema_decay=ema, **rhythm)
    assert outcome(whole) == (10, "steps")
    for point in POINTS:
        out = tmp_path / point
        name, _, passage = point.partition("@")
        monkeypatch.setattr("dinoray.failpoints._passed", Counter())
        monkeypatch.setenv("DINORAY_FAILPOINTS", f"{name}=raise@{passage}")
        with pytest.raises(OSError, match=name):
            train(out, toy(), precision=precision, ema_decay=ema, **rhythm)
        monkeypatch.delenv("DINORAY_FAILPOINTS")
        rest = train(out, toy(), precision=precision, ema_decay=ema, **rhythm)
        assert timeless(json.loads((out / "history.json").read_text())) == timeless(whole.history), point
        assert outcome(rest) == (10, "steps")
        assert timeless(rest.history) == timeless(whole.history), point
        assert_same_state(last_state(out), last_state(tmp_path / "whole"))
        names = {path.name for path in (out / "_dinoray/states").iterdir()}
        assert sorted(name[:14] for name in names) == [f"best-{whole.best_step:09d}", "last-000000010", "last.json"], \
            "older ones are gone"


def test_a_resumed_run_takes_up_the_next_samples_and_no_others(tmp_path: Path) -> None:
    first, second = Toy(), Toy()
    began, plain = time.monotonic(), first.loss

    def loss(samples):
        if 5 * 6 <= samples[0][0] < 10**6:
            time.sleep(max(0.0, began + 3.0 - time.monotonic()))
        return plain(samples)

    first.loss = loss  # type: ignore[method-assign]
    stopped = train(tmp_path / "o", first, stop_after_s=2.5)
    assert 0 < stopped.step < 10 and stopped.ended == ""
    assert last_state(tmp_path / "o")["progress"]["step"] == stopped.step, "a state was saved where it stopped"
    train(tmp_path / "o", second)
    assert sorted(i for i in second.seen if i < 10**6) == list(range(stopped.step * 6, 60))


def test_stop_is_seen_and_a_state_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STOP_LOOK_S", 0.0)
    store = LocalStore(str(tmp_path))
    toy = Toy()
    plain = toy.loss

    def loss(samples):
        if 5 * 6 <= samples[0][0] < 10**6:
            store.put(STOP_KEY, b'{"mode": "drain"}')
        return plain(samples)

    toy.loss = loss  # type: ignore[method-assign]
    progress = train(tmp_path, toy)
    assert outcome(progress) == (6, "")
    store.delete(STOP_KEY)
    assert outcome(train(tmp_path)) == (10, "steps")


def test_patience_ends_it_at_the_best_weights(tmp_path: Path) -> None:
    toy = Toy()
    figures = iter([3.0, 2.0, 2.0 - 1e-6, 1.9999, 5.0, 5.0])
    toy.validate = lambda workers: {"loss": next(figures)}  # type: ignore[method-assign]
    progress = train(tmp_path, toy, validate_every=1, patience=2)
    assert outcome(progress) == (4, "patience"), "falls of less than min_improvement do not count"
    assert (progress.best_step, progress.best_loss) == (4, 1.9999)
    state = last_state(tmp_path)
    assert state["progress"]["ended"] == "patience"
    again = Toy()
    assert outcome(train(tmp_path, again, validate_every=1, patience=2)) == (4, "patience")
    assert again.seen == [] or max(again.seen) < 10**6 and again.seen[0] >= 4 * 6, "nothing is trained after the end"


def test_reports_are_the_same_for_each_run_and_follow_saved_states(tmp_path: Path) -> None:
    told: list[float] = []
    train(tmp_path, report=lambda metrics: told.append(metrics["step"]))
    assert told == [4.0, 8.0, 10.0]


def test_what_is_validated_and_kept_with_a_running_mean_is_the_mean(tmp_path: Path) -> None:
    toy = Toy()
    seen: list[torch.Tensor] = []
    plain = toy.validate

    def validate(workers: Workers) -> dict[str, float]:
        seen.append(toy.model[0].weight.detach().clone())
        return plain(workers)

    toy.validate = validate  # type: ignore[method-assign]
    progress = train(tmp_path, toy, ema_decay=0.9)
    state, best = last_state(tmp_path), torch.load(tmp_path / progress.best_state["key"])
    assert torch.equal(best["model"]["0.weight"], seen[-1])
    assert torch.equal(state["mean"]["values"]["0.weight"], seen[-1])
    assert torch.equal(state["model"]["0.weight"], toy.model[0].weight)
    assert not torch.equal(seen[-1], toy.model[0].weight)


def test_states_of_others_are_refused(tmp_path: Path) -> None:
    train(tmp_path, steps=3)
    other = Toy()
    other.fingerprint = "another"
    with pytest.raises(ChangedRequest, match="another output folder"):
        train(tmp_path, other)
    wider = Toy()
    wider.model = nn.Linear(5, 2).double()
    with pytest.raises(OutputDamaged, match="of another model"):
        train(tmp_path, wider)


def test_a_worker_that_has_lost_the_output_writes_nothing_more(tmp_path: Path) -> None:
    calls = itertools.count()

    def check() -> None:
        if next(calls) == 2:
            raise SystemicError("another driver took this output over")

    with pytest.raises(SystemicError, match="took this output over"):
        train(tmp_path, check=check)  # at the start, the best of step 3; then the state of step 4
    assert not (tmp_path / "_dinoray/states/last.json").exists()


def test_the_size_that_fits_is_kept_over_a_restart_and_never_above_the_jobs(tmp_path: Path) -> None:
    sizes: list[int] = []

    def fussy(limit: int) -> Toy:
        toy = Toy()
        plain = toy.loss

        def loss(samples):
            sizes.append(len(samples))
            if len(samples) > limit:
                raise torch.OutOfMemoryError("no memory, says the test")
            return plain(samples)

        toy.loss = loss  # type: ignore[method-assign]
        toy.validate = lambda workers: {"loss": 1.0}  # type: ignore[method-assign]
        return toy

    progress = train(tmp_path, fussy(3), steps=4, batch_size=8, micro_batch=8)
    assert (progress.micro_batch, sizes[:2], max(sizes[2:])) == (2, [8, 4], 2)
    sizes.clear()
    with pytest.raises(OutputDamaged):  # a broken state is never trained on
        next((tmp_path / "_dinoray/states").glob("last-000000004-*.pt")).write_bytes(b"torn")
        train(tmp_path, fussy(3), steps=4, batch_size=8, micro_batch=8)
    other = tmp_path / "other"
    monkey = fussy(3)
    train(other, monkey, steps=5, batch_size=8, micro_batch=8, patience=1, validate_every=2)
    assert last_state(other)["progress"]["micro_batch"] == 2
    assert json.loads((other / "_dinoray/progress.json").read_text())["micro_batch"] == 2


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "the loss of a step is nan"), (1e308, "the gradient's norm is")])
def test_a_loss_that_is_no_number_stops_it(value: float, message: str, tmp_path: Path) -> None:
    toy = Toy()
    toy.loss = lambda samples: ((toy.model(torch.full((1, 5), 1e200, dtype=torch.float64)) * value).sum(), torch.tensor(1.0))  # type: ignore[method-assign]
    with pytest.raises(SystemicError, match="lower learning_rate") as caught:
        train(tmp_path, toy)
    assert message.split()[1] in str(caught.value)
    assert not (tmp_path / "_dinoray/states/last.json").exists()


def test_a_validation_that_is_no_number_stops_it(tmp_path: Path) -> None:
    toy = Toy()
    toy.validate = lambda workers: {"loss": float("nan")}  # type: ignore[method-assign]
    with pytest.raises(SystemicError, match="the loss of the validation at step 3 is nan"):
        train(tmp_path, toy)
