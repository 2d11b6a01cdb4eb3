"""Outputs made by hand for tests of the report: real plans, receipts and tables of any size, without a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dinoray.generations import FOLDER
from dinoray.io.items import FileRef, Item
from dinoray.io.stores import LocalStore, open_store
from dinoray.io.tables import feature_schema, write_table
from dinoray.ledger import Ledger, Receipt
from dinoray.units import Plan
from tests.runs import DictStore, make_plan

SETTINGS = {"features": ["cls"], "layers": [], "vector_dtype": "float32", "scaling": "dtype", "scaling_low_percent": 0.1,
            "scaling_high_percent": 99.9, "contrast": "none", "size": "auto", "tile_px": 256, "resize_px": 224,
            "channels": "auto", "z_projection": "refuse"}
FACTS = {"numerics": {"device": "cpu", "device_kind": "cpu"},
         "described": {"model": "vitt16", "precision": "float32", "fingerprint": "f" * 16,
                       "normalisation": {"mean": [0.5] * 3, "std": [0.2] * 3, "rule": "lvd"}}}
QC = ("p01", "p50", "p999", "frac_saturated", "focus")
Values = Callable[[Item, str, int], dict[str, float]]
"""Quality of a row by (item, channel, number of the object): the fields of QC that differ from 1."""


def item(name: str, plate: str | None = None, well: str | None = None, **metadata: str) -> Item:
    """An input that need not exist; `metadata` by short name (Site="1", Batch="b")."""
    named = {"Plate": plate, "Well": well, **metadata}
    return Item(name, (FileRef(f"/nowhere/{name}", 10, "1"),), group=plate or ".", plate=plate,
                metadata={f"Metadata_{key}": value for key, value in named.items() if value is not None})


def write_job(store: LocalStore, **settings: object) -> None:
    """A record of the job with these settings."""
    store.put("_dinoray/job.json", json.dumps({
        "command": "dinoray extract images /nowhere", "fingerprint": "f" * 16, "identity": {"settings": {**SETTINGS, **settings}},
        "job": {"sources": ["/nowhere"]}, "weights": {"source": "random:0", "digest": "d" * 64}}).encode())


def write_units(out: Path, items: Sequence[Item], *, generation: str = "", max_items: int = 100, channels: Sequence[str] = ("A",),
                objects: int = 0, bad: dict[str, str] | None = None, values: Values = lambda *_: {},
                vector: Callable[[Item, str], np.ndarray] = lambda *_: np.ones(4), undone: Sequence[int] = (),
                replaces: dict[str, str] | None = None, **facts: object) -> Plan:
    """Plan `items` and commit units with rows (one per item, channel and object) or quarantine (`bad`: id -> reason).

    `generation`: "" for the first plan, else a name such as `001-retry`. Units in `undone` get no receipt.
    `replaces`: of a retry, the reasons its items had (id -> reason).
    """
    store = open_store(str(out))
    prefix = f"{FOLDER}/{generation}" if generation else "_dinoray"
    if replaces is not None:  # unit ids are a function of the items
        scratch = make_plan(DictStore(), items, max_items=max_items)
        facts["replaces"] = {unit.id: dict(Counter(replaces[one.item_id] for one in unit.items)) for unit in scratch.units()}
    plan = make_plan(store, items, prefix=prefix, max_items=max_items, **{**FACTS, **facts})
    if not generation:
        write_job(store)
    ledger, bad = Ledger(store, prefix), bad or {}
    names = sorted({name for one in items for name in one.metadata})
    for unit in plan.units():
        ledger.begin(unit.id)
        if unit.number in undone:
            continue
        lost = [{"item_id": one.item_id, "uri": one.files[0].uri, "reason": bad[one.item_id], "message": f"{one.item_id} is bad"}
                for one in unit.items if one.item_id in bad]
        rows = [(one, channel, n) for one in unit.items if one.item_id not in bad for channel in channels
                for n in range(objects or 1)]
        receipt = Receipt(unit.id, unit.number, "f" * 16, unit.plate, items=len(unit.items), rows=len(rows),
                          row_items=len(unit.items) - len(lost), quarantined=len(lost),
                          reasons=dict(Counter(row["reason"] for row in lost)),
                          seconds={"wall": 2.0, "wait_compute": 1.5}, worker={"host": "h", "pid": 1})
        if lost:
            receipt.objects.append(ledger.put_quarantine(unit.id, lost))
        if rows:
            vectors = np.stack([vector(one, channel) for one, channel, _ in rows]).astype(np.float32)
            quality = [values(*row) for row in rows]
            columns = {"item_id": [one.item_id for one, _, _ in rows], "uri": [one.files[0].uri for one, _, _ in rows],
                       "channel": [channel for _, channel, _ in rows], "tile": [0] * len(rows),
                       **{name: [v] * len(rows) for name, v in (("y0", 0), ("x0", 0), ("y1", 64), ("x1", 64), ("height", 64),
                                                                ("width", 64), ("pixel_size_um", None))},
                       **{name: [one.get(name, 1.0) for one in quality] for name in QC},
                       **{name: [one.metadata.get(name) for one, _, _ in rows] for name in names}, "cls": vectors}
            schema = feature_schema(vectors={"cls": vectors.shape[1]}, vector_dtype="float32", metadata_columns=names)
            if objects:
                schema = schema.append(schema.field("item_id").with_name("object_id"))
                columns["object_id"] = [str(n) for _, _, n in rows]
            suffix = f".r{int(generation[:3])}" if generation.endswith("retry") else ""
            receipt.objects.append(ledger.put_object(f"features/part-{unit.id}{suffix}.parquet", write_table(columns, schema)))
        ledger.commit(receipt)
    return plan
