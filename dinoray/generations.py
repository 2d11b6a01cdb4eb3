"""What one output is made of: the first plan, then one generation for every `retry` and `extend`.

Each generation has a plan and a ledger of its own below `_dinoray/more/<nnn>-<kind>/`, so that nothing that was
committed is ever changed. A retry's receipts replace what earlier ones said of the same inputs; an extension
adds inputs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from dinoray.errors import OutputDamaged
from dinoray.io.stores import Store
from dinoray.ledger import QUARANTINE_SCHEMA, Ledger, Tally
from dinoray.units import Plan

FOLDER = "_dinoray/more"
REQUEST = "request.json"
_NAME = re.compile(r"(\d{3})-(retry|extend)")


@dataclass
class Generation:
    """`kind` is `first`, `retry` or `extend`; `number` 0 for the first."""

    number: int
    kind: str
    prefix: str
    plan: Plan
    ledger: Ledger


def generations(store: Store) -> list[Generation]:
    """All generations with a sealed plan, in order. Raises FileNotFoundError when not even the first is sealed."""
    found = [Generation(0, "first", "_dinoray", Plan(store), Ledger(store))]
    names = sorted({key.split("/")[2] for key, _ in store.list(FOLDER) if key.endswith("/plan/index.parquet")})
    for name in names:
        match = _NAME.fullmatch(name)
        if match and Plan.exists(store, f"{FOLDER}/{name}"):
            prefix = f"{FOLDER}/{name}"
            found.append(Generation(int(match[1]), match[2], prefix, Plan(store, prefix), Ledger(store, prefix)))
    return found


def next_prefix(store: Store, existing: Iterable[Generation], kind: str, command: str) -> str:
    """The prefix of the generation to come; one that the same command began and never sealed is planned over."""
    begun = begun_unsealed(store)
    for prefix, earlier in begun.items():
        if earlier == command:
            return prefix
    taken = [g.number for g in existing] + [int(prefix.rsplit("/", 1)[1][:3]) for prefix in begun]
    return f"{FOLDER}/{max(taken) + 1:03d}-{kind}"


def begin(store: Store, prefix: str, command: str) -> None:
    """Record that a generation is about to be planned, so that it is not forgotten when its driver dies."""
    store.put(f"{prefix}/{REQUEST}", json.dumps({"command": command}).encode())


def begun_unsealed(store: Store) -> dict[str, str]:
    """Prefix -> command of the generations that were begun and whose planning did not come to its end."""
    found = {}
    for key, _ in sorted(store.list(FOLDER)):
        prefix, _, name = key.rpartition("/")
        if name == REQUEST and _NAME.fullmatch(prefix.rsplit("/", 1)[1]) and not Plan.exists(store, prefix):
            try:
                found[prefix] = str(json.loads(store.get(key))["command"])
            except (ValueError, KeyError, TypeError) as error:
                raise OutputDamaged(f"the record of a generation cannot be read: {error!r}", where=f"{store.url}/{key}",
                                    todo="delete this file; run the `dinoray extend` again that it was made by") from error
    return found


def unfinished_notes(store: Store) -> list[str]:
    """One line for each generation that was begun and is not planned: nothing of it is in the totals."""
    return [f"begun, but its planning did not come to its end: {command} (run it again, or delete {prefix})"
            for prefix, command in begun_unsealed(store).items()]


def total_tally(parts: Sequence[Generation]) -> Tally:
    """Totals over all committed units; what a retry settled is counted once, as its latest receipt says."""
    tally = Tally()
    for part in parts:
        done = part.ledger.done()
        for receipt in part.ledger.receipts([u for u in part.plan.unit_ids if u in done]):
            tally.add(receipt, replaces=replaced_reasons(part.plan, receipt.unit))
    settle(tally, parts)
    return tally


def settle(tally: Tally, parts: Sequence[Generation]) -> None:
    """Take the quarantine from the tables themselves where there was a retry: a unit of the first plan that is redone
    later may find other reasons than those that the retry replaced."""
    if any(part.kind == "retry" for part in parts):
        reasons = Counter(quarantined_now(parts)["reason"].to_pylist())
        tally.quarantined, tally.reasons = reasons.total(), dict(reasons)


def replaced_reasons(plan: Plan, unit_id: str) -> dict[str, int] | None:
    """Of a retry's unit: why its items were quarantined before, {reason: count}; None for other units."""
    return plan.facts.get("replaces", {}).get(unit_id)


def quarantined_now(parts: Iterable[Generation]) -> pa.Table:
    """The items that are quarantined by their latest receipt (rows of QUARANTINE_SCHEMA, in plan order)."""
    rows: dict[str, list[dict[str, str]]] = {}  # one id may be planned twice: both are quarantined as duplicates
    for part in parts:
        done = part.ledger.done()
        if part.kind == "retry":
            for number, unit_id in enumerate(part.plan.unit_ids):
                if unit_id in done:
                    for item in part.plan.unit(number).items:
                        rows.pop(item.item_id, None)
        receipts = list(part.ledger.receipts([u for u in part.plan.unit_ids if u in done]))
        for row in part.ledger.quarantine(receipts).to_pylist():
            rows.setdefault(row["item_id"], []).append(row)
    return pa.Table.from_pylist([row for group in rows.values() for row in group], schema=QUARANTINE_SCHEMA)
