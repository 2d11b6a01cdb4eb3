"""Whole outputs made of given rows, without a model: plan, receipts, feature files, quarantine, later generations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dinoray.io.stores import Store
from dinoray.io.tables import feature_schema, write_table
from dinoray.ledger import Ledger, Receipt
from tests.runs import make_item, make_plan

KEYS = ("Metadata_Batch", "Metadata_Plate", "Metadata_Well", "Metadata_Site")


def make_row(item_id: str, channel: str = "DNA", **fields: Any) -> dict[str, Any]:
    """One row of a feature table; vectors and `Metadata_*` in `fields`."""
    return {"item_id": item_id, "uri": f"/in/{item_id}", "channel": channel, "tile": 0, "y0": 0, "x0": 0, "y1": 8, "x1": 8,
            "height": 8, "width": 8, "pixel_size_um": None, "p01": 1.0, "p50": 2.0, "p999": 3.0, "frac_saturated": None,
            "focus": 0.5, **fields}


def schema_of(rows: Sequence[dict[str, Any]], dtype: str) -> pa.Schema:
    """The schema that a run would give these rows; `object_id` (int64) where they have one."""
    vectors = {name: len(value) for name, value in rows[0].items() if isinstance(value, np.ndarray)}
    metadata = sorted({name for row in rows for name in row if name.startswith("Metadata_")})
    schema = feature_schema(vectors=vectors, vector_dtype=dtype, metadata_columns=metadata, facts={"model": "vits16"})
    if "object_id" in rows[0]:
        schema = schema.insert(4, pa.field("object_id", pa.int64()))
    return schema


def write_output(store: Store, rows: Sequence[dict[str, Any]], *, quarantined: Iterable[dict[str, Any]] = (),
                 dtype: str = "float32", prefix: str = "_dinoray", suffix: str = "", max_items: int = 3,
                 leave_out: int = 0) -> None:
    """Write an output of these rows, units of `max_items` items per plate, in the order in which items first appear.

    `quarantined`: `make_row`s of items without rows. `prefix` and `suffix` make a later generation. `leave_out`: that many
    units at the end stay without file and receipt.
    """
    by_item: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_item.setdefault(row["item_id"], []).append(row)
    bad = {row["item_id"]: row for row in quarantined}
    items = []
    for name, first in {**{name: found[0] for name, found in by_item.items()}, **bad}.items():
        metadata = {key: value for key, value in first.items() if key.startswith("Metadata_")}
        items.append(make_item(name, plate=metadata.get("Metadata_Plate"), metadata=metadata))
    plan, ledger = make_plan(store, items, prefix=prefix, max_items=max_items), Ledger(store, prefix)
    schema = schema_of(rows, dtype) if rows else None
    for unit in list(plan.units())[:len(plan) - leave_out]:
        some = [row for item in unit.items for row in by_item.get(item.item_id, [])]
        reasons = [{"item_id": item.item_id, "uri": item.files[0].uri, "reason": "truncated", "message": "the file ends early"}
                   for item in unit.items if item.item_id in bad]
        receipt = Receipt(unit.id, unit.number, "f" * 16, unit.plate, items=len(unit.items), rows=len(some),
                          row_items=len(unit.items) - len(reasons), quarantined=len(reasons),
                          reasons={"truncated": len(reasons)} if reasons else {})
        if some:
            columns = {f.name: np.stack([row[f.name] for row in some]).astype(dtype) if pa.types.is_fixed_size_list(f.type)
                       else [row.get(f.name) for row in some] for f in schema}
            folder = f"{unit.plate}/" if unit.plate else ""
            key = f"features/{folder}part-{unit.id}{suffix}.parquet"
            receipt.objects.append(ledger.put_object(key, write_table(columns, schema)))
        if reasons:
            receipt.objects.append(ledger.put_quarantine(unit.id, reasons))
        ledger.commit(receipt)


def plate_rows(plates: Sequence[str] = ("P10", "P9"), wells: Sequence[str] = ("A01", "A02", "B01"), *, sites: int = 2,
               channels: Sequence[str] = ("DNA", "AGP"), dim: int = 3, seed: int = 0, tiles: int = 1, objects: int = 0,
               **fields: Any) -> list[dict[str, Any]]:
    """Random rows of every plate, well, site, channel and tile; a plate moves all its features."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, plate in enumerate(plates):
        for well in wells:
            for site in range(1, sites + 1):
                for channel in channels:
                    for tile in range(max(tiles, objects)):
                        row = make_row(f"{plate}/{well}_s{site}.tif", channel, Metadata_Plate=plate, Metadata_Well=well,
                                       Metadata_Site=str(site), cls=rng.normal(3 * number, 1, dim), patch_mean=rng.normal(size=dim),
                                       **fields)
                        rows.append({**row, "object_id": tile + 1} if objects else {**row, "tile": tile})
    return rows
