"""Outputs of `dinoray segment cells` made by hand for tests of the report: real tables, masks and receipts, without a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tifffile

from dinoray.generations import FOLDER
from dinoray.io.cell_tables import cell_rows, image_table, join_cells
from dinoray.io.items import FileRef, Item
from dinoray.io.mask_files import mask_key, mask_objects
from dinoray.io.object_names import item_path, plate_folder
from dinoray.io.stores import open_store
from dinoray.io.tables import encode_table
from dinoray.ledger import Ledger, Receipt
from dinoray.units import Plan
from dinoray.vision.shapes import cell_table
from tests.report.outputs import FACTS
from tests.runs import item_of_file, make_plan

SETTINGS = {"channel": "auto", "scaling": "image", "peak": 0.47, "fill": 0.09, "markers": "components",
            "marker_height": 0.25, "min_area_px": 0, "diameter_px": None, "pixel_size_um": None, "masks": "tiff",
            "z_projection": "refuse", "cell_features": True}
DESCRIBED = {**FACTS["described"], "kind": "cell-masks",
             "checkpoint": {"crop_px": 96, "median_diameter_px": 20.0, "pixel_size_um": None, "scaling_percents": [0.1, 99.9]}}


def field_of(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """A 16-bit image in which the cells of `labels` are bright."""
    noise = np.random.default_rng(seed).integers(0, 60, labels.shape)
    return (100 + noise + 900 * (labels > 0) + 40 * (labels % 7)).astype(np.uint16)


def saved(folder: Path, name: str, labels: np.ndarray, **fields: object) -> Item:
    """An image of these cells as a file, as an input."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, field_of(labels), photometric="minisblack")
    return Item(name, item_of_file(path).files, **fields)  # type: ignore[arg-type]


def lost(name: str, **fields: object) -> Item:
    """An input whose file is gone."""
    return Item(name, (FileRef(f"/nowhere/{name}", 10, "1"),), **fields)  # type: ignore[arg-type]


def write_segmented(out: Path | str, found: Sequence[tuple[Item, np.ndarray | str]], *, generation: str = "", max_items: int = 3,
                    scales: Mapping[str, tuple[float, str]] | None = None, undone: Sequence[int] = (), masks: str = "tiff",
                    replaces: Mapping[str, Mapping[str, int]] | None = None, **settings: object) -> Plan:
    """Plan the items and commit units: labels become masks and rows, a text is the reason of a quarantine.

    `scales`: item id -> (factor, source) where it is not (1, estimated). Units in `undone` get no receipt.
    """
    store = open_store(str(out))
    facts = {**FACTS, "described": DESCRIBED, "kind": "cell-masks"}
    prefix = f"{FOLDER}/{generation}" if generation else "_dinoray"
    if generation.endswith("retry"):
        facts["replaces"] = replaces or {}
    names = sorted({name for one, _ in found for name in one.metadata})
    plan = make_plan(store, [one for one, _ in found], prefix=prefix, max_items=max_items, metadata_columns=names, **facts)
    if not generation:
        store.put("_dinoray/job.json", json.dumps({
            "command": "dinoray segment cells /nowhere", "fingerprint": "f" * 16,
            "identity": {"settings": {**SETTINGS, "masks": masks, **settings}},
            "job": {"sources": ["/nowhere"], "checkpoint": "/nowhere/checkpoint"},
            "weights": {"source": "/nowhere/checkpoint", "digest": "d" * 64}}).encode())
    ledger, by_id = Ledger(store, prefix), {one.item_id: labels for one, labels in found}
    suffix = f".r{int(generation[:3])}" if generation else ""
    for unit in plan.units():
        ledger.begin(unit.id)
        if unit.number in undone:
            continue
        tables, rows, objects, bad = [], [], [], []
        for item in unit.items:
            labels = by_id[item.item_id]
            shared = {"item_id": item.item_id, "uri": item.files[0].uri}
            if isinstance(labels, str):
                bad.append({**shared, "reason": labels, "message": f"{item.item_id} is bad"})
                continue
            metadata = {name: item.metadata.get(name) for name in names}
            measured = cell_table(labels, field_of(labels)[None], ["DNA"])
            feature = np.ones((len(measured["object_id"]), 4), np.float32)
            tables.append(cell_rows({**shared, **metadata}, measured, feature))
            factor, source = (scales or {}).get(item.item_id, (1.0, "estimated"))
            key, sizes = mask_key(item_path(item.item_id), masks), measured["equivalent_diameter_px"]
            rows.append({**shared, **metadata, "channel": "DNA", "height": labels.shape[0], "width": labels.shape[1],
                         "pixel_size_um": None, "num_cells": len(sizes), "scale": factor, "scale_source": source,
                         "median_diameter_px": float(np.median(sizes)) if len(sizes) else None,
                         "cell_fraction": float((labels > 0).mean()), "mask": key, "p01": 1.0, "p50": 100.0, "p999": 900.0,
                         "frac_saturated": 0.0, "focus": 0.5})
            objects += [ledger.put_object(name, data) for name, data in mask_objects(labels.astype(np.int32), key, None)]
        counts = [row["num_cells"] for row in rows]
        receipt = Receipt(unit.id, unit.number, "f" * 16, unit.plate, items=len(unit.items), rows=sum(counts),
                          row_items=sum(count > 0 for count in counts), quarantined=len(bad),
                          without_objects=[row["item_id"] for row in rows if not row["num_cells"]],
                          reasons=dict(Counter(row["reason"] for row in bad)),
                          seconds={"wall": 4.0, "wait_compute": 1.0, "wait_cells": 2.0, "cells": 3.0, "compute": 2.0},
                          worker={"host": "h", "pid": 1})
        receipt.objects += objects
        if rows:
            name = f"{plate_folder(unit.plate)}part-{unit.id}{suffix}.parquet"
            for folder, table in (("cells", join_cells(tables, {})), ("images", image_table(rows, names, {}))):
                receipt.objects.append(ledger.put_object(f"{folder}/{name}", encode_table(table)))
        if bad:
            receipt.objects.append(ledger.put_quarantine(unit.id, bad))
        ledger.commit(receipt)
    return plan
