"""Which images a training was begun on, kept beside its output: so that a changed one can be named, not only noticed."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.io.annotations import LabelledImage
from dinoray.io.stores import Store

LISTING_SCHEMA = pa.schema([
    ("source", pa.int32()), ("image_id", pa.string()), ("uris", pa.list_(pa.string())), ("sizes", pa.list_(pa.int64())),
    ("versions", pa.list_(pa.string())),
])
"""A row per image: its files, then those of its labels."""
_NAMED = 5


def listing_of(images: Sequence[LabelledImage]) -> pa.Table:
    """Rows of LISTING_SCHEMA, in the order of the images."""
    return pa.Table.from_pylist([
        {"source": image.source, "image_id": image.image_id, "uris": [file.uri for file in image.files],
         "sizes": [file.size for file in image.files], "versions": [file.version for file in image.files]}
        for image in images], schema=LISTING_SCHEMA)


def keep_listing(store: Store, name: str, images: Sequence[LabelledImage]) -> None:
    """Write `_dinoray/inputs-<name>.parquet`, unless it is there."""
    if stored_listing(store, name) is None:
        sink = io.BytesIO()
        pq.write_table(listing_of(images), sink, compression="zstd")
        store.put(f"_dinoray/inputs-{name}.parquet", sink.getbuffer())


def stored_listing(store: Store, name: str) -> pa.Table | None:
    """The kept listing, or None."""
    try:
        data = store.get(f"_dinoray/inputs-{name}.parquet")
    except FileNotFoundError:
        return None
    return pq.read_table(io.BytesIO(data), schema=LISTING_SCHEMA)


def listing_changes(old: pa.Table, new: pa.Table) -> str:
    """`1 added (a); 2 removed (b, c); 1 changed (d: 10 -> 12 bytes)` between two listings; empty when they are the same."""
    before, now = ({(row["source"], row["image_id"]): row for row in table.to_pylist()} for table in (old, new))
    changed = [f"{key[1]}: {what}" for key in now if key in before and (what := _change(before[key], now[key]))]
    found = {"added": [key[1] for key in now if key not in before], "removed": [key[1] for key in before if key not in now],
             "changed": changed}
    return "; ".join(f"{len(names):,} {word} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
                     for word, names in found.items() if names)


def _change(old: dict, new: dict) -> str:
    """What differs between two rows of one image, the weightiest alone."""
    if old["sizes"] != new["sizes"]:
        return f"{sum(old['sizes']):,} -> {sum(new['sizes']):,} bytes"
    if old["uris"] != new["uris"]:
        was, now = next((a, b) for a, b in zip(old["uris"], new["uris"], strict=True) if a != b)
        return f"{was} -> {now}"
    return "" if old["versions"] == new["versions"] else "as large, but written anew (time or ETag)"
