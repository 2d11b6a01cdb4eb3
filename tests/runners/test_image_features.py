"""Image features: the columns of the contract, rows in plan order, references to dense arrays, quarantine by reason."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
import zarr

from dinoray import open_features
from dinoray.errors import BadRequest
from dinoray.io.object_names import plate_folder
from dinoray.ledger import Ledger, Receipt
from dinoray.verification import open_run
from dinoray.vision.extractor import Extractor
from dinoray.vision.quality import quality
from dinoray.vision.tiling import windows
from tests.conftest import texture
from tests.runs import ALL_FEATURES, TINY, check_whole, data_objects, run, tiny_backbone, use_tiny_backbone

D = TINY.dim
FIXED = ["item_id string", "uri string", "channel string", "tile int32", "y0 int32", "x0 int32", "y1 int32",
         "x1 int32", "height int32", "width int32", "pixel_size_um double", "p01 float", "p50 float", "p999 float",
         "frac_saturated float", "focus float"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_backbone(monkeypatch)


def tiff(path: Path, pixels: np.ndarray, **kwargs: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 3:
        kwargs = {"metadata": {"axes": "CYX"}, "ome": False, **kwargs}
    tifffile.imwrite(path, pixels, photometric="minisblack", **kwargs)
    return path


def rows_of(out: Path) -> list[dict]:
    """All rows, in plan order, as each unit's file holds them."""
    store, plan, ledger = open_run(str(out))
    found = []
    for receipt in ledger.receipts(plan.unit_ids):
        for stored in receipt.objects:
            if stored.key.startswith("features/"):
                found += pq.read_table(io.BytesIO(store.get(stored.key))).to_pylist()
    return found


def receipts_of(out: Path) -> list[Receipt]:
    _, plan, ledger = open_run(str(out))
    return list(ledger.receipts(plan.unit_ids))


def reasons_of(out: Path) -> dict[str, str]:
    """Quarantined item -> reason."""
    store, plan, ledger = open_run(str(out))
    table = Ledger(store).quarantine(receipts_of(out))
    return dict(zip(table["item_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def types_of(out: Path) -> list[str]:
    part = next(iter((out / "features").rglob("*.parquet")))
    return [f"{f.name} {f.type}".replace("<element:", "<item:") for f in pq.read_schema(part)]


# ---------------------------------------------------------------- columns


def test_the_columns_of_the_contract(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(pictures, out).exit_code == 0
    vector = f"fixed_size_list<item: float>[{D}]"
    assert types_of(out) == [*FIXED, f"cls {vector}", f"patch_mean {vector}"]
    part = next(iter((out / "features").rglob("*.parquet")))
    described = json.loads(pq.read_schema(part).metadata[b"dinoray"])
    assert {"fingerprint", "model", "weights_digest", "normalisation", "preprocessing"} <= set(described)
    assert described["model"] == "tiny16"
    assert not (out / "dense").exists()
    check_whole(out)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_columns_with_layers_dense_arrays_and_float16(pictures: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    run(pictures, out, features=ALL_FEATURES, layers=(2, 0), vector_dtype=dtype)
    vector = f"fixed_size_list<item: {'float' if dtype == 'float32' else 'halffloat'}>[{D}]"
    assert types_of(out) == [
        *FIXED, "dense_array_l02 string", "dense_index_l02 int64", "dense_array_l00 string", "dense_index_l00 int64",
        f"cls_l02 {vector}", f"patch_mean_l02 {vector}", f"cls_l00 {vector}", f"patch_mean_l00 {vector}"]
    check_whole(out)
    found = open_features(str(out))
    for row in rows_of(out):
        for layer in (0, 2):
            array = row[f"dense_array_l{layer:02d}"]
            assert array.endswith(f".zarr/l{layer:02d}/{row['height'] // 16}x{row['width'] // 16}")
            grid = found.dense(array, row[f"dense_index_l{layer:02d}"])
            assert grid.dtype == np.float16
            assert np.allclose(grid.astype(np.float32).mean(axis=(0, 1)), row[f"patch_mean_l{layer:02d}"], atol=3e-3)


def test_only_dense_features(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "out", features="patches", dense_dtype="float32")
    assert types_of(tmp_path / "out") == [*FIXED, "dense_array string", "dense_index int64"]
    row = rows_of(tmp_path / "out")[0]
    assert open_features(str(tmp_path / "out")).dense(row["dense_array"], row["dense_index"]).dtype == np.float32


# ---------------------------------------------------------------- values


def test_values_are_those_of_the_backbone_on_scaled_normalised_pixels(tmp_path: Path) -> None:
    pixels = texture((48, 64), 3, "uint16")
    tiff(tmp_path / "in/a.tif", pixels)
    run(tmp_path / "in", tmp_path / "out", features=ALL_FEATURES, dense_dtype="float32")
    row = rows_of(tmp_path / "out")[0]
    low, high = np.percentile(pixels, (0.1, 99.9))
    x = np.clip((pixels - low) / (high - low), 0, 1)[None].repeat(3, 0)
    x = (x - np.array(TINY.mean)[:, None, None]) / np.array(TINY.std)[:, None, None]
    with torch.inference_mode():
        tokens = tiny_backbone()(torch.from_numpy(x[None]).float())
    assert np.allclose(row["cls"], tokens.cls[0], atol=2e-5)
    assert np.allclose(row["patch_mean"], tokens.patches[0].mean(dim=(0, 1)), atol=2e-5)
    grid = open_features(str(tmp_path / "out")).dense(row["dense_array"], row["dense_index"])
    assert np.allclose(grid, tokens.patches[0], atol=2e-5)


def test_rows_stand_in_plan_order_with_channels_then_tiles(tmp_path: Path) -> None:
    shapes = {"a": (2, 70, 200), "b": (1, 64, 64), "c": (2, 130, 40)}
    images = {}
    for i, (name, shape) in enumerate(shapes.items()):
        images[name] = texture(shape, i, "uint16")
        tiff(tmp_path / f"in/{name}.tif", images[name] if shape[0] > 1 else images[name][0])
    run(tmp_path / "in", tmp_path / "out", tile_px=64, unit_items=2, features=ALL_FEATURES, token_budget=64)
    check_whole(tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    expected = []
    for name, pixels in images.items():
        channels = ["gray"] if len(pixels) == 1 else ["0", "1"]
        for index, channel in enumerate(channels):
            for box in windows(*pixels.shape[1:], size="auto", tile_px=64, patch=16):
                expected.append((f"{name}.tif", channel, box.tile, box.y0, box.x0, box.y1, box.x1))
                seen = quality(pixels[index:index + 1, box.y0:box.y1, box.x0:box.x1])
                row = rows[len(expected) - 1]
                assert {k: row[k] for k in seen} == pytest.approx(seen, rel=1e-6)
                assert (row["height"], row["width"]) == pixels.shape[1:]
    assert [tuple(r[k] for k in ("item_id", "channel", "tile", "y0", "x0", "y1", "x1")) for r in rows] == expected
    assert len({(r["item_id"], r["channel"], r["tile"]) for r in rows}) == len(rows)
    assert len({(r["dense_array"], r["dense_index"]) for r in rows}) == len(rows)


def test_files_of_channels_and_their_metadata(tmp_path: Path) -> None:
    for plate in ("P1", "P2"):
        for well in ("A01", "B12"):
            for channel in (1, 2, 3):
                tiff(tmp_path / f"in/{plate}/{plate}_{well}_s1_w{channel}.tif", texture((32, 32), channel, "uint16"))
    run(tmp_path / "in", tmp_path / "each")
    rows = rows_of(tmp_path / "each")
    assert len(rows) == 12
    for row in rows:
        name = f"{row['Metadata_Plate']}_{row['Metadata_Well']}_s{row['Metadata_Site']}_{row['channel']}.tif"
        assert row["uri"] == str(tmp_path / "in" / row["Metadata_Plate"] / name)
    assert sorted(p.parent.name for p in (tmp_path / "each/features").rglob("*.parquet")) == ["P1", "P2"]
    run(tmp_path / "in", tmp_path / "group", channels="mix=w3,w1,w1")
    grouped = rows_of(tmp_path / "group")
    assert [r["channel"] for r in grouped] == ["mix"] * 4
    run(tmp_path / "in", tmp_path / "where", where={"Plate": "P2", "Well": "A*"})
    assert {(r["Metadata_Plate"], r["Metadata_Well"]) for r in rows_of(tmp_path / "where")} == {("P2", "A01")}
    run(tmp_path / "in", tmp_path / "limit", limit=3)
    assert len(rows_of(tmp_path / "limit")) == 9


def test_channels_of_one_name_are_told_apart(tmp_path: Path) -> None:
    pixels = texture((3, 32, 32), 1, "uint16")
    pixels[2] = pixels[2] // 50
    path = tmp_path / "in/a.ome.tif"
    path.parent.mkdir()
    tifffile.imwrite(path, pixels, photometric="minisblack",
                     metadata={"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP", "DAPI"]}})
    run(tmp_path / "in", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 3
    assert len({(r["item_id"], r["channel"], r["tile"]) for r in rows}) == 3, "the key of a row is unique"


@pytest.mark.parametrize(("dtype", "offset"), [("int32", 2**30), ("uint32", 2**31), ("float64", 1e9), ("int8", -100),
                                               ("int16", -20_000), ("float16", 0), ("uint8", 0)])
def test_every_dtype_gives_the_features_of_the_same_picture(tmp_path: Path, dtype: str, offset: float) -> None:
    picture = (texture((48, 48), 5) // 2).astype(np.uint16)
    tiff(tmp_path / "u16/a.tif", picture)
    tiff(tmp_path / "other/a.tif", (picture.astype(np.float64) + offset).astype(dtype))
    for scaling in ("plate", "image"):
        run(tmp_path / "u16", tmp_path / f"a{scaling}", scaling=scaling)
        run(tmp_path / "other", tmp_path / f"b{scaling}", scaling=scaling)
        a, b = rows_of(tmp_path / f"a{scaling}")[0], rows_of(tmp_path / f"b{scaling}")[0]
        assert np.allclose(a["cls"], b["cls"], atol=2e-3)


@pytest.mark.parametrize("scaling", ["plate", "image", "dtype"])
@pytest.mark.parametrize("contrast", ["none", "clahe"])
def test_every_way_of_scaling_runs_and_they_differ(tmp_path: Path, pictures: Path, scaling: str, contrast: str) -> None:
    run(pictures, tmp_path / "out", scaling=scaling, contrast=contrast)
    run(pictures, tmp_path / "plain", scaling="plate", contrast="none")
    check_whole(tmp_path / "out")
    same = data_objects(tmp_path / "out").values() == data_objects(tmp_path / "plain").values()
    matrix, plain = (open_features(str(tmp_path / n)).matrix("cls") for n in ("out", "plain"))
    assert np.isfinite(matrix).all()
    assert len(np.unique(matrix.round(4), axis=0)) == len(matrix), "no two pictures look the same"
    assert np.allclose(matrix, plain) is ((scaling, contrast) == ("plate", "none")) or same


def test_resize_takes_images_of_any_size(tmp_path: Path) -> None:
    for i, shape in enumerate([(9, 11), (100, 300)]):
        tiff(tmp_path / f"in/{i}.tif", texture(shape, i, "uint16"))
    run(tmp_path / "in", tmp_path / "out", size="resize", resize_px=32, features=ALL_FEATURES)
    rows = rows_of(tmp_path / "out")
    assert [(r["y1"], r["x1"]) for r in rows] == [(9, 11), (100, 300)]
    assert {r["dense_array"].rpartition("/")[2] for r in rows} == {"2x2"}


def test_crops_that_wait_for_company_are_bounded_and_every_row_is_still_there(
        monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "together", features=ALL_FEATURES)
    for limit in (1, 10_000, 40_000):
        monkeypatch.setattr("dinoray.runners.gathering.WAITING_BYTES", limit)
        out = tmp_path / str(limit)
        run(pictures, out, features=ALL_FEATURES)
        check_whole(out)
        for a, b in zip(rows_of(tmp_path / "together"), rows_of(out), strict=True):
            assert (a["item_id"], a["channel"]) == (b["item_id"], b["channel"])
            assert np.allclose(a["cls"], b["cls"], atol=1e-5)
            grids = [open_features(str(o)).dense(r["dense_array"], r["dense_index"])
                     for o, r in ((tmp_path / "together", a), (out, b))]
            assert np.allclose(*grids, atol=2e-3)


# ---------------------------------------------------------------- quarantine


def bad_inputs(folder: Path) -> dict[str, str]:
    """A folder of one good image and one of each kind of trouble; returns item -> reason."""
    good = texture((32, 32), 1, "uint16")
    tiff(folder / "good.tif", good)
    tiff(folder / "small.tif", good[:8])
    tiff(folder / "flat.tif", np.full((32, 32), 7, np.uint16))
    nan = texture((32, 32), 2, "float32")
    nan[3, 3] = np.nan
    tiff(folder / "nan.tif", nan)
    (folder / "empty.tif").write_bytes(b"")
    (folder / "text.png").write_bytes(b"this is no picture at all")
    data = (folder / "good.tif").read_bytes()
    (folder / "torn.tif").write_bytes(data[:len(data) // 2])
    return {"small.tif": "too_small", "flat.tif": "constant", "nan.tif": "nan", "empty.tif": "empty",
            "text.png": "not_image", "torn.tif": "truncated"}


@pytest.mark.parametrize("unit_items", [1, 3, 256])
def test_bad_images_are_quarantined_by_reason_and_the_rest_is_done(tmp_path: Path, unit_items: int) -> None:
    expected = bad_inputs(tmp_path / "in")
    out = tmp_path / "out"
    outcome = run(tmp_path / "in", out, unit_items=unit_items, features=ALL_FEATURES, scaling="image")
    assert outcome.exit_code == 3
    assert reasons_of(out) == expected
    assert [r["item_id"] for r in rows_of(out)] == ["good.tif"]
    check_whole(out)
    store, _, ledger = open_run(str(out))
    table = ledger.quarantine(receipts_of(out)).to_pylist()
    assert [row["item_id"] for row in table] == sorted(expected), "in plan order"
    assert all(row["uri"] == str(tmp_path / "in" / row["item_id"]) and len(row["message"]) > 10 for row in table)
    totals = json.loads(store.get("_dinoray/summary.json"))
    assert totals["reasons"] == {reason: 1 for reason in expected.values()}
    assert run(tmp_path / "in", out, unit_items=unit_items, features=ALL_FEATURES, scaling="image").executed_units == 0


def test_a_bad_image_does_not_change_the_rows_of_the_others(tmp_path: Path) -> None:
    bad_inputs(tmp_path / "in")
    tiff(tmp_path / "alone/good.tif", texture((32, 32), 1, "uint16"))
    run(tmp_path / "in", tmp_path / "a", scaling="image")
    run(tmp_path / "alone", tmp_path / "b", scaling="image")
    (a,), (b,) = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != "uri"} == {k: v for k, v in b.items() if k != "uri"}


def test_when_all_are_bad_the_output_is_whole_and_empty(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.png").write_bytes(b"")
    outcome = run(tmp_path / "in", tmp_path / "out", features=ALL_FEATURES)
    assert outcome.exit_code == 3
    check_whole(tmp_path / "out")
    assert data_objects(tmp_path / "out") == {}
    with pytest.raises(BadRequest, match="no features"):
        open_features(str(tmp_path / "out"))


def broken_backbone(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    backbone = copy.deepcopy(tiny_backbone())
    with torch.no_grad():
        backbone.norm.weight.mul_(factor)
    monkeypatch.setattr("dinoray.vision.weights.load_backbone", lambda *a, **k: backbone)


@pytest.mark.parametrize(("factor", "fields", "reason"), [
    (1e6, {"vector_dtype": "float16"}, "overflow"),
    (1e6, {"features": ALL_FEATURES}, "overflow"),
    (float("nan"), {}, "nonfinite"),
    (float("inf"), {"vector_dtype": "float16"}, "nonfinite"),
])
def test_features_that_cannot_be_stored_quarantine_their_image(
        monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path, factor: float, fields: dict,
        reason: str) -> None:
    broken_backbone(monkeypatch, factor)
    outcome = run(pictures, tmp_path / "out", max_failed_fraction=1.0, **fields)
    assert outcome.exit_code == 3
    assert set(reasons_of(tmp_path / "out").values()) == {reason}
    assert outcome.tally.quarantined == 10
    check_whole(tmp_path / "out")


def test_large_features_are_stored_in_float32(monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path) -> None:
    broken_backbone(monkeypatch, 1e6)
    assert run(pictures, tmp_path / "out", features=ALL_FEATURES, dense_dtype="float32").exit_code == 0


def test_one_bad_tile_takes_the_whole_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in "ab":
        tiff(tmp_path / f"in/{name}.tif", texture((64, 150), ord(name), "uint16"))
    real = Extractor._forward
    calls = []

    def forward(self: Extractor, crops):
        result = real(self, crops)
        calls.append(len(crops))
        if len(calls) == 1:
            result["cls"][1, 0] = np.nan
        return result

    monkeypatch.setattr(Extractor, "_forward", forward)
    run(tmp_path / "in", tmp_path / "out", tile_px=64, token_budget=64, compute_threads=1)
    assert reasons_of(tmp_path / "out") == {"a.tif": "nonfinite"}
    assert {r["item_id"] for r in rows_of(tmp_path / "out")} == {"b.tif"}
    check_whole(tmp_path / "out")


# ---------------------------------------------------------------- device memory


def test_after_out_of_memory_every_unit_computed_in_parts_says_so(
        monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "clean", unit_items=5)
    real = Extractor._forward

    def forward(self: Extractor, crops):
        if len(crops) > 1:
            raise torch.OutOfMemoryError("simulated")
        return real(self, crops)

    monkeypatch.setattr(Extractor, "_forward", forward)
    run(pictures, tmp_path / "out", unit_items=5)
    assert [r.numerics["degraded"] for r in receipts_of(tmp_path / "clean")] == [False, False]
    assert [r.numerics["degraded"] for r in receipts_of(tmp_path / "out")] == [True, True]
    for a, b in zip(rows_of(tmp_path / "clean"), rows_of(tmp_path / "out"), strict=True):
        assert np.allclose(a.pop("cls"), b.pop("cls"), atol=1e-5)
        assert np.allclose(a.pop("patch_mean"), b.pop("patch_mean"), atol=1e-5)
        assert a == b


def test_an_image_too_large_for_the_device_is_quarantined(monkeypatch: pytest.MonkeyPatch, pictures: Path,
                                                          tmp_path: Path) -> None:
    real = Extractor._forward

    def forward(self: Extractor, crops):
        if crops[0].pixels.shape[2] == 80:
            raise torch.OutOfMemoryError("simulated")
        return real(self, crops)

    monkeypatch.setattr(Extractor, "_forward", forward)
    outcome = run(pictures, tmp_path / "out")
    assert set(reasons_of(tmp_path / "out").values()) == {"device_memory"}
    assert outcome.tally.quarantined == 5  # rgb1, rgb3 and the three gray ones
    check_whole(tmp_path / "out")


# ---------------------------------------------------------------- names from outside


def manifest(tmp_path: Path, plates: list[str], name: Callable[[int], str] = lambda i: f"{i}.tif") -> Path:
    for i in range(len(plates)):
        tiff(tmp_path / "in" / f"{i}.tif", texture((32, 32), i, "uint16"))
    path = tmp_path / "in/images.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "Plate"])
        writer.writerows([f"{i}.tif", plate] for i, plate in enumerate(plates))
    return path


PLATES = ["..", ".", "...", "_hidden", ".hidden", "a/b", "a=b", "a%2Fb", "Ünï", "中" * 100, "x" * 300, "a b", "CON",
          "~", "part-1.parquet", "\\", "-rf"]


def test_plates_of_any_name_stay_inside_and_are_read_back(tmp_path: Path) -> None:
    outcome = run(manifest(tmp_path, PLATES), tmp_path / "deep/out", features=ALL_FEATURES, scaling="image")
    assert outcome.exit_code == 0
    check_whole(tmp_path / "deep/out")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "deep/out").iterdir()) == ["_SUCCESS", "_dinoray", "dense", "features"]
    found = open_features(str(tmp_path / "deep/out"))
    table = found.table()
    assert sorted(table["Metadata_Plate"].to_pylist()) == sorted(PLATES), "a reader must not pass over a plate"
    for row in table.to_pylist():
        assert found.dense(row["dense_array"], row["dense_index"]).shape == (2, 2, D)


def test_folders_of_plates_are_safe_distinct_and_readable() -> None:
    folders = [plate_folder(plate) for plate in PLATES]
    assert len(set(folders)) == len(PLATES)
    for folder in folders:
        name = folder.removesuffix("/")
        assert folder == name + "/"
        assert "/" not in name
        assert name.isascii()
        assert "=" not in name
        assert not name.startswith((".", "_"))
        assert len(name) <= 200
    assert plate_folder(None) == plate_folder("") == ""
    assert plate_folder("BR00117035") == "BR00117035/"
    assert plate_folder("a b") == "a%20b/"
    assert plate_folder("中" * 100) != plate_folder("中" * 101)


@pytest.mark.parametrize("unit_items", [1, 256])
def test_images_of_one_id_are_all_quarantined(tmp_path: Path, unit_items: int) -> None:
    manifest(tmp_path, ["p", "p", "p"])
    (tmp_path / "in/images.csv").write_text("path,item_id\n0.tif,same\n1.tif,same\n2.tif,other\n")
    outcome = run(tmp_path / "in/images.csv", tmp_path / "out", unit_items=unit_items)
    assert outcome.exit_code == 3
    assert reasons_of(tmp_path / "out") == {"same": "duplicate_id"}
    assert [r["item_id"] for r in rows_of(tmp_path / "out")] == ["other"]
    assert outcome.tally.quarantined == 2
    check_whole(tmp_path / "out")


@pytest.mark.parametrize("unit_items", [1, 256])
def test_a_manifest_that_names_one_file_twice(tmp_path: Path, unit_items: int) -> None:
    manifest(tmp_path, ["p", "p"])
    (tmp_path / "in/images.csv").write_text("path\n0.tif\n1.tif\n0.tif\n")
    outcome = run(tmp_path / "in/images.csv", tmp_path / "out", unit_items=unit_items)
    assert outcome.exit_code == 3
    check_whole(tmp_path / "out")
    assert run(tmp_path / "in/images.csv", tmp_path / "out", unit_items=unit_items).executed_units == 0


def test_names_of_files_in_any_script(tmp_path: Path) -> None:
    names = ["é 中 文.tif", "a'b\"c.tif", "100%.tif", "#1?.tif", "😀.tif", " lead.tif"]
    for i, name in enumerate(names):
        tiff(tmp_path / "in" / name, texture((32, 32), i, "uint16"))
    run(tmp_path / "in", tmp_path / "öut", features=ALL_FEATURES)
    check_whole(tmp_path / "öut")
    rows = rows_of(tmp_path / "öut")
    assert sorted(r["item_id"] for r in rows) == sorted(names)
    assert all(Path(r["uri"]).read_bytes() for r in rows)
    assert zarr.open_group(str(tmp_path / "öut" / rows[0]["dense_array"].partition(".zarr/")[0]) + ".zarr", mode="r")
