"""Listing -> checked, digested, de-duplicated items on a local spool -> plan. Memory stays bounded.

Two passes: the first streams the listing to a spool on local disk and takes the digest of all inputs, the
ids that occur twice, and the sample that fixes the scaling; the second writes the units. Per item only 8
bytes (a hash of its id) and the sample stay in memory.
"""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from dinoray.errors import BadRequest, ChangedRequest
from dinoray.io.items import Item
from dinoray.units import CELL_ITEM_SCHEMA, ITEM_SCHEMA, Plan, PlanWriter, item_digest, item_row, items_of, row_digest

SPOOL_SCHEMA = CELL_ITEM_SCHEMA.append(pa.field("digest", pa.binary(16)))
SPOOL_ROWS = 16_384
SPOOL_OBJECT_BYTES = 32 * 2**20
"""A batch of the spool ends earlier when its items' centroids reach this."""


def id_hash(item_id: str) -> int:
    """64 bits of an item id: what duplicates are looked for by, and what a sample is drawn by."""
    return int.from_bytes(hashlib.blake2b(item_id.encode(), digest_size=8).digest(), "little")


@dataclass
class Spool:
    """The listing on local disk. Close it (or use `with`) to remove the file.

    `input_digest` is over (uri, size, version, id, metadata) of every input in listing order.
    """

    num_items: int = 0
    num_bytes: int = 0
    input_digest: str = ""
    metadata_columns: tuple[str, ...] = ()
    samples: dict[str, list[int]] = field(default_factory=dict)
    """Row numbers, per scaling group, of the `sample` items with the smallest id hash, in listing order."""
    duplicates: dict[str, list[str]] = field(default_factory=dict)
    """The ids that occur more than once, with the first files of the first few inputs that have them."""
    _file: Any = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, in listing order, with `problem` filled for ids that occur more than once."""
        self._file.seek(0)
        with pa.ipc.open_stream(self._file) as reader:
            yield from reader

    def rows(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """(row of ITEM_SCHEMA, digest) of every item."""
        for batch in self.batches():
            for row in batch.to_pylist():
                digest = row.pop("digest")
                if row["item_id"] in self.duplicates:
                    row["problem"] = _duplicate_of(row, self.duplicates[row["item_id"]])
                yield row, digest

    def sampled(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The rows of `samples` (of ITEM_SCHEMA: statistics look at whole images), sorted by group, in listing order
        within a group."""
        wanted = np.sort(np.fromiter((n for ns in self.samples.values() for n in ns), dtype=np.int64))
        cells = [name for name in CELL_ITEM_SCHEMA.names if name not in ITEM_SCHEMA.names]
        start, parts = 0, [SPOOL_SCHEMA.empty_table().drop_columns(cells)]
        for batch in self.batches():
            batch = batch.drop_columns(cells)
            low, high = np.searchsorted(wanted, [start, start + batch.num_rows])
            if high > low:
                parts.append(pa.Table.from_batches([batch.take(pa.array(wanted[low:high] - start))]))
            start += batch.num_rows
        table = pa.concat_tables(parts)
        table = table.append_column("row", pa.array(wanted)).sort_by([("group", "ascending"), ("row", "ascending")])
        for batch in table.drop_columns(["row"]).to_batches(max_chunksize=SPOOL_ROWS):
            for row in batch.to_pylist():
                digest = row.pop("digest")
                if row["item_id"] not in self.duplicates:
                    yield row, digest


def spool_items(items: Iterable[Item], *, sample: int = 0, sample_if: Callable[[Item], bool] = lambda item: True) -> Spool:
    """Stream a listing to disk (pass one). `sample`: items per scaling group to remember, of those that
    `sample_if` accepts; 0 for none.

    Raises BadRequest when there is no item.
    """
    spool = Spool(_file=tempfile.TemporaryFile(prefix="dinoray-plan-"))  # noqa: SIM115 (closed by Spool.__exit__)
    hasher = hashlib.sha256()
    hashes = array("Q")
    columns: dict[str, None] = {}
    heaps: dict[str, list[tuple[int, int]]] = {}
    rows: list[dict[str, Any]] = []
    object_bytes = 0
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(spool._file, SPOOL_SCHEMA, options=options) as writer:
        for number, item in enumerate(items):
            row = item_row(item)
            row["digest"] = digest = row_digest(row)
            hasher.update(digest)
            key = id_hash(item.item_id)
            hashes.append(key)
            columns.update(dict.fromkeys(item.metadata))
            if sample and item.problem is None and sample_if(item):
                heap = heaps.setdefault(item.group, [])
                (heapq.heappush if len(heap) < sample else heapq.heappushpop)(heap, (-key, number))
            rows.append(row)
            spool.num_bytes += item.num_bytes
            object_bytes += 0 if item.objects is None else len(item.objects.packed)
            if len(rows) == SPOOL_ROWS or object_bytes >= SPOOL_OBJECT_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SPOOL_SCHEMA))
                rows.clear()
                object_bytes = 0
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SPOOL_SCHEMA))
    spool.num_items = len(hashes)
    if not spool.num_items:
        spool._file.close()
        raise BadRequest("no image was found in the sources",
                         todo="check the path, the file extensions, and --where/--limit")
    spool.input_digest = hasher.hexdigest()
    spool.metadata_columns = tuple(sorted(columns))
    spool.samples = {group: sorted(number for _, number in heap) for group, heap in heaps.items()}
    spool.duplicates = _duplicates(spool, np.frombuffer(hashes, dtype=np.uint64))
    return spool


def _duplicate_of(row: dict[str, Any], files: list[str]) -> str:
    """The problem of an input whose id is not its own: it names another input of that id."""
    others = [uri for uri in files if uri not in row["uris"]]
    return f"duplicate_id: {others[0]} has the same id" if others else "duplicate_id: this file is listed more than once"


def _duplicates(spool: Spool, hashes: np.ndarray) -> dict[str, list[str]]:
    """Ids that occur more than once. Equal hashes only nominate; the ids themselves decide."""
    ordered = np.sort(hashes)
    candidates = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(candidates):
        return {}
    counts: Counter[str] = Counter()
    files: dict[str, list[str]] = {}
    start = 0
    for batch in spool.batches():
        hits = np.flatnonzero(np.isin(hashes[start:start + batch.num_rows], candidates))
        found = batch.select(["item_id", "uris"]).take(pa.array(hits)).to_pylist()
        counts.update(row["item_id"] for row in found)
        for row in found:
            known = files.setdefault(row["item_id"], [])
            if len(known) < 3:
                known += row["uris"][:1]
        start += batch.num_rows
    return {item_id: files[item_id] for item_id, count in counts.items() if count > 1}


def write_plan(spool: Spool, writer: PlanWriter, **facts: Any) -> None:
    """Pass two: the spool's items into units, sealed with the digest of the inputs and `facts`."""
    for row, digest in spool.rows():
        writer.add(row, digest)
    writer.seal(input_digest=spool.input_digest, num_items=spool.num_items, num_bytes=spool.num_bytes,
                metadata_columns=list(spool.metadata_columns), **facts)


def check_same_inputs(plans: Sequence[Plan], spool: Spool) -> None:
    """Compare a new listing with the plans of an output: by one digest with the first; if that differs, item by item
    with all of them (what a later retry or extension planned counts). Raises ChangedRequest naming what differs.
    """
    plan = plans[0]
    if spool.input_digest == plan.facts["input_digest"]:
        return
    planned = {item.item_id: item for each in plans for unit in each.units() for item in unit.items}
    added, changed, listed = [], [], set()
    for batch in spool.batches():
        for item in items_of(batch.drop_columns(["digest"])):
            listed.add(item.item_id)
            old = planned.get(item.item_id)
            if old is None:
                added.append(item.item_id)
            elif item_digest(old) != item_digest(item):
                changed.append(item.item_id)
    removed = list(dict.fromkeys(item.item_id for unit in plan.units() for item in unit.items if item.item_id not in listed))
    parts = [f"{len(ids)} {verb} (e.g. {ids[0]})"
             for verb, ids in (("added", added), ("removed", removed), ("changed", changed)) if ids]
    if not parts and len(plans) > 1:
        return  # the difference is what later generations brought
    what = "; ".join(parts) or "another order or root"
    todo = ("`dinoray extend OUT SRC...` adds them (and finishes the rest); else use another --out" if added and len(parts) == 1
            else "use another --out for the new inputs, or restore the old ones to resume")
    if changed and len(parts) == 1:
        todo = ("`dinoray retry OUT` finishes the rest and takes inputs that were quarantined as they are now; else use another "
                "--out, or restore the old files")
    raise ChangedRequest(f"the inputs are not those this output was planned for: {what}", where=plan.store.url, todo=todo)
