"""Where an export goes: one CSV or Parquet file that appears whole or not at all.

Rows are streamed into a scratch file beside the target (for `s3://` and the like: on this machine), which is renamed (or
put) when it is complete. The same rows give the same bytes: there is no timestamp, not even in the gzip header.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import posixpath
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from dinoray.errors import BadRequest, SystemicError
from dinoray.export.names import widened
from dinoray.io.stores import filesystem, is_local, local_path

FORMATS = ("parquet", "csv", "csv.gz")
ROW_GROUP_BYTES = 128 * 2**20
"""Rows are gathered to row groups near this size: wide tables of many small row groups have enormous footers."""
_OWN = ("features", "dense", "_dinoray", "_SUCCESS")
"""What belongs to the run below OUT: `verify` would call an export in there foreign."""


def resolve_target(out: str, to: str | None, fmt: str | None, stem: str) -> tuple[str, str]:
    """(path or URL of the file, its format). `to` None: OUT/profiles/<stem>.<format>; the format is Parquet, or what
    `to` ends with. Raises BadRequest for a format that contradicts the name, a folder, a place that belongs to the run."""
    if fmt is not None and fmt not in FORMATS:
        raise BadRequest(f"unknown format {fmt!r}", where="--format", todo=f"one of {', '.join(FORMATS)}")
    if to is None:
        fmt = fmt or "parquet"
        return f"{out.rstrip('/')}/profiles/{stem}.{fmt}", fmt
    named = next((f for f in reversed(FORMATS) if to.endswith("." + f)), None)
    if named is None and fmt is None:
        raise BadRequest("the file's name does not tell the format", where=to, todo="end it with .parquet, .csv or .csv.gz, "
                         "or give --format")
    if named is not None and fmt is not None and named != fmt:
        raise BadRequest(f"--format {fmt} contradicts the name", where=to, todo=f"end it with .{fmt}, or leave --format out")
    inside = _below(out, to)
    if inside is not None and inside.split("/")[0] in (*_OWN, "."):
        raise BadRequest("this place belongs to the run", where=to, todo="leave --to out (OUT/profiles), or name a file elsewhere")
    if is_local(to) and local_path(to).is_dir():
        raise BadRequest("this is a folder", where=to, todo=f"name a file in it: {to.rstrip('/')}/{stem}.{fmt or 'parquet'}")
    return to, fmt or str(named)


def _below(out: str, to: str) -> str | None:
    """The path of `to` below `out`, links followed; None when it lies elsewhere."""
    if is_local(out) != is_local(to):
        return None
    if is_local(out):
        root, path = os.path.realpath(local_path(out)), os.path.realpath(local_path(to))
    else:
        root, path = (posixpath.normpath("/".join(url.split("://", 1))) for url in (out, to))
    if path == root:
        return "."
    return path[len(root):].lstrip("/") if path.startswith(root.rstrip("/") + "/") else None


class TableWriter:
    """Takes tables of one schema, in order."""

    def __init__(self, sink: IO[bytes], fmt: str, schema: pa.Schema):
        self.rows = 0
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self._csv = fmt != "parquet"
        if self._csv:
            self._writer: Any = pyarrow.csv.CSVWriter(sink, as_csv(schema.empty_table()).schema)
        else:
            numbers = [f.name for f in schema if not pa.types.is_string(f.type)]
            self._writer = pq.ParquetWriter(sink, schema, compression="zstd", write_statistics=False,
                                            use_dictionary=[n for n in schema.names if n not in numbers])

    def write(self, table: pa.Table) -> None:
        """Append rows. Raises SystemicError when the target cannot be written."""
        self.rows += table.num_rows
        if self._csv:
            with _writing():
                self._writer.write_table(as_csv(table))
            return
        self._waiting.append(table)
        self._waiting_bytes += table.nbytes
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            self._waiting, self._waiting_bytes = [], 0
            with _writing():
                self._writer.write_table(table, row_group_size=max(1, table.num_rows))

    def abandon(self) -> None:
        """End the writer of a file that will not be kept; what went wrong is on its way to the caller already."""
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            self._writer.close()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        with _writing():
            self._writer.close()


@contextlib.contextmanager
def _closing(file: Any) -> Iterator[None]:
    """Close the file; when the block failed, what closing it says (the disk is still full) does not replace that."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    with _writing():
        file.close()


@contextlib.contextmanager
def open_target(target: str, fmt: str, schema: pa.Schema) -> Iterator[TableWriter]:
    """A writer whose file is put at `target` when the block ends well; nothing is left when it does not.

    Raises SystemicError when it cannot be written.
    """
    scratch: Path | None = None
    try:
        with _writing(target):
            scratch = _scratch(target)
            raw = scratch.open("xb")
        with _closing(raw):
            sink: Any = gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) if fmt == "csv.gz" else raw
            writer = TableWriter(sink, fmt, schema)
            try:
                yield writer
                writer.close()
            except BaseException:
                writer.abandon()
                raise
            with _writing(target):
                if sink is not raw:
                    sink.close()
                raw.flush()
                os.fsync(raw.fileno())
        with _writing(target):
            if is_local(target):
                os.replace(scratch, local_path(target))
            else:
                fs, path = filesystem(target)
                fs.put_file(str(scratch), path)
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def _scratch(target: str) -> Path:
    name = f".{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}.part"
    if not is_local(target):
        return Path(tempfile.gettempdir()) / name
    folder = local_path(target).parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@contextlib.contextmanager
def _writing(where: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SystemicError(f"cannot write the export: {error.strerror or error}", where=where,
                            todo="free space, mend the permissions, or choose another --to; then run the same command again") \
            from error


def as_csv(table: pa.Table) -> pa.Table:
    """The table as CSV holds it: vectors widened to one column per number, NaN as an empty cell, and text that a
    spreadsheet would take for a formula (first character = + - @, tab or carriage return) behind a `'`."""
    columns: dict[str, Any] = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        kind = field.type
        if pa.types.is_fixed_size_list(kind):
            flat = column.combine_chunks().flatten() if column.num_chunks else pa.array([], kind.value_type)
            matrix = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), kind.list_size)
            for i, name in enumerate(widened(field.name, kind.list_size)):
                columns[name] = pa.array(np.ascontiguousarray(matrix[:, i]), from_pandas=True)
        elif pa.types.is_floating(kind):
            wide = column.cast(pa.float32()) if pa.types.is_float16(kind) else column
            columns[field.name] = pc.if_else(pc.is_nan(wide), pa.scalar(None, wide.type), wide)
        elif pa.types.is_string(kind):
            columns[field.name] = pc.replace_substring_regex(column, r"^([=+\-@\t\r])", r"'\1")
        else:
            columns[field.name] = column
    return pa.table(columns)
