"""The feature table: a plain schema that every reader opens without Ray, the same bytes for the same rows."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray import open_features
from dinoray.errors import BadRequest, ItemError
from dinoray.io import tables
from dinoray.io.stores import open_store
from dinoray.io.tables import as_vector_dtype, dense_columns, feature_schema, write_table

FACTS = {"fingerprint": "f" * 16, "model": "vitt16", "normalisation": {"mean": [0.5]}}
DTYPES = ("float32", "float16")


def columns_of(n: int, dim: int, dtype: str, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    fixed = {name: [f"{name} {i} é中" for i in range(n)] for name in ("item_id", "uri", "channel", "Metadata_Plate")}
    fixed |= {name: list(range(n)) for name in ("tile", "y0", "x0", "y1", "x1", "height", "width", "dense_index")}
    fixed |= {name: [None if i % 2 else i / 3 for i in range(n)] for name in (
        "pixel_size_um", "p01", "p50", "p999", "frac_saturated", "focus")}
    fixed["dense_array"] = [f"dense/part-x.zarr/{i}x4" for i in range(n)]
    return {**fixed, "cls": rng.normal(size=(n, dim)).astype(dtype),
            "patch_mean": rng.normal(size=(n, dim)).astype(dtype)}


def schema_of(dim: int, dtype: str) -> pa.Schema:
    return feature_schema(vectors={"cls": dim, "patch_mean": dim}, vector_dtype=dtype, dense=["patches"],
                          metadata_columns=["Metadata_Plate"], facts=FACTS)


def write(path: Path, n: int = 7, dim: int = 5, dtype: str = "float32", seed: int = 0) -> dict:
    columns = columns_of(n, dim, dtype, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write_table(columns, schema_of(dim, dtype)))
    return columns


def test_the_schema_of_the_contract() -> None:
    schema = schema_of(384, "float32")
    assert [f"{f.name} {f.type}" for f in schema] == [
        "item_id string", "uri string", "channel string", "tile int32", "y0 int32", "x0 int32", "y1 int32", "x1 int32",
        "height int32", "width int32", "pixel_size_um double", "p01 float", "p50 float", "p999 float",
        "frac_saturated float", "focus float", "Metadata_Plate string", "dense_array string", "dense_index int64",
        "cls fixed_size_list<item: float>[384]", "patch_mean fixed_size_list<item: float>[384]"]
    assert json.loads(schema.metadata[b"dinoray"]) == FACTS
    assert str(schema_of(8, "float16").field("cls").type) == "fixed_size_list<item: halffloat>[8]"


def test_columns_of_dense_layers() -> None:
    assert dense_columns("patches") == ("dense_array", "dense_index")
    assert dense_columns("patches_l05") == ("dense_array_l05", "dense_index_l05")


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=20)
@given(n=st.integers(0, 9), dim=st.integers(1, 6), row_group=st.sampled_from([1, 200, 10**9]))
def test_what_is_written_is_read(dtype: str, n: int, dim: int, row_group: int) -> None:
    columns, schema = columns_of(n, dim, dtype), schema_of(dim, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "ROW_GROUP_BYTES", row_group)
        data = bytes(write_table(columns, schema))
        assert data == bytes(write_table(columns, schema))
    table = pq.read_table(io.BytesIO(data))
    assert table.schema.equals(schema)
    for name, values in columns.items():
        got = table[name].combine_chunks()
        if name in ("cls", "patch_mean"):
            assert np.array_equal(got.flatten().to_numpy(zero_copy_only=False).reshape(n, dim), values)
        else:
            expected = [v if v is None or isinstance(v, str | int) else pa.scalar(v, schema.field(name).type).as_py()
                        for v in values]
            assert got.to_pylist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_extension_types_and_no_foreign_metadata(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "x.parquet", dtype=dtype)
    file = pq.ParquetFile(tmp_path / "x.parquet")
    for field in file.schema_arrow:
        kinds = [field.type, *([field.type.value_type] if pa.types.is_fixed_size_list(field.type) else [])]
        assert not any(isinstance(kind, pa.BaseExtensionType) for kind in kinds)
        assert not [key for key in (field.metadata or {}) if not key.startswith(b"PARQUET:")]
    assert set(file.schema_arrow.metadata) == {b"dinoray"}
    text = (tmp_path / "x.parquet").read_bytes()
    assert b"ray." not in text
    assert b"tensor" not in text
    assert b"ARROW:extension" not in text
    assert {file.metadata.row_group(0).column(i).compression for i in range(file.metadata.num_columns)} == {"ZSTD"}


# ---------------------------------------------------------------- every reader, without Ray

READERS = {
    "pyarrow": "import pyarrow.parquet as pq\n"
               "rows = pq.read_table(path)[column].to_pylist()",
    "pyarrow folder": "import os, pyarrow.dataset as ds\n"
                      "rows = ds.dataset(os.path.dirname(path)).to_table()[column].to_pylist()",
    "pandas": "import pandas as pd\n"
              "rows = [list(map(float, v)) for v in pd.read_parquet(path)[column]]",
    "polars": "import polars as pl\n"
              "rows = [list(v) for v in pl.read_parquet(path)[column].to_list()]",
    "polars lazy": "import polars as pl\n"
                   "rows = pl.scan_parquet(path).select(column).collect()[column].to_list()",
    "duckdb": "import duckdb\n"
              "rows = [list(r[0]) for r in duckdb.sql(f'select {column} from read_parquet(\"{path}\")').fetchall()]",
    "datasets": "import datasets\n"
                "datasets.disable_progress_bars()\n"
                "read = datasets.Dataset.from_parquet(path, cache_dir=cache)\n"
                "rows = [list(map(float, v)) for v in read[column]]",
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_opens_the_vectors_without_ray(tmp_path: Path, reader: str) -> None:
    expected = {}
    for dtype in DTYPES:
        columns = write(tmp_path / dtype / "part-1.parquet", dtype=dtype)
        expected[dtype] = [columns["cls"].tolist(), columns["patch_mean"].tolist()]
    code = "import sys, json\nfound = {}\nfor dtype in ('float32', 'float16'):\n    found[dtype] = []\n"
    code += f"    path, cache = {str(tmp_path)!r} + f'/{{dtype}}/part-1.parquet', {str(tmp_path)!r} + '/cache'\n"
    code += "    for column in ('cls', 'patch_mean'):\n"
    code += "".join(f"        {line}\n" for line in READERS[reader].splitlines())
    code += "        found_rows = [[float(x) for x in row] for row in rows]\n"
    code += "        found[dtype].append(found_rows)\n"
    code += "bad = [m for m in sys.modules if m.split('.')[0] in ('ray', 'dinoray')]\n"
    code += "print(json.dumps([found, bad]))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                          env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    found, bad = json.loads(done.stdout.splitlines()[-1])
    assert found == expected
    assert bad == []


def test_open_features_needs_no_ray(tmp_path: Path) -> None:
    write(tmp_path / "features/part-1.parquet")
    code = ("import sys, dinoray\n"
            f"found = dinoray.open_features({str(tmp_path)!r})\n"
            "assert found.matrix('cls').shape == (7, 5)\n"
            "print([m for m in sys.modules if m.split('.')[0] in ('ray', 'torch')])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- reading back


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_an_output_back(tmp_path: Path, dtype: str) -> None:
    parts = [write(tmp_path / f"features/{name}.parquet", n=n, dtype=dtype, seed=n)
             for name, n in (("p1/part-a", 3), ("p2/part-b", 4), ("part-c", 2))]
    found = open_features(str(tmp_path))
    assert found.facts == FACTS
    assert found.vectors == ["cls", "patch_mean"]
    assert found.table().num_rows == 9
    matrix = found.matrix("patch_mean")
    assert matrix.dtype == dtype
    expected = np.concatenate([p["patch_mean"] for p in parts])
    assert sorted(map(tuple, matrix.tolist())) == sorted(map(tuple, expected.tolist()))
    assert found.table(["item_id", "cls"]).column_names == ["item_id", "cls"]


def test_a_filter_that_keeps_some_rows_or_none(tmp_path: Path) -> None:
    columns = write(tmp_path / "features/part-a.parquet", n=6)
    found = open_features(str(tmp_path))
    some = found.matrix("cls", filter=ds.field("tile") >= 4)
    assert np.array_equal(some, columns["cls"][4:])
    none = found.matrix("cls", filter=ds.field("tile") > 100)
    assert none.shape == (0, 5)


@pytest.mark.parametrize("url", ["{tmp}", "memory://tables-{name}"])
def test_one_plate_and_batches(tmp_path: Path, url: str) -> None:
    store = open_store(url.format(tmp=tmp_path, name=tmp_path.name))
    long = "L" * 300
    for plate, folder, n in (("P 1", "P%201", 5), (".x", "%2Ex", 3), (long, "L" * 100 + "-cut", 2)):
        columns = {**columns_of(n, 4, "float32", n), "Metadata_Plate": [plate] * n}
        store.put(f"features/{folder}/part-a.parquet", write_table(columns, schema_of(4, "float32")))
    found = open_features(store.url)
    for plate, n in (("P 1", 5), (".x", 3), (long, 2), ("P", 0)):
        assert found.table(["tile"], plate=plate)["tile"].to_pylist() == list(range(n))
        assert np.array_equal(found.matrix("cls", plate=plate), columns_of(n, 4, "float32", n)["cls"].reshape(n, 4))
    batches = list(found.batches(["tile", "cls"], batch_size=2))
    assert sum(batch.num_rows for batch in batches) == 10
    assert max(batch.num_rows for batch in batches) == 2
    some = list(found.batches(["tile"], plate="P 1", filter=ds.field("tile") > 2, batch_size=9))
    assert [batch["tile"].to_pylist() for batch in some] == [[3, 4]]
    table = found.table(["tile"], plate="P 1", filter=ds.field("tile") > 3)
    assert table["tile"].to_pylist() == [4]


def test_a_plate_is_read_from_its_folder_alone(tmp_path: Path) -> None:
    for plate in ("P1", "P2"):
        write(tmp_path / f"features/{plate}/part-a.parquet")
    found = open_features(str(tmp_path))
    (tmp_path / "features/P2/part-a.parquet").write_bytes(b"nothing")
    assert found.table(["item_id"], plate="P1").num_rows == 0  # the filter still holds; the other folder was not opened
    with pytest.raises(pa.ArrowInvalid):
        found.table(["item_id"])


def test_files_of_later_generations_stand_beside_the_first(tmp_path: Path) -> None:
    for name, n, extra in (("P1/part-a.parquet", 3, []), ("P1/part-a.r1.parquet", 2, []),
                           ("P0/part-b.r10.parquet", 1, ["Metadata_Dose"]), ("P0/part-c.r9.parquet", 4, [])):
        columns = {**columns_of(n, 2, "float32", n), "Metadata_Plate": [name[:2]] * n, "Metadata_Dose": ["7"] * n}
        schema = feature_schema(vectors={"cls": 2, "patch_mean": 2}, vector_dtype="float32", dense=["patches"],
                                metadata_columns=["Metadata_Plate", *extra], facts=FACTS)
        (tmp_path / "features" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "features" / name).write_bytes(write_table(columns, schema))
    found = open_features(str(tmp_path))
    assert found.table().num_rows == 10
    assert found.facts == FACTS
    assert sorted(found.table(["Metadata_Dose"])["Metadata_Dose"].to_pylist(), key=str) == ["7", *[None] * 9]
    assert found.matrix("cls", plate="P1").shape == (5, 2)


def test_a_plate_where_images_have_none(tmp_path: Path) -> None:
    schema = feature_schema(vectors={"cls": 2}, vector_dtype="float32", dense=["patches"])
    (tmp_path / "features").mkdir()
    (tmp_path / "features/part-a.parquet").write_bytes(write_table(columns_of(3, 2, "float32"), schema))
    with pytest.raises(BadRequest, match="have no plate"):
        open_features(str(tmp_path)).table(plate="P1")


def test_columns_and_outputs_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "features/part-a.parquet")
    with pytest.raises(BadRequest, match="no vector column 'tile'") as caught:
        open_features(str(tmp_path)).matrix("tile")
    assert "cls, patch_mean" in caught.value.todo
    for url in (str(tmp_path / "none"), f"memory://none-{tmp_path.name}"):
        with pytest.raises(BadRequest, match="no features here"):
            open_features(url)
    (tmp_path / "foreign/features").mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign/features/x.parquet")
    with pytest.raises(BadRequest, match="no features here"):
        open_features(str(tmp_path / "foreign"))


def test_outputs_on_other_file_systems(tmp_path: Path) -> None:
    columns = write(tmp_path / "x.parquet")
    url = f"memory://tables-{tmp_path.name}/out"
    fsspec.filesystem("memory").pipe(f"{url}/features/p/part.parquet", (tmp_path / "x.parquet").read_bytes())
    assert np.array_equal(open_features(url).matrix("cls"), columns["cls"])


@pytest.mark.parametrize("folder", ["_out", ".cache/out", "a=b/out", "ü out"])
def test_where_an_output_lies_does_not_matter(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder / "features/plate/part-a.parquet")
    assert open_features(str(tmp_path / folder)).table().num_rows == 7


# ---------------------------------------------------------------- vectors that cannot be stored


def test_float16_overflow_and_non_numbers_are_refused() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in DTYPES:
            with pytest.raises(ItemError) as caught:
                as_vector_dtype(np.array([1.0, bad], dtype=np.float32), dtype)
            assert caught.value.reason == "nonfinite"
    for value in (65536.0, -70000.0, 65520.0):
        with pytest.raises(ItemError) as caught:
            as_vector_dtype(np.array([value], dtype=np.float32), "float16")
        assert caught.value.reason == "overflow"
        assert as_vector_dtype(np.array([value], dtype=np.float32), "float32") == value
    assert as_vector_dtype(np.array([65504.0], dtype=np.float32), "float16") == 65504
    assert as_vector_dtype(np.zeros((0,), dtype=np.float32), "float16").dtype == np.float16


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-70000, 70000, width=32), min_size=1, max_size=8))
def test_float16_is_finite_and_near_or_refused(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    try:
        stored = as_vector_dtype(array, "float16")
    except ItemError as error:
        assert error.reason == "overflow"
        assert np.abs(array).max() > 65504
        return
    assert np.isfinite(stored).all()
    assert np.allclose(stored.astype(np.float32), array, rtol=2**-10, atol=6e-8)
