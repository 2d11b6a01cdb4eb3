"""Units and the plan: which work there is, fixed once, and the same whoever does it.

A plan is `plan/<nnnnn>.parquet` (at most 1,000 units a file, one row group per unit: unit u is row group
u % 1000 of file u // 1000) and `plan/index.parquet` (one row per unit), written last: a plan is sealed if
and only if its index exists. Planning streams: memory holds at most one file of the plan and the items of
the units that are still open.

A unit's id = sha256(job fingerprint, scaling of its groups, its items), so the same request gives the same
ids on any machine. Worker count and node type are not in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.config import canonical_json
from dinoray.errors import OutputDamaged
from dinoray.failpoints import reach
from dinoray.io.items import FileRef, Item, Objects
from dinoray.io.stores import Store

UNITS_PER_FILE = 1000
MAX_OPEN_PLATES = 64
"""Plates whose units fill side by side when a listing mixes plates; more would hold too many items."""

ITEM_SCHEMA = pa.schema([
    ("item_id", pa.string()), ("uris", pa.list_(pa.string())), ("sizes", pa.list_(pa.int64())),
    ("versions", pa.list_(pa.string())), ("channels", pa.list_(pa.string())), ("group", pa.string()),
    ("plate", pa.string()), ("metadata", pa.string()), ("problem", pa.string()),
])
CELL_ITEM_SCHEMA = pa.schema([
    *ITEM_SCHEMA, ("labels_uri", pa.string()), ("labels_size", pa.int64()), ("labels_version", pa.string()),
    ("objects", pa.large_binary()), ("objects_unit", pa.string()),
])
"""Rows of a plan of cells: `labels_*` is the label image, `objects` the packed centroids (io.items.Objects). Plans of
images keep ITEM_SCHEMA, and their units the ids they had before there were cells."""
INDEX_SCHEMA = pa.schema([
    ("unit_id", pa.string()), ("num_items", pa.int32()), ("num_bytes", pa.int64()), ("plate", pa.string()),
])


@dataclass(frozen=True, slots=True)
class Unit:
    """The atom of work, commit, error and progress: items in plan order."""

    number: int
    id: str
    items: tuple[Item, ...]

    @property
    def plate(self) -> str | None:
        """The plate of all its items, None where unknown."""
        return self.items[0].plate if self.items else None


def fingerprint_of(settings: dict[str, Any]) -> str:
    """The job fingerprint: 16 hex digits of sha256 over everything that changes results."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]


def item_row(item: Item) -> dict[str, Any]:
    """An item as a row of `ITEM_SCHEMA`, or of `CELL_ITEM_SCHEMA` when it has labels or objects."""
    row = {
        "item_id": item.item_id, "uris": [f.uri for f in item.files], "sizes": [f.size for f in item.files],
        "versions": [f.version for f in item.files], "channels": list(item.channels), "group": item.group,
        "plate": item.plate, "metadata": canonical_json(item.metadata), "problem": item.problem,
    }
    if item.labels is not None:
        row |= {"labels_uri": item.labels.uri, "labels_size": item.labels.size, "labels_version": item.labels.version}
    if item.objects is not None:
        row |= {"objects": item.objects.packed, "objects_unit": item.objects.unit}
    return row


def items_of(table: pa.Table) -> tuple[Item, ...]:
    """The items of rows of `ITEM_SCHEMA` or `CELL_ITEM_SCHEMA`."""
    return tuple(
        Item(row["item_id"], tuple(FileRef(*f) for f in zip(row["uris"], row["sizes"], row["versions"], strict=True)),
             tuple(row["channels"]), row["group"], row["plate"], json.loads(row["metadata"]), row["problem"],
             _labels_of(row), Objects(row["objects"], row["objects_unit"]) if row.get("objects") is not None else None)
        for row in table.to_pylist()
    )


def _labels_of(row: dict[str, Any]) -> FileRef | None:
    if row.get("labels_uri") is None:
        return None
    return FileRef(row["labels_uri"], row["labels_size"], row["labels_version"])


def row_digest(row: dict[str, Any]) -> bytes:
    """16 bytes that identify an item's row: id, (uri, size, version) and channel of each file, metadata, group, and
    of cells the label image or the centroids.

    `problem` is left out: planning finds it again, and duplicates are marked after the digest is taken.
    """
    values = [row[name] for name in ITEM_SCHEMA.names if name != "problem"]
    values += [row[name] for name in ("labels_uri", "labels_size", "labels_version") if row.get("labels_uri") is not None]
    if row.get("objects") is not None:
        values += [row["objects_unit"], hashlib.blake2b(row["objects"], digest_size=16).hexdigest()]
    content = json.dumps(values, ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def item_digest(item: Item) -> bytes:
    """`row_digest` of an item."""
    return row_digest(item_row(item))


@dataclass
class OpenUnit:
    """Items gathered for a unit that is not full yet: (row of the table, digest)."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    num_bytes: int = 0


class PlanWriter:
    """Streams units into plan files. Use: `add` items in listing order, then `seal`."""

    def __init__(self, store: Store, prefix: str, fingerprint: str, *, max_items: int, max_bytes: int,
                 group_salt: Callable[[set[str]], str] | None = None, max_open: int = MAX_OPEN_PLATES, id_salt: str = "",
                 schema: pa.Schema = ITEM_SCHEMA):
        self.store, self.prefix, self.fingerprint = store, prefix, fingerprint
        self.max_items, self.max_bytes = max_items, max_bytes
        self.group_salt = group_salt
        """Text that enters a unit's id for the scaling groups of its items."""
        self.max_open, self.schema = max_open, schema
        self.id_salt = id_salt
        """Text that enters every unit's id: the items of a retry were in a unit before."""
        self.on_unit: Callable[[str, list[str]], None] | None = None
        """Told the id and the item ids of each unit that is complete."""
        self._open: OrderedDict[str | None, OpenUnit] = OrderedDict()
        self._index: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
        self._sink: io.BytesIO | None = None
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any], digest: bytes) -> None:
        """Add one item: its row of the writer's schema and its `item_digest`."""
        if self.schema is ITEM_SCHEMA and (row.get("labels_uri") is not None or row.get("objects") is not None):
            raise ValueError(f"{row['item_id']}: labels and objects need a plan of CELL_ITEM_SCHEMA")
        plate = row["plate"]
        size = sum(max(0, s) for s in (*row["sizes"], row.get("labels_size") or 0))
        unit = self._open.get(plate)
        if unit is not None and (len(unit.rows) >= self.max_items or unit.num_bytes + size > self.max_bytes):
            self._flush(plate)
            unit = None
        if unit is None:
            if len(self._open) >= self.max_open:
                self._flush(next(iter(self._open)))
            unit = self._open[plate] = OpenUnit()
        self._open.move_to_end(plate)
        unit.rows.append(row)
        unit.digests.append(digest)
        unit.num_bytes += size

    def end_unit(self) -> None:
        """What comes next belongs to another unit, whatever fits."""
        for plate in list(self._open):
            self._flush(plate)

    @property
    def num_units(self) -> int:
        """Units that are complete."""
        return len(self._index["unit_id"])

    def _flush(self, plate: str | None) -> None:
        unit = self._open.pop(plate)
        hasher = hashlib.sha256((self.fingerprint + self.id_salt).encode())
        if self.group_salt is not None:
            hasher.update(self.group_salt({row["group"] for row in unit.rows}).encode())
        for row, digest in zip(unit.rows, unit.digests, strict=True):
            hasher.update(digest + (row["problem"] or "").encode())
        if self._writer is None:
            self._sink = io.BytesIO()
            self._writer = pq.ParquetWriter(self._sink, self.schema, compression="zstd", write_statistics=False)
        self._writer.write_table(pa.Table.from_pylist(unit.rows, schema=self.schema), row_group_size=len(unit.rows))
        unit_id = hasher.hexdigest()[:20]
        if self.on_unit is not None:
            self.on_unit(unit_id, [row["item_id"] for row in unit.rows])
        for name, value in zip(INDEX_SCHEMA.names,
                               (unit_id, len(unit.rows), unit.num_bytes, plate), strict=True):
            self._index[name].append(value)
        if len(self._index["unit_id"]) % UNITS_PER_FILE == 0:
            self._put_file()

    def _put_file(self) -> None:
        if self._writer is None or self._sink is None:
            return
        self._writer.close()
        number = (len(self._index["unit_id"]) - 1) // UNITS_PER_FILE
        self.store.put(f"{self.prefix}/plan/{number:05d}.parquet", self._sink.getbuffer())
        self._writer = self._sink = None
        reach("plan.file")

    def seal(self, **facts: Any) -> None:
        """Write the open units and, last, the index with `facts` (JSON values) in its metadata."""
        self.end_unit()
        self._put_file()
        reach("plan.seal")
        table = pa.table(self._index, schema=INDEX_SCHEMA)
        described = {"fingerprint": self.fingerprint, "num_units": table.num_rows, **facts}
        table = table.replace_schema_metadata({"dinoray": canonical_json(described)})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.store.put(f"{self.prefix}/plan/index.parquet", sink.getbuffer())


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """OutputDamaged for a file of the plan whose bytes are there but make no sense."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise OutputDamaged(f"the plan cannot be read: {error}", where=where,
                            todo="restore this file from a copy, or use a new --out") from error


class Plan:
    """A sealed plan, read back: the index in memory, the items of a unit on demand."""

    def __init__(self, store: Store, prefix: str = "_dinoray"):
        self.store, self.prefix = store, prefix
        key = f"{prefix}/plan/index.parquet"
        data = store.get(key)
        with _readable(f"{store.url}/{key}"):
            table = pq.read_table(io.BytesIO(data))
            self.facts: dict[str, Any] = json.loads(table.schema.metadata[b"dinoray"])
            self.unit_ids: list[str] = table["unit_id"].to_pylist()
            if table.schema.types != INDEX_SCHEMA.types or table.schema.names != INDEX_SCHEMA.names or \
                    any(table[name].null_count for name in ("unit_id", "num_items", "num_bytes")):
                raise ValueError(f"columns {table.schema.names}")
        self.index = table
        self._file = lru_cache(maxsize=2)(self._open_file)

    @staticmethod
    def exists(store: Store, prefix: str = "_dinoray") -> bool:
        """Whether a sealed plan is there."""
        return store.exists(f"{prefix}/plan/index.parquet")

    @property
    def suffix(self) -> str:
        """What follows the unit's id in the names of its objects: `.r1` for the first retry, else nothing."""
        return self.facts.get("suffix", "")

    @property
    def stages(self) -> list[range]:
        """Unit numbers that may be in work together; units of a later stage read what earlier ones wrote."""
        first = self.facts.get("first_stage", len(self))
        ends = self.facts.get("stage_ends", [first, len(self)] if first < len(self) else [len(self)])
        return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]

    @property
    def num_items(self) -> int:
        """Planned inputs."""
        return int(np.sum(self.index["num_items"].to_numpy())) if self.index.num_rows else 0

    def __len__(self) -> int:
        return len(self.unit_ids)

    def _open_file(self, number: int) -> pq.ParquetFile:
        try:
            data = self.store.get(self._key(number))
        except FileNotFoundError as error:
            raise OutputDamaged("a file of the plan is missing", where=f"{self.store.url}/{self._key(number)}",
                                todo="restore it from a copy, or use a new --out") from error
        with _readable(f"{self.store.url}/{self._key(number)}"):
            return pq.ParquetFile(io.BytesIO(data))

    def _key(self, number: int) -> str:
        return f"{self.prefix}/plan/{number:05d}.parquet"

    def unit(self, number: int) -> Unit:
        """Unit `number`, from its row group. Raises OutputDamaged when index and file disagree."""
        file = self._file(number // UNITS_PER_FILE)
        with _readable(f"{self.store.url}/{self._key(number // UNITS_PER_FILE)}"):
            table = file.read_row_group(number % UNITS_PER_FILE)
            items = items_of(table)
        if table.num_rows != self.index["num_items"][number].as_py():
            raise OutputDamaged(f"unit {number} has another number of items in the plan file than in the index",
                                where=f"{self.store.url}/{self.prefix}/plan",
                                todo="delete the output folder and run again, or restore the plan from a copy")
        return Unit(number, self.unit_ids[number], items)

    def units(self) -> Iterator[Unit]:
        """All units in order."""
        return (self.unit(number) for number in range(len(self)))

    def pending(self, done: Iterable[str]) -> list[int]:
        """The numbers of the units without a receipt, in plan order."""
        finished = set(done)
        return [number for number, unit_id in enumerate(self.unit_ids) if unit_id not in finished]
