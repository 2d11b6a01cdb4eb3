"""Tables of centroids: which columns are understood, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, DinorayError
from dinoray.io.centroids import CentroidTable, position_key
from dinoray.io.items import Objects


def csv(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def found(url: str, *names: str) -> tuple[list[tuple[int, float, float]], str, str | None]:
    """((id, y, x) of an image's objects, their unit, problem)."""
    table = CentroidTable(url)
    try:
        objects, problem = table.objects_of(list(names))
    finally:
        table.close()
    return list(zip(*(a.tolist() for a in objects.arrays()), strict=True)), objects.unit, problem


@pytest.mark.parametrize(("header", "unit"), [
    ("item_id,x,y,object_id", "px"),
    ("ID,X,Y,ObjectNumber", "px"),
    ("path,x_px,y_px,label", "px"),
    ("image,centroid_x,centroid_y,Nuclei_ObjectNumber", "px"),
    ("uri,centroid_x_px,centroid_y_px,object_id", "px"),
    ("file,centroid-1,centroid-0,label", "px"),
    ("item_id,x_um,y_um,object_id", "um"),
    ("FileName_DNA,Location_Center_X,Location_Center_Y,ObjectNumber", "px"),
    ("FileName_DNA,Nuclei_Location_Center_X,Nuclei_Location_Center_Y,Nuclei_Number_Object_Number", "px"),
    ("FileName_DNA,Nuclei_AreaShape_Center_X,Nuclei_AreaShape_Center_Y,Metadata_ObjectNumber", "px"),
])
def test_columns_by_their_names(tmp_path: Path, header: str, unit: str) -> None:
    url = csv(tmp_path / "t.csv", f"{header}\na.tif,12.5,3.25,7\nb.tif,1,2,1\na.tif,0,5e1,2.0\n")
    if "Nuclei_ObjectNumber" in header and "Nuclei_L" not in header:  # an id of one kind without its centres: counted
        assert found(url, "a.tif") == ([(1, 3.25, 12.5), (2, 50.0, 0.0)], unit, None)
    else:
        assert found(url, "a.tif") == ([(2, 50.0, 0.0), (7, 3.25, 12.5)], unit, None)
    assert found(url, "none") == ([], unit, None)


def test_without_ids_cells_are_counted_in_the_order_of_the_table(tmp_path: Path) -> None:
    url = csv(tmp_path / "t.csv", "item_id,x,y\na,9,9\nb,1,1\na,3,4\n")
    assert found(url, "a") == ([(1, 9.0, 9.0), (2, 4.0, 3.0)], "px", None)


def test_nuclei_are_preferred_and_location_over_areashape(tmp_path: Path) -> None:
    url = csv(tmp_path / "t.csv", "item_id,Cells_Location_Center_X,Cells_Location_Center_Y,Nuclei_AreaShape_Center_X,"
              "Nuclei_AreaShape_Center_Y,Nuclei_Location_Center_X,Nuclei_Location_Center_Y,Nuclei_ObjectNumber\n"
              "a,1,2,3,4,5,6,8\n")
    assert found(url, "a") == ([(8, 6.0, 5.0)], "px", None)


def test_paths_of_cellprofiler(tmp_path: Path) -> None:
    url = csv(tmp_path / "t.csv", "PathName_DNA,FileName_DNA,Location_Center_X,Location_Center_Y\n"
              "/data/p1,a.tif,1,2\nC:\\data\\p1,b.tif,3,4\n./sub/../p2,c.tif,5,6\ns3://bucket/p,d.tif,7,8\n")
    assert found(url, "/data/p1/a.tif")[0] == [(1, 2.0, 1.0)]
    assert found(url, "C:/data/p1/b.tif")[0] == [(1, 4.0, 3.0)]
    assert found(url, "p2/c.tif")[0] == [(1, 6.0, 5.0)]
    assert found(url, "s3://bucket/p/d.tif")[0] == [(1, 8.0, 7.0)]


@pytest.mark.parametrize("prefix", ["", "Image_"])
def test_positions_on_a_plate(tmp_path: Path, prefix: str) -> None:
    columns = ",".join(f"{prefix}Metadata_{name}" for name in ("Plate", "Well", "Site"))
    url = csv(tmp_path / "t.csv", f"{columns},x,y\nP1,c3,01,1,2\nP1,C03,1.0,3,4\nP2,C03,1,5,6\n")
    assert found(url, position_key("P1", "C03", "1"))[0] == [(1, 2.0, 1.0), (2, 4.0, 3.0)]
    assert found(url, position_key("P2", "C3", "01"))[0] == [(1, 6.0, 5.0)]


def test_parquet_with_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"item_id": ["a", "a"], "x": np.array([1 / 3, 2.0]), "y": np.array([0.1, 4.0], np.float32),
                             "object_id": np.array([2**60 + 1, 5])}), path)
    rows, unit, problem = found(str(path), "a")
    assert [row[0] for row in rows] == [5, 2**60 + 1]
    assert rows[1][2] == 1 / 3 and rows[1][1] == pytest.approx(0.1, abs=1e-7)
    assert (unit, problem) == ("px", None)


@pytest.mark.parametrize(("text", "needle"), [
    ("item_id,x,y,object_id\na,1,2,7\na,3,4,7\n", "bad_centroids: object_id 7 occurs more than once"),
    ("item_id,x,y\na,1,2\na,,4\n", "bad_centroids: object 2"),
    ("item_id,x,y\na,nan,4\n", "bad_centroids: object 1"),
    ("item_id,x,y\na,inf,4\n", "bad_centroids: object 1"),
])
def test_objects_that_cannot_be_placed_are_a_problem_of_their_image(tmp_path: Path, text: str, needle: str) -> None:
    rows, _, problem = found(csv(tmp_path / "t.csv", text), "a")
    assert rows == []
    assert problem is not None and needle in problem


@pytest.mark.parametrize(("text", "needle"), [
    ("x,y\n1,2\n", "which image"),
    ("ImageNumber,x,y\n1,1,2\n", "found columns: ImageNumber"),
    ("Metadata_Well,Metadata_Site,x,y\nA01,1,1,2\n", "which image"),
    ("item_id,a\nb,1\n", "no columns x and y"),
    ("item_id,x\nb,1\n", "no columns x and y"),
    ("item_id,A_Location_Center_X,A_Location_Center_Y,B_Location_Center_X,B_Location_Center_Y\nb,1,1,1,1\n", "several kinds"),
    ("item_id,x,y\na,one,2\n", "not a coordinate: 'one'"),
    ("item_id,x,y,object_id\na,1,2,2.5\n", "not an object id: '2.5'"),
    ("item_id,x,y,object_id\na,1,2,\n", "not an object id: ''"),
    ("item_id,x,y,object_id\na,1,2,99999999999999999999\n", "not an object id"),
    ("item_id,x,y,X\na,1,2,3\n", "two columns are called 'x'"),
    ("item_id,x,y\n", "no rows"),
    ("", "cannot be read"),
])
def test_tables_that_are_refused(tmp_path: Path, text: str, needle: str) -> None:
    with pytest.raises(BadRequest) as caught:
        CentroidTable(csv(tmp_path / "t.csv", text))
    assert needle in str(caught.value)
    assert "t.csv" in caught.value.where


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"\.csv or \.parquet"):
        CentroidTable(str(tmp_path / "t.xlsx"))
    with pytest.raises(BadRequest, match="no such file"):
        CentroidTable(str(tmp_path / "none.csv"))


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_table_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "t.csv"
    path.write_bytes(b"item_id,x,y\n" + data)
    try:
        CentroidTable(str(path)).close()
    except DinorayError as error:
        assert isinstance(error, BadRequest)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-2**63, 2**63 - 1), st.floats(allow_nan=False), st.floats(allow_nan=False)), max_size=9,
                unique_by=lambda row: row[0]))
def test_packed_objects_come_back_sorted_by_id(rows: list[tuple[int, float, float]]) -> None:
    ids, y, x = (np.array([row[i] for row in rows]) for i in range(3))
    objects = Objects.pack(ids, y, x)
    assert len(objects) == len(rows)
    assert list(zip(*(a.tolist() for a in objects.arrays()), strict=True)) == sorted(rows)
