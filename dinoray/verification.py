"""`verify`: is the output whole? Receipts against the plan, and what is stored against the receipts.

fast: one listing of features/ and dense/ compared with all receipts (names and sizes), Parquet footers (rows).
deep: every object is read and its sha256 compared; rows, ids and quarantine are matched with the plan.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.errors import BadRequest, OutputDamaged, SystemicError
from dinoray.io.stores import Store, open_store
from dinoray.ledger import Ledger, Receipt
from dinoray.units import Plan

DATA_FOLDERS = ("features", "dense")
_SHOWN = 5
_FOREIGN = "no receipt names"


def open_run(url: str) -> tuple[Store, Plan, Ledger]:
    """The store, plan and ledger of an output. Raises BadRequest when `url` holds none."""
    store = open_store(url)
    if not Plan.exists(store):
        started = store.exists("_dinoray/job.json")
        raise BadRequest("planning has not finished here" if started else "this is not an output of dinoray", where=url,
                         todo="run the command in _dinoray/job.json again" if started else "give the --out of a run")
    return store, Plan(store), Ledger(store)


def verify_fast(store: Store, plan: Plan, ledger: Ledger, *, write_success: bool) -> dict[str, Any]:
    """Check the output and return its totals; `write_success` stores them as `_SUCCESS`, or removes a stale one.

    Raises OutputDamaged listing what is missing, foreign, or of another size; an incomplete output counts.
    """
    try:
        totals = _check_fast(store, plan, ledger)
    except OutputDamaged:
        if write_success:
            store.delete("_SUCCESS")
        raise
    if write_success and not store.exists("_SUCCESS"):
        store.put("_SUCCESS", json.dumps(totals, indent=1, sort_keys=True).encode())
    return totals


def _check_fast(store: Store, plan: Plan, ledger: Ledger) -> dict[str, Any]:
    done = ledger.done()
    missing = [plan.unit_ids[n] for n in plan.pending(done)]
    if missing:
        raise OutputDamaged(f"{len(missing)} of {len(plan)} units are not done: {_some(missing)}", where=store.url,
                            todo="run the same command again: it does what is missing")
    expected: dict[str, int] = {}
    totals: dict[str, Any] = {"units": 0, "items": 0, "rows": 0, "row_items": 0, "without_objects": 0,
                              "quarantined": 0, "bytes": 0}
    problems: list[str] = []
    tables: list[tuple[str, int]] = []
    for receipt in ledger.receipts(plan.unit_ids):
        totals["units"] += 1
        for name in ("items", "rows", "row_items", "quarantined"):
            totals[name] += getattr(receipt, name)
        totals["without_objects"] += len(receipt.without_objects)
        if receipt.items != receipt.row_items + len(receipt.without_objects) + receipt.quarantined:
            problems.append(f"unit {receipt.unit}: {receipt.items} inputs, but {receipt.row_items} with rows, "
                            f"{len(receipt.without_objects)} without objects and {receipt.quarantined} quarantined")
        for stored in receipt.objects:
            expected[stored.key] = stored.bytes
            totals["bytes"] += stored.bytes
            if stored.key.startswith("features/"):
                tables.append((stored.key, receipt.rows))
    if totals["items"] != plan.num_items:
        problems.append(f"the receipts hold {totals['items']} inputs, the plan {plan.num_items}")
    found = {key: size for folder in (*DATA_FOLDERS, f"{ledger.prefix}/quarantine") for key, size in store.list(folder)}
    problems += [f"missing: {key}" for key in expected if key not in found]
    problems += [f"{_FOREIGN}: {key}" for key in found if key not in expected]
    problems += [f"{key}: {found[key]} bytes, the receipt says {size}" for key, size in expected.items()
                 if key in found and found[key] != size]
    if not problems:
        with ThreadPoolExecutor(8) as pool:
            problems += [p for p in pool.map(lambda t: _footer(store, *t), tables) if p]
    _raise_if(problems, store)
    totals["fingerprint"] = plan.facts["fingerprint"]
    return totals


def verify_deep(store: Store, plan: Plan, ledger: Ledger) -> dict[str, Any]:
    """As `verify_fast`, then read everything: checksums, and plan = rows + quarantined, disjoint, per unit.

    Raises OutputDamaged listing every difference.
    """
    try:
        return _check_deep(store, plan, ledger)
    except OutputDamaged:
        with contextlib.suppress(SystemicError):  # a read-only copy can be checked too
            store.delete("_SUCCESS")
        raise


def _check_deep(store: Store, plan: Plan, ledger: Ledger) -> dict[str, Any]:
    totals = _check_fast(store, plan, ledger)
    with ThreadPoolExecutor(4) as pool:
        pairs = zip(plan.units(), ledger.receipts(plan.unit_ids), strict=True)
        problems: list[str] = []
        while some := list(islice(pairs, 64)):  # `map` takes all it is given at once, and a plan may be large
            problems += [p for found in pool.map(lambda pair: _deep_unit(store, *pair), some) for p in found]
    _raise_if(problems, store)
    return totals


def _footer(store: Store, key: str, expected: int) -> str | None:
    with store.open(key) as file:
        try:
            rows = pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError) as error:
            return f"{key}: its footer cannot be read ({error})"
    return None if rows == expected else f"{key}: {rows} rows, the receipt says {expected}"


def _deep_unit(store: Store, unit: Any, receipt: Receipt) -> list[str]:
    problems: list[str] = []
    with_rows: set[str] = set()
    quarantined: list[str] = []
    for stored in receipt.objects:
        data = store.get(stored.key)
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            problems.append(f"{stored.key}: the content has changed (sha256 differs from the receipt)")
        elif stored.key.startswith("features/"):
            with_rows = set(pq.read_table(io.BytesIO(data), columns=["item_id"])["item_id"].to_pylist())
        elif "/quarantine/" in stored.key:
            quarantined = pq.read_table(io.BytesIO(data), columns=["item_id"])["item_id"].to_pylist()
    if problems:
        return problems
    planned = [item.item_id for item in unit.items]
    if with_rows & set(quarantined):
        problems.append(f"unit {unit.id}: both rows and quarantine: {_some(sorted(with_rows & set(quarantined)))}")
    if sorted([*with_rows, *receipt.without_objects, *quarantined]) != sorted(planned):
        problems.append(f"unit {unit.id}: rows, items without objects and quarantine do not add up to the {len(planned)} "
                        "planned inputs")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _raise_if(problems: list[str], store: Store) -> None:
    if problems:
        todo = ["delete the receipts of the units named and run the same command again"]
        if any(problem.startswith(_FOREIGN) for problem in problems):
            todo = ["remove what no receipt names", *([] if all(p.startswith(_FOREIGN) for p in problems) else todo)]
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise OutputDamaged(f"the output differs from its receipts in {len(problems)} places:\n  "
                            + "\n  ".join(problems[:20]) + more, where=store.url,
                            todo="; ".join(todo))
