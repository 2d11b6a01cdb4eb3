"""Cells as rows: what a row holds, labels and centroids alike, batches across images, and what is quarantined."""

from __future__ import annotations

import json
import struct
import weakref
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image
from skimage.measure import regionprops_table

from dinoray import open_features
from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.items import Item
from dinoray.runners import cell_features
from dinoray.runners.gathering import Gathering
from dinoray.units import CELL_ITEM_SCHEMA, ITEM_SCHEMA, Plan, PlanWriter, item_digest, item_row
from dinoray.verification import open_run, verify_deep, verify_fast
from dinoray.vision.quality import quality
from tests.conftest import texture
from tests.runners.test_image_features import FIXED, reasons_of, receipts_of, rows_of, types_of
from tests.runs import TINY, DictStore, check_whole, data_objects, make_item, run, run_cells, use_tiny_backbone


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_backbone(monkeypatch)


def cells_of(shape: tuple[int, int], count: int, seed: int) -> np.ndarray:
    """A label image of `count` squares of 5..9 px that do not touch, with sparse rising ids, uint16."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint16)
    places = [(y, x) for y in range(0, shape[0] - 10, 12) for x in range(0, shape[1] - 10, 12)]
    for i, n in enumerate(sorted(rng.choice(len(places), count, replace=False))):
        (y, x), side = places[n], int(rng.integers(5, 10))
        labels[y:y + side, x:x + side] = 3 * i + 2
    return labels


COUNTS = {"a": 5, "b": 0, "c": 9, "p/d": 1, "p/e": 14}


@pytest.fixture
def fields(tmp_path: Path) -> tuple[Path, Path]:
    """Five 16-bit images of two channels in two folders and their label images; one has no cell."""
    images, labels = tmp_path / "img", tmp_path / "lab"
    for i, (name, count) in enumerate(COUNTS.items()):
        shape = (72, 96 + 12 * (i % 2))
        for folder, suffix in ((images, ".tif"), (labels, "_masks.tif")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = texture((2, *shape), i, "uint16") if folder is images else cells_of(shape, count, i)
            kwargs = {"metadata": {"axes": "CYX"}, "ome": False} if folder is images else {}
            tifffile.imwrite(f"{folder / name}{suffix}", pixels, photometric="minisblack", **kwargs)
    return images, labels


def centroid_table(labels: Path, path: Path, factor: float = 1.0, names: tuple[str, str] = ("x", "y")) -> Path:
    """The label images' centroids as skimage measures them, in a CSV."""
    lines = [f"item_id,{names[0]},{names[1]},object_id"]
    for file in sorted(labels.rglob("*.tif")):
        name = str(file.relative_to(labels)).replace("_masks", "")
        table = regionprops_table(tifffile.imread(file), properties=("label", "centroid"))
        lines += [f"{name},{x * factor!r},{y * factor!r},{label}" for label, y, x in
                  zip(table["label"], map(float, table["centroid-0"]), map(float, table["centroid-1"]), strict=True)]
    path.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    return path


# ---------------------------------------------------------------- rows


def test_one_row_per_cell_and_channel(fields: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = fields
    out = tmp_path / "out"
    outcome = run_cells(images, out, labels=str(labels), crop_um=9.0, pixel_size_um=0.5)
    assert outcome.exit_code == 0 and outcome.tally.rows == 2 * sum(COUNTS.values())
    check_whole(out)
    vector = f"fixed_size_list<item: float>[{TINY.dim}]"
    assert types_of(out) == [*FIXED, "object_id int64", "centroid_y_px double", "centroid_x_px double", "area_px int64",
                             f"cls {vector}", f"patch_mean {vector}"]
    rows = rows_of(out)
    keys = [(row["item_id"], row["object_id"], row["channel"]) for row in rows]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)  # ids rise, each with its two channels
    for name in COUNTS:
        plane = tifffile.imread(f"{labels / name}_masks.tif")
        pixels = tifffile.imread(f"{images / name}.tif")
        table = regionprops_table(plane, properties=("label", "centroid", "area"))
        mine = [row for row in rows if row["item_id"] == f"{name}.tif"]
        assert [row["object_id"] for row in mine[::2]] == table["label"].tolist()
        for number, (y, x, area) in enumerate(zip(table["centroid-0"], table["centroid-1"], table["area"], strict=True)):
            for channel, row in enumerate(mine[2 * number:2 * number + 2]):
                assert (row["centroid_y_px"], row["centroid_x_px"], row["area_px"]) == (pytest.approx(y), pytest.approx(x), area)
                # 9 µm are 18 px; the first pixel's centre is 0 of a centroid and 0.5 of the box
                box = np.floor([y + 0.5 - 9, x + 0.5 - 9]), np.ceil([y + 0.5 + 9, x + 0.5 + 9])
                assert [row[k] for k in ("y0", "x0", "y1", "x1")] == np.concatenate(box).tolist()
                assert (row["height"], row["width"], row["pixel_size_um"], row["tile"]) == (*plane.shape, 0.5, 0)
                inside = pixels[channel][max(0, row["y0"]):row["y1"], max(0, row["x0"]):row["x1"]]
                for name_, value in quality(inside[None]).items():
                    assert row[name_] == pytest.approx(value, rel=1e-5)
    assert any(row["y0"] < 0 for row in rows) and any(row["x1"] > row["width"] for row in rows), "some crops cross the border"
    receipt, = receipts_of(out)
    assert receipt.without_objects == ["b.tif"]
    assert (receipt.items, receipt.row_items, receipt.quarantined) == (5, 4, 0)
    assert receipt.bytes_read == sum(p.stat().st_size for folder in fields for p in folder.rglob("*.tif"))


def test_open_features_reads_them(fields: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_cells(fields[0], out, labels=str(fields[1]), channels="mean", features=("cls",), vector_dtype="float16")
    features = open_features(str(out))
    assert features.matrix("cls").shape == (sum(COUNTS.values()), TINY.dim) and features.vectors == ["cls"]
    assert features.table(["channel"])["channel"].unique().to_pylist() == ["mean"]
    assert features.facts["preprocessing"]["crop_um"] == 30.0


@pytest.mark.parametrize("unit", ["px", "um"])
def test_centroids_give_the_features_of_their_labels(fields: tuple[Path, Path], tmp_path: Path, unit: str) -> None:
    images, labels = fields
    factor, names = (1.0, ("x", "y")) if unit == "px" else (0.5, ("x_um", "y_um"))
    table = centroid_table(labels, tmp_path / "cells.csv", factor, names)
    run_cells(images, tmp_path / "labels", labels=str(labels), pixel_size_um=0.5)
    run_cells(images, tmp_path / "table", centroids=str(table), pixel_size_um=0.5)
    check_whole(tmp_path / "table")
    first, second = (rows_of(tmp_path / name) for name in ("labels", "table"))
    assert all(row.pop("area_px") is None for row in second) and all(row.pop("area_px") for row in first)
    assert len(first) == len(second) > 50
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=1e-4, atol=1e-5) if isinstance(value, list | float) \
                else pytest.approx(value) == b[name]
    assert receipts_of(tmp_path / "table")[0].without_objects == ["b.tif"]


def test_neighbours_are_kept_or_masked(tmp_path: Path) -> None:
    """Two cells side by side, the second one bright: masked, it changes nothing in the crop of the first."""
    labels = np.zeros((64, 64), np.int32)
    labels[28:36, 20:28], labels[28:36, 30:38] = 1, 2
    for name, level in (("dark", 100), ("bright", 60_000)):
        pixels = texture((64, 64), 1, "uint16") // 4
        pixels[labels == 2] = level
        for folder, plane in (("img", pixels), ("lab", labels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / folder / f"{name}.tif", plane)
    rows = {}
    for mask in (False, True):
        out = tmp_path / f"out{mask}"
        run_cells(tmp_path / "img", out, labels=str(tmp_path / "lab"), mask_neighbours=mask, scaling="dtype")
        rows |= {(mask, row["item_id"][:-4], row["object_id"]): row["cls"] for row in rows_of(out)}
    assert not np.allclose(rows[False, "dark", 1], rows[False, "bright", 1], atol=1e-3)
    assert rows[True, "dark", 1] == rows[True, "bright", 1]
    assert rows[True, "dark", 2] != rows[True, "bright", 2], "an object's own pixels stay"
    assert rows[True, "dark", 1] != rows[False, "dark", 1]


def test_a_physical_size_means_the_same_cell_at_any_pixel_size(tmp_path: Path) -> None:
    """A scene drawn at two resolutions gives nearly the same crops for the same µm (and not for the same px)."""
    yy, xx = np.mgrid[0:320, 0:320] / 4
    scene = (np.sin(yy / 3) + np.cos(xx / 4) + 2) / 4 * 60_000
    for name, step in (("fine", 1), ("coarse", 2)):
        (tmp_path / name).mkdir()
        pixels = scene.reshape(320 // step, step, 320 // step, step).mean(axis=(1, 3)).astype(np.uint16)
        tifffile.imwrite(tmp_path / name / "a.ome.tif", pixels, metadata={
            "axes": "YX", "PhysicalSizeX": step / 4, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": step / 4,
            "PhysicalSizeYUnit": "µm"})
    # the same point of the scene: the centre of coarse pixel 80 lies between the fine pixels 160 and 161
    (tmp_path / "coarse.csv").write_text("item_id,x,y\na,80,80\n")
    (tmp_path / "fine.csv").write_text("item_id,x,y\na,160.5,160.5\n")
    found = {}
    for name in ("fine", "coarse"):
        run_cells(tmp_path / name, tmp_path / f"out-{name}", centroids=str(tmp_path / f"{name}.csv"), pixel_size_um=None,
                  crop_um=20.0, scaling="dtype")
        row, = rows_of(tmp_path / f"out-{name}")
        found[name] = row
    assert (found["fine"]["pixel_size_um"], found["coarse"]["pixel_size_um"]) == (0.25, 0.5)
    assert found["fine"]["x1"] - found["fine"]["x0"] == pytest.approx(80, abs=1.1)
    assert found["coarse"]["x1"] - found["coarse"]["x0"] == pytest.approx(40, abs=1.1)
    np.testing.assert_allclose(found["fine"]["cls"], found["coarse"]["cls"], atol=0.02)


# ---------------------------------------------------------------- the same, however it is computed


def test_crops_share_batches_across_images_and_give_what_each_image_gives_alone(
        fields: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = fields
    sizes: list[set[int]] = []
    launch = Gathering._launch

    def watched(self, key):
        sizes.append({position for (position, _), _ in self._waiting[key]})
        launch(self, key)

    monkeypatch.setattr(Gathering, "_launch", watched)
    run_cells(images, tmp_path / "together", labels=str(labels), token_budget=90)
    assert any(len(positions) > 1 for positions in sizes), "a batch holds crops of several images"
    run_cells(images, tmp_path / "alone", labels=str(labels), token_budget=90, unit_items=1)
    together, alone = rows_of(tmp_path / "together"), rows_of(tmp_path / "alone")
    assert len(together) == len(alone)
    for a, b in zip(together, alone, strict=True):
        for name in ("cls", "patch_mean"):  # vectors may differ in the last bits between batch sizes (docs/reliability.md)
            np.testing.assert_allclose(a.pop(name), b.pop(name), rtol=1e-4, atol=1e-5)
        assert a == b


def test_same_bytes_for_any_number_of_threads_and_any_chunk(
        fields: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = fields
    outs = []
    for i, (decode, compute, chunk) in enumerate([(1, 1, 1), (4, 2, 5000), (3, 5, cell_features.CHUNK_BYTES)]):
        monkeypatch.setattr(cell_features, "CHUNK_BYTES", chunk)
        outs.append(tmp_path / f"out{i}")
        run_cells(images, outs[-1], labels=str(labels), decode_threads=decode, compute_threads=compute, token_budget=64,
                  unit_items=2, mask_neighbours=True)
        check_whole(outs[-1])
    first = data_objects(outs[0])
    assert len(first) == 3
    assert data_objects(outs[1]) == first == data_objects(outs[2])


def test_an_image_of_many_cells_does_not_hold_all_their_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 crops of 32 x 32 px pass through while never more than a few chunks are alive."""
    monkeypatch.setattr(cell_features, "CHUNK_BYTES", 100_000)
    alive: set[int] = set()
    most = 0
    make = cell_features.Crop

    def counted(*args):
        nonlocal most
        crop = make(*args)
        alive.add(id(crop))
        weakref.finalize(crop, alive.discard, id(crop))
        most = max(most, len(alive))
        return crop

    monkeypatch.setattr(cell_features, "Crop", counted)
    (tmp_path / "img").mkdir()
    tifffile.imwrite(tmp_path / "img/a.tif", texture((200, 200), 3, "uint16"))
    rng = np.random.default_rng(0)
    lines = [f"a.tif,{x:.2f},{y:.2f}" for y, x in rng.uniform(0, 199, (3000, 2))]
    (tmp_path / "cells.csv").write_text("item_id,x,y\n" + "\n".join(lines) + "\n")
    outcome = run_cells(tmp_path / "img", tmp_path / "out", centroids=str(tmp_path / "cells.csv"), decode_threads=2,
                        compute_threads=2, token_budget=64)
    assert outcome.tally.rows == 3000
    # three chunks of 43, one batch of 7 that waits and three that are computed
    assert most < 300, f"{most} crops were held at once"
    assert [row["object_id"] for row in rows_of(tmp_path / "out")] == list(range(1, 3001))


# ---------------------------------------------------------------- pixel size


def test_no_pixel_size_is_a_bad_request_before_anything_is_written(fields: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="pixel size") as caught:
        run_cells(fields[0], tmp_path / "out", labels=str(fields[1]), pixel_size_um=None)
    assert "--pixel-size-um" in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_later_image_without_pixel_size_is_quarantined(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for i in range(3):
        kwargs = {"imagej": True, "resolution": (2.0, 2.0), "metadata": {"unit": "um"}} if i != 1 else {}
        tifffile.imwrite(tmp_path / f"img/{i}.tif", texture((40, 40), i, "uint16"), **kwargs)
    (tmp_path / "cells.csv").write_text("item_id,x,y\n" + "".join(f"{i}.tif,20,20\n" for i in range(3)))
    outcome = run_cells(tmp_path / "img", tmp_path / "out", centroids=str(tmp_path / "cells.csv"), pixel_size_um=None)
    assert outcome.exit_code == 3
    assert reasons_of(tmp_path / "out") == {"1.tif": "no_pixel_size"}
    assert [row["pixel_size_um"] for row in rows_of(tmp_path / "out")] == [0.5, 0.5]
    check_whole(tmp_path / "out")


def test_a_damaged_first_image_does_not_hide_the_pixel_size_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img/0.tif").write_bytes(b"II*\0 not a tiff")
    tifffile.imwrite(tmp_path / "img/1.tif", texture((40, 40), 1, "uint16"), imagej=True, resolution=(2.0, 2.0),
                     metadata={"unit": "um"})
    (tmp_path / "cells.csv").write_text("item_id,x,y\n0.tif,20,20\n1.tif,20,20\n")
    run_cells(tmp_path / "img", tmp_path / "out", centroids=str(tmp_path / "cells.csv"), pixel_size_um=None)
    assert list(reasons_of(tmp_path / "out")) == ["0.tif"]


# ---------------------------------------------------------------- quarantine


def test_labels_that_are_none(fields: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = fields
    plane = tifffile.imread(labels / "a_masks.tif")
    tifffile.imwrite(labels / "a_masks.tif", plane.astype(np.float32))
    tifffile.imwrite(labels / "b_masks.tif", np.stack([plane, plane]), photometric="minisblack")
    tifffile.imwrite(labels / "c_masks.tif", plane[:-1])
    (labels / "p/d_masks.tif").unlink()
    tifffile.imwrite(labels / "p/e_masks.tif", -plane.astype(np.int32))
    for i, name in enumerate(("f", "g", "h")):
        tifffile.imwrite(images / f"{name}.tif", texture((2, *plane.shape), 30 + i, "uint16"), photometric="minisblack",
                         metadata={"axes": "CYX"}, ome=False)
    tifffile.imwrite(labels / "f_masks.tif", plane.astype(np.int64) + 2**40 * (plane > 0))
    tifffile.imwrite(labels / "g_masks.tif", plane.astype(np.uint64) + np.uint64(2**63) * (plane > 0))
    (labels / "h_masks.tif").write_bytes(b"")
    out = tmp_path / "out"
    assert run_cells(images, out, labels=str(labels), max_failed_fraction=1).exit_code == 3
    assert reasons_of(out) == {"a.tif": "bad_labels", "b.tif": "bad_labels", "c.tif": "shape", "p/d.tif": "missing_labels",
                               "p/e.tif": "bad_labels", "g.tif": "bad_labels", "h.tif": "empty"}
    assert [row["object_id"] for row in rows_of(out)[::2]] == [2**40 + i for i in (2, 5, 8, 11, 14)]
    check_whole(out)


def test_a_png_of_few_bits_is_no_label_image(tmp_path: Path) -> None:
    """Its decoder stretches 0..15 to 0..255: cell 3 would be called 51."""
    (tmp_path / "img").mkdir(), (tmp_path / "lab").mkdir()
    labels = cells_of((60, 60), 5, 1)
    for bits in (1, 4, 8):
        tifffile.imwrite(tmp_path / f"img/{bits}.tif", texture((60, 60), bits, "uint16"))
    Image.fromarray(labels > 0).save(tmp_path / "lab/1.png")
    (tmp_path / "lab/4.png").write_bytes(four_bit_png(labels % 16))
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "lab/8.png")
    run_cells(tmp_path / "img", tmp_path / "out", labels=str(tmp_path / "lab"), max_failed_fraction=1)
    assert reasons_of(tmp_path / "out") == {"1.tif": "bad_labels", "4.tif": "bad_labels"}
    assert [row["object_id"] for row in rows_of(tmp_path / "out")] == [2, 5, 8, 11, 14]


def four_bit_png(values: np.ndarray) -> bytes:
    """A grey PNG of 4 bits per pixel from values [Y, X] of 0..15, an even number of columns."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (values[:, ::2] << 4 | values[:, 1::2]).astype(np.uint8)
    packed = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 4, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("value", [1, 255])
def test_a_binary_mask_is_not_taken_for_one_cell(tmp_path: Path, value: int) -> None:
    (tmp_path / "img").mkdir(), (tmp_path / "lab").mkdir()
    for name, count in (("many", 9), ("one", 1)):
        tifffile.imwrite(tmp_path / f"img/{name}.tif", texture((60, 60), count, "uint16"))
        tifffile.imwrite(tmp_path / f"lab/{name}.tif", ((cells_of((60, 60), count, 1) > 0) * value).astype(np.uint8))
    run_cells(tmp_path / "img", tmp_path / "out", labels=str(tmp_path / "lab"), max_failed_fraction=1)
    assert reasons_of(tmp_path / "out") == {"many.tif": "bad_labels"}
    assert [row["object_id"] for row in rows_of(tmp_path / "out")] == [value]


def test_centroids_that_are_none(fields: tuple[Path, Path], tmp_path: Path) -> None:
    table = tmp_path / "cells.csv"
    table.write_text("item_id,x,y,object_id\na.tif,5,5,1\na.tif,6,6,1\nb.tif,,5,1\nc.tif,200,5,1\nc.tif,5,5,2\np/d.tif,-0.5,71.5,7\n")
    run_cells(fields[0], tmp_path / "out", centroids=str(table), max_failed_fraction=1)
    assert reasons_of(tmp_path / "out") == {"a.tif": "bad_centroids", "b.tif": "bad_centroids", "c.tif": "bad_centroids"}
    assert {(row["item_id"], row["object_id"]) for row in rows_of(tmp_path / "out")} == {("p/d.tif", 7)}
    assert receipts_of(tmp_path / "out")[0].without_objects == ["p/e.tif"]


@pytest.mark.parametrize(("crop_um", "reason"), [(0.2, "too_small"), (20_000.0, "too_large")])
def test_crops_out_of_all_proportion(fields: tuple[Path, Path], tmp_path: Path, crop_um: float, reason: str) -> None:
    run_cells(fields[0], tmp_path / "out", labels=str(fields[1]), crop_um=crop_um, max_failed_fraction=1)
    assert set(reasons_of(tmp_path / "out").values()) == {reason}


def test_an_output_without_a_single_cell_is_whole(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir(), (tmp_path / "lab").mkdir()
    for i in range(3):
        tifffile.imwrite(tmp_path / f"img/{i}.tif", texture((40, 40), i, "uint16"))
        tifffile.imwrite(tmp_path / f"lab/{i}.tif", np.zeros((40, 40), np.uint8))
    out = tmp_path / "out"
    assert run_cells(tmp_path / "img", out, labels=str(tmp_path / "lab")).exit_code == 0
    store, plan, ledger = open_run(str(out))
    assert verify_deep(store)["without_objects"] == 3
    assert data_objects(out) == {}
    assert json.loads((out / "_SUCCESS").read_text())["rows"] == 0
    with pytest.raises(BadRequest, match="no features"):
        open_features(str(out))


def test_a_receipt_cannot_call_an_image_empty_that_has_rows(fields: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_cells(fields[0], out, labels=str(fields[1]))
    store, plan, ledger = open_run(str(out))
    path = next((out / "_dinoray/receipts").iterdir())
    path.write_text(json.dumps({**json.loads(path.read_text()), "without_objects": []}))
    with pytest.raises(OutputDamaged, match="0 without objects"):
        verify_fast(store, write_success=False)
    path.write_text(json.dumps({**json.loads(path.read_text()), "without_objects": ["a.tif"]}))
    with pytest.raises(OutputDamaged, match="do not add up"):
        verify_deep(store)


# ---------------------------------------------------------------- identity


def test_plans_of_images_are_as_they_were(pictures: Path, tmp_path: Path) -> None:
    run(pictures, tmp_path / "out")
    assert pq.read_schema(tmp_path / "out/_dinoray/plan/00000.parquet").names == ITEM_SCHEMA.names
    assert "labels_uri" not in item_row(make_item("a"))


def test_labels_and_centroids_are_part_of_an_items_identity(tmp_path: Path) -> None:
    from dinoray.io.items import FileRef, Objects

    def objects(x: float, unit: str = "px") -> Objects:
        return Objects.pack(np.array([1]), np.array([2.0]), np.array([x]), unit)

    items = [make_item("a"), make_item("a", labels=FileRef("/l", 1, "1")), make_item("a", labels=FileRef("/l", 1, "2")),
             make_item("a", labels=FileRef("/m", 1, "1")), make_item("a", objects=objects(1.0)),
             make_item("a", objects=objects(2.0)), make_item("a", objects=objects(1.0, "um")),
             make_item("a", objects=Objects(b""))]
    assert len({item_digest(item) for item in items}) == len(items)
    store = DictStore()
    writer = PlanWriter(store, "_dinoray", "f", max_items=3, max_bytes=10**9, schema=CELL_ITEM_SCHEMA)
    for item in items:
        writer.add(item_row(item), item_digest(item))
    writer.seal()
    back: list[Item] = [item for unit in Plan(store).units() for item in unit.items]
    assert back == items
    with pytest.raises(ValueError, match="CELL_ITEM_SCHEMA"):
        PlanWriter(store, "x", "f", max_items=3, max_bytes=10**9).add(item_row(items[1]), b"")


def test_other_labels_are_other_inputs(fields: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = fields
    run_cells(images, tmp_path / "out", labels=str(labels))
    tifffile.imwrite(labels / "a_masks.tif", cells_of((72, 96), 4, 77))
    with pytest.raises(BadRequest, match="1 changed .*a.tif"):
        run_cells(images, tmp_path / "out", labels=str(labels))
    with pytest.raises(BadRequest, match="crop_um: 30.0 -> 31.0"):
        run_cells(images, tmp_path / "out", labels=str(labels), crop_um=31.0)
