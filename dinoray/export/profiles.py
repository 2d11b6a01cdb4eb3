"""Wide profiles: one row per site, well, image or object, the channels side by side; what pycytominer reads.

A profile is the mean (or median) of all rows of the feature table that belong to it, per channel: tiles and objects
count once each, not site by site. Plates are done one after the other. Of a plate, keys are held as integers; vectors
are read for as many neighbouring groups as fit BLOCK_BYTES, so memory depends neither on the number of rows nor plates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.export import grouping
from dinoray.export.grouping import KEYS, LEVELS, RENAMED, Groups
from dinoray.export.names import COMPARTMENTS, DEFAULT_COMPARTMENT, channel_labels, feature_names
from dinoray.export.plain import Exported, absences, choose_vectors, conform
from dinoray.export.pooling import pool
from dinoray.export.source import Part, Source, open_source
from dinoray.export.target import open_target, resolve_target
from dinoray.io.grouping import natural

BLOCK_BYTES = 64 * 2**20
"""Vectors in memory at once; several times this in all while they are pooled. One group larger than this is read whole."""
QUALITY = ("p01", "p50", "p999", "frac_saturated", "focus")
HOW = ("mean", "median")


@dataclass
class Layout:
    """What the columns of an export are, fixed before the first row."""

    level: str
    how: str
    columns: list[str]
    """Columns of the feature table."""
    channels: list[str]
    quality: list[str]
    vectors: list[tuple[str, int]]
    schema: pa.Schema

    @property
    def keys(self) -> list[str]:
        """Columns that make a group."""
        return grouping.level_keys(self.level, self.columns)

    @property
    def dim(self) -> int:
        """Numbers of one row and channel: quality, then vectors."""
        return len(self.quality) + sum(dim for _, dim in self.vectors)


def export_profiles(url: str, to: str | None = None, *, level: str = "well", how: str = "mean",
                    features: Sequence[str] | None = None, fmt: str | None = None, compartment: str | None = None,
                    partial: bool = False) -> Exported:
    """Write wide profiles of an output, plates in natural order, in a plate by (Source, Batch, Well, Site, image, object).

    `level` is site, well, image or object; `how` mean or median, NaN left out, computed in float64, stored as float32;
    `features` some of the vector columns; `compartment` the prefix of the feature columns (default Cells: pycytominer
    finds these with its defaults). A channel that a profile has no row of is NaN. Source: the column conventions of pycytominer.
    Raises BadRequest (no output, unfinished, no plate or well), OutputDamaged, SystemicError.
    """
    for name, value, known in (("--level", level, LEVELS), ("--aggregate", how, HOW),
                               ("--compartment", compartment or DEFAULT_COMPARTMENT, COMPARTMENTS)):
        if value not in known:
            raise BadRequest(f"{name} {value} is unknown", todo=f"one of {', '.join(known)}")
    target, fmt = resolve_target(url, to, fmt, f"{level}_{how}")
    source = open_source(url, partial=partial)
    layout = _layout(source, level, how, features, compartment)
    pooled: Counter[str] = Counter()
    absent = np.zeros(len(layout.channels), np.int64)
    bad = _quarantined(source, layout)
    quarantined = sum(bad.values())
    with open_target(target, fmt, layout.schema) as writer:
        for _, parts in source.plates():
            groups = grouping.group_plate(source, parts, level, layout.columns, layout.channels)
            pooled.update(groups.pooled)
            groups.counts |= _take_counts(groups, layout, bad)
            for table, present in _blocks(source, groups, layout):
                absent += (~present).sum(axis=0)
                writer.write(table)
    notes = [f"channel {channel}: absent (NaN) in {n} of {writer.rows} rows"
             for channel, n in zip(layout.channels, absent, strict=True) if n]
    notes += [f"{n} of {writer.rows} profiles pool several values of {name}" for name, n in pooled.items() if n]
    notes += [f"channel {name!r} is called {label} in column names"
              for name, label in zip(layout.channels, channel_labels(layout.channels), strict=True) if label != name]
    if taken := [n for n in layout.columns if n.startswith("Metadata_") and grouping.is_taken(n)]:
        notes.append(f"left out, the export has columns of these names: {', '.join(taken)}")
    notes += absences(source, quarantined)
    if level in ("site", "well") and bad:
        shown = ["/".join(value or "?" for value in key) for key in sorted(bad, key=lambda k: [natural(v or "") for v in k])]
        notes.append(f"no profile, all images quarantined: {len(bad)} {level}{'s' * (len(bad) > 1)}: {', '.join(shown[:5])}"
                     + (f" and {len(shown) - 5} more" if len(shown) > 5 else ""))
    return Exported(target, writer.rows, len(layout.schema), notes)


def _layout(source: Source, level: str, how: str, features: Sequence[str] | None, compartment: str | None) -> Layout:
    schema, url = source.schema(), source.store.url
    vectors = [(name, schema.field(name).type.list_size) for name in choose_vectors(schema, features, url)]
    if not vectors:
        raise BadRequest("this output has no vectors (cls, patch_mean), so no profile can be made of it", where=url,
                         todo="extract with --features cls,patch_mean")
    grouping.require_keys(level, schema.names, url)
    channels = _channels(source, level)
    facts = json.loads(schema.metadata[b"dinoray"])
    quality = [name for name in QUALITY if name in schema.names]
    keys = grouping.level_keys(level, schema.names)
    extra = grouping.agreed_columns(level, schema.names)
    counts = ["Metadata_Count_Rows", "Metadata_Count_Images"]
    counts += ["Metadata_Count_Objects"] * ("object_id" in schema.names)
    counts += ["Metadata_Count_Quarantined"] * (level in ("site", "well"))
    labels = channel_labels(channels)
    prefix = compartment or DEFAULT_COMPARTMENT
    fields = [(RENAMED.get(n, n), schema.field(n).type) for n in keys]
    fields += [(n, schema.field(n).type) for n in extra] + [(n, pa.int64()) for n in counts]
    fields += [(f"Metadata_QC_{label}_{name}", pa.float32()) for label in labels for name in quality]
    fields += [(n, pa.float32()) for n in feature_names(prefix, facts["model"], channels, vectors)]
    described = {**facts, "export": {"level": level, "aggregate": how, "channels": dict(zip(labels, channels, strict=True)),
                                     "missing_units": source.missing_units}}
    return Layout(level, how, schema.names, channels, quality, vectors,
                  pa.schema(fields, {"dinoray": json.dumps(described, sort_keys=True)}))


def _channels(source: Source, level: str) -> list[str]:
    """All channels in natural order, and the check that every row has the keys of its level."""
    channels: set[str] = set()
    nulls: Counter[str] = Counter()
    required = grouping.required_keys(level)
    example = ""
    for table in source.scan(["channel", *(["item_id"] if required else []), *required]):
        channels |= set(pc.unique(table["channel"]).to_pylist())
        for name in required:
            absent = table[name].is_null() if name in table.column_names else pa.chunked_array([np.ones(table.num_rows, bool)])
            nulls[name] += pc.sum(absent).as_py() or 0
            if nulls[name] and not example:
                example = table["item_id"].filter(absent)[0].as_py()
    if missing := [name for name in required if nulls[name]]:
        raise BadRequest("some rows have no " + ", no ".join(f"{name} ({nulls[name]} rows)" for name in missing)
                         + f", the first: {example}", where=source.store.url, todo=grouping.todo_keys(level, missing))
    return sorted(channels, key=natural)


def _quarantined(source: Source, layout: Layout) -> Counter[tuple[str | None, ...]]:
    """Quarantined images by the keys of their site or well (of their image, at the finer levels)."""
    keys = [name for name in layout.keys if name in KEYS]
    found: Counter[tuple[str | None, ...]] = Counter()
    for metadata, _, count in source.quarantined():
        found[tuple(metadata.get(name) for name in keys)] += count
    return found


def _take_counts(groups: Groups, layout: Layout, bad: Counter[tuple[str | None, ...]]) -> dict[str, np.ndarray]:
    """Metadata_Count_Quarantined of the groups; what is counted here is taken out of `bad`."""
    if layout.level not in ("site", "well"):
        return {}
    keys = zip(*(groups.metadata[name].to_pylist() for name in layout.keys), strict=True)
    return {"Metadata_Count_Quarantined": np.array([bad.pop(key, 0) for key in keys], np.int64)}


def _blocks(source: Source, groups: Groups, layout: Layout) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """The groups of a plate as tables of the export, and which channels are there: bool [groups, C]."""
    ends = np.cumsum(groups.counts["Metadata_Count_Rows"])
    rows = max(1, BLOCK_BYTES // (4 * layout.dim))
    first = 0
    while first < groups.num:
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + rows, side="right")))
        chosen = groups.rows_by_segment[begin:ends[last - 1]]
        segment = (groups.group[chosen] - first) * len(layout.channels) + groups.channel[chosen]
        there, starts = np.unique(segment, return_index=True)
        cube = np.full(((last - first) * len(layout.channels), layout.dim), np.nan, np.float32)
        cube[there] = pool(_read(source, groups, layout, chosen), starts, layout.how)
        present = np.zeros(len(cube), bool)
        present[there] = True
        yield (_table(groups, layout, slice(first, last), cube.reshape(last - first, len(layout.channels), layout.dim)),
               present.reshape(last - first, -1))
        first = last


def _read(source: Source, groups: Groups, layout: Layout, rows: np.ndarray) -> np.ndarray:
    """Quality and vectors of these rows of a plate -> float32 [rows, dim]; only the row groups that hold them are read."""
    values = np.full((len(rows), layout.dim), np.nan, np.float32)
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    for part, start in zip(groups.parts, groups.part_starts, strict=False):
        if not np.searchsorted(ordered, start + part.rows) > np.searchsorted(ordered, start):
            continue
        with source.open(part) as file:
            for number in range(file.num_row_groups):
                length = file.metadata.row_group(number).num_rows
                low, high = np.searchsorted(ordered, [start, start + length])
                if high > low:
                    columns = [*layout.quality, *(name for name, _ in layout.vectors)]
                    table = file.read_row_group(number, columns=columns)
                    values[order[low:high]] = _matrix(table, layout, part)[ordered[low:high] - start]
                start += length
    return values


def _matrix(table: pa.Table, layout: Layout, part: Part) -> np.ndarray:
    """Quality columns (null -> NaN) and vectors side by side, float32 [rows, dim]."""
    wide = np.empty((table.num_rows, layout.dim), np.float32)
    for i, name in enumerate(layout.quality):
        wide[:, i] = table[name].to_numpy(zero_copy_only=False)
    at = len(layout.quality)
    for name, dim in layout.vectors:
        column = table[name].combine_chunks()
        if column.null_count or column.type.list_size != dim:
            raise OutputDamaged(f"column {name} has nulls, or vectors of another length than {dim}", where=part.key,
                                todo="`dinoray verify --deep` lists all damage")
        wide[:, at:at + dim] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), dim)
        at += dim
    return wide


def _table(groups: Groups, layout: Layout, some: slice, cube: np.ndarray) -> pa.Table:
    """Rows of the export from the metadata of these groups and their numbers [groups, C, dim]."""
    num = some.stop - some.start
    columns = {name: values.slice(some.start, num) for name, values in groups.metadata.items()}
    columns |= {name: pa.array(values[some]) for name, values in groups.counts.items()}
    quality = np.ascontiguousarray(cube[:, :, :len(layout.quality)].reshape(num, -1).T)
    vectors = np.ascontiguousarray(cube[:, :, len(layout.quality):].reshape(num, -1).T)
    numbers = [pa.array(column) for column in (*quality, *vectors)]
    names = layout.schema.names[len(layout.schema) - len(numbers):]
    return conform(pa.table(columns | dict(zip(names, numbers, strict=True))), layout.schema)
