"""The ledger: one receipt per unit, the first one counts, and nothing else says that a unit is done."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import OutputDamaged
from dinoray.io.stores import LocalStore, Store
from dinoray.ledger import Ledger, Receipt, StoredObject, Tally
from tests.runs import DictStore

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=10)
COUNTS = st.dictionaries(TEXT, st.integers(0, 2**60), max_size=3)
RECEIPTS = st.builds(
    Receipt, unit=TEXT, number=st.integers(0, 10**9), fingerprint=TEXT, plate=st.none() | TEXT,
    objects=st.lists(st.builds(StoredObject, TEXT, st.integers(0, 2**60), TEXT), max_size=3), items=st.integers(0, 9),
    rows=st.integers(0, 9), row_items=st.integers(0, 9), quarantined=st.integers(0, 9), reasons=COUNTS,
    seconds=st.dictionaries(TEXT, st.floats(0, 1e6), max_size=3), bytes_read=st.integers(0, 2**60), memory=COUNTS,
    numerics=st.fixed_dictionaries({"degraded": st.booleans()}), attempt=st.integers(1, 9), worker=COUNTS)


@pytest.fixture(params=["dict", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return DictStore() if request.param == "dict" else LocalStore(tmp_path / "out")


def receipt(unit: str, **fields: object) -> Receipt:
    return Receipt(unit=unit, number=0, fingerprint="f", **fields)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(RECEIPTS)
def test_a_receipt_reads_back(written: Receipt) -> None:
    assert Receipt.from_json(written.to_json()) == written
    assert Receipt.from_json(written.to_json().encode()) == written


def test_attempts_are_numbered_without_gaps_by_many_threads(store: Store) -> None:
    ledger = Ledger(store)
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: ledger.begin("a-unit"), range(12)))
    assert sorted(numbers) == list(range(1, 13))
    ledger.begin("other")
    assert ledger.attempts() == {"a-unit": 12, "other": 1}


def test_the_first_receipt_counts(store: Store) -> None:
    ledger = Ledger(store)
    assert ledger.receipt("u") is None
    assert ledger.done() == set()
    first, second = receipt("u", rows=1), receipt("u", rows=2)
    assert ledger.commit(first) is first
    assert ledger.commit(second) == first
    assert ledger.receipt("u") == first
    assert ledger.done() == {"u"}


def test_exactly_one_of_many_commits_wins(store: Store) -> None:
    ledger = Ledger(store)
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda n: ledger.commit(receipt("u", rows=n)), range(16)))
    assert len({r.rows for r in kept}) == 1
    assert ledger.receipt("u") == kept[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "{}", '{"objects": null}',
                                  '{"objects": [{"key": "a"}]}',
                                  '{"objects": [], "unit": "u"}', "\xff"])
def test_a_receipt_that_cannot_be_read_is_damage_with_its_key_and_what_to_do(text: str) -> None:
    ledger = Ledger(DictStore({"_dinoray/receipts/u.json": text.encode("latin-1")}))
    with pytest.raises(OutputDamaged) as caught:
        ledger.receipt("u")
    assert "_dinoray/receipts/u.json" in caught.value.where
    assert "delete this receipt" in caught.value.todo


def test_a_receipt_of_unknown_fields_is_damage() -> None:
    written = receipt("u").to_json().replace('"unit"', '"a_new_field": 1,\n "unit"')
    with pytest.raises(OutputDamaged, match="a_new_field"):
        Ledger(DictStore({"_dinoray/receipts/u.json": written.encode()})).receipt("u")


def test_a_receipt_that_vanishes_during_a_commit_is_damage() -> None:
    class Vanishing(DictStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            return False

    with pytest.raises(OutputDamaged, match="is gone"):
        Ledger(Vanishing()).commit(receipt("u"))


def test_receipts_come_in_the_order_asked_and_a_missing_one_is_said(store: Store) -> None:
    ledger = Ledger(store)
    names = [f"{i:02d}" for i in range(40)]
    for name in reversed(names):
        ledger.commit(receipt(name))
    wanted = names[::3] + names[1::3]
    assert [r.unit for r in ledger.receipts(wanted)] == wanted
    assert list(ledger.receipts([])) == []
    with pytest.raises(OutputDamaged, match="no receipt") as caught:
        list(ledger.receipts([*names, "none"]))
    assert "none" in caught.value.where
    assert "run the same command again" in caught.value.todo


def test_more_receipts_than_one_chunk() -> None:
    ledger = Ledger(DictStore())
    names = [f"{i:05d}" for i in range(1030)]
    for name in names:
        ledger.commit(receipt(name))
    assert [r.unit for r in ledger.receipts(names)] == names


def test_stored_objects_say_what_was_stored(store: Store) -> None:
    for data in (b"", b"abc", memoryview(b"abcdef")[2:]):
        stored = Ledger(store).put_object("features/x.parquet", data)
        assert stored == StoredObject("features/x.parquet", len(data), hashlib.sha256(data).hexdigest())
        assert store.get("features/x.parquet") == bytes(data)


def test_quarantine_is_read_back_in_plan_order(store: Store) -> None:
    ledger, receipts = Ledger(store), []
    for unit, items in (("z", ["b", "ü"]), ("m", []), ("a", ["c"])):
        rows = [{"item_id": i, "uri": f"/{i}", "reason": "nan", "message": "no\nnumbers"} for i in items]
        objects = [ledger.put_quarantine(unit, rows)] if rows else []
        receipts.append(receipt(unit, quarantined=len(rows), objects=objects))
    table = ledger.quarantine(receipts)
    assert table["item_id"].to_pylist() == ["b", "ü", "c"]
    assert table["message"].to_pylist() == ["no\nnumbers"] * 3
    assert ledger.quarantine([]).num_rows == 0


def test_ledgers_of_two_prefixes_do_not_mix(store: Store) -> None:
    main, stats = Ledger(store), Ledger(store, "_dinoray/stats")
    stats.commit(receipt("s"))
    stats.begin("s")
    assert main.done() == set()
    assert main.attempts() == {}
    assert stats.done() == {"s"}


# ---------------------------------------------------------------- totals


@settings(deadline=None, max_examples=40)
@given(st.lists(RECEIPTS, max_size=6))
def test_the_tally_is_the_sum(receipts: list[Receipt]) -> None:
    tally = Tally()
    for each in receipts:
        tally.add(each)
    assert tally.units == len(receipts)
    for name in ("items", "rows", "quarantined", "bytes_read"):
        assert getattr(tally, name) == sum(getattr(r, name) for r in receipts)
    assert tally.bytes_written == sum(o.bytes for r in receipts for o in r.objects)
    assert sum(tally.reasons.values()) == sum(sum(r.reasons.values()) for r in receipts)
    assert tally.degraded_units == sum(r.numerics["degraded"] for r in receipts)
    assert tally.rss_peak == max([0, *(r.memory.get("rss_peak", 0) for r in receipts)])
    values = tally.as_dict()
    assert values["num_plates"] == len({r.plate for r in receipts if r.plate})
    assert all(bad > 0 for _, bad in values["plates"].values())


def tally_of(*plates: tuple[str | None, int, int]) -> Tally:
    tally = Tally()
    for plate, items, bad in plates:
        tally.add(receipt("u", plate=plate, items=items, quarantined=bad))
    return tally


@pytest.mark.parametrize(("plates", "limit", "stops"), [
    ([(None, 199, 199)], 0.1, False),  # too early to judge
    ([(None, 200, 20)], 0.1, False),  # at the limit is not above it
    ([(None, 200, 21)], 0.1, True),
    ([(None, 200, 1)], 0.0, True),
    ([(None, 200, 0)], 0.0, False),
    ([(None, 500, 500)], 1.0, False),
    ([("good", 10_000, 0), ("bad", 200, 21)], 0.1, True),  # one plate, though not overall
    ([("good", 10_000, 0), ("bad", 199, 199)], 0.1, False),
    ([("a", 100, 60), ("a", 100, 0)], 0.25, True),  # summed over the units of the plate
    ([("a", 100, 60), ("b", 100, 0)], 0.25, True),  # overall, though no plate has 200 items
])
def test_when_a_run_must_stop(plates: list, limit: float, stops: bool) -> None:
    message = tally_of(*plates).too_many_failures(limit)
    assert (message is not None) is stops


def test_the_message_names_the_plate_and_the_numbers() -> None:
    message = tally_of(("good", 10_000, 0), ("bad", 400, 100)).too_many_failures(0.1)
    assert message is not None
    assert all(part in message for part in ("bad", "100", "400", "25.0%", "10.0%"))
