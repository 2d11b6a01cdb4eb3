"""The Parquet tables of a segmentation: one row per cell, and one per image.

Images of one unit may have different channels: their tables are joined, and a column that an image does not have is null
for it. What cannot be measured (a cell's area in µm² without a pixel size) is null, never NaN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

FEATURE = "feature"
"""Column of the mean backbone feature of a cell."""
_IMAGE = [
    ("item_id", pa.string()), ("uri", pa.string()), ("channel", pa.string()), ("height", pa.int32()), ("width", pa.int32()),
    ("pixel_size_um", pa.float64()), ("num_cells", pa.int64()), ("scale", pa.float64()), ("scale_source", pa.string()),
    ("median_diameter_px", pa.float64()), ("cell_fraction", pa.float64()), ("mask", pa.string()),
    ("p01", pa.float32()), ("p50", pa.float32()), ("p999", pa.float32()), ("frac_saturated", pa.float32()),
    ("focus", pa.float32()),
]

_WHOLE = frozenset({"object_id", "y0", "x0", "y1", "x1", "area_px", "neighbours_touching", "neighbours_within"})
"""Columns of cells that are int64."""
_TRUTH = frozenset({"touches_border"})
"""Columns of cells that are booleans; all other measurements are float64."""


def cell_rows(shared: Mapping[str, Any], measured: Mapping[str, np.ndarray], feature: np.ndarray | None) -> pa.Table:
    """The table of one image's cells. `shared`: values of all its rows (item_id, uri, `Metadata_*`: text); `measured`:
    columns of equal length with `object_id` first; `feature`: float32 [n, D]."""
    count = len(measured["object_id"])
    names, arrays = [], []
    for name, value in shared.items():
        names.append(name)
        arrays.append(pa.array([value] * count, pa.string()))
    for name, values in measured.items():
        names.append(name)
        arrays.append(_column(name, values))
    order = ["item_id", "uri", "object_id", *(name for name in names if name not in ("item_id", "uri", "object_id"))]
    table = pa.Table.from_arrays(arrays, names=names).select(order)
    if feature is None:
        return table
    flat = pa.array(np.ascontiguousarray(feature, np.float32).reshape(-1), pa.float32())
    return table.append_column(FEATURE, pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.float32(), feature.shape[1])))


def _column(name: str, values: np.ndarray) -> pa.Array:
    """A measurement in its column's type, the same in all files; NaN becomes null."""
    if name in _WHOLE:
        return pa.array(values.astype(np.int64))
    return pa.array(values.astype(bool)) if name in _TRUTH else pa.array(values.astype(np.float64), from_pandas=True)


def join_cells(tables: Sequence[pa.Table], facts: Mapping[str, Any]) -> pa.Table:
    """One table of several images' cells, in order: columns by first appearance, the feature last."""
    table = pa.concat_tables(tables, promote_options="default")
    if FEATURE in table.column_names:
        table = table.select([*(name for name in table.column_names if name != FEATURE), FEATURE])
    return table.replace_schema_metadata({"dinoray": json.dumps(facts, sort_keys=True)})


def image_table(rows: Sequence[Mapping[str, Any]], metadata_columns: Sequence[str], facts: Mapping[str, Any]) -> pa.Table:
    """The table of images: rows of the fixed columns and `Metadata_*`."""
    schema = pa.schema([*_IMAGE, *((name, pa.string()) for name in metadata_columns)],
                       metadata={"dinoray": json.dumps(facts, sort_keys=True)})
    return pa.Table.from_arrays([pa.array([row[field.name] for row in rows], field.type) for field in schema], schema=schema)
