"""Tables from outside (CSV, Parquet) -> batches of text cells, with nothing of the file's own code run.

Cells are text or None, rows are streamed (memory holds one batch), columns that only number the rows of a
data frame are left out. CSV may be separated by commas, semicolons or tabs: the header line tells.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from dinoray.errors import BadRequest
from dinoray.io.retries import RetriedFile
from dinoray.io.storage_errors import listing_errors
from dinoray.io.stores import filesystem, on_inputs

ROWS = 2048
"""Rows of a batch."""
_INDEX = re.compile(r"__index_level_\d+__|Unnamed: 0|")
"""Columns that pandas writes for its row numbers; the empty name is that of to_csv."""
_HEADER_BYTES = 2**20
_ONE_THREAD = pa_csv.ReadOptions(use_threads=False)
"""A reader that is given up in the middle must not leave a thread behind: it can abort the process at its end."""


def text_rows(uri: str) -> Iterator[tuple[list[str], list[tuple[str | None, ...]]]]:
    """(column names, up to ROWS rows) of a `.csv` or else Parquet file, in the order of its rows.

    Numbers become text (1.0 becomes "1"), nulls None. Raises BadRequest when the table cannot be read, or
    holds columns that are no values (lists, pickled objects, Arrow extension types).
    """
    for batch in _csv_batches(uri) if uri.lower().endswith(".csv") else _parquet_batches(uri):
        kept = [i for i, name in enumerate(batch.schema.names) if not _INDEX.fullmatch(name.strip())]
        names = [batch.schema.names[i] for i in kept]
        values = [_strings(batch.column(i), name, uri) for i, name in zip(kept, names, strict=True)]
        for begin in range(0, batch.num_rows, ROWS):
            yield names, list(zip(*(value[begin:begin + ROWS] for value in values), strict=True))


def _strings(column: pa.Array, name: str, uri: str) -> list[str | None]:
    """A column as strings (1.0 becomes "1"), None for null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_nested(kind) or pa.types.is_fixed_size_binary(kind):
        raise BadRequest(f"column {name!r} of a table is of type {kind}", where=uri,
                         todo="keep plain columns only: text, numbers, dates")
    try:
        return column.cast(pa.string()).to_pylist()  # some writers do not say that their bytes are text
    except (pa.ArrowException, UnicodeError) as error:
        raise BadRequest(f"column {name!r} of a table is no text: {error}", where=uri,
                         todo="write it again as UTF-8 text, or leave it out") from error


@contextmanager
def _open(uri: str) -> Iterator[Any]:
    with listing_errors(uri):
        path = filesystem(uri)[1]
        with RetriedFile(on_inputs(uri, lambda fs: fs.open(path, "rb")), uri) as file:
            try:
                yield file
            except (pa.ArrowException, UnicodeError, OverflowError, OSError) as error:
                # damaged, not UTF-8, rows of differing length; pyarrow calls damage an OSError too, without a number
                if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                    raise
                raise BadRequest(f"the table cannot be read: {error}", where=uri,
                                 todo="write it again: UTF-8 CSV with a header line, or Parquet") from error


def _csv_batches(uri: str) -> Iterator[pa.RecordBatch]:
    with _open(uri) as file:  # once for the names, so that no column is taken for numbers ("01" is a site)
        header = file.read(_HEADER_BYTES).split(b"\n", 1)[0]
        separator = max(",;\t", key=lambda each: header.count(each.encode()))
        parse = pa_csv.ParseOptions(newlines_in_values=True, delimiter=separator)
        file.seek(0)
        names = pa_csv.open_csv(file, read_options=_ONE_THREAD, parse_options=parse).schema.names
    with _open(uri) as file:
        text = dict.fromkeys(names, pa.string())
        types = pa_csv.ConvertOptions(column_types=text, strings_can_be_null=False)
        yield from pa_csv.open_csv(file, read_options=_ONE_THREAD, parse_options=parse, convert_options=types)


def _parquet_batches(uri: str) -> Iterator[pa.RecordBatch]:
    with _open(uri) as file:
        _refuse_extension_types(file, uri)
        file.seek(0)
        yield from pq.ParquetFile(file).iter_batches(batch_size=ROWS)


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
            raise BadRequest("the table's Arrow schema is not understood", where=uri,
                             todo="write it again")
        if b"ARROW:extension" in schema:
            raise BadRequest("a table with Arrow extension types (Ray tensors, pickled objects, ...)",
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
