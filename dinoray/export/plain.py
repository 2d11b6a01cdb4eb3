"""The feature table as it is, as one file: rows in plan order, streamed file by file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from dinoray.errors import BadRequest
from dinoray.export.source import Source, open_source
from dinoray.export.target import open_target, resolve_target

BATCH_BYTES = 32 * 2**20
"""Rows are read in batches near this size."""


@dataclass
class Exported:
    """What was written, and what a reader must know of it (`notes`: lines for a person)."""

    target: str
    rows: int
    columns: int
    notes: list[str] = field(default_factory=list)


def choose_vectors(schema: pa.Schema, features: Sequence[str] | None, where: str) -> list[str]:
    """The vector columns to export, in the table's order. Raises BadRequest for a name that is none."""
    there = [f.name for f in schema if pa.types.is_fixed_size_list(f.type)]
    unknown = [name for name in features or () if name not in there]
    if unknown:
        raise BadRequest(f"no vector column {', '.join(unknown)}", where=where,
                         todo=f"--feature: {', '.join(there) or 'there is none'}")
    return [name for name in there if not features or name in features]


def absences(source: Source, quarantined: int) -> Iterable[str]:
    """Lines on what an export does not hold."""
    if source.missing_units:
        yield f"partial: {source.missing_units} of {source.units} units are missing"
    if quarantined:
        yield f"quarantined: {quarantined} images have no row (`dinoray status` gives the reasons)"


def export_table(url: str, to: str | None = None, *, features: Sequence[str] | None = None, fmt: str | None = None,
                 partial: bool = False) -> Exported:
    """Write the feature table of an output as one file; `features`: these vector columns only.

    Parquet keeps vectors as FixedSizeList and the file metadata; CSV widens them (`cls_0000`, ...) and escapes formulas.
    Raises BadRequest (no output, unfinished, no such column), OutputDamaged, SystemicError.
    """
    target, fmt = resolve_target(url, to, fmt, "features")
    source = open_source(url, partial=partial)
    schema = source.schema()
    vectors = choose_vectors(schema, features, url)
    schema = pa.schema([f for f in schema if not pa.types.is_fixed_size_list(f.type) or f.name in vectors], schema.metadata)
    with open_target(target, fmt, schema) as writer:
        for part in source.parts:
            with source.open(part) as file:
                row_bytes = 200 + sum(f.type.list_size * f.type.value_type.bit_width // 8
                                      for f in schema if pa.types.is_fixed_size_list(f.type))
                names = [name for name in schema.names if name in file.schema_arrow.names]
                for batch in file.iter_batches(max(1, BATCH_BYTES // row_bytes), columns=names, use_threads=False):
                    writer.write(conform(pa.Table.from_batches([batch]), schema))
    quarantined = sum(count for _, _, count in source.quarantined())
    width = len(schema) if fmt == "parquet" else sum(
        f.type.list_size if pa.types.is_fixed_size_list(f.type) else 1 for f in schema)
    return Exported(target, writer.rows, width, list(absences(source, quarantined)))


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly these columns; one that its generation has not is null."""
    there = dict(zip(table.column_names, table.columns, strict=True))  # thousands of columns: no search by name in a loop
    return pa.table([there[f.name] if f.name in there else pa.nulls(table.num_rows, f.type) for f in schema], schema=schema)
