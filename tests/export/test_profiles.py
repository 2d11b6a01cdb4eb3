"""Wide profiles equal a naive sum over rows; what is missing is said or refused."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.export import profiles
from dinoray.export.pooling import pool
from dinoray.export.profiles import export_profiles
from dinoray.io.grouping import natural
from dinoray.io.stores import LocalStore, open_store
from tests.export.outputs import make_row, plate_rows, write_output

LEVEL_KEYS = {"site": ["Metadata_Plate", "Metadata_Well", "Metadata_Site"], "well": ["Metadata_Plate", "Metadata_Well"],
              "image": ["Metadata_Plate", "Metadata_Well", "Metadata_Site", "item_id"],
              "object": ["Metadata_Plate", "Metadata_Well", "Metadata_Site", "item_id", "object_id"]}


def naive(rows: list[dict], level: str, how: str, dtype: str, compartment: str) -> dict[tuple, dict[str, float]]:
    """Key -> {feature column: value}: dictionaries of lists, one number after the other."""
    pooled: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = tuple(row[name] for name in LEVEL_KEYS[level])
        for vector in ("cls", "patch_mean"):
            for i, value in enumerate(row[vector].astype(dtype)):
                pooled[key][f"{compartment}_dinov3_vits16_{row['channel']}_{vector}_{i:04d}"].append(float(value))
        for name in ("p50", "focus"):
            pooled[key][f"Metadata_QC_{row['channel']}_{name}"].append(row[name])
    function = {"mean": np.mean, "median": np.median}[how]
    return {key: {name: float(function(known)) if (known := [v for v in values if not np.isnan(v)]) else np.nan
                  for name, values in columns.items()} for key, columns in pooled.items()}


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict], bool]:
    objects = draw(st.booleans())
    numbers = st.floats(-4, 4, width=16) | st.just(float("nan"))
    rows, seen = [], set()
    for _ in range(draw(st.integers(1, 25))):
        plate, well, site = draw(st.sampled_from(["P1", "P10", "P9"])), draw(st.sampled_from(["A01", "B02"])), draw(
            st.sampled_from(["1", "2", "10"]))
        channel, count = draw(st.sampled_from(["DNA", "ER"])), draw(st.integers(1, 3))
        if (plate, well, site, channel, count) in seen:
            continue
        seen.add((plate, well, site, channel, count))
        vectors = {name: np.array(draw(st.lists(numbers, min_size=2, max_size=2))) for name in ("cls", "patch_mean")}
        row = make_row(f"{plate}/{well}/{site}", channel, Metadata_Plate=plate, Metadata_Well=well, Metadata_Site=site, **vectors,
                       p50=draw(st.floats(0, 100, width=32)), focus=draw(st.floats(0, 1, width=32)))
        rows.append({**row, "object_id": count} if objects else {**row, "tile": count})
    return rows, objects


@settings(deadline=None, max_examples=30)
@given(table=tables(), level=st.sampled_from(["site", "well", "image", "object"]), how=st.sampled_from(["mean", "median"]),
       dtype=st.sampled_from(["float32", "float16"]), block=st.sampled_from([1, 100, 10**8]), row_group=st.sampled_from([1, 10**9]))
def test_profiles_equal_the_naive_ones(tmp_path_factory: pytest.TempPathFactory, table: tuple[list[dict], bool], level: str,
                                       how: str, dtype: str, block: int, row_group: int) -> None:
    rows, objects = table
    level = "image" if level == "object" and not objects else level
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dinoray.io.tables.ROW_GROUP_BYTES", row_group)
        patch.setattr(profiles, "BLOCK_BYTES", block)
        write_output(LocalStore(out), rows, dtype=dtype)
        done = export_profiles(str(out), level=level, how=how)
    found = pd.read_parquet(done.target)
    compartment = "Cells"
    expected = naive(rows, level, how, dtype, compartment)
    names = [{"item_id": "Metadata_ItemId", "object_id": "Metadata_ObjectNumber"}.get(n, n) for n in LEVEL_KEYS[level]]
    keys = list(found[names].itertuples(index=False, name=None))
    assert keys == sorted(expected, key=lambda key: [natural(str(part)) for part in key])
    for key, (_, got) in zip(keys, found.iterrows(), strict=True):
        columns = [n for n in found if n.startswith((compartment, "Metadata_QC_")) and not n.endswith(("p01", "p999", "saturated"))]
        want = [expected[key].get(name, np.nan) for name in columns]  # a channel without rows is NaN
        np.testing.assert_allclose(got[columns].to_numpy(float), want, rtol=1e-6, atol=1e-6)
        mine = [row for row in rows if tuple(row[n] for n in LEVEL_KEYS[level]) == key]
        assert got["Metadata_Count_Rows"] == len(mine)
        assert got["Metadata_Count_Images"] == len({row["item_id"] for row in mine})
        if objects:
            assert got["Metadata_Count_Objects"] == len({(row["item_id"], row["object_id"]) for row in mine})


# ---------------------------------------------------------------- columns, order, bytes


def test_columns_of_the_contract(tmp_path: Path) -> None:
    write_output(LocalStore(tmp_path), plate_rows(Metadata_Batch="b1", Metadata_Dose="1.5", dim=2))
    done = export_profiles(str(tmp_path), level="site", features=["cls"])
    table = pq.read_table(done.target)
    quality = ("p01", "p50", "p999", "frac_saturated", "focus")
    assert table.column_names == [
        "Metadata_Batch", "Metadata_Plate", "Metadata_Well", "Metadata_Site", "Metadata_Dose", "Metadata_Count_Rows",
        "Metadata_Count_Images", "Metadata_Count_Quarantined", *(f"Metadata_QC_{c}_{q}" for c in ("AGP", "DNA") for q in quality),
        *(f"Cells_dinov3_vits16_{c}_cls_{i:04d}" for c in ("AGP", "DNA") for i in range(2))]
    assert {str(table.schema.field(n).type) for n in table.column_names[:5]} == {"string"}
    assert {str(f.type) for f in table.schema if f.name.startswith("Cells_")} == {"float"}
    facts = json.loads(table.schema.metadata[b"dinoray"])
    assert facts["export"] == {"level": "site", "aggregate": "mean", "channels": {"AGP": "AGP", "DNA": "DNA"}, "missing_units": 0}
    assert table["Metadata_Plate"].to_pylist() == ["P9"] * 6 + ["P10"] * 6
    assert done.notes == []


def test_metadata_on_which_the_rows_differ_is_empty_and_planes_are_reported(tmp_path: Path) -> None:
    rows = plate_rows(plates=["P1"], wells=["A01", "A02"], sites=1, channels=["DNA"])
    rows += [{**row, "item_id": row["item_id"] + "p2", "Metadata_Plane": "2"} for row in rows[:1]]
    for row in rows:
        row.setdefault("Metadata_Plane", "1")
    write_output(LocalStore(tmp_path), rows)
    done = export_profiles(str(tmp_path), level="well")
    assert pq.read_table(done.target)["Metadata_Plane"].to_pylist() == [None, "1"]
    assert "1 of 2 profiles pool several values of Metadata_Plane" in done.notes


def test_the_same_output_gives_the_same_bytes_whatever_the_order_of_its_units(tmp_path: Path) -> None:
    rows = plate_rows(tiles=2)
    data = []
    for name, order, max_items in (("a", rows, 3), ("b", rows, 3), ("c", rows[::-1], 2)):
        write_output(LocalStore(tmp_path / name), order, max_items=max_items)
        for fmt in ("parquet", "csv.gz"):
            target = tmp_path / f"{name}.{fmt}"
            export_profiles(str(tmp_path / name), str(target), level="image")
            data.append(target.read_bytes())
    assert data[0] == data[2]
    assert data[1] == data[3]
    pd.testing.assert_frame_equal(*(pd.read_parquet(io.BytesIO(data[i])) for i in (4, 0)))


@pytest.mark.parametrize("fmt", ["parquet", "csv", "csv.gz"])
def test_pandas_and_polars_read_it(tmp_path: Path, fmt: str) -> None:
    rows = plate_rows()
    write_output(LocalStore(tmp_path), [row for row in rows if (row["Metadata_Well"], row["channel"]) != ("A02", "AGP")])
    done = export_profiles(str(tmp_path), fmt=fmt)
    parquet = export_profiles(str(tmp_path), str(tmp_path / "x.parquet"))
    expected = pq.read_table(parquet.target)
    assert done.target == f"{tmp_path}/profiles/well_mean.{fmt}"
    assert (done.rows, done.columns) == expected.shape
    as_pandas = pd.read_parquet(done.target) if fmt == "parquet" else pd.read_csv(done.target)
    as_polars = pl.read_parquet(done.target) if fmt == "parquet" else pl.read_csv(done.target)
    for name in expected.column_names:
        column = expected[name].to_pylist()
        for got in (list(as_pandas[name]), as_polars[name].to_list()):
            if name in ("Metadata_Plate", "Metadata_Well"):
                assert got == column
            else:
                np.testing.assert_allclose(np.array(got, float), np.array(column, float), rtol=1e-6)
    assert "channel AGP: absent (NaN) in 2 of 6 rows" in done.notes
    assert as_pandas["Cells_dinov3_vits16_AGP_cls_0000"].isna().sum() == 2


# ---------------------------------------------------------------- quarantine, generations, refusals


def test_quarantined_images_are_counted_where_they_are(tmp_path: Path) -> None:
    rows = plate_rows()
    bad = [row for row in rows if (row["Metadata_Plate"], row["Metadata_Well"]) == ("P9", "B01")
           or row["item_id"] == "P10/A02_s2.tif"]
    names = {row["item_id"] for row in bad}
    write_output(LocalStore(tmp_path), [row for row in rows if row["item_id"] not in names], quarantined=bad)
    done = export_profiles(str(tmp_path), level="well")
    table = pq.read_table(done.target, columns=["Metadata_Plate", "Metadata_Well", "Metadata_Count_Quarantined"]).to_pylist()
    assert {(r["Metadata_Plate"], r["Metadata_Well"]): r["Metadata_Count_Quarantined"] for r in table} == {
        ("P9", "A01"): 0, ("P9", "A02"): 0, ("P10", "A01"): 0, ("P10", "A02"): 1, ("P10", "B01"): 0}
    assert "quarantined: 3 images have no row (`dinoray status` gives the reasons)" in done.notes
    assert "no profile, all images quarantined: 1 well: P9/B01" in done.notes


def test_a_retry_and_an_extension_belong_to_the_output(tmp_path: Path) -> None:
    rows = plate_rows(tiles=2)
    later = [row for row in rows if row["item_id"] == "P9/A01_s1.tif"]
    added = plate_rows(plates=["P11"], Metadata_Dose="3", seed=5)
    first = [row for row in rows if row["item_id"] != "P9/A01_s1.tif"]
    store = LocalStore(tmp_path / "out")
    write_output(store, first, quarantined=later)
    write_output(store, later, prefix="_dinoray/more/001-retry", suffix=".r1")
    write_output(store, added, prefix="_dinoray/more/002-extend", suffix=".r2")
    done = export_profiles(store.url, level="site")
    assert not done.notes
    write_output(LocalStore(tmp_path / "whole"), [{**row, "Metadata_Dose": None} for row in rows] + added)
    whole = export_profiles(f"{tmp_path}/whole", level="site")
    pd.testing.assert_frame_equal(pd.read_parquet(done.target), pd.read_parquet(whole.target), check_like=True)


def test_unfinished_and_damaged_outputs(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_output(store, plate_rows(), leave_out=1)
    with pytest.raises(BadRequest, match="1 of 4 units are not done") as caught:
        export_profiles(store.url)
    assert "--partial" in caught.value.todo
    assert "partial: 1 of 4 units are missing" in export_profiles(store.url, partial=True).notes
    key = next(iter(sorted(k for k, _ in store.list("features"))))
    data = store.get(key)
    store.put(key, data[:-10])
    with pytest.raises(OutputDamaged, match="1 files are missing or not of the size"):
        export_profiles(store.url)
    assert "partial: 2 of 4 units are missing" in export_profiles(store.url, partial=True).notes
    store.put(key, data[:-10] + b"0123456789")  # right size, no footer
    with pytest.raises(OutputDamaged, match="cannot be read"):
        export_profiles(store.url, partial=True)
    assert not [name for name, _ in store.list("profiles") if name.endswith(".part")]


def test_levels_that_the_metadata_does_not_carry(tmp_path: Path) -> None:
    rows = [make_row(f"{i}.png", cls=np.ones(2), patch_mean=np.ones(2)) for i in range(4)]
    write_output(LocalStore(tmp_path / "no"), rows)
    for level in ("well", "site"):
        with pytest.raises(BadRequest, match="Metadata_Plate, Metadata_Well") as caught:
            export_profiles(f"{tmp_path}/no", level=level)
        assert "--level image" in caught.value.todo
        assert not (tmp_path / "no/profiles").exists()
    assert export_profiles(f"{tmp_path}/no", level="image").rows == 4
    with pytest.raises(BadRequest, match="not objects"):
        export_profiles(f"{tmp_path}/no", level="object")
    rows = plate_rows()
    for row in rows[:2]:
        row["Metadata_Well"] = None
    write_output(LocalStore(tmp_path / "some"), rows)
    with pytest.raises(BadRequest, match=r"no Metadata_Well \(2 rows\), the first: P10/A01_s1.tif"):
        export_profiles(f"{tmp_path}/some", level="site")
    assert export_profiles(f"{tmp_path}/some", level="image").rows == 12


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    write_output(LocalStore(tmp_path), plate_rows())
    for fields in ({"level": "plate"}, {"how": "max"}, {"compartment": "Blobs"}, {"features": ["patches"]}, {"fmt": "xlsx"}):
        with pytest.raises(BadRequest) as caught:
            export_profiles(str(tmp_path), **fields)
        assert caught.value.todo
    with pytest.raises(BadRequest, match="not an output"):
        export_profiles(str(tmp_path / "none"))
    write_output(LocalStore(tmp_path / "bad"), [], quarantined=plate_rows())
    with pytest.raises(BadRequest, match="nothing to export"):
        export_profiles(f"{tmp_path}/bad")


def test_from_and_to_an_object_store(tmp_path: Path) -> None:
    url = f"memory://export-{tmp_path.name}/out"
    write_output(open_store(url), plate_rows())
    write_output(LocalStore(tmp_path), plate_rows())
    done = export_profiles(url)
    assert done.target == f"{url}/profiles/well_mean.parquet"
    assert open_store(url).get("profiles/well_mean.parquet") == Path(export_profiles(str(tmp_path)).target).read_bytes()


def test_metadata_that_bears_a_name_of_the_export(tmp_path: Path) -> None:
    write_output(LocalStore(tmp_path), plate_rows(Metadata_Count_Rows="7"))
    done = export_profiles(str(tmp_path))
    assert "left out, the export has columns of these names: Metadata_Count_Rows" in done.notes
    assert set(pq.read_table(done.target)["Metadata_Count_Rows"].to_pylist()) == {4}


@pytest.mark.parametrize("how", ["mean", "median"])
def test_no_more_rows_are_held_than_a_block_or_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    held = []

    def counting(values: np.ndarray, starts: np.ndarray, rule: str) -> np.ndarray:
        held.append(len(values))
        return pool(values, starts, rule)

    write_output(LocalStore(tmp_path), plate_rows(tiles=4), max_items=100)  # one file a plate: 48 rows, a well has 16
    monkeypatch.setattr(profiles, "pool", counting)
    for rows, expected in ((1, [16] * 6), (20, [16] * 6), (40, [32, 16] * 2), (1000, [48, 48])):
        held.clear()
        monkeypatch.setattr(profiles, "BLOCK_BYTES", rows * 4 * (5 + 2 * 3))
        export_profiles(str(tmp_path), how=how)
        assert held == expected
