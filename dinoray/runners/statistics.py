"""The statistics pass: units over a sample of images give the intensity scaling of every plate and channel.

A unit writes `<prefix>/stats/part-<unit>.parquet`, an exact histogram: (group, channel, value, count). Float
images contribute a regular grid of at most `FLOAT_VALUES` values each. `scaling_table` merges the parts into
percentiles, which are stored beside the plan before it is sealed.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.errors import ItemError
from dinoray.io.images import Limits, load_item
from dinoray.io.items import Item
from dinoray.io.stores import Store
from dinoray.ledger import Ledger, Receipt
from dinoray.runners.base import Finish, Loaded, UnitRunner
from dinoray.units import Plan, Unit
from dinoray.vision.intensity import Scaling, channel_names, scaling_key
from dinoray.vision.quality import check_pixels, histogram_percentiles

PREFIX = "_dinoray/stats"
FLOAT_VALUES = 65_536
"""Values taken from one float plane, on a regular grid."""
HISTOGRAM_SCHEMA = pa.schema([("group", pa.string()), ("channel", pa.string()), ("value", pa.float64()),
                              ("count", pa.int64())])
SCALING_SCHEMA = pa.schema([("group", pa.string()), ("channel", pa.string()), ("low", pa.float64()),
                            ("high", pa.float64()), ("num_values", pa.int64())])

Histogram = tuple[np.ndarray, np.ndarray]


class StatisticsRunner(UnitRunner):
    """Unit -> histogram of its images' raw values. Items that cannot be read are left to the main pass."""

    point = "stats"

    def __init__(self, plan: Plan, ledger: Ledger, *, limits: Limits, z_projection: str, decode_threads: int,
                 prefetch_bytes: int):
        super().__init__(plan, ledger, decode_threads=decode_threads, prefetch_bytes=prefetch_bytes)
        self.limits, self.z_projection = limits, z_projection

    def load(self, item: Item) -> tuple[dict[str, Histogram], float, float, int]:
        loaded = load_item(item, self.limits, z_projection=self.z_projection)
        image = loaded.image
        check_pixels(image.pixels)
        began = time.monotonic()
        histograms = {}
        if not image.is_rgb8:  # 8-bit RGB is divided by 255, no statistics needed
            names = channel_names(image.channel_names, len(image.pixels), image.is_rgb8)
            histograms = {scaling_key(name, plane.dtype): histogram(plane)
                          for name, plane in zip(names, image.pixels, strict=True)}
        return histograms, loaded.read_s, loaded.decode_s + time.monotonic() - began, loaded.num_bytes

    def process(self, unit: Unit, loaded: Iterable[Loaded], receipt: Receipt) -> Finish:
        merged: dict[tuple[str, str], list[Histogram]] = {}
        receipt.seconds = {"read": 0.0, "decode": 0.0}
        for entry in loaded:
            if isinstance(entry.error, ItemError):
                receipt.quarantined += 1
                receipt.reasons[entry.error.reason] = receipt.reasons.get(entry.error.reason, 0) + 1
                continue
            histograms, read_s, decode_s, num_bytes = entry.value
            receipt.seconds["read"] += read_s
            receipt.seconds["decode"] += decode_s
            receipt.bytes_read += num_bytes
            for name, values in histograms.items():
                parts = merged.setdefault((entry.item.group, name), [])
                parts.append(values)
                if len(parts) == 8:  # bounds memory: a histogram is never longer than its distinct values
                    parts[:] = [merge(parts)]

        def finish() -> None:
            tables = []
            for (group, channel), parts in merged.items():
                values, counts = merge(parts)
                columns = {"group": pa.repeat(group, len(values)), "channel": pa.repeat(channel, len(values)),
                           "value": values, "count": counts}
                tables.append(pa.table(columns, schema=HISTOGRAM_SCHEMA))
            if tables:
                sink = io.BytesIO()
                pq.write_table(pa.concat_tables(tables), sink, compression="zstd")
                receipt.objects.append(self.ledger.put_object(f"{self.ledger.prefix}/part-{unit.id}.parquet", sink.getbuffer()))

        return finish


def histogram(plane: np.ndarray) -> Histogram:
    """Sorted distinct values (float64) and counts of a plane [Y, X]; floats are sampled on a regular grid."""
    if plane.dtype in (np.uint8, np.uint16):
        counts = np.bincount(plane.reshape(-1))
        values = np.flatnonzero(counts)
        return values.astype(np.float64), counts[values]
    height, width = plane.shape
    y = x = int(np.ceil(np.sqrt(plane.size / FLOAT_VALUES)))
    if height < y:  # a line scan: one line of it
        y, x = height, int(np.ceil(width / FLOAT_VALUES))
    elif width < x:
        y, x = int(np.ceil(height / FLOAT_VALUES)), width
    return np.unique(plane[y // 2::y, x // 2::x].astype(np.float64), return_counts=True)


def merge(parts: list[Histogram]) -> Histogram:
    """The histogram of all parts together."""
    if len(parts) == 1:
        return parts[0]
    values, inverse = np.unique(np.concatenate([p[0] for p in parts]), return_inverse=True)
    counts = np.zeros(len(values), dtype=np.int64)
    np.add.at(counts, inverse, np.concatenate([p[1] for p in parts]))
    return values, counts


def scaling_table(store: Store, receipts: Iterable[Receipt], percents: tuple[float, float]) -> pa.Table:
    """Merge the parts of the statistics units into percentiles, rows of SCALING_SCHEMA sorted by group, channel.

    Parts come in plan order, where a group's items stand together, so only open groups are held.
    """
    rows: list[dict] = []
    held: dict[tuple[str, str], list[Histogram]] = {}

    def close(keep: set[str]) -> None:
        for group, channel in [key for key in held if key[0] not in keep]:
            values, counts = merge(held.pop((group, channel)))
            low, high = histogram_percentiles(values, counts, percents)
            rows.append({"group": group, "channel": channel, "low": low, "high": high,
                         "num_values": int(counts.sum())})

    for receipt in receipts:
        for stored in receipt.objects:
            table = pq.read_table(io.BytesIO(store.get(stored.key)))
            close(keep=set(table["group"].unique().to_pylist()))
            for (group, channel), part in _by_key(table):
                held.setdefault((group, channel), []).append(part)
    close(keep=set())
    rows.sort(key=lambda row: (row["group"], row["channel"]))
    return pa.Table.from_pylist(rows, schema=SCALING_SCHEMA)


def distinct_values(store: Store, prefix: str) -> int:
    """How many different raw values the statistics units of one group and channel saw."""
    ledger, values = Ledger(store, prefix), set()
    for receipt in ledger.receipts(Plan(store, prefix).unit_ids):
        for stored in receipt.objects:
            values.update(pq.read_table(io.BytesIO(store.get(stored.key)), columns=["value"])["value"].unique().to_pylist())
    return len(values)


def _by_key(table: pa.Table) -> Iterator[tuple[tuple[str, str], Histogram]]:
    """The runs of equal (group, channel) of a part, in its order."""
    groups = table["group"].combine_chunks().dictionary_encode()
    channels = table["channel"].combine_chunks().dictionary_encode()
    g, c = groups.indices.to_numpy(), channels.indices.to_numpy()
    cuts = np.flatnonzero((np.diff(g) != 0) | (np.diff(c) != 0)) + 1
    values, counts = table["value"].to_numpy(), table["count"].to_numpy()
    for start, stop in zip([0, *cuts], [*cuts, table.num_rows], strict=True):
        key = (groups.dictionary[int(g[start])].as_py(), channels.dictionary[int(c[start])].as_py())
        yield key, (values[start:stop], counts[start:stop])


def read_scaling(table: pa.Table) -> Scaling:
    """SCALING_SCHEMA rows as group -> channel -> (low, high)."""
    scaling: Scaling = {}
    for row in table.to_pylist():
        scaling.setdefault(row["group"], {})[row["channel"]] = (row["low"], row["high"])
    return scaling
