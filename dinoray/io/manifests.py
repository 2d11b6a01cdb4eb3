"""Manifests: a CSV or Parquet table of images -> Items, in the order of its rows.

Columns (in any case): `uri` (or `path`, `image`, `file`), or one `uri_<channel>` for each channel; optional
`item_id` (or `id`); every other column becomes a string `Metadata_*`. Relative paths start at the
manifest's folder. Rows are streamed; the named files are stat'ed in threads.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import posixpath
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from dinoray.errors import BadRequest
from dinoray.io.grouping import make_item, relative_to
from dinoray.io.items import FileRef, Item
from dinoray.io.storage_errors import listing_errors
from dinoray.io.stores import filesystem, is_local, local_path
from dinoray.io.walk import LocalTree, RemoteTree

FILE_COLUMNS = ("uri", "path", "image", "file")
ID_COLUMNS = ("item_id", "id")
_STANDARD = {name.lower(): f"Metadata_{name}" for name in ("Source", "Batch", "Plate", "Well", "Site")}
_THREADS = 16
_ROWS = 2048
_CHUNK = 16


def is_manifest(path: str) -> bool:
    """Whether a source is a manifest, by its extension."""
    return path.lower().endswith((".csv", ".parquet"))


def manifest_items(uri: str, root: str) -> Iterator[Item]:
    """The items of a manifest at `uri`; ids default to the path of the (first) file below `root`.

    A row without a file has the problem `missing`, one that lacks a channel `channel_count`. Raises
    BadRequest when the table cannot be read, lacks the needed columns, or holds columns that are no values.
    """
    folder, row = posixpath.dirname(uri), 0
    stat = _Stat()
    with ThreadPoolExecutor(_THREADS) as pool:
        columns = None
        for batch in table_batches(uri):
            columns = columns or _Columns(batch.schema.names, uri)
            columns_of_batch = zip(batch.schema.names, batch.columns, strict=True)
            values = [strings(column, name, uri) for name, column in columns_of_batch]
            for begin in range(0, batch.num_rows, _ROWS):
                rows = list(zip(*(value[begin:begin + _ROWS] for value in values), strict=True))
                wanted = [[_resolve(r[i], folder) for i in columns.files] for r in rows]
                named = [u for uris in wanted for u in uris if u]
                chunks = [named[i:i + _CHUNK] for i in range(0, len(named), _CHUNK)]
                refs = itertools.chain.from_iterable(pool.map(stat, chunks))
                for values_of_row, uris in zip(rows, wanted, strict=True):
                    row += 1
                    files = [next(refs) if u else None for u in uris]
                    yield _item(values_of_row, files, columns, root, f"{relative_to(root, uri)}#row{row}")


def table_batches(uri: str) -> Iterator[pa.RecordBatch]:
    """The rows of a CSV (every column as text) or Parquet table, streamed.

    Raises BadRequest when it cannot be read, or holds Arrow extension types.
    """
    return _csv_batches(uri) if uri.lower().endswith(".csv") else _parquet_batches(uri)


class _Columns:
    """Which column is what, by position."""

    def __init__(self, names: list[str], uri: str):
        lower = [name.strip().lower() for name in names]
        found = f"found columns: {', '.join(names)}"
        if len(set(lower)) < len(lower):
            raise BadRequest("two columns of a manifest have one name", where=uri, todo=found)
        single = next((lower.index(name) for name in FILE_COLUMNS if name in lower), None)
        per_channel = [i for i, name in enumerate(lower) if name.startswith("uri_") and len(name) > 4]
        if (single is None) == (not per_channel):
            raise BadRequest(
                "a manifest needs one column of files: uri, path, image or file; or one uri_<channel> for "
                f"each channel{', not both' if per_channel else ''}", where=uri, todo=found)
        self.files = per_channel or [single]
        self.channels = tuple(names[i].strip()[4:] for i in per_channel)
        self.item_id = next((lower.index(name) for name in ID_COLUMNS if name in lower), None)
        taken = {*self.files, self.item_id}
        self.metadata = {i: _metadata_name(name) for i, name in enumerate(names) if i not in taken}
        if len(set(self.metadata.values())) < len(self.metadata):
            raise BadRequest("two columns mean the same metadata", where=uri, todo=found)


def _metadata_name(name: str) -> str:
    bare = name.strip()
    bare = bare[9:] if bare.lower().startswith("metadata_") else bare
    return _STANDARD.get(bare.lower(), f"Metadata_{bare}")


class _Stat:
    """URIs -> FileRefs, with one tree per protocol; missing files have size -1."""

    def __init__(self):
        self._trees: dict[str, RemoteTree] = {}

    def __call__(self, uris: list[str]) -> list[FileRef]:
        return [self._stat(uri) for uri in uris]

    def _stat(self, uri: str) -> FileRef:
        if "\0" in uri:
            return FileRef(uri, -1, "missing")
        with listing_errors(uri):
            if is_local(uri):
                return LocalTree().ref(str(local_path(uri)))
            protocol = uri.split("://", 1)[0]
            tree = self._trees.get(protocol)
            if tree is None:
                tree = self._trees[protocol] = RemoteTree(uri)
            return tree.ref(tree.fs._strip_protocol(uri))


def _resolve(value: str | None, folder: str) -> str | None:
    """The file that a cell names, seen from the manifest's folder; None for an empty cell."""
    value = (value or "").strip()
    if not value or "://" in value or value.startswith(("/", "~")):
        return value or None
    protocol, mark, base = folder.rpartition("://")
    return protocol + mark + posixpath.normpath(posixpath.join(base, value))


def _item(row: tuple, files: list[FileRef | None], columns: _Columns, root: str, fallback_id: str) -> Item:
    present = tuple(file for file in files if file is not None)
    item_id = (row[columns.item_id] or "").strip() if columns.item_id is not None else ""
    if not item_id:
        item_id = relative_to(root, present[0].uri) if present else fallback_id
    channels, problem = columns.channels, None
    if not present:
        problem, present = "missing: the row names no file", (FileRef("", -1, "missing"),)
    elif len(present) < len(files):
        missing = [c for c, file in zip(channels, files, strict=True) if file is None]
        channels = tuple(c for c, file in zip(channels, files, strict=True) if file is not None)
        problem = f"channel_count: missing {', '.join(missing)}"
    metadata = {name: row[i] or None for i, name in columns.metadata.items()}
    return make_item(item_id, present, root, channels=channels, metadata=metadata, problem=problem)


def strings(column: pa.Array, name: str, uri: str) -> list[str | None]:
    """A column of a table as text, None for null. Raises BadRequest for nested and binary columns."""
    """A column as strings (1.0 becomes "1"), None for null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) \
            or pa.types.is_fixed_size_binary(kind):
        raise BadRequest(f"column {name!r} of a manifest is of type {kind}", where=uri,
                         todo="keep plain columns only: text, numbers, dates")
    return column.cast(pa.string()).to_pylist()


@contextmanager
def _open(uri: str) -> Iterator[Any]:
    with listing_errors(uri):
        fs, path = filesystem(uri)
        with fs.open(path, "rb") as file:
            try:
                yield file
            except pa.ArrowException as error:  # damaged, not UTF-8, rows of differing length
                raise BadRequest(f"the manifest cannot be read: {error}", where=uri,
                                 todo="write it again: UTF-8 CSV with a header line, or Parquet") from error


def _csv_batches(uri: str) -> Iterator[pa.RecordBatch]:
    parse = pa_csv.ParseOptions(newlines_in_values=True)
    with _open(uri) as file:  # once for the names, so that no column is taken for numbers ("01" is a site)
        names = pa_csv.open_csv(file, parse_options=parse).schema.names
    with _open(uri) as file:
        text = dict.fromkeys(names, pa.string())
        types = pa_csv.ConvertOptions(column_types=text, strings_can_be_null=False)
        yield from pa_csv.open_csv(file, parse_options=parse, convert_options=types)


def _parquet_batches(uri: str) -> Iterator[pa.RecordBatch]:
    with _open(uri) as file:
        _refuse_extension_types(file, uri)
        file.seek(0)
        yield from pq.ParquetFile(file).iter_batches(batch_size=_ROWS)


def _refuse_extension_types(file: Any, uri: str) -> None:
    """Refuse Arrow extension types before pyarrow sees the schema.

    Opening the file with pyarrow would call the registered types' own code: Ray's tensor types unpickle
    what the file says (CVE-2026-41486). So the footer's copy of the Arrow schema is searched as bytes.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    footer_bytes = struct.unpack("<I", tail[:4])[0] if len(tail) == 8 else size + 1
    if tail[4:] != b"PAR1" or footer_bytes > size - 8:
        raise BadRequest("not a Parquet file, or cut short", where=uri, todo="write it again")
    file.seek(size - 8 - footer_bytes)
    footer = file.read(footer_bytes)
    at = footer.find(_SCHEMA_KEY)
    while at >= 0:
        begin = at + len(_SCHEMA_KEY)
        value = _thrift_binary(footer, begin)
        try:
            schema = base64.b64decode(value or b"", validate=True)
        except binascii.Error:
            schema = None
        if value is None or schema is None:
            raise BadRequest("the manifest's Arrow schema is not understood", where=uri,
                             todo="write it again")
        if b"ARROW:extension" in schema:
            raise BadRequest("a manifest with Arrow extension types (Ray tensors, pickled objects, ...)",
                             where=uri, todo="keep plain columns only: text, numbers, dates")
        at = footer.find(_SCHEMA_KEY, begin)


_SCHEMA_KEY = b"ARROW:schema"


def _thrift_binary(footer: bytes, at: int) -> bytes | None:
    """The value of a key in Thrift's compact encoding: field byte 0x18, length as varint, bytes."""
    if footer[at:at + 1] != b"\x18":
        return None
    length, shift = 0, 0
    for byte in footer[at + 1:at + 6]:
        at += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return footer[at + 1:at + 1 + length] if at + 1 + length <= len(footer) else None
    return None
