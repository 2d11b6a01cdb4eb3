"""`verify`: is the output whole? Receipts against the plan, and what is stored against the receipts.

fast: one listing of the data folders compared with all receipts (names and sizes), Parquet footers (rows).
deep: every object is read and its sha256 compared; rows, ids and quarantine are matched with the plan.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.driver import at_work
from dinoray.errors import BadRequest, OutputDamaged, SystemicError
from dinoray.generations import Generation, generations, quarantined_now, replaced_reasons
from dinoray.io.prediction_grid import PredictionGrid
from dinoray.io.stores import Store, open_store
from dinoray.io.volume_arrays import check_arrays
from dinoray.io.volume_grid import VolumeGrid
from dinoray.label_units import object_keys
from dinoray.ledger import Ledger, Receipt
from dinoray.slabs import Slab, shard_keys
from dinoray.units import Plan, Unit
from dinoray.wording import plural

DATA_FOLDERS = ("features", "dense", "labels.zarr", "instances", "masks", "cells", "images")
TABLES = ("features/", "cells/")
"""Folders of tables whose rows are those of the receipts."""
_SHOWN = 5
_LINES, _DEEP_LINES = 20, 1000
"""Problems that are listed, fast and deep; more are counted."""
_FOREIGN = "no receipt names"


def open_run(url: str) -> tuple[Store, Plan, Ledger]:
    """The store, plan and ledger of an output. Raises BadRequest when `url` holds none."""
    store = open_store(url)
    if not Plan.exists(store):
        if training_record(store):
            raise BadRequest("this is the output of a training, which has no units", where=url,
                             todo=f"dinoray status {shlex.quote(url)} says where it stands; its result is the folder checkpoint")
        started = store.exists("_dinoray/job.json")
        busy = at_work(store)
        raise BadRequest("planning has not finished here" if started else "this is not an output of dinoray", where=url,
                         todo=f"wait for {busy}" if busy else
                         "run the command in _dinoray/job.json again" if started else "give the --out of a run")
    return store, Plan(store), Ledger(store)


def training_record(store: Store) -> dict[str, Any] | None:
    """job.json where the output is a training's, else None. Raises OutputDamaged when it cannot be read."""
    try:
        record = json.loads(store.get("_dinoray/job.json"))
        return record if str(record.get("kind", "")).startswith("train ") else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, AttributeError) as error:
        raise OutputDamaged(f"the record of the job cannot be read: {error!r}", where=f"{store.url}/_dinoray/job.json",
                            todo="restore it from a copy") from error


def verify_fast(store: Store, *, write_success: bool) -> dict[str, Any]:
    """Check the output and return its totals; `write_success` stores them as `_SUCCESS`, or removes a stale one.

    Raises OutputDamaged listing what is missing, foreign, or of another size; an incomplete output counts.
    """
    try:
        totals, _, problems = _check_fast(store)
        _raise_if(problems, store, _LINES)
    except OutputDamaged:
        if write_success:
            store.delete("_SUCCESS")
        raise
    if write_success and not store.exists("_SUCCESS"):
        store.put("_SUCCESS", json.dumps(totals, indent=1, sort_keys=True).encode())
    return totals


def verify_deep(store: Store) -> dict[str, Any]:
    """As `verify_fast`, then read everything: checksums, and plan = rows + quarantined, disjoint, per unit; a retry
    holds only items that were quarantined before it.

    Raises OutputDamaged listing every difference.
    """
    try:
        totals, parts, problems = _check_fast(store)
        problems += _check_deep(store, parts, {_named(problem) for problem in problems})
        _raise_if(problems, store, _DEEP_LINES)
    except OutputDamaged:
        with contextlib.suppress(SystemicError):  # a read-only copy can be checked too
            store.delete("_SUCCESS")
        raise
    return totals


def _check_fast(store: Store) -> tuple[dict[str, Any], list[Generation], list[str]]:
    """(totals, generations, what is wrong). Raises OutputDamaged when units are not done."""
    parts = generations(store)
    missing = [unit for part in parts for unit in _missing(part)]
    if missing:
        units = sum(len(part.plan) for part in parts)
        raise OutputDamaged(f"{len(missing)} of {units} units are not done: {_some(missing)}", where=store.url,
                            todo="run the same command again: it does what is missing")
    expected: dict[str, int] = {}
    totals: dict[str, Any] = {"units": 0, "items": 0, "rows": 0, "row_items": 0, "without_objects": 0,
                              "quarantined": 0, "bytes": 0}
    problems: list[str] = []
    metadata: list[dict[str, Any]] = []
    tables: list[tuple[str, int]] = []
    found: dict[str, int] = {}
    for part in parts:
        planned = 0
        arrays = part.plan.facts.get("arrays", [])
        metadata += arrays
        for record in arrays:  # metadata that the driver stored before the first unit
            expected[record["key"]] = record["bytes"]
        for receipt in part.ledger.receipts(part.plan.unit_ids):
            planned += receipt.items
            replaced = replaced_reasons(part.plan, receipt.unit)
            totals["units"] += 1
            totals["items"] += receipt.items if replaced is None else 0
            for name in ("rows", "row_items", "quarantined"):
                totals[name] += getattr(receipt, name)
            totals["without_objects"] += len(receipt.without_objects)
            if receipt.items != receipt.row_items + len(receipt.without_objects) + receipt.quarantined:
                problems.append(f"unit {receipt.unit}: {receipt.items} inputs, but {receipt.row_items} with rows, "
                                f"{len(receipt.without_objects)} without objects and {receipt.quarantined} quarantined")
            if receipt.fingerprint != part.plan.facts["fingerprint"]:
                problems.append(f"unit {receipt.unit}: its receipt has the fingerprint of another job, {receipt.fingerprint}")
            for stored in receipt.objects:  # a retry of a volume replaces shards that lacked tokens
                expected[stored.key] = stored.bytes
                if stored.key.startswith(TABLES):
                    tables.append((stored.key, receipt.rows))
                elif stored.key.startswith("images/"):
                    tables.append((stored.key, receipt.items - receipt.quarantined))
        if planned != part.plan.num_items:
            problems.append(f"the receipts of {part.prefix} hold {planned} inputs, its plan {part.plan.num_items}")
        found |= dict(store.list(f"{part.ledger.prefix}/quarantine"))
    for folder in DATA_FOLDERS:
        found |= {key: size for key, size in store.list(folder) if not _is_debris(key)}
    totals["bytes"] = sum(expected.values())
    problems += [f"missing: {key}" for key in expected if key not in found]
    problems += [f"{_FOREIGN}: {key}" for key in found if key not in expected]
    problems += [f"{key}: {found[key]} bytes, the receipt says {size}" for key, size in expected.items()
                 if key in found and found[key] != size]
    for record in metadata:  # a handful of small objects that say what all others mean
        if found.get(record["key"]) == record["bytes"]:
            try:
                check_arrays(store, [record])
            except OutputDamaged as error:
                problems.append(f"{record['key']}: {error.what}")
    if not problems:
        with ThreadPoolExecutor(8) as pool:
            problems += [p for p in pool.map(lambda t: _footer(store, *t), tables) if p]
    if len(parts) > 1 and not problems:
        totals["quarantined"] = quarantined_now(parts).num_rows
    totals["fingerprint"], totals["kind"] = parts[0].plan.facts["fingerprint"], parts[0].plan.facts.get("kind", "images")
    return totals, parts, problems


def _missing(part: Generation) -> list[str]:
    return [part.plan.unit_ids[n] for n in part.plan.pending(part.ledger.done())]


def _is_debris(key: str) -> bool:
    """Files that desktops leave in every folder they look at."""
    name = key.rsplit("/", 1)[-1]
    return name in (".DS_Store", "Thumbs.db", "desktop.ini") or name.startswith("._")


def _check_deep(store: Store, parts: list[Generation], known: set[str]) -> list[str]:
    """What is wrong besides; `known`: objects that `_check_fast` has named, which are not read."""
    problems: list[str] = []
    if "arrays" in parts[0].plan.facts and not known:
        check_arrays(store, parts[0].plan.facts["arrays"])
    before: Counter[str] = Counter()  # quarantined so far, by id
    newer = _replaced_later(parts)
    with ThreadPoolExecutor(4) as pool:
        for part, replaced in zip(parts, newer, strict=True):
            pairs = zip(part.plan.units(), part.ledger.receipts(part.plan.unit_ids), strict=True)
            while some := list(islice(pairs, 64)):  # `map` takes all it is given at once, and a plan may be large
                results = pool.map(lambda pair, facts=part.plan.facts, replaced=replaced:
                                   _deep_unit(store, *pair, facts, replaced, known), some)
                for (unit, _), (found, quarantined) in zip(some, results, strict=True):
                    problems += found
                    if part.kind == "retry" and not known:  # else what was quarantined may be what is missing
                        planned = Counter(item.item_id for item in unit.items)
                        if planned - before:
                            problems.append(f"unit {unit.id}: it retries items that were not quarantined: "
                                            f"{_some(sorted(planned - before))}")
                        before -= planned
                    before.update(quarantined)
    return problems


def _footer(store: Store, key: str, expected: int) -> str | None:
    with store.open(key) as file:
        try:
            rows = pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError) as error:
            return f"{key}: its footer cannot be read ({error})"
    return None if rows == expected else f"{key}: {rows} rows, the receipt says {expected}"


def _replaced_later(parts: list[Generation]) -> list[set[str]]:
    """For each generation of a volume: the shards that a later retry has put anew."""
    found: list[set[str]] = [set()]
    for part in reversed(parts[1:]):
        done = part.ledger.done()
        keys = {stored.key for receipt in part.ledger.receipts([u for u in part.plan.unit_ids if u in done])
                for stored in receipt.objects} if part.plan.facts.get("kind") == "volume" else set()
        found.append(found[-1] | keys)
    return found[::-1]


def _deep_unit(store: Store, unit: Unit, receipt: Receipt, facts: dict[str, Any], replaced: set[str],
               known: set[str]) -> tuple[list[str], list[str]]:
    """What is wrong with a unit, and the ids that it quarantined. `facts`: of the plan; `replaced`: objects that
    are another generation's by now; `known`: objects that are missing or of another size."""
    problems: list[str] = []
    with_rows: set[str] = set()
    quarantined: list[str] = []
    images: pa.Table | None = None
    for stored in receipt.objects:
        if stored.key in replaced or stored.key in known:
            continue
        data = store.get(stored.key)
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            problems.append(f"{stored.key}: the content has changed (sha256 differs from the receipt)")
        elif stored.key.startswith(TABLES):
            with_rows = set(pq.read_table(io.BytesIO(data), columns=["item_id"])["item_id"].to_pylist())
        elif stored.key.startswith("images/"):
            images = pq.read_table(io.BytesIO(data), columns=["item_id", "mask"])
        elif "/quarantine/" in stored.key:
            quarantined = pq.read_table(io.BytesIO(data), columns=["item_id"])["item_id"].to_pylist()
    if problems or any(stored.key in known for stored in receipt.objects):
        return problems, quarantined
    if "grid" in facts:
        return _volume_unit(unit, receipt, facts, set(quarantined)), quarantined
    planned = [item.item_id for item in unit.items]
    if with_rows & set(quarantined):
        problems.append(f"unit {unit.id}: both rows and quarantine: {_some(sorted(with_rows & set(quarantined)))}")
    if sorted([*with_rows, *receipt.without_objects, *quarantined]) != sorted(planned):
        problems.append(f"unit {unit.id}: rows, items without objects and quarantine do not add up to the {len(planned)} "
                        "planned inputs")
    if images is not None:
        problems += _images_unit(unit, receipt, images, with_rows)
    return problems, quarantined


def _images_unit(unit: Unit, receipt: Receipt, images: pa.Table, with_rows: set[str]) -> list[str]:
    """What is wrong with a segmented unit's table of images: each has its row, and its mask among the receipt's objects."""
    problems = []
    if sorted(images["item_id"].to_pylist()) != sorted([*with_rows, *receipt.without_objects]):
        problems.append(f"unit {unit.id}: its table of images is not of the images with and without cells")
    stored = [each.key for each in receipt.objects if each.key.startswith("masks/")]
    masks = images["mask"].to_pylist()
    missing = [mask for mask in masks if not any(key == mask or key.startswith(mask + "/") for key in stored)]
    if missing:
        problems.append(f"unit {unit.id}: its receipt names no mask for {_some(missing)}")
    return problems


def _keys_of(facts: dict[str, Any]) -> Callable[[str], Iterable[str]]:
    """What tells the objects that an item of a volume's plan owns."""
    if facts["kind"] == "volume-labels":
        labels = PredictionGrid.read(facts["grid"])
        return lambda item_id: object_keys(labels, Slab.read(item_id),
                                           instances=facts["instances"], probabilities=facts["probabilities"])
    grid = VolumeGrid.read(facts["grid"])
    return lambda item_id: shard_keys(grid, Slab.read(item_id))


def _volume_unit(unit: Unit, receipt: Receipt, facts: dict[str, Any], quarantined: set[str]) -> list[str]:
    """What is wrong with the list of shards of a unit: each of its own must be stored or said to be empty, no other."""
    keys = _keys_of(facts)
    owned = {key for item in unit.items if item.item_id not in quarantined for key in keys(item.item_id)}
    partly = {key for item_id in quarantined for key in keys(item_id)}  # what they have is stored
    said = {stored.key for stored in receipt.objects if "/quarantine/" not in stored.key} | set(receipt.empty)
    problems = [f"unit {unit.id}: its shards are neither stored nor empty: {_some(sorted(owned - said))}"] if owned - said else []
    if said - owned - partly:
        problems.append(f"unit {unit.id}: it names shards that are not its own: {_some(sorted(said - owned - partly))}")
    if len(quarantined) != receipt.quarantined or quarantined - {item.item_id for item in unit.items}:
        problems.append(f"unit {unit.id}: its quarantine is not that of its receipt")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _named(problem: str) -> str:
    """The object or unit that a problem begins with."""
    return problem.removeprefix("missing: ").partition(": ")[0]


def _raise_if(problems: list[str], store: Store, most: int) -> None:
    """Raises OutputDamaged with each problem, the receipt whose deletion mends it, and what to do about all of them."""
    if not problems:
        return
    shown, rest = problems[:most], len(problems) - most
    receipts, metadata = _owners(shown, store)
    todo = []
    if any(problem.startswith(_FOREIGN) for problem in problems):
        todo.append("remove what no receipt names")
    if metadata:
        todo.append("put the metadata of the arrays (zarr.json) back from a copy: no unit makes them again")
    if receipts or rest > 0 and not todo:
        todo.append("delete the receipts named and run the same command again")
    if rest > 0:
        todo.append("verify again for the rest")
    lines = [f"{problem} (receipt: {receipts[problem]})" if problem in receipts else problem for problem in shown]
    more = f"\n  and {rest} more" if rest > 0 else ""
    raise OutputDamaged(f"the output differs from its receipts in {plural(len(problems), 'place')}:\n  "
                        + "\n  ".join(lines) + more, where=store.url,
                        todo="; ".join(todo) or "restore the output from a copy, or use a new --out")


def _owners(problems: list[str], store: Store) -> tuple[dict[str, str], list[str]]:
    """{problem: key of the receipt of the unit or object that it begins with}, and those about metadata of arrays.

    Found by reading the receipts again: a whole output has no use for an owner of each of its objects.
    """
    receipts: dict[str, str] = {}
    metadata: list[str] = []
    asked: dict[str, list[str]] = {}
    for problem in problems:
        asked.setdefault(_named(problem), []).append(problem)
    for part in generations(store):
        metadata += [problem for record in part.plan.facts.get("arrays", []) for problem in asked.get(record["key"], ())]
        for receipt in part.ledger.receipts(part.plan.unit_ids):
            for name in (f"unit {receipt.unit}", *(stored.key for stored in receipt.objects)):
                for problem in asked.get(name, ()):
                    receipts[problem] = f"{part.ledger.prefix}/receipts/{receipt.unit}.json"
    return receipts, metadata
