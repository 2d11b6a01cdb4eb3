"""Rows of one plate -> groups: which rows make a profile, in which order profiles stand, what is said of each.

Rows are numbers here: keys are read as Arrow dictionaries and turned into small integers, so a plate of millions of
objects costs a few integers a row and no Python object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinoray.errors import BadRequest
from dinoray.export.source import Part, Source
from dinoray.io.grouping import natural

LEVELS = ("site", "well", "image", "object")
KEYS = ("Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_Well", "Metadata_Site")
"""Where an image is, from outside in: the order of profiles and of their first columns."""
SERIES = ("Metadata_Plane", "Metadata_Time", "Metadata_Timepoint")
"""Planes and times of one site are different images; pooling them is worth a word."""
RENAMED = {"item_id": "Metadata_ItemId", "object_id": "Metadata_ObjectNumber"}
"""Keys of the levels image and object, and what they are called in a profile."""


def level_keys(level: str, columns: Sequence[str]) -> list[str]:
    """The columns (of those there are) whose values make a group at this level."""
    wanted = [name for name in KEYS if not (level == "well" and name == "Metadata_Site")]
    wanted += {"image": ["item_id"], "object": ["item_id", "object_id"]}.get(level, [])
    return [name for name in wanted if name in columns]


def agreed_columns(level: str, columns: Sequence[str]) -> list[str]:
    """The other `Metadata_*` columns: a profile has their value where all its rows agree, else null."""
    left = {*level_keys(level, columns), *(["Metadata_Site"] if level == "well" else [])}
    return [name for name in columns if name.startswith("Metadata_") and name not in left and not is_taken(name)]


def is_taken(name: str) -> bool:
    """Whether an export makes a column of this name itself."""
    return name.startswith(("Metadata_Count_", "Metadata_QC_")) or name in RENAMED.values()


def required_keys(level: str) -> list[str]:
    """The columns without which a level makes no sense."""
    return {"site": ["Metadata_Plate", "Metadata_Well", "Metadata_Site"], "well": ["Metadata_Plate", "Metadata_Well"],
            "image": [], "object": ["object_id"]}[level]


def require_keys(level: str, columns: Sequence[str], where: str) -> None:
    """Raises BadRequest when the table has not the columns of the level, saying which level works."""
    missing = [name for name in required_keys(level) if name not in columns]
    if missing == ["object_id"]:
        raise BadRequest("the rows of this output are whole fields or tiles, not objects", where=where,
                         todo="--level site, well or image; objects come from `dinoray extract cells`")
    if missing:
        raise BadRequest(f"--level {level} needs {', '.join(missing)}, and the images of this output have none", where=where,
                         todo=todo_keys(level, missing))


def todo_keys(level: str, missing: Sequence[str]) -> str:
    other = "--level well or image" if list(missing) == ["Metadata_Site"] else "--level image"
    return (f"{other} works without; or extract again with names that tell it (--pattern, see docs/channels.md) or a "
            f"manifest with {', '.join(missing)}")


@dataclass(frozen=True)
class Codes:
    """A column as integers [rows] int32: 0 for null, k for `values[k - 1]`, values sorted."""

    numbers: np.ndarray
    values: pa.Array

    def take(self, numbers: np.ndarray) -> pa.Array:
        """The values of these codes, null for 0."""
        return self.values.take(pa.array(numbers.astype(np.int64) - 1, mask=numbers == 0))


def encode(column: pa.ChunkedArray, *, naturally: bool) -> Codes:
    """Sorted codes of a column; `naturally`: site 2 before site 10 (for columns of few distinct values)."""
    encoded = pc.dictionary_encode(column).combine_chunks() if not pa.types.is_dictionary(column.type) \
        else column.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # no chunk at all
        encoded = pc.dictionary_encode(pa.array([], column.type))
    values = encoded.dictionary
    if naturally and pa.types.is_string(values.type):
        texts = values.to_pylist()
        order = np.array(sorted(range(len(texts)), key=lambda i: (natural(texts[i]), texts[i])), np.int64)
    else:
        order = pc.sort_indices(values).to_numpy()
    rank = np.empty(len(order) + 1, np.int32)
    rank[order], rank[-1] = np.arange(1, len(order) + 1), 0
    numbers = rank[pc.fill_null(encoded.indices, len(order)).to_numpy(zero_copy_only=False)]
    return Codes(numbers, values.take(pa.array(order)))


@dataclass
class Groups:
    """The groups of one plate, sorted, and where their rows lie."""

    parts: list[Part]
    num: int
    channel: np.ndarray
    """[rows] int32: index into the channels of the export."""
    group: np.ndarray
    """[rows] int64: the group of each row; rows are numbered through the parts in order."""
    metadata: dict[str, pa.Array]
    """Per group: the keys, then what all rows of a group agree on (null where they differ)."""
    counts: dict[str, np.ndarray]
    """Per group: Metadata_Count_Rows, Metadata_Count_Images and, of objects, Metadata_Count_Objects; int64."""
    rows_by_segment: np.ndarray
    """Row numbers sorted by (group, channel), stable."""
    pooled: dict[str, int]
    """Of SERIES columns: how many groups hold more than one of their values."""

    @property
    def part_starts(self) -> np.ndarray:
        """[parts + 1] number of the first row of each part, and the number of rows."""
        return np.cumsum([0, *(part.rows for part in self.parts)])


def group_plate(source: Source, parts: list[Part], level: str, columns: Sequence[str], channels: Sequence[str]) -> Groups:
    """Read the keys of a plate's files and group its rows. `columns`: names of all columns of the output."""
    wanted = [name for name in columns if name.startswith("Metadata_") or name in ("channel", "item_id", "object_id")]
    tables = []
    for part in parts:
        with source.open(part) as file:
            table = file.read([name for name in wanted if name in file.schema_arrow.names])
        # dictionaries at once: one string per distinct value instead of one per row
        tables.append(pa.table({name: pc.dictionary_encode(table[name]) for name in table.column_names}))
    table = pa.concat_tables(tables, promote_options="default")
    codes = {name: encode(table[name], naturally=name not in RENAMED) for name in table.column_names}
    channel_of = {name: i for i, name in enumerate(channels)}
    channel = np.array([-1, *(channel_of[name] for name in codes["channel"].values.to_pylist())],
                       np.int32)[codes["channel"].numbers]

    keys = level_keys(level, columns)
    group, first = _combine([codes[name].numbers for name in keys if name in codes], table.num_rows)
    num = len(first)
    metadata = {RENAMED.get(name, name): codes[name].take(codes[name].numbers[first])
                for name in keys if name in codes}
    pooled: dict[str, int] = {}
    by_group = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[by_group], np.arange(num))
    for name in (n for n in agreed_columns(level, columns) if n in codes):
        numbers = codes[name].numbers[by_group]
        low, high = np.minimum.reduceat(numbers, starts), np.maximum.reduceat(numbers, starts)
        metadata[name] = codes[name].take(np.where(low == high, low, 0))
        if name in SERIES:
            pooled[name] = int(np.sum(low != high))
    counts = {"Metadata_Count_Rows": np.bincount(group, minlength=num),
              "Metadata_Count_Images": _distinct(group, [codes["item_id"].numbers], num)}
    if "object_id" in codes:
        counts["Metadata_Count_Objects"] = _distinct(group, [codes["item_id"].numbers, codes["object_id"].numbers], num)
    segment = group * len(channels) + channel
    return Groups(parts, num, channel, group, metadata, counts, np.argsort(segment, kind="stable"), pooled)


def _combine(keys: list[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(group of each row, a row of each group): groups sorted by the first key, then the second, ..."""
    group, first = np.zeros(rows, np.int64), np.zeros(1, np.int64)
    for numbers in keys:
        _, first, group = np.unique(group * (int(numbers.max()) + 1) + numbers, return_index=True, return_inverse=True)
    return group, first


def _distinct(group: np.ndarray, keys: list[np.ndarray], num: int) -> np.ndarray:
    """How many distinct combinations of `keys` each group has."""
    combined, first = _combine([group, *keys], len(group))
    del combined
    return np.bincount(group[first], minlength=num)
