"""The lease: receipts first, attempts marked before the work, reading ahead within bounds, errors that surface."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import ItemError, NoProgress, SystemicError, TransientError
from dinoray.io.items import Item
from dinoray.ledger import Ledger, Receipt
from dinoray.runners.base import DECODED_PER_FILE_BYTE, READ_AHEAD_PER_THREAD, Finish, Loaded, UnitLeft, UnitRunner
from dinoray.runners.local import run_units
from dinoray.runners.null import NullRunner
from dinoray.units import Plan, Unit
from tests.runs import DictStore, make_item, make_plan


class Echo(UnitRunner):
    """Writes the names of its items; `events` says what happened in which order."""

    def __init__(self, plan: Plan, ledger: Ledger, *, threads: int = 2, prefetch_bytes: int = 10**9,
                 bad: dict[str, Exception] | None = None, slow: float = 0.0):
        super().__init__(plan, ledger, decode_threads=threads, prefetch_bytes=prefetch_bytes)
        self.bad, self.slow = bad or {}, slow
        self.events: list[str] = []
        self.loaded = 0
        self.taken = 0
        self.most_ahead = 0
        self._lock = threading.Lock()

    def load(self, item: Item) -> str:
        with self._lock:
            self.loaded += 1
            self.most_ahead = max(self.most_ahead, self.loaded - self.taken)
        if self.slow:
            time.sleep(self.slow)
        if item.item_id in self.bad:
            raise self.bad[item.item_id]
        return item.item_id.upper()

    def process(self, unit: Unit, loaded: Iterable[Loaded], receipt: Receipt) -> Finish:
        self.events.append(f"start {unit.number}")
        parts = []
        for entry in loaded:
            with self._lock:
                self.taken += 1
            if entry.error is not None:
                receipt.quarantined += 1
                continue
            parts.append(entry.value)
        self.events.append(f"end {unit.number}")

        def finish() -> None:
            self.events.append(f"finish {unit.number}")
            receipt.rows = len(parts)
            receipt.objects.append(self.ledger.put_object(f"features/part-{unit.id}.parquet", ",".join(parts).encode()))

        return finish


def setup(items: int = 7, max_items: int = 2, **fields: object) -> tuple[DictStore, Plan, Ledger]:
    store = DictStore()
    plan = make_plan(store, [make_item(f"i{n}", **fields) for n in range(items)], max_items=max_items)
    store.order.clear()
    return store, plan, Ledger(store)


def features(store: DictStore) -> dict[str, bytes]:
    return {key: data for key, data in store.objects.items() if key.startswith("features/")}


def lease(runner: UnitRunner, numbers: Iterable[int]) -> list[Receipt]:
    try:
        return list(runner.lease(list(numbers)))
    finally:
        runner.close()


def test_one_receipt_per_unit_in_order() -> None:
    store, plan, ledger = setup()
    receipts = lease(Echo(plan, ledger), range(4))
    assert [r.number for r in receipts] == [0, 1, 2, 3]
    assert [r.unit for r in receipts] == plan.unit_ids
    assert [r.items for r in receipts] == [2, 2, 2, 1]
    assert all(r.attempt == 1 and r.fingerprint == plan.facts["fingerprint"] for r in receipts)
    assert all(r.seconds["wall"] >= 0 and r.memory["rss_peak"] > 0 for r in receipts)
    assert [ledger.receipt(u) for u in plan.unit_ids] == receipts
    assert sorted(features(store).values()) == [b"I0,I1", b"I2,I3", b"I4,I5", b"I6"]


def test_an_empty_lease() -> None:
    _, plan, ledger = setup()
    assert lease(Echo(plan, ledger), []) == []


def test_finished_units_are_returned_and_not_executed() -> None:
    store, plan, ledger = setup()
    done = lease(Echo(plan, ledger), [1, 3])
    before = dict(store.objects)
    runner = Echo(plan, ledger)
    receipts = lease(runner, range(4))
    assert [r.number for r in receipts] == [0, 1, 2, 3]
    assert receipts[1::2] == done
    assert [e for e in runner.events if e.startswith("start")] == ["start 0", "start 2"]
    assert runner.loaded == 4
    assert all(store.objects[key] == data for key, data in before.items())
    assert ledger.attempts() == dict.fromkeys(plan.unit_ids, 1)


def test_a_wholly_finished_lease_reads_no_item_and_yields_at_once() -> None:
    _, plan, ledger = setup()
    lease(Echo(plan, ledger), range(4))
    runner = Echo(plan, ledger)
    assert [r.number for r in lease(runner, range(4))] == [0, 1, 2, 3]
    assert (runner.loaded, runner.events) == (0, [])


def test_a_finished_unit_is_yielded_before_the_next_is_read() -> None:
    _, plan, ledger = setup()
    lease(Echo(plan, ledger), [0])
    runner = Echo(plan, ledger)
    stream = runner.lease([0, 1])
    assert next(stream).number == 0
    assert runner.loaded == 0
    stream.close()
    runner.close()


@settings(deadline=None, max_examples=25)
@given(numbers=st.lists(st.integers(0, 5), unique=True), done=st.sets(st.integers(0, 5)))
def test_any_lease_over_any_state(numbers: list[int], done: set[int]) -> None:
    store, plan, ledger = setup(items=6, max_items=1)
    if done:
        lease(Echo(plan, ledger), sorted(done))
    runner = Echo(plan, ledger)
    receipts = lease(runner, numbers)
    assert [r.number for r in receipts] == numbers
    assert [e for e in runner.events if e.startswith("start")] == [f"start {n}" for n in numbers if n not in done]
    assert ledger.done() == {plan.unit_ids[n] for n in {*numbers, *done}}
    assert set(ledger.attempts().values()) <= {1}


def test_the_order_of_a_commit() -> None:
    store, plan, ledger = setup(items=2, max_items=2)
    lease(Echo(plan, ledger), [0])
    unit = plan.unit_ids[0]
    assert store.order == [f"_dinoray/attempts/{unit}-1", f"features/part-{unit}.parquet",
                           f"_dinoray/receipts/{unit}.json"]


def test_the_attempt_is_marked_before_an_item_of_the_unit_is_read() -> None:
    store, plan, ledger = setup()

    class Watching(Echo):
        def load(self, item: Item) -> str:
            unit = plan.unit_ids[int(item.item_id[1:]) // 2]
            assert f"_dinoray/attempts/{unit}-1" in store.objects
            return super().load(item)

    assert len(lease(Watching(plan, ledger), range(4))) == 4


def test_item_errors_stay_with_their_item() -> None:
    store, plan, ledger = setup()
    receipts = lease(Echo(plan, ledger, bad={"i1": ItemError("nan", "x"), "i6": ItemError("decode", "x")}), range(4))
    assert [r.quarantined for r in receipts] == [1, 0, 0, 1]
    assert sorted(features(store).values()) == [b"", b"I0", b"I2,I3", b"I4,I5"]


@pytest.mark.parametrize("error", [SystemicError("denied"), ValueError("bug"), MemoryError("host")])
def test_other_errors_end_the_lease_and_leave_no_receipt(error: Exception) -> None:
    store, plan, ledger = setup()
    runner = Echo(plan, ledger, bad={"i4": error})
    found: list[Receipt] = []
    with pytest.raises(type(error), match=str(error)):
        try:
            found.extend(runner.lease(range(4)))
        finally:
            runner.close()
    assert plan.unit_ids[2] not in ledger.done()
    assert plan.unit_ids[0] in ledger.done()
    again = lease(Echo(plan, ledger), range(4))
    assert [r.number for r in again] == [0, 1, 2, 3]
    assert again[2].attempt == 2


def test_transient_trouble_leaves_its_unit_and_goes_on() -> None:
    _, plan, ledger = setup()
    results = lease(Echo(plan, ledger, bad={"i3": TransientError("throttled")}), range(4))
    assert [r.number for r in results] == [0, 1, 2, 3]
    assert isinstance(results[1], UnitLeft) and str(results[1].error) == "throttled"
    assert ledger.done() == set(plan.unit_ids) - {plan.unit_ids[1]}
    assert lease(Echo(plan, ledger), [1])[0].attempt == 2


def test_a_commit_that_meets_transient_trouble_leaves_its_unit() -> None:
    class Flaky(DictStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            if "/receipts/" in key and not self.failed:
                self.failed = True
                raise TransientError("503")
            return super().put_if_absent(key, data)

    store = Flaky()
    store.failed = False
    plan = make_plan(store, [make_item(f"i{n}") for n in range(4)], max_items=2)
    results = lease(Echo(plan, Ledger(store)), range(2))
    assert [type(r) for r in results] == [UnitLeft, Receipt]


@pytest.mark.parametrize("error", [SystemicError("denied"), TransientError("throttled")])
def test_only_starts_whose_process_died_count_towards_isolation(error: Exception) -> None:
    _, plan, ledger = setup()
    for _ in range(4):
        with contextlib.suppress(SystemicError):
            lease(Echo(plan, ledger, bad={"i0": error}), [0])
    runner = Echo(plan, ledger)
    runner.isolate = lambda *args: pytest.fail("isolated")
    assert lease(runner, [0])[0].attempt == 5


def test_the_third_start_after_two_deaths_is_isolated_and_reads_nothing_ahead() -> None:
    _, plan, ledger = setup()
    for _ in range(2):
        ledger.begin(plan.unit_ids[1])
    runner, calls = Echo(plan, ledger, threads=8), []

    def isolate(number: int, attempt: int, beat: Callable[[], None]) -> Receipt:
        beat()
        calls.append((number, attempt, runner.loaded))
        return ledger.commit(Receipt(plan.unit_ids[number], number, "f" * 16, items=2, attempt=attempt, isolated=True))

    runner.isolate = isolate
    receipts = lease(runner, range(4))
    assert calls == [(1, 3, 2)]  # the items of unit 0 were loaded here, none of 1, 2, 3
    assert [r.isolated for r in receipts] == [False, True, False, False]


def test_a_stop_request_ends_the_lease_between_units() -> None:
    store, plan, ledger = setup()
    runner = Echo(plan, ledger, threads=1)
    stream = runner.lease(range(4))
    first = next(stream)
    store.put("_dinoray/stop.json", b'{"mode": "drain"}')
    rest = list(stream)
    runner.close()
    begun = set(ledger.attempts())
    assert {r.unit for r in [first, *rest]} == begun == ledger.done()  # what was begun was finished
    assert len(begun) < 4


def test_an_error_of_the_writer_surfaces() -> None:
    class Full(DictStore):
        def put(self, key: str, data: bytes | memoryview) -> None:
            if key.startswith("features/"):
                raise SystemicError("cannot write the output: No space left on device")
            super().put(key, data)

    store = Full()
    plan = make_plan(store, [make_item(f"i{n}") for n in range(4)], max_items=2)
    with pytest.raises(SystemicError, match="No space"):
        lease(Echo(plan, Ledger(store)), range(2))
    assert Ledger(store).done() == set()


def test_reading_ahead_is_bounded_by_count() -> None:
    _, plan, ledger = setup(items=40, max_items=5)
    runner = Echo(plan, ledger, threads=3)
    stream = runner.lease(range(8))
    next(stream)
    time.sleep(0.1)
    bound = READ_AHEAD_PER_THREAD * 3
    assert runner.most_ahead <= bound + 1
    list(stream)
    runner.close()
    assert runner.most_ahead <= bound + 1  # and the one that is being handed over
    assert runner.loaded == 40


@pytest.mark.parametrize(("size", "prefetch", "most"), [(100, 100 * DECODED_PER_FILE_BYTE * 3, 4), (100, 1, 2),
                                                        (10**12, 10**9, 2)])
def test_reading_ahead_is_bounded_by_bytes_but_never_stops(size: int, prefetch: int, most: int) -> None:
    _, plan, ledger = setup(items=20, max_items=5, size=size)
    runner = Echo(plan, ledger, threads=8, prefetch_bytes=prefetch)
    assert len(lease(runner, range(len(plan)))) == len(plan)
    assert runner.most_ahead <= most
    assert runner.loaded == 20


def test_the_next_unit_is_read_while_one_is_worked_on() -> None:
    _, plan, ledger = setup(items=8, max_items=2)

    class Waiting(Echo):
        def process(self, unit: Unit, loaded: Iterable[Loaded], receipt: Receipt) -> Finish:
            finish = super().process(unit, loaded, receipt)
            if unit.number == 0:
                deadline = time.monotonic() + 5
                while self.loaded < 4 and time.monotonic() < deadline:
                    time.sleep(0.005)
                assert self.loaded >= 4, "the items of unit 1 are read before unit 0 is left"
            return finish

    assert len(lease(Waiting(plan, ledger), range(4))) == 4


def test_the_writer_works_beside_the_next_unit() -> None:
    _, plan, ledger = setup(items=4, max_items=2)
    reached = threading.Event()

    class Slow(Echo):
        def process(self, unit: Unit, loaded: Iterable[Loaded], receipt: Receipt) -> Finish:
            finish = super().process(unit, loaded, receipt)
            if unit.number == 1:
                reached.set()
                return finish

            def later() -> None:
                assert reached.wait(timeout=10), "unit 1 did not start while unit 0 was being stored"
                finish()

            return later

    assert [r.number for r in lease(Slow(plan, ledger), range(2))] == [0, 1]


def test_leaving_a_lease_early_stops_reading() -> None:
    _, plan, ledger = setup(items=40, max_items=2)
    runner = Echo(plan, ledger, threads=1, slow=0.002)
    stream = runner.lease(range(20))
    next(stream)
    stream.close()
    runner.close()
    loaded = runner.loaded
    assert loaded < 15
    time.sleep(0.05)
    assert runner.loaded == loaded


def test_a_kill_between_data_and_receipt_is_mended_by_the_same_bytes() -> None:
    class Dying(Ledger):
        def commit(self, receipt: Receipt) -> Receipt:
            if receipt.number == 1:
                raise KeyboardInterrupt
            return super().commit(receipt)

    store, plan, ledger = setup()
    with pytest.raises(KeyboardInterrupt):
        lease(Echo(plan, Dying(store)), range(4))
    orphan = f"features/part-{plan.unit_ids[1]}.parquet"
    data = store.objects[orphan]
    assert plan.unit_ids[1] not in ledger.done()
    store.objects[orphan] = b"torn"
    receipts = lease(Echo(plan, ledger), plan.pending(ledger.done()))
    assert ledger.done() == set(plan.unit_ids)
    assert store.objects[orphan] == data == b"I2,I3"
    assert [r.attempt for r in receipts if r.number == 1] == [2]


def test_two_runners_on_the_same_units_end_with_one_receipt_each() -> None:
    store, plan, ledger = setup(items=20, max_items=2)
    runners = [Echo(Plan(store), Ledger(store)) for _ in range(3)]
    found: list[list[Receipt]] = [[] for _ in runners]
    threads = [threading.Thread(target=lambda i=i: found[i].extend(lease(runners[i], range(10)))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert len(features(store)) == 10


# ---------------------------------------------------------------- in one process


def test_run_units_builds_the_runner_only_when_there_is_work() -> None:
    _, plan, ledger = setup()
    built: list[Echo] = []

    def make() -> Echo:
        built.append(Echo(plan, ledger))
        return built[-1]

    seen: list[int] = []
    run_units(make, lambda: [], lambda r: seen.append(r.number), rounds=1, where="x")
    assert built == []
    run_units(make, lambda: plan.pending(ledger.done()), lambda r: seen.append(r.number), rounds=1, where="x")
    assert seen == [0, 1, 2, 3]
    assert len(built) == 1


def test_units_that_were_left_come_again_in_the_next_round() -> None:
    _, plan, ledger = setup()
    runner = Echo(plan, ledger, bad={"i0": TransientError("503"), "i5": TransientError("503")})
    seen: list[int] = []

    def on_receipt(receipt: Receipt) -> None:
        seen.append(receipt.number)
        runner.bad.clear()

    run_units(lambda: runner, lambda: plan.pending(ledger.done()), on_receipt, rounds=1, where="x", pause_s=0)
    assert sorted(seen) == [0, 1, 2, 3]


def test_rounds_without_progress_end_the_run_with_the_last_trouble() -> None:
    _, plan, ledger = setup()
    runner = Echo(plan, ledger, bad={f"i{n}": TransientError(f"503 at i{n}") for n in range(7)})
    with pytest.raises(NoProgress, match="4 units are left after 2 rounds.*503"):
        run_units(lambda: runner, lambda: plan.pending(ledger.done()), print, rounds=2, where="x", pause_s=0)
    assert set(ledger.attempts().values()) == {2}


def test_a_round_in_which_every_unit_is_left_ends_early() -> None:
    _, plan, ledger = setup(items=40, max_items=1)
    runner = Echo(plan, ledger, threads=1, bad={f"i{n}": TransientError("down") for n in range(40)})
    with pytest.raises(NoProgress):
        run_units(lambda: runner, lambda: plan.pending(ledger.done()), print, rounds=1, where="x", pause_s=0)
    assert len(ledger.attempts()) < 15


def test_run_units_closes_the_runner_whatever_happens() -> None:
    _, plan, ledger = setup()
    closed: list[bool] = []

    class Closing(Echo):
        def close(self) -> None:
            closed.append(True)
            super().close()

    def stop(receipt: Receipt) -> None:
        raise RuntimeError("too many failures")

    with pytest.raises(RuntimeError, match="too many"):
        run_units(lambda: Closing(plan, ledger), lambda: [0, 1], stop, rounds=1, where="x")
    assert closed == [True]


def test_the_null_runner_only_keeps_the_books() -> None:
    store, plan, ledger = setup()
    runner = NullRunner(plan, ledger)
    first: Iterator[Receipt] = runner.lease([2])
    done = list(first)
    receipts = list(runner.lease(range(4)))
    assert receipts[2] == done[0]
    assert [r.items for r in receipts] == [2, 2, 2, 1]
    assert features(store) == {}
    assert ledger.attempts() == dict.fromkeys(plan.unit_ids, 1)
