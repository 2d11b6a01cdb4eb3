"""Units and the plan: every item once, never across plates, within the limits, the same ids for the same request."""

from __future__ import annotations

import io
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray import units
from dinoray.errors import OutputDamaged
from dinoray.io.items import FileRef, Item
from dinoray.units import Plan, PlanWriter, fingerprint_of, item_digest, item_row
from tests.runs import DictStore, make_item, make_plan

TEXT = st.text("aé/\0\n \u4e2d\U0001f52c", min_size=1, max_size=4)
FILES = st.builds(FileRef, TEXT, st.integers(-1, 2**50), TEXT)
ITEMS = st.builds(Item, TEXT, st.lists(FILES, max_size=3).map(tuple), st.lists(TEXT, max_size=3).map(tuple), TEXT,
                  st.none() | TEXT, st.dictionaries(TEXT, st.none() | TEXT, max_size=3), st.none() | TEXT)


@settings(deadline=None, max_examples=40)
@given(items=st.lists(ITEMS, max_size=4))
def test_items_survive_the_plan(items: list[Item]) -> None:
    items = [replace(item, item_id=f"{i}{item.item_id}") for i, item in enumerate(items)]
    plan = make_plan(DictStore(), items, max_items=1)
    found = [item for unit in plan.units() for item in unit.items]
    assert sorted(found, key=lambda item: item.item_id) == sorted(items, key=lambda item: item.item_id)
    assert plan.num_items == len(items)


PLATED = st.lists(st.tuples(st.sampled_from([None, "p1", "p2", "p3", ".."]), st.integers(-1, 60)), max_size=40)


@settings(deadline=None, max_examples=60)
@given(listing=PLATED, max_items=st.integers(1, 6), max_bytes=st.integers(1, 100), max_open=st.integers(1, 4))
def test_units_keep_plates_limits_and_order(listing: list, max_items: int, max_bytes: int, max_open: int) -> None:
    items = [make_item(f"{i:03d}", size=size, plate=plate) for i, (plate, size) in enumerate(listing)]
    store = DictStore()
    writer = PlanWriter(store, "x", "f", max_items=max_items, max_bytes=max_bytes, max_open=max_open)
    for item in items:
        writer.add(item_row(item), item_digest(item))
        assert len(writer._open) <= max_open
    writer.seal()
    plan = Plan(store, "x")
    seen: dict[str | None, list[str]] = {}
    for unit in plan.units():
        assert {item.plate for item in unit.items} == {unit.plate}
        assert 1 <= len(unit.items) <= max_items
        assert sum(item.num_bytes for item in unit.items) <= max_bytes or len(unit.items) == 1
        seen.setdefault(unit.plate, []).extend(item.item_id for item in unit.items)
    expected: dict[str | None, list[str]] = {}
    for item in items:
        expected.setdefault(item.plate, []).append(item.item_id)
    assert seen == expected
    assert plan.index["num_bytes"].to_pylist() == [sum(i.num_bytes for i in u.items) for u in plan.units()]
    assert len(set(plan.unit_ids)) == len(plan.unit_ids)


def test_one_plate_in_listing_order_fills_its_units() -> None:
    plan = make_plan(DictStore(), [make_item(f"{i}") for i in range(7)], max_items=3)
    assert [[i.item_id for i in unit.items] for unit in plan.units()] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    plan = make_plan(DictStore(), [make_item(f"{i}", size=5) for i in range(5)], max_items=99, max_bytes=10)
    assert [len(unit.items) for unit in plan.units()] == [2, 2, 1]


def test_an_item_larger_than_a_unit_gets_its_own() -> None:
    plan = make_plan(DictStore(), [make_item("a", size=1), make_item("big", size=100), make_item("b", size=1)],
                     max_items=9, max_bytes=10)
    assert [[i.item_id for i in unit.items] for unit in plan.units()] == [["a"], ["big"], ["b"]]


# ---------------------------------------------------------------- ids

ONE = Item("a", (FileRef("/in/a", 5, "1"),), ("ch1",), "g", "p", {"Metadata_Well": "A01"})
OTHERS = {
    "id": replace(ONE, item_id="b"), "uri": replace(ONE, files=(FileRef("/in/b", 5, "1"),)),
    "size": replace(ONE, files=(FileRef("/in/a", 6, "1"),)), "version": replace(ONE, files=(FileRef("/in/a", 5, "2"),)),
    "channel": replace(ONE, channels=("ch2",)), "group": replace(ONE, group="h"), "plate": replace(ONE, plate=None),
    "metadata": replace(ONE, metadata={"Metadata_Well": "A02"}), 
    "no value": replace(ONE, metadata={"Metadata_Well": None}),
    "more files": replace(ONE, files=ONE.files * 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_identifies_an_item_changes_its_digest_and_its_unit(name: str) -> None:
    assert item_digest(ONE) != item_digest(OTHERS[name])
    first, second = (make_plan(DictStore(), [item]).unit_ids for item in (ONE, OTHERS[name]))
    assert first != second


def test_a_problem_changes_the_unit_but_not_the_item() -> None:
    flagged = replace(ONE, problem="duplicate_id")
    assert item_digest(flagged) == item_digest(ONE)  # so that resume compares what the listing saw
    assert make_plan(DictStore(), [flagged]).unit_ids != make_plan(DictStore(), [ONE]).unit_ids


def test_ids_depend_on_the_request_only(tmp_path) -> None:
    items = [make_item(f"{i}", plate=f"p{i % 2}") for i in range(9)]
    store = DictStore()
    first = make_plan(store, items)
    assert make_plan(DictStore(), items, prefix="elsewhere").unit_ids == first.unit_ids
    assert make_plan(DictStore(), items, other_fact=5).unit_ids == first.unit_ids
    assert not set(make_plan(DictStore(), items, fingerprint="e" * 16).unit_ids) & set(first.unit_ids)
    again = DictStore()
    make_plan(again, items)
    assert again.objects == store.objects, "the plan files themselves are the same bytes"


def test_the_scaling_of_a_group_enters_only_its_units() -> None:
    items = [make_item("a", plate="p", group="p"), make_item("b", plate="q", group="q")]

    def ids(table: dict[str, str]) -> list[str]:
        store = DictStore()
        writer = PlanWriter(store, "x", "f", max_items=5, max_bytes=99,
                            group_salt=lambda g: repr([table[n] for n in g]))
        for item in items:
            writer.add(item_row(item), item_digest(item))
        writer.seal()
        return Plan(store, "x").unit_ids

    before, after = ids({"p": "1", "q": "1"}), ids({"p": "1", "q": "2"})
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_fingerprint_is_of_content_not_order() -> None:
    assert fingerprint_of({"a": 1, "b": {"c": 2}}) == fingerprint_of({"b": {"c": 2}, "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 1.5})
    assert len(fingerprint_of({})) == 16


# ---------------------------------------------------------------- files of the plan


@pytest.mark.parametrize("key", ["_dinoray/plan/index.parquet", "_dinoray/plan/00000.parquet"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 500])
def test_plan_files_that_cannot_be_read_are_damage_by_name(key: str, content: bytes) -> None:
    store = DictStore()
    make_plan(store, [make_item("a")])
    store.objects[key] = content
    with pytest.raises(OutputDamaged, match="the plan cannot be read") as caught:
        Plan(store).unit(0)
    assert caught.value.where.endswith(key)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 6, 7])
def test_unit_u_is_row_group_u_mod_n_of_file_u_div_n(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(units, "UNITS_PER_FILE", 3)
    store = DictStore()
    plan = make_plan(store, [make_item(f"{i}") for i in range(count)], max_items=1)
    files = sorted(key for key in store.objects if not key.endswith("index.parquet"))
    assert files == [f"_dinoray/plan/{n:05d}.parquet" for n in range(-(-count // 3))]
    for number in range(count):
        file = pq.ParquetFile(io.BytesIO(store.objects[files[number // 3]]))
        assert file.read_row_group(number % 3)["item_id"].to_pylist() == [f"{number}"]
        assert plan.unit(number).items[0].item_id == f"{number}"
    assert sum(pq.ParquetFile(io.BytesIO(store.objects[f])).num_row_groups for f in files) == count
    assert store.order[-1] == "_dinoray/plan/index.parquet", "the index seals the plan, so it comes last"


def test_a_thousand_and_one_units_make_two_files() -> None:
    store = DictStore()
    plan = make_plan(store, (make_item(f"{i}") for i in range(1001)), max_items=1)
    assert [key for key in store.order if "index" not in key] == ["_dinoray/plan/00000.parquet",
                                                                   "_dinoray/plan/00001.parquet"]
    assert len(plan) == 1001
    assert [plan.unit(n).items[0].item_id for n in (0, 999, 1000)] == ["0", "999", "1000"]


def test_an_unsealed_plan_does_not_exist() -> None:
    store = DictStore()
    writer = PlanWriter(store, "_dinoray", "f", max_items=1, max_bytes=1)
    writer.add(item_row(ONE), item_digest(ONE))
    assert not Plan.exists(store)
    writer.seal()
    assert Plan.exists(store)


def test_an_empty_plan() -> None:
    plan = make_plan(DictStore(), [], note="x")
    assert (len(plan), plan.num_items, plan.pending([]), list(plan.units())) == (0, 0, [], [])
    assert plan.facts["num_units"] == 0
    assert plan.facts["note"] == "x"


@settings(deadline=None, max_examples=30)
@given(done=st.sets(st.integers(0, 9)))
def test_pending_is_plan_minus_done_in_plan_order(done: set[int]) -> None:
    plan = make_plan(DictStore(), [make_item(f"{i}") for i in range(10)], max_items=1)
    ids = {plan.unit_ids[n] for n in done} | {"a unit of another plan"}
    assert plan.pending(iter(ids)) == [n for n in range(10) if n not in done]


def test_index_and_file_that_disagree_are_damage() -> None:
    store, other = DictStore(), DictStore()
    make_plan(store, [make_item("a"), make_item("b")], max_items=2)
    make_plan(other, [make_item("a")], max_items=2)
    store.objects["_dinoray/plan/00000.parquet"] = other.objects["_dinoray/plan/00000.parquet"]
    with pytest.raises(OutputDamaged, match="another number of items"):
        Plan(store).unit(0)
