"""The Parquet schema of features: one row per (item, channel, tile or object), readable without dinoray or Ray.

Vectors are FixedSizeList<float32 or float16>[D], never a Ray tensor extension type: pyarrow, pandas, polars,
duckdb and Hugging Face datasets read them as they are. Rows stand in plan order; there is no timestamp, so
the same unit gives the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

from dinoray.errors import BadRequest, ItemError
from dinoray.io.stores import filesystem, is_local, local_path, open_store, safe_join

if TYPE_CHECKING:
    from dinoray.io.volume_features import VolumeFeatures

ROW_GROUP_BYTES = 64 * 2**20
"""Row groups are cut near this size so that readers can stream."""

FOLDERS = ("features", "cells")
"""Folders of tables that are looked for, in this order."""

_FIXED = [
    ("item_id", pa.string()), ("uri", pa.string()), ("channel", pa.string()), ("tile", pa.int32()),
    ("y0", pa.int32()), ("x0", pa.int32()), ("y1", pa.int32()), ("x1", pa.int32()),
    ("height", pa.int32()), ("width", pa.int32()), ("pixel_size_um", pa.float64()),
    ("p01", pa.float32()), ("p50", pa.float32()), ("p999", pa.float32()),
    ("frac_saturated", pa.float32()), ("focus", pa.float32()),
]
_OBJECT = [("object_id", pa.int64()), ("centroid_y_px", pa.float64()), ("centroid_x_px", pa.float64()), ("area_px", pa.int64())]


def feature_schema(*, vectors: Mapping[str, int], vector_dtype: str, dense: Sequence[str] = (),
                   metadata_columns: Sequence[str] = (), facts: Mapping[str, Any] | None = None,
                   objects: bool = False) -> pa.Schema:
    """The schema of one output: fixed columns, `Metadata_*`, vectors (name -> D), dense references.

    `dense`: columns of dense features, each giving `<name>_array` and `<name>_index` (`dense_array` and
    `dense_index` where there is one without a layer, named `patches`). `facts` go to the file metadata under
    `dinoray` (fingerprint, model, weights digest, normalisation, preprocessing). `objects`: rows are objects of an
    image, which adds object_id, centroid_y_px, centroid_x_px, area_px.
    """
    kind = {"float32": pa.float32(), "float16": pa.float16()}[vector_dtype]
    fields = _FIXED + (_OBJECT if objects else []) + [(name, pa.string()) for name in metadata_columns]
    for name in dense:
        array, index = dense_columns(name)
        fields += [(array, pa.string()), (index, pa.int64())]
    fields += [(name, pa.list_(kind, dim)) for name, dim in vectors.items()]
    described = {"dinoray": json.dumps(facts or {}, sort_keys=True)}
    return pa.schema(fields, metadata=described)


def dense_columns(name: str) -> tuple[str, str]:
    """The two columns that point from a row to its patch grid: `patches` -> dense_array, dense_index."""
    suffix = name.removeprefix("patches")
    return f"dense_array{suffix}", f"dense_index{suffix}"


def as_vector_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Cast float32 features to `float32` or `float16`. Raises ItemError `nonfinite`, `overflow`."""
    largest = max(values.max(initial=0), -values.min(initial=0))  # NaN where one is in it; no copy of the values is made
    if not np.isfinite(largest):
        raise ItemError("nonfinite", "the features hold NaN or infinity", todo="try precision=float32")
    if dtype == "float16" and largest > float(np.finfo(np.float16).max):
        raise ItemError("overflow", f"features reach {largest:.3g}, above float16's 65504", todo="use float32")
    return values.astype(dtype, copy=False)


def write_table(columns: Mapping[str, Any], schema: pa.Schema) -> memoryview:
    """One Parquet file (zstd) of equal-length columns; vectors are arrays [n, D] written without copies."""
    arrays = []
    for field in schema:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = np.ascontiguousarray(values).reshape(-1)
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat, field.type.value_type), type=field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return encode_table(pa.Table.from_arrays(arrays, schema=schema))


def encode_table(table: pa.Table) -> memoryview:
    """One Parquet file (zstd) of a table; the same table gives the same bytes."""
    schema = table.schema
    row_bytes = max(1, table.nbytes // max(1, table.num_rows))
    sink = io.BytesIO()
    # vectors do not repeat: a dictionary would only cost time; statistics of vectors help nobody
    vectors = [f.name for f in schema if pa.types.is_fixed_size_list(f.type)]
    plain = [f.name for f in schema if f.name not in vectors]
    pq.write_table(table, sink, compression="zstd", row_group_size=max(1, ROW_GROUP_BYTES // row_bytes),
                   use_dictionary=[n for n in plain if pa.types.is_string(schema.field(n).type)],
                   write_statistics=plain)
    return sink.getbuffer()


class Features:
    """An output folder read back: `open_features(OUT)`. `folder`: which of its tables; by default `features` of an extraction,
    `cells` of a segmentation. Files of later generations (`part-<unit>.r1.parquet`, written by
    `retry` and `extend`) belong to it; a `Metadata_*` column that only some of them have is null elsewhere."""

    def __init__(self, url: str, folder: str | None = None):
        self.url = url
        if is_local(url):
            base, fs = str(local_path(url)), pyarrow.fs.LocalFileSystem()
        else:
            remote, path = filesystem(url)
            base, fs = path.rstrip("/"), pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(remote))
        found = [name for name in ((folder,) if folder else FOLDERS)
                 if fs.get_file_info(f"{base}/{name}").type != pyarrow.fs.FileType.NotFound]
        self.folder = found[0] if found else folder or FOLDERS[0]
        try:
            dataset = ds.dataset(f"{base}/{self.folder}", format="parquet", filesystem=fs)
            self.facts: dict[str, Any] = json.loads(dataset.schema.metadata[b"dinoray"])
        except (FileNotFoundError, KeyError, TypeError) as error:
            raise BadRequest(f"there are no {self.folder} here", where=f"{url}/{self.folder}",
                             todo="give the --out of a finished `dinoray extract`, or of `dinoray segment`") from error
        fragments = list(dataset.get_fragments())
        if self.folder == "cells":  # each file has the channels of its images
            with ThreadPoolExecutor(8) as pool:
                schemas = list(pool.map(lambda fragment: fragment.physical_schema, fragments))
            schema = _feature_last(pa.unify_schemas(schemas))
        else:
            first = {_generation(f.path): f for f in reversed(fragments)}  # all files of a generation have one schema
            schema = pa.unify_schemas([first[name].physical_schema for name in sorted(first)])
        self.dataset = ds.FileSystemDataset(fragments, schema.with_metadata(dataset.schema.metadata), dataset.format, fs)

    @property
    def vectors(self) -> list[str]:
        """Names of the vector columns."""
        return [f.name for f in self.dataset.schema if pa.types.is_fixed_size_list(f.type)]

    def _where(self, plate: str | None, given: ds.Expression | None) -> tuple[ds.Dataset, ds.Expression | None]:
        """The files of a plate, and the filter that leaves its rows."""
        if plate is None:
            return self.dataset, given
        if "Metadata_Plate" not in self.dataset.schema.names:
            raise BadRequest("the images of this output have no plate", where=self.url, todo="read without plate=")
        wanted = ds.field("Metadata_Plate") == plate
        # folders are percent-encoded plates; a very long name was cut, then the filter alone must find its rows
        fragments = [f for f in self.dataset.get_fragments() if unquote(f.path.rsplit("/", 2)[-2]) == plate]
        chosen = ds.FileSystemDataset(fragments, self.dataset.schema, self.dataset.format, self.dataset.filesystem) \
            if fragments else self.dataset
        return chosen, wanted if given is None else given & wanted

    def table(self, columns: Sequence[str] | None = None, *, plate: str | None = None,
              filter: ds.Expression | None = None, **kwargs: Any) -> pa.Table:
        """The rows (all files, or those of one plate) as one Arrow table; `columns` to read fewer, `filter` and the rest
        as in pyarrow.dataset."""
        dataset, filter = self._where(plate, filter)
        return dataset.to_table(columns=None if columns is None else list(columns), filter=filter, **kwargs)

    def batches(self, columns: Sequence[str] | None = None, *, plate: str | None = None, filter: ds.Expression | None = None,
                batch_size: int = 4096) -> Iterator[pa.RecordBatch]:
        """The same rows in record batches of at most `batch_size`, for tables larger than memory; no batch is empty."""
        dataset, filter = self._where(plate, filter)
        # little read-ahead: the default keeps many files in memory
        found = dataset.to_batches(columns=None if columns is None else list(columns), filter=filter, batch_size=batch_size,
                                   batch_readahead=2, fragment_readahead=1)
        return (batch for batch in found if batch.num_rows)

    def matrix(self, column: str = "cls", **kwargs: Any) -> np.ndarray:
        """One vector column as [rows, D]."""
        if column not in self.vectors:
            raise BadRequest(f"no vector column {column!r}", where=self.url, todo=f"one of {', '.join(self.vectors)}")
        chunks = self.table([column], **kwargs)[column].combine_chunks()
        return chunks.flatten().to_numpy(zero_copy_only=False).reshape(len(chunks), chunks.type.list_size)

    def dense(self, array: str, index: int) -> np.ndarray:
        """The patch grid [h, w, D] that a row's `dense_array` and `dense_index` name."""
        import zarr

        part, _, name = array.partition(".zarr/")
        base = str(local_path(self.url)) if is_local(self.url) else self.url.rstrip("/")
        return zarr.open_array(f"{base}/{safe_join(part + '.zarr', name)}", mode="r")[index]


def _feature_last(schema: pa.Schema) -> pa.Schema:
    """Columns that only later files have go before the vectors."""
    return pa.schema(sorted(schema, key=lambda field: pa.types.is_fixed_size_list(field.type)))


def _generation(path: str) -> int:
    """Which generation wrote a file, by its name: 0 for part-<unit>.parquet, 1 for part-<unit>.r1.parquet, ..."""
    found = re.search(r"\.r(\d+)\.parquet$", path)
    return int(found[1]) if found else 0


def open_features(url: str | os.PathLike[str]) -> Features | VolumeFeatures:
    """Open the features that a run wrote to `url` (folder or fsspec URL): of images or cells as tables (of a segmentation the
    table of its cells), of a volume by boxes.

    Raises BadRequest when there are none.
    """
    from dinoray.io.volume_features import VolumeFeatures, is_volume

    url = os.fspath(url)
    return VolumeFeatures(url) if is_volume(open_store(url)) else Features(url)
