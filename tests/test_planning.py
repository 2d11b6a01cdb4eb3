"""Planning: one streamed listing gives the digest, the duplicates and the sample; a resume compares listings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray import planning
from dinoray.errors import BadRequest, ChangedRequest
from dinoray.io.items import FileRef, Item
from dinoray.planning import check_same_inputs, id_hash, spool_items, write_plan
from dinoray.units import Plan, PlanWriter
from tests.runs import DictStore, make_item


def plan_of(items: list[Item], max_items: int = 4) -> Plan:
    store = DictStore()
    with spool_items(iter(items)) as spool:
        write_plan(spool, PlanWriter(store, "_dinoray", "f", max_items=max_items, max_bytes=10**9), root="/in")
    return Plan(store)


NAMES = st.lists(st.text("abcé/ ", min_size=1, max_size=3), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(names=NAMES, spool_rows=st.integers(1, 9))
def test_rows_come_back_in_order_and_all_items_of_a_repeated_id_are_flagged(names: list[str], spool_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SPOOL_ROWS", spool_rows)
        with spool_items(make_item(n, size=i) for i, n in enumerate(names)) as spool:
            rows = [row for row, _ in spool.rows()]
    assert [row["item_id"] for row in rows] == names
    assert [row["sizes"] for row in rows] == [[i] for i in range(len(names))]
    repeated = {n for n in names if names.count(n) > 1}
    assert spool.duplicates.keys() == repeated
    assert {row["item_id"] for row in rows if (row["problem"] or "").startswith("duplicate_id: ")} == repeated
    assert (spool.num_items, spool.num_bytes) == (len(names), sum(range(len(names))))


def test_equal_hashes_of_different_ids_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "id_hash", lambda item_id: 7)
    with spool_items([make_item("a"), make_item("b"), make_item("c"), make_item("b")], sample=2) as spool:
        assert spool.duplicates.keys() == {"b"}


def test_a_listing_without_items_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="no image was found"):
        spool_items(iter(()))


GROUPED = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["g", "h", ""])), min_size=1, max_size=40, unique=True)


@settings(deadline=None, max_examples=60)
@given(listing=GROUPED, sample=st.integers(1, 5), spool_rows=st.integers(1, 7), random=st.randoms())
def test_the_sample_is_the_smallest_hashes_whatever_the_order(listing: list, sample: int, spool_rows: int,
                                                                  random) -> None:
    items = [make_item(f"{group}{i}", group=group) for i, group in listing]
    shuffled = random.sample(items, len(items))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SPOOL_ROWS", spool_rows)
        chosen = []
        for order in (items, shuffled):
            with spool_items(order, sample=sample) as spool:
                rows = [row for row, _ in spool.sampled()]
                assert [r["group"] for r in rows] == sorted(r["group"] for r in rows)
                positions = [[item.item_id for item in order].index(r["item_id"]) for r in rows]
                for group in {r["group"] for r in rows}:
                    mine = [p for p, r in zip(positions, rows, strict=True) if r["group"] == group]
                    assert mine == sorted(mine), "listing order within a group"
                chosen.append({r["item_id"] for r in rows})
    expected: set[str] = set()
    for group in {item.group for item in items}:
        members = sorted((item.item_id for item in items if item.group == group), key=id_hash)
        expected |= set(members[:sample])
    assert chosen == [expected, expected]


def test_items_with_a_problem_are_not_sampled() -> None:
    items = [replace(make_item(f"{i}", group="g"), problem="bad_id: x" if i % 2 else None) for i in range(10)]
    items += [make_item("dup", group="g"), make_item("dup", group="g")]
    with spool_items(items, sample=100) as spool:
        assert [row["item_id"] for row, _ in spool.sampled()] == ["0", "2", "4", "6", "8"]


def test_a_listing_of_problems_only_has_an_empty_sample() -> None:
    with spool_items([replace(make_item("a"), problem="bad_id: x")], sample=5) as spool:
        assert list(spool.sampled()) == []
        assert spool.num_items == 1
    with spool_items([make_item("a"), make_item("b")]) as spool:
        assert list(spool.sampled()) == []


def test_metadata_columns_are_all_that_occur() -> None:
    items = [make_item("a", metadata={"Metadata_Well": "A01"}), make_item("b"),
             make_item("c", metadata={"Metadata_Plate": None, "Metadata_Añ": "x"})]
    with spool_items(items) as spool:
        assert spool.metadata_columns == ("Metadata_Añ", "Metadata_Plate", "Metadata_Well")


def test_the_spool_is_removed_with_its_context() -> None:
    with spool_items([make_item("a")]) as spool:
        file = spool._file
        assert not file.closed
    assert file.closed


# ---------------------------------------------------------------- the same inputs?

LISTING = [make_item(f"{i}", metadata={"Metadata_Well": "A01"}) for i in range(6)] + [make_item("x"), make_item("x")]


def changed(**fields: object) -> list[Item]:
    return [replace(LISTING[0], **fields), *LISTING[1:]]


@pytest.mark.parametrize(("listing", "needles"), [
    ([*LISTING, make_item("new")], ["1 added (e.g. new)"]),
    (LISTING[1:], ["1 removed (e.g. 0)"]),
    (changed(files=(FileRef("/in/0", 10, "2"),)), ["1 changed (e.g. 0)"]),
    (changed(files=(FileRef("/in/0", 11, "1"),)), ["1 changed (e.g. 0)"]),
    (changed(metadata={"Metadata_Well": "A02"}), ["1 changed (e.g. 0)"]),
    ([make_item("new"), *changed(group="other")[:-3]], ["1 added (e.g. new)", "1 changed (e.g. 0)", "2 removed"]),
    (LISTING[::-1], ["another order"]),
])
def test_what_differs_is_named(listing: list[Item], needles: list[str]) -> None:
    plan = plan_of(LISTING)
    with spool_items(listing) as spool, pytest.raises(ChangedRequest) as caught:
        check_same_inputs([plan], spool)
    for needle in needles:
        assert needle in caught.value.what
    assert "--out" in caught.value.todo


def test_the_same_listing_is_the_same() -> None:
    plan = plan_of(LISTING)
    with spool_items(iter(LISTING)) as spool:
        check_same_inputs([plan], spool)
    assert plan.num_items == len(LISTING)
    assert plan.facts["metadata_columns"] == ["Metadata_Well"]
    assert plan.facts["num_bytes"] == 10 * len(LISTING)


def test_a_lost_duplicate_is_a_change() -> None:
    plan = plan_of(LISTING)
    with spool_items(LISTING[:-1]) as spool, pytest.raises(ChangedRequest):
        check_same_inputs([plan], spool)
