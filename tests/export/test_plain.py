"""The feature table as one file: the same rows and types, and text that no spreadsheet runs."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray import open_features
from dinoray.errors import BadRequest
from dinoray.export.plain import export_table
from dinoray.export.target import as_csv
from dinoray.io.stores import LocalStore
from tests.export.outputs import make_row, plate_rows, write_output


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_is_the_table(tmp_path: Path, dtype: str) -> None:
    write_output(LocalStore(tmp_path), plate_rows(tiles=2), dtype=dtype)
    features = open_features(str(tmp_path))
    done = export_table(str(tmp_path))
    table = pq.read_table(done.target)
    assert done.target == f"{tmp_path}/profiles/features.parquet"
    assert table.schema.equals(features.dataset.schema, check_metadata=True)
    keys = [(name, "ascending") for name in ("item_id", "channel", "tile")]
    assert table.sort_by(keys).equals(features.table().sort_by(keys))
    assert (done.rows, done.columns) == table.shape
    one = pq.read_table(export_table(str(tmp_path), str(tmp_path / "one.parquet"), features=["cls"]).target)
    assert one.column_names == [name for name in table.column_names if name != "patch_mean"]
    again = export_table(str(tmp_path), str(tmp_path / "again.parquet"))
    assert Path(again.target).read_bytes() == Path(done.target).read_bytes()


@pytest.mark.parametrize("fmt", ["csv", "csv.gz"])
def test_csv_widens_the_vectors(tmp_path: Path, fmt: str) -> None:
    write_output(LocalStore(tmp_path), plate_rows(), dtype="float16")
    done = export_table(str(tmp_path), fmt=fmt)
    table = pq.read_table(export_table(str(tmp_path)).target)
    found = pd.read_csv(done.target)
    assert done.columns == found.shape[1]
    assert [name for name in found if name.startswith(("cls", "patch"))] == [
        f"{vector}_{i:04d}" for vector in ("cls", "patch_mean") for i in range(3)]
    matrix = table["cls"].combine_chunks().flatten().to_numpy().reshape(-1, 3)
    assert np.array_equal(found[["cls_0000", "cls_0001", "cls_0002"]].to_numpy(np.float16), matrix)
    assert found["item_id"].tolist() == table["item_id"].to_pylist()
    assert found["frac_saturated"].isna().all()
    assert pl.read_csv(done.target).shape == found.shape


def test_gzip_holds_no_time(tmp_path: Path) -> None:
    write_output(LocalStore(tmp_path), plate_rows())
    packed = Path(export_table(str(tmp_path), fmt="csv.gz").target).read_bytes()
    assert packed[3:8] == bytes(5)  # no flags (so no file name), time 0
    assert gzip.decompress(packed) == Path(export_table(str(tmp_path), fmt="csv").target).read_bytes()


# ---------------------------------------------------------------- formulas

EVIL = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\tx", "\rx", '=HYPERLINK("http://x","y"),"z"', "a=b", "'=quoted", "",
        "é\n=x"]


def test_text_that_a_spreadsheet_would_run_is_escaped(tmp_path: Path) -> None:
    rows = [make_row(f"{text}.tif", text, Metadata_Plate="P1", Metadata_Well=text, Metadata_Note=text,
                     cls=np.array([-1.5, 2.0])) for text in EVIL]
    write_output(LocalStore(tmp_path), rows)
    with open(export_table(str(tmp_path), fmt="csv").target, newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(EVIL)
    for text, row in zip(EVIL, found, strict=True):
        escaped = "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
        assert row["Metadata_Note"] == row["channel"] == row["Metadata_Well"] == escaped
        assert (float(row["cls_0000"]), float(row["cls_0001"])) == (-1.5, 2.0)  # numbers are numbers
    assert sorted(pq.read_table(export_table(str(tmp_path)).target)["channel"].to_pylist()) == sorted(EVIL)  # Parquet needs none


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1))
def test_no_cell_begins_a_formula_and_nothing_is_lost(texts: list[str]) -> None:
    sink = io.BytesIO()
    pyarrow.csv.write_csv(as_csv(pa.table({"text": texts})), sink)
    found = [row[0] for row in csv.reader(io.StringIO(sink.getvalue().decode(), newline=""))][1:]
    assert not [cell for cell in found if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert [cell.removeprefix("'") if text[:1] != "'" else cell for text, cell in zip(texts, found, strict=True)] == texts


# ---------------------------------------------------------------- refusals


def test_unfinished_outputs_and_unknown_columns_are_refused(tmp_path: Path) -> None:
    write_output(LocalStore(tmp_path), plate_rows(), leave_out=2)
    with pytest.raises(BadRequest, match="2 of 4 units"):
        export_table(str(tmp_path))
    done = export_table(str(tmp_path), partial=True)
    assert (done.rows, done.notes) == (12, ["partial: 2 of 4 units are missing"])
    with pytest.raises(BadRequest, match="no vector column dense") as caught:
        export_table(str(tmp_path), partial=True, features=["dense"])
    assert "cls, patch_mean" in caught.value.todo


def test_later_generations_may_have_more_metadata(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_output(store, plate_rows(plates=["P1"]))
    write_output(store, plate_rows(plates=["P2"], Metadata_Dose="3"), prefix="_dinoray/more/001-extend", suffix=".r1")
    table = pq.read_table(export_table(store.url).target)
    pairs = zip(table["Metadata_Plate"].to_pylist(), table["Metadata_Dose"].to_pylist(), strict=True)
    assert set(pairs) == {("P1", None), ("P2", "3")}
