"""The small parts of a training: samples, schedule, running mean, parameter groups, states, the board."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dinoray.errors import OutputDamaged
from dinoray.io.stores import FsspecStore, LocalStore
from dinoray.training.averaging import RunningMean
from dinoray.training.journal import Journal
from dinoray.training.loop import Progress
from dinoray.training.parameters import parameter_groups
from dinoray.training.sampling import Ahead, bounded_map, generator, micro_batches, pick
from dinoray.training.schedule import lr_factor
from dinoray.training.states import load_best, load_last, save_best, save_last
from dinoray.training.workers import Workers
from tests.runs import DictStore


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 50), st.integers(1, 9))
def test_micro_batches_are_the_step_and_shared_without_gap_or_overlap(step: int, batch: int, micro: int, world: int) -> None:
    parts = micro_batches(step, batch, micro)
    assert [i for part in parts for i in part] == list(range(step * batch, (step + 1) * batch))
    assert all(len(part) == micro for part in parts[:-1]) and 1 <= len(parts[-1]) <= micro
    shares = []
    for rank in range(world):
        workers = Workers()
        workers.rank, workers.world = rank, world
        shares.append(workers.share(parts))
    assert [part for share in shares for part in share] == parts
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 2**32))
def test_pick_draws_by_weight(weights: list[float], seed: int) -> None:
    shares = np.array(weights) / sum(weights)
    rng = np.random.default_rng(seed)
    counts = np.bincount([pick(rng, np.cumsum(shares)) for _ in range(2000)], minlength=len(weights))
    assert np.abs(counts / 2000 - shares).max() < 0.08


def test_each_sample_has_its_own_randomness() -> None:
    first = [generator(0, i).random() for i in range(100)]
    assert len(set(first)) == 100
    assert first == [generator(0, i).random() for i in range(100)]
    assert generator(1, 5).random() != generator(0, 5).random()


def test_samples_are_made_ahead_in_order_and_errors_come_out() -> None:
    made: list[int] = []

    def make(index: int) -> int:
        made.append(index)
        if index == 7:
            raise ValueError("bad sample 7")
        return index * 10

    ahead = Ahead(make, iter([[range(0, 2), range(2, 3)], [range(3, 5)], [range(5, 8)]]), threads=2)
    assert ahead.next() == [[0, 10], [20]]
    assert ahead.next() == [[30, 40]]
    with pytest.raises(ValueError, match="bad sample 7"):
        ahead.next()
    ahead.close()
    assert sorted(made) == list(range(8)), "each sample once"


@given(st.integers(2, 500), st.integers(0, 400), st.floats(0, 1))
def test_learning_rate_rises_then_falls_and_ends_where_asked(steps: int, warmup: int, final: float) -> None:
    warmup = min(warmup, steps - 1)
    values = [lr_factor(s, steps=steps, warmup_steps=warmup, final=final) for s in range(steps)]
    assert all(0 < v <= 1 or final == 0 for v in values)
    assert np.all(np.diff(values[:warmup]) > 0) and np.all(np.diff(values[warmup:]) <= 1e-12)
    if warmup:
        assert values[0] == pytest.approx(1 / warmup) and values[warmup - 1] == 1.0
    if steps - warmup > 1:
        assert values[warmup] == 1.0, "no fall right after the warm-up"
        assert values[-1] == pytest.approx(final, abs=1e-12)
        middle = warmup + (steps - 1 - warmup) / 2
        if middle == int(middle):
            assert values[int(middle)] == pytest.approx(final + (1 - final) / 2)


def test_running_mean_is_the_formula_and_gives_the_weights_back_exactly() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    mean = RunningMean(model, 0.9)
    expected = model.weight.detach().clone()
    for update in range(1, 30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        mean.update(model)
        decay = min(0.9, update / (update + 9))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    before, pointer = model.weight.detach().clone(), model.weight.data_ptr()
    with mean.applied(model):
        assert torch.allclose(model.weight, expected, atol=1e-6)
    assert torch.equal(model.weight, before) and model.weight.data_ptr() == pointer
    assert list(mean.values) == ["weight"]
    other = RunningMean(nn.Linear(3, 2), 0.9)
    other.model = None  # type: ignore[attr-defined]
    other.values.setdefault("weight", torch.zeros(2, 3))
    other.load(mean.tensors)
    assert other.updates == 29 and torch.equal(other.values["weight"], mean.values["weight"])


def test_only_matrices_and_kernels_are_decayed() -> None:
    module = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4)})
    module.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 4)))
    module["fc"].weight.requires_grad_(False)
    groups = parameter_groups(module, 0.1, 0.05)
    decayed, free = groups
    assert decayed["weight_decay"] == 0.05 and [p is module["conv"].weight for p in decayed["params"]] == [True]
    assert free["weight_decay"] == 0.0 and {id(p) for p in free["params"]} == {
        id(module.cls_token), id(module["conv"].bias), id(module["norm"].weight), id(module["norm"].bias), id(module["fc"].bias)}
    assert parameter_groups(module["fc"].requires_grad_(False), 0.1, 0.05) == []


def test_a_bounded_map_holds_no_more_than_it_may_and_keeps_the_order() -> None:
    from concurrent.futures import ThreadPoolExecutor

    begun: list[int] = []

    def double(i: int) -> int:
        begun.append(i)
        if i == 7:
            raise ValueError("seven")
        return 2 * i

    with ThreadPoolExecutor(3) as pool:
        found = bounded_map(pool, double, iter(range(20)), 4)
        assert next(found) == 0
        pool.submit(lambda: None).result()  # the pool's queue has run empty
        assert len(begun) <= 4
        assert [next(found) for _ in range(6)] == [2, 4, 6, 8, 10, 12]
        with pytest.raises(ValueError, match="seven"):
            next(found)
        assert list(bounded_map(pool, str, [], 4)) == [] and list(bounded_map(pool, str, [1], 4)) == ["1"]


@pytest.mark.parametrize("kind", ["dict", "local", "remote"])
def test_states_come_back_whole_and_damage_is_told(kind: str, tmp_path: Path) -> None:
    store = DictStore() if kind == "dict" else LocalStore(str(tmp_path)) if kind == "local" else \
        FsspecStore(f"memory://states-{id(tmp_path)}/out")
    assert load_last(store) is None
    lost = save_best(store, 1, {"step": 1})
    best = save_best(store, 2, {"step": 2, "w": torch.arange(3.0)})
    assert load_best(store, {"best_state": lost}) == {"step": 1}, "until a newest state names another, it is there"
    for step in (3, 12):
        save_last(store, step, {"step": step, "w": torch.full((2, 2), float(step), dtype=torch.bfloat16), "none": None}, best)
    state = load_last(store)
    assert state is not None and state["step"] == 12 and state["w"].dtype == torch.bfloat16 and bool((state["w"] == 12).all())
    found = sorted(key for key, _ in store.list("_dinoray/states"))
    last = found[1]
    assert found == [best["key"], last, "_dinoray/states/last.json"] and "/last-000000012-" in last
    assert load_best(store, {"best_state": best})["w"].tolist() == [0, 1, 2]
    for wrong in ({"best_state": lost}, {"best_state": {}}, {}):
        with pytest.raises(OutputDamaged, match="best state of the training is missing"):
            load_best(store, wrong)
    store.put(best["key"], b"torn")
    with pytest.raises(OutputDamaged, match="not what was written"):
        load_best(store, {"best_state": best})
    store.put(last, store.get(last)[:-1])
    with pytest.raises(OutputDamaged, match="not what was written"):
        load_last(store)
    store.delete(last)
    with pytest.raises(OutputDamaged, match="missing"):
        load_last(store)
    store.put("_dinoray/states/last.json", b"{}")
    with pytest.raises(OutputDamaged, match="cannot be read"):
        load_last(store)


def test_a_state_of_the_same_step_never_writes_over_the_one_that_is_pointed_at(tmp_path: Path) -> None:
    """A training that ends where a state is due saves that step twice: killed between the second and its pointer, it has the
    first."""
    store = LocalStore(str(tmp_path))
    save_last(store, 8, {"ended": ""}, {})
    pointer = store.get("_dinoray/states/last.json")
    save_last(store, 8, {"ended": "steps"}, {})
    store.put("_dinoray/states/last.json", pointer)
    with pytest.raises(OutputDamaged, match="missing"):
        load_last(store)  # the older one was dropped only after the pointer: put back by hand, it points nowhere
    save_last(store, 8, {"ended": ""}, {})
    kept = {key for key, _ in store.list("_dinoray/states")}
    plain = store.put
    store.put = lambda key, data: plain(key, data) if key.endswith(".pt") else (_ for _ in ()).throw(OSError(5, "killed"))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="killed"):
        save_last(store, 8, {"ended": "steps"}, {})
    store.put = plain  # type: ignore[method-assign]
    assert kept < {key for key, _ in store.list("_dinoray/states")} and load_last(store) == {"ended": ""}


def test_a_state_runs_no_code(tmp_path: Path) -> None:
    import hashlib
    import json
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    store, sink = LocalStore(str(tmp_path / "out")), io.BytesIO()
    torch.save({"x": Evil()}, sink)
    store.put("_dinoray/states/last-1.pt", sink.getvalue())
    store.put("_dinoray/states/last.json", json.dumps({"key": "_dinoray/states/last-1.pt", "sha256":
                                                       hashlib.sha256(sink.getvalue()).hexdigest()}).encode())
    with pytest.raises(pickle.UnpicklingError):
        load_last(store)
    assert not (tmp_path / "owned").exists()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard's own reader shows them."""
    board = EventAccumulator(str(folder))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_the_board_shows_each_step_once_over_kills(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    for begin, end, offset in ((0, 5, 0.0), (2, 6, 100.0), (4, 8, 200.0)):  # killed at 5, resumed from 2, killed at 6, from 4
        journal = Journal(store, Progress(step=begin), 8, 1)
        for step in range(begin + 1, end + 1):
            row = {"step": step, "loss": step + offset, "lr": 0.1, "grad_norm": 1.0, "samples_per_s": 2.0}
            journal.add(row, Progress(step=step))
            if step % 2 == 0:
                journal.keep()
        journal.add({"step": end, "val_loss": 7.0 + end}, Progress(step=end))
        journal.close()
    assert points(tmp_path / "tensorboard", "train/loss") == [(1, 1.0), (2, 2.0), (3, 103.0), (4, 104.0), (5, 205.0), (6, 206.0),
                                                              (7, 207.0), (8, 208.0)]
    assert points(tmp_path / "tensorboard", "validation/loss") == [(8, 15.0)]
    assert {math.isclose(v, 0.1, rel_tol=1e-6) for _, v in points(tmp_path / "tensorboard", "train/lr")} == {True}


def test_the_board_reaches_a_remote_output(tmp_path: Path) -> None:
    store = DictStore()
    journal = Journal(store, Progress(), 4, 1)
    journal.add({"step": 1, "loss": 3.0}, Progress(step=1))
    journal.keep()
    assert not any(key.startswith("tensorboard/") and not data for key, data in store.objects.items())
    for key, data in store.objects.items():
        if key.startswith("tensorboard/"):
            (tmp_path / key.rsplit("/", 1)[-1]).write_bytes(data)
    journal.close()
    assert points(tmp_path, "train/loss") == [(1, 3.0)]


def test_a_state_that_is_replaced_while_it_is_read_is_read_anew(tmp_path: Path) -> None:
    class Racing(LocalStore):
        """The first state opened is replaced by a newer one just before."""

        raced = False

        def open(self, key: str):
            if not self.raced:
                self.raced = True
                save_last(self, 2, {"step": 2}, {})
            return super().open(key)

    store = Racing(str(tmp_path))
    save_last(store, 1, {"step": 1}, {})
    assert load_last(store) == {"step": 2}
    next((tmp_path / "_dinoray/states").glob("last-000000002-*.pt")).unlink()
    with pytest.raises(OutputDamaged, match="a saved state is missing"):
        load_last(store)
