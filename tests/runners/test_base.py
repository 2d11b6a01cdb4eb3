"""The lease: receipts first, attempts marked before the work, reading ahead within bounds, errors that surface."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import ItemError, SystemicError, TransientError
from dinoray.io.items import Item
from dinoray.ledger import Ledger, Receipt
from dinoray.runners.base import DECODED_PER_FILE_BYTE, READ_AHEAD_PER_THREAD, Finish, Loaded, UnitRunner
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


@pytest.mark.parametrize("error", [TransientError("throttled"), SystemicError("denied"), ValueError("bug"),
                                   MemoryError("host")])
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
    run_units(make, [], lambda r: seen.append(r.number))
    assert built == []
    run_units(make, plan.pending([]), lambda r: seen.append(r.number))
    assert seen == [0, 1, 2, 3]


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
        run_units(lambda: Closing(plan, ledger), [0, 1], stop)
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
