"""A bounded, deterministic sample of the rows of a run.

A run of at most `MAX_ROWS` rows is read whole. Of a larger one, `MAX_UNITS` units spread evenly over the plan
give their first items, whole items only (an item with more tiles than a unit's share is cut). One sample
serves pictures, maps, neighbours and histograms, so the pictures of the page belong together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.errors import OutputDamaged
from dinoray.report.run import Part, Run

MAX_ROWS = 20_000
"""Rows whose vectors are read."""
MAX_UNITS = 64
"""Units that the sample of a larger run comes from."""
_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class SampledItem:
    """One item of the sample: its file and its rows [start, stop) in the sample's table."""

    item_id: str
    part: Part
    start: int
    stop: int


@dataclass
class Sample:
    """Rows of a run: `table` without vectors, `vectors` float32 [rows, D] or None, and their items."""

    table: pa.Table
    vectors: np.ndarray | None
    vector_column: str | None
    dense_column: str | None
    """The column that names the patch grids (`dense_array...`), its index column beside it."""
    items: list[SampledItem]
    num_units: int
    complete: bool
    """Whether these are all rows of the run."""

    @property
    def channels(self) -> list[str]:
        """Distinct channels, in order of appearance."""
        return self.table["channel"].unique().to_pylist() if self.table.num_rows else []

    @property
    def index_column(self) -> str:
        """The index column of `dense_column`."""
        return (self.dense_column or "").replace("dense_array", "dense_index")


def read_sample(run: Run, *, max_rows: int = MAX_ROWS, max_units: int = MAX_UNITS) -> Sample:
    """Read the sample of rows. Memory: `max_rows` rows and their vectors as float32.

    Raises OutputDamaged when a file that a receipt names is missing or is not readable.
    """
    total = sum(part.rows for part in run.parts)
    complete = total <= max_rows
    chosen = run.parts if complete else [run.parts[i] for i in evenly(len(run.parts), max_units)]
    share = max_rows if complete else max(1, max_rows // len(chosen))
    tables, vectors, items, start = [], [], [], 0
    vector_column = dense_column = None
    for part in chosen:
        try:
            with run.store.open(part.key) as file:
                parquet = pq.ParquetFile(file)
                names = parquet.schema_arrow.names
                vector_column, dense_column = pick_vector(names), pick_dense(names)
                table, matrix = _read_part(parquet, vector_column, dense_column, share, whole=complete)
        except (OSError, pa.ArrowException) as error:
            raise OutputDamaged(f"features cannot be read: {error}", where=f"{run.store.url}/{part.key}",
                                todo="see `dinoray verify`, then run the extraction again") from error
        tables.append(table)
        if matrix is not None:
            vectors.append(matrix)
        ids = table["item_id"].to_pylist()
        cuts = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1]), len(ids)]
        items += [SampledItem(ids[a], part, start + a, start + b) for a, b in zip(cuts, cuts[1:], strict=False)
                  if b > a]
        start += len(ids)
    empty = pa.table({"channel": pa.array([], pa.string())})
    table = pa.concat_tables(tables, promote_options="default") if tables else empty
    return Sample(table, np.concatenate(vectors) if vectors else None, vector_column, dense_column, items,
                  len(chosen), complete)


def _read_part(parquet: pq.ParquetFile, vector: str | None, dense: str | None, share: int, *,
               whole: bool) -> tuple[pa.Table, np.ndarray | None]:
    """The first rows of a file, at least one item's and about `share` of them; the last item is not cut."""
    vectors = {field.name for field in parquet.schema_arrow if pa.types.is_fixed_size_list(field.type)}
    references = {name for name in parquet.schema_arrow.names if name.startswith(("dense_array", "dense_index"))}
    wanted = [name for name in parquet.schema_arrow.names if name not in vectors | references]
    wanted += [vector] if vector else []
    wanted += [dense, dense.replace("dense_array", "dense_index")] if dense else []
    batches, rows = [], 0
    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
        batches.append(batch)
        rows += batch.num_rows
        if not whole and rows >= share:
            break
    table = pa.Table.from_batches(batches)
    if not whole and table.num_rows > share:
        ids = table["item_id"].to_pylist()
        stop = share
        while stop and ids[stop - 1] == ids[stop]:
            stop -= 1
        table = table.slice(0, stop or share)
    if vector is None:
        return table, None
    column = table[vector].combine_chunks()
    matrix = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
    return table.drop_columns([vector]), matrix


def pick_vector(names: Sequence[str]) -> str | None:
    """The vector column that neighbours use: `cls`, else its last layer, else `patch_mean` likewise."""
    for feature in ("cls", "patch_mean"):
        if feature in names:
            return feature
        layers = sorted(name for name in names if re.fullmatch(rf"{feature}_l\d+", name))
        if layers:
            return layers[-1]
    return None


def pick_dense(names: Sequence[str]) -> str | None:
    """The dense reference that maps use: `dense_array`, else that of the last layer."""
    found = sorted(name for name in names if re.fullmatch(r"dense_array(_l\d+)?", name))
    return found[-1] if found else None


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` distinct positions spread over range(count), its ends included."""
    if wanted < 1 or count < 1:
        return []
    if count <= wanted:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)})
