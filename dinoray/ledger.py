"""The ledger: receipts, attempts, quarantine, summary. The only place that decides what is done.

A unit is done if and only if its receipt exists. Order of a commit: data objects, quarantine table,
receipt (put if absent) last. Data without a receipt is recomputed and replaced by the same bytes. The
names of a unit's objects are a pure function of its id.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from dinoray.config import canonical_json
from dinoray.errors import OutputDamaged
from dinoray.io.stores import Store

QUARANTINE_SCHEMA = pa.schema([
    ("item_id", pa.string()), ("uri", pa.string()), ("reason", pa.string()), ("message", pa.string()),
])


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object a unit wrote: key below the output, bytes, sha256 of its content."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    key: str
    bytes: int
    sha256: str


@dataclass
class Receipt:
    """Proof that a unit is done, and what it took. Stored as `receipts/<unit>.json`."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    unit: str
    number: int
    fingerprint: str
    plate: str | None = None
    objects: list[StoredObject] = field(default_factory=list)
    """Every object of the unit, the quarantine table included; `[]` when it wrote nothing."""
    empty: list[str] = field(default_factory=list)
    """Keys of shards that the unit owns and did not store, because nothing was computed there (background)."""
    items: int = 0
    """Planned inputs of the unit."""
    rows: int = 0
    row_items: int = 0
    """Distinct inputs that have rows."""
    without_objects: list[str] = field(default_factory=list)
    """Ids of the inputs that were read and hold nothing to make rows of (an image without cells): done, not quarantined.
    items = row_items + len(without_objects) + quarantined."""
    quarantined: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Quarantined inputs by reason."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds of the unit (`wall`) and seconds of work by stage, summed over threads."""
    bytes_read: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    """Peak bytes: `rss_peak` of the process so far, `device_peak` where there is a device."""
    numerics: dict[str, Any] = field(default_factory=dict)
    """What the numbers were computed with; `degraded` is true where they may differ in low bits."""
    attempt: int = 1
    isolated: bool = False
    """Run in a child process, because earlier starts had ended without a receipt."""
    retries: dict[str, int] = field(default_factory=dict)
    """Storage requests that were repeated, by kind of trouble."""
    worker: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The receipt's text."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        """Read a receipt back. Raises ValueError on text that is none, or has values of other types."""
        return _RECEIPT.validate_json(text, strict=True)


_RECEIPT = TypeAdapter(Receipt)


class Ledger:
    """The records below `<output>/<prefix>`: one for the job, one (prefix `_dinoray/stats`) for its statistics."""

    def __init__(self, store: Store, prefix: str = "_dinoray"):
        self.store, self.prefix = store, prefix

    # ---------------------------------------------------------------- units

    def begin(self, unit_id: str) -> int:
        """Mark that the unit is about to be started; returns the number of this attempt, from 1."""
        note = canonical_json({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        attempt = 1
        while not self.store.put_if_absent(f"{self.prefix}/attempts/{unit_id}-{attempt}", note):
            attempt += 1
        return attempt

    def end(self, unit_id: str, attempt: int, why: str) -> None:
        """Note that a start ended in good order without a receipt (an error was raised, the run was stopped)."""
        note = {"host": socket.gethostname(), "pid": os.getpid(), "ended": why}
        self.store.put(f"{self.prefix}/attempts/{unit_id}-{attempt}", canonical_json(note).encode())

    def deaths(self, unit_id: str, attempt: int) -> int:
        """How many starts before `attempt` ended with neither a receipt nor a word: their process died."""
        count = 0
        for number in range(1, attempt):
            try:
                count += "ended" not in json.loads(self.store.get(f"{self.prefix}/attempts/{unit_id}-{number}"))
            except (FileNotFoundError, ValueError):  # removed, or torn by a crash of the machine
                count += 1
        return count

    def put_object(self, key: str, data: bytes | memoryview) -> StoredObject:
        """Store one object of a unit and return what the receipt says of it."""
        stored = StoredObject(key, len(data), hashlib.sha256(data).hexdigest())
        self.store.put(key, data)
        return stored

    def put_quarantine(self, unit_id: str, rows: list[dict[str, str]]) -> StoredObject:
        """Store the unit's quarantined items (rows of QUARANTINE_SCHEMA)."""
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA), sink, compression="zstd")
        return self.put_object(f"{self.prefix}/quarantine/{unit_id}.parquet", sink.getbuffer())

    def commit(self, receipt: Receipt) -> Receipt:
        """Put the receipt if absent; returns the one that counts (an earlier one wins)."""
        if self.store.put_if_absent(f"{self.prefix}/receipts/{receipt.unit}.json", receipt.to_json().encode()):
            return receipt
        existing = self.receipt(receipt.unit)
        if existing is None:
            raise OutputDamaged("a receipt was there and is gone", where=f"{self.store.url} unit {receipt.unit}",
                                todo="do not delete receipts while a run is active; run the command again")
        return existing

    def receipt(self, unit_id: str) -> Receipt | None:
        """The unit's receipt, None when it is not done. Raises OutputDamaged for one that cannot be read."""
        key = f"{self.prefix}/receipts/{unit_id}.json"
        try:
            text = self.store.get(key)
        except FileNotFoundError:
            return None
        try:
            return Receipt.from_json(text)
        except (ValueError, KeyError, TypeError) as error:
            raise OutputDamaged(f"a receipt cannot be read: {error}", where=f"{self.store.url}/{key}",
                                todo="delete this receipt and run the same command again: the unit is redone") from error

    # ---------------------------------------------------------------- all of them

    def done(self) -> set[str]:
        """Ids of the units that have a receipt (one listing, nothing is read)."""
        folder = f"{self.prefix}/receipts"
        return {key.rsplit("/", 1)[1][:-5] for key, _ in self.store.list(folder) if key.endswith(".json")}

    def receipts(self, unit_ids: list[str]) -> Iterator[Receipt]:
        """The receipts of these units, in this order; a missing one raises OutputDamaged."""
        if not unit_ids:
            return
        with ThreadPoolExecutor(16) as pool:
            for start in range(0, len(unit_ids), 1024):
                chunk = unit_ids[start:start + 1024]
                for unit_id, receipt in zip(chunk, pool.map(self.receipt, chunk), strict=True):
                    if receipt is None:
                        raise OutputDamaged("a unit has no receipt", where=f"{self.store.url} unit {unit_id}",
                                            todo="run the same command again: it does what is missing")
                    yield receipt

    def attempts(self) -> dict[str, int]:
        """How often each unit was started (from the attempt markers)."""
        counts: dict[str, int] = {}
        for key, _ in self.store.list(f"{self.prefix}/attempts"):
            unit_id = key.rsplit("/", 1)[1].rsplit("-", 1)[0]
            counts[unit_id] = counts.get(unit_id, 0) + 1
        return counts

    def quarantine(self, receipts: list[Receipt]) -> pa.Table:
        """All quarantined items of these receipts, in plan order."""
        keys = [f"{self.prefix}/quarantine/{r.unit}.parquet" for r in receipts if r.quarantined]
        tables = [pq.read_table(io.BytesIO(self.store.get(key))) for key in keys]
        return pa.concat_tables(tables) if tables else QUARANTINE_SCHEMA.empty_table()


@dataclass
class Tally:
    """Running totals over receipts: progress, and the share of quarantined items per plate."""

    units: int = 0
    items: int = 0
    rows: int = 0
    quarantined: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rss_peak: int = 0
    degraded_units: int = 0
    device_kinds: dict[str, int] = field(default_factory=dict)
    plates: dict[str, list[int]] = field(default_factory=dict)
    """Per plate: [items, quarantined]."""

    def add(self, receipt: Receipt, *, replaces: dict[str, int] | None = None) -> None:
        """Count one receipt. `replaces`: of a retry's unit, {reason: count} of its items, which were counted as
        quarantined before."""
        self.units += 1
        self.items += receipt.items
        self.rows += receipt.rows
        self.quarantined += receipt.quarantined
        if replaces is not None:
            self.items -= receipt.items
            self.quarantined -= sum(replaces.values())
            for reason, count in replaces.items():
                self.reasons[reason] = self.reasons.get(reason, 0) - count
        self.bytes_read += receipt.bytes_read
        self.bytes_written += sum(o.bytes for o in receipt.objects)
        for reason, count in receipt.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.reasons = {reason: count for reason, count in self.reasons.items() if count}
        for stage, value in receipt.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value
        self.rss_peak = max(self.rss_peak, receipt.memory.get("rss_peak", 0))
        self.degraded_units += bool(receipt.numerics.get("degraded"))
        kind = str(receipt.numerics.get("device_kind", "unknown"))
        self.device_kinds[kind] = self.device_kinds.get(kind, 0) + 1
        plate = self.plates.setdefault(receipt.plate or "", [0, 0])
        plate[0] += receipt.items if replaces is None else 0
        plate[1] += receipt.quarantined - sum((replaces or {}).values())

    def too_many_failures(self, limit: float, after_items: int = 200) -> str | None:
        """Why the run must stop, or None: the share of quarantined items, overall or on one plate."""
        scopes = [("of all items", self.items, self.quarantined)]
        scopes += [(f"of plate {name}", n, bad) for name, (n, bad) in self.plates.items() if name]
        for name, items, bad in scopes:
            if items >= after_items and bad > limit * items:
                return f"{bad} {name} so far ({bad / items:.1%} of {items}) were quarantined, the limit is {limit:.1%}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `plates` keeps only those with quarantined items."""
        values = asdict(self)
        values["plates"] = {name: counts for name, counts in self.plates.items() if counts[1]}
        values["num_plates"] = len([name for name in self.plates if name])
        return values
