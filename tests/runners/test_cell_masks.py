"""Cells as masks and rows: what is found, in which channel, at which scale, and what is quarantined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from dinoray import open_features, open_masks
from dinoray.config import SegmentCellsJob
from dinoray.errors import BadRequest, ChangedRequest, OutputDamaged, WeightsError
from dinoray.io.stores import open_store
from dinoray.resolve_checkpoint import resolve_checkpoint
from dinoray.runners.gathering import Gathering
from dinoray.verification import open_run, verify_deep, verify_fast
from dinoray.vision.distance_model import load_segmenter
from dinoray.vision.instances import instances
from tests.checkpoints import STEEP, blobs, run_segment, seeing_checkpoint, use_tiny_model
from tests.runners.test_image_features import reasons_of, receipts_of
from tests.runs import check_whole, data_objects
from tests.vision.distance_models import FOUR

COUNTS = {"a.tif": 3, "b.tif": 0, "c.tif": 7, "p/d.tif": 1, "p/e.tif": 9}
DIM = FOUR.dim


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_model(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


def as_16_bit(image: np.ndarray) -> np.ndarray:
    return (image * 60_000 + 100).astype(np.uint16)


def write(path: Path, pixels: np.ndarray, **metadata: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, photometric="minisblack", **metadata)


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    """Five 16-bit images of several sizes in two folders, with 0 to 9 cells."""
    folder = tmp_path / "in"
    for i, (name, count) in enumerate(COUNTS.items()):
        image = blobs((72, 90 + 17 * (i % 3)), count, i)
        image[0, 0] = 0.2  # the one without cells is not constant
        write(folder / name, as_16_bit(image))
    return folder


def expected(raw: np.ndarray) -> np.ndarray:
    """Cells of raw pixels [Y, X] by the checkpoint's own formula."""
    x = raw / np.iinfo(raw.dtype).max
    return instances((1 / (1 + np.exp(-STEEP * (x - 0.5)))).astype(np.float32))


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize("masks", ["tiff", "zarr"])
def test_masks_cells_and_images(fields: Path, checkpoint: Path, tmp_path: Path, masks: str) -> None:
    out = tmp_path / "out"
    outcome = run_segment(fields, checkpoint, out, unit_items=3, masks=masks, pixel_size_um=0.5)
    assert outcome.exit_code == 0 and outcome.tally.rows == sum(COUNTS.values())
    check_whole(out)
    found, cells = open_masks(out), open_features(str(out)).table()
    assert sorted(found) == sorted(COUNTS) and len(found) == len(COUNTS) and "zzz" not in found
    for name, count in COUNTS.items():
        labels = found[name]
        assert labels.dtype == np.int32
        assert np.array_equal(labels, expected(tifffile.imread(fields / name))), name
        assert set(np.unique(labels)) == set(range(count + 1))
        rows = [row for row in cells.to_pylist() if row["item_id"] == name]
        assert [row["object_id"] for row in rows] == list(range(1, count + 1))
        for row in rows:
            inside = labels == row["object_id"]
            assert row["area_px"] == inside.sum()
            assert row["area_um2"] == pytest.approx(inside.sum() * 0.25)
            assert (row["centroid_y_px"], row["centroid_x_px"]) == pytest.approx(tuple(np.argwhere(inside).mean(axis=0)))
            assert row["intensity_mean_gray"] == pytest.approx(tifffile.imread(fields / name)[inside].mean())
            assert row["uri"] == str(fields / name)
    images = {row["item_id"]: row for row in found.images.table().to_pylist()}
    for name, count in COUNTS.items():
        row = images[name]
        assert (row["num_cells"], row["height"], row["width"]) == (count, *tifffile.imread(fields / name).shape)
        assert row["channel"] == "gray" and row["pixel_size_um"] == 0.5
        assert row["cell_fraction"] == pytest.approx((found[name] > 0).mean())
        assert (row["median_diameter_px"] is None) == (count == 0)
        assert row["p50"] is not None and row["mask"].startswith("masks/")
    assert open_features(str(out)).matrix("feature").shape == (sum(COUNTS.values()), DIM)


def test_the_feature_is_the_mean_token_under_the_cell(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    import torch

    run_segment(fields, checkpoint, tmp_path / "out")
    name = "p/e.tif"
    raw = tifffile.imread(fields / name)[:64, :64]
    write(tmp_path / "one" / "e.tif", raw)  # one window, so that its tokens are those of one forward
    run_segment(tmp_path / "one", checkpoint, tmp_path / "single")
    labels = open_masks(tmp_path / "single")["e.tif"]
    model, _ = load_segmenter(str(checkpoint))
    pixels = torch.from_numpy((raw / 65535).astype(np.float32)).expand(1, 3, -1, -1).contiguous()
    with torch.inference_mode():
        grid = np.moveaxis(model.with_tokens(pixels)[1][0].numpy(), -1, 0)
    dense = np.kron(grid, np.ones((1, 16, 16)))
    table = open_features(str(tmp_path / "single"))
    for object_id, feature in zip(table.table()["object_id"].to_pylist(), table.matrix("feature"), strict=True):
        np.testing.assert_allclose(feature, dense[:, labels == object_id].mean(axis=1), rtol=2e-3, atol=2e-3)


def test_without_features_there_is_no_such_column(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    run_segment(fields, checkpoint, tmp_path / "with")
    run_segment(fields, checkpoint, tmp_path / "out", cell_features=False)
    a, b = (open_features(str(tmp_path / name)) for name in ("with", "out"))
    assert b.vectors == [] and a.vectors == ["feature"]
    assert a.table().drop_columns(["feature"]).equals(b.table(), check_metadata=False)


def test_large_images_windows_and_a_size_that_fits_no_patch(checkpoint: Path, tmp_path: Path) -> None:
    image = as_16_bit(blobs((331, 207), 40, 5))
    write(tmp_path / "in" / "a.tif", image)
    run_segment(tmp_path / "in", checkpoint, tmp_path / "out")
    assert np.array_equal(open_masks(tmp_path / "out")["a.tif"], expected(image)) and expected(image).max() == 40


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (15, 17)])
def test_tiny_images(checkpoint: Path, tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.zeros(shape, np.uint16)
    pixels.flat[-1] = 60_000
    write(tmp_path / "in" / "a.tif", pixels)
    outcome = run_segment(tmp_path / "in", checkpoint, tmp_path / "out")
    check_whole(tmp_path / "out")
    if pixels.size == 1:
        assert reasons_of(tmp_path / "out") == {"a.tif": "constant"} and outcome.exit_code == 3
        return
    assert outcome.tally.rows == 1
    assert np.array_equal(open_masks(tmp_path / "out")["a.tif"], pixels > 0)


# ---------------------------------------------------------------- channels


@pytest.fixture
def stained(tmp_path: Path) -> Path:
    """An OME-TIFF of three channels; the cells are in DNA, twice as many in ER."""
    pixels = np.stack([as_16_bit(blobs((64, 96), n, n)) for n in (4, 8, 0)])
    pixels[2, 3, 4] = 7
    (tmp_path / "in").mkdir(exist_ok=True)
    tifffile.imwrite(tmp_path / "in" / "a.ome.tif", pixels, photometric="minisblack",
                     metadata={"axes": "CYX", "Channel": {"Name": ["DNA", "ER", "Mito"]}, "PhysicalSizeX": 0.65,
                               "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.65, "PhysicalSizeYUnit": "µm"})
    return tmp_path / "in"


@pytest.mark.parametrize(("channel", "count", "name"), [("DNA", 4, "DNA"), ("ER", 8, "ER"), ("1", 8, "ER"), (0, 4, "DNA")])
def test_the_channel_is_chosen_and_all_are_measured(stained: Path, checkpoint: Path, tmp_path: Path, channel: str, count: int,
                                                    name: str) -> None:
    out = tmp_path / "out"
    assert run_segment(stained, checkpoint, out, channel=channel).tally.rows == count
    raw = tifffile.imread(stained / "a.ome.tif")
    labels = open_masks(out)["a.ome.tif"]
    image = open_masks(out).images.table().to_pylist()[0]
    assert (image["channel"], image["pixel_size_um"]) == (name, 0.65)
    table = open_features(str(out)).table().to_pylist()
    for row in table:
        for i, each in enumerate(("DNA", "ER", "Mito")):
            assert row[f"intensity_mean_{each}"] == pytest.approx(raw[i][labels == row["object_id"]].mean())


def test_several_channels_and_none_named(stained: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert run_segment(stained, checkpoint, tmp_path / "out").exit_code == 3
    assert reasons_of(tmp_path / "out") == {"a.ome.tif": "channel_count"}
    assert run_segment(stained, checkpoint, tmp_path / "no", channel="Golgi").exit_code == 3
    message = open_run(str(tmp_path / "no"))[2].quarantine(receipts_of(tmp_path / "no"))["message"][0].as_py()
    assert "Golgi" in message and "DNA, ER, Mito" in message


def test_images_of_other_channels_share_one_table(fields: Path, stained: Path, checkpoint: Path, tmp_path: Path) -> None:
    """`stained` lies in the same folder: a unit of gray images and one of three channels."""
    out = tmp_path / "out"
    assert run_segment(fields, checkpoint, out, channel="0").tally.rows == sum(COUNTS.values()) + 4
    check_whole(out)
    rows = open_features(str(out)).table().to_pylist()
    for row in rows:
        has = {name for name in ("gray", "DNA", "ER", "Mito") if row[f"intensity_mean_{name}"] is not None}
        assert has == ({"DNA", "ER", "Mito"} if row["item_id"].endswith("ome.tif") else {"gray"})
    one_each = tmp_path / "one_each"
    run_segment(fields, checkpoint, one_each, channel="0", unit_items=1)
    table = open_features(str(one_each)).table()
    assert set(table.column_names) == set(rows[0]) and table.column_names[-1] == "feature"


def test_the_commands_of_the_docs_read_parts_of_other_channels(fields: Path, stained: Path, checkpoint: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/segmentation.md, as it stands there; `fields` and `stained` are one folder."""
    out = tmp_path / "OUT"
    run_segment(fields, checkpoint, out, channel="0", unit_items=1)
    names = set(open_features(str(out)).table().column_names)
    text = (Path(__file__).parents[2] / "docs/segmentation.md").read_text()
    code, = [block for block in text.split("```python\n")[1:] if "by_duckdb" in block]
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code.partition("```")[0], found)
    for table in (found["by_pandas"], found["by_polars"], found["by_duckdb"].df()):
        assert set(table.columns) == names and len(table) == sum(COUNTS.values()) + 4
        assert table["intensity_mean_ER"].count() == 4 and table["intensity_mean_gray"].count() == sum(COUNTS.values())
    assert len({tuple(pq.read_schema(path)) for path in (out / "images").rglob("*.parquet")}) == 1


def test_rgb_and_8_bit(checkpoint: Path, tmp_path: Path) -> None:
    gray = (blobs((64, 80), 5, 3) * 240).astype(np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(np.stack([gray] * 3, axis=-1)).save(tmp_path / "in" / "rgb.png")
    Image.fromarray(gray).save(tmp_path / "in" / "gray.png")
    run_segment(tmp_path / "in", checkpoint, tmp_path / "out")
    found = open_masks(tmp_path / "out")
    assert np.array_equal(found["gray.png"], expected(gray)) and found["gray.png"].max() == 5
    assert np.array_equal(found["rgb.png"], found["gray.png"])
    columns = open_features(str(tmp_path / "out")).table().column_names
    assert {"intensity_mean_R", "intensity_mean_G", "intensity_mean_B", "intensity_mean_gray"} <= set(columns)


def test_one_file_per_channel(checkpoint: Path, tmp_path: Path) -> None:
    for site in (1, 2):
        for number, count in ((1, 5), (2, 2)):
            image = as_16_bit(blobs((64, 64), count, 10 * site + number))
            write(tmp_path / "in" / f"r01c01f{site:02d}p01-ch{number}sk1fk1fl1.tiff", image)
    out = tmp_path / "out"
    assert run_segment(tmp_path / "in", checkpoint, out, channel="1").tally.rows == 4
    images = open_masks(out).images.table().to_pylist()
    assert len(images) == 2 and all("-ch2" in row["uri"] for row in images)
    assert {"Metadata_Well", "Metadata_Site"} <= set(images[0])
    assert {"Metadata_Well", "Metadata_Site"} <= set(open_features(str(out)).table().column_names)


# ---------------------------------------------------------------- scale and thresholds


def test_pixel_sizes_bring_images_to_the_models_scale(tmp_path: Path) -> None:
    checkpoint = seeing_checkpoint(tmp_path / "ck", pixel_size_um=0.5, median_diameter_px=10.0)
    small = blobs((64, 96), 6, 1)
    large = np.kron(small, np.ones((3, 3)))
    write(tmp_path / "in" / "a.tif", as_16_bit(large))
    out = tmp_path / "out"
    run_segment(tmp_path / "in", checkpoint, out, pixel_size_um=0.5 / 3)
    image = open_masks(out).images.table().to_pylist()[0]
    assert (image["scale"], image["scale_source"]) == (pytest.approx(1 / 3), "pixel_size")
    labels = open_masks(out)["a.tif"]
    assert labels.shape == (192, 288) and labels.max() == 6
    truth = expected(as_16_bit(large))
    overlap = ((labels > 0) & (truth > 0)).sum() / ((labels > 0) | (truth > 0)).sum()
    assert overlap > 0.85


def test_a_diameter_goes_before_pixel_sizes(tmp_path: Path) -> None:
    checkpoint = seeing_checkpoint(tmp_path / "ck", pixel_size_um=0.5, median_diameter_px=10.0)
    write(tmp_path / "in" / "a.tif", as_16_bit(blobs((64, 96), 6, 1)))
    lines: list[str] = []
    run_segment(tmp_path / "in", checkpoint, tmp_path / "out", pixel_size_um=0.1, diameter_px=20.0, say=lines.append)
    image = open_masks(tmp_path / "out").images.table().to_pylist()[0]
    assert (image["scale"], image["scale_source"]) == (0.5, "diameter")
    assert "scale by cell diameter (20 px to the model's 10)" in lines[0]


def test_thresholds(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    run_segment(fields, checkpoint, tmp_path / "a")
    run_segment(fields, checkpoint, tmp_path / "b", peak=0.97, fill=0.9)
    run_segment(fields, checkpoint, tmp_path / "c", min_area_px=10_000)
    areas = [open_features(str(tmp_path / name)).table()["area_px"].to_numpy() for name in "ab"]
    assert 0 < areas[1].sum() < areas[0].sum()
    assert open_features(str(tmp_path / "c")).table().num_rows == 0, "a table without rows can be read"
    facts = open_features(str(tmp_path / "b")).facts
    assert facts["segmentation"]["peak"] == 0.97 and facts["kind"] == "cell-masks"


# ---------------------------------------------------------------- what is bad


def test_bad_images_are_quarantined_with_their_reason(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    nan = blobs((64, 64), 3, 1).astype(np.float32)
    nan[5, 5] = np.nan
    write(fields / "nan.tif", nan)
    write(fields / "flat.tif", np.full((40, 40), 9, np.uint16))
    (fields / "torn.tif").write_bytes((fields / "a.tif").read_bytes()[:500])
    write(fields / "two.tif", np.stack([as_16_bit(blobs((64, 64), 3, n)) for n in (1, 2)]), metadata={"axes": "CYX"})
    out = tmp_path / "out"
    outcome = run_segment(fields, checkpoint, out, unit_items=4, max_failed_fraction=1.0)
    check_whole(out)
    found = reasons_of(out)
    assert found.pop("torn.tif") in ("truncated", "decode")
    assert found == {"nan.tif": "nan", "flat.tif": "constant", "two.tif": "channel_count"}
    assert outcome.exit_code == 3 and outcome.tally.rows == sum(COUNTS.values())
    assert sorted(open_masks(out)) == sorted(COUNTS)
    with pytest.raises(BadRequest, match="no mask of 'nan.tif'"):
        open_masks(out)["nan.tif"]


def test_a_retry_and_an_extension(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    from dinoray.repair import extend, retry

    good = (fields / "c.tif").read_bytes()
    (fields / "c.tif").write_bytes(good[:300])
    out = tmp_path / "out"
    assert run_segment(fields, checkpoint, out, unit_items=2).exit_code == 3
    before = data_objects(out)
    assert "masks/c.tif.tif" not in before
    (fields / "c.tif").write_bytes(good)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in checkpoint.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert retry(str(out), say=lambda line: None, checkpoint=str(moved)).exit_code == 0
    more = tmp_path / "more"
    write(more / "f.tif", as_16_bit(blobs((64, 64), 2, 9)))
    assert extend(str(out), [str(more)], say=lambda line: None).exit_code == 0
    verify_deep(open_store(str(out)))
    after = data_objects(out)
    assert {key: after[key] for key in before} == before, "what was committed is never changed"
    assert any(key.endswith(".r1.parquet") for key in after)
    found = open_masks(out)
    assert len(found) == len(COUNTS) + 1 and found["c.tif"].max() == COUNTS["c.tif"]
    assert open_features(str(out)).table().num_rows == sum(COUNTS.values()) + 2
    assert found[next(name for name in found if name.endswith("f.tif"))].max() == 2


@pytest.mark.parametrize("masks", ["tiff", "zarr"])
def test_a_unit_done_again_leaves_what_a_retry_has_committed(fields: Path, checkpoint: Path, tmp_path: Path, masks: str) -> None:
    """`verify --deep` says to delete a receipt and to run again: then the image that a retry has done is a changed one."""
    from dinoray.repair import retry

    good, out = (fields / "c.tif").read_bytes(), tmp_path / "out"
    (fields / "c.tif").write_bytes(good[:300])
    assert run_segment(fields, checkpoint, out, unit_items=8, masks=masks).exit_code == 3
    (fields / "c.tif").write_bytes(good)
    assert retry(str(out), say=lambda line: None).exit_code == 0
    whole = data_objects(out)
    next((out / "_dinoray/receipts").iterdir()).unlink()
    run_segment(fields, checkpoint, out, unit_items=8, masks=masks)
    assert data_objects(out) == whole
    verify_deep(open_store(str(out)))


def test_damage_is_found(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_segment(fields, checkpoint, out, unit_items=2)
    store = open_store(str(out))
    mask = out / "masks" / "c.tif.tif"
    data = mask.read_bytes()
    mask.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    verify_fast(store, write_success=False)
    with pytest.raises(OutputDamaged, match="masks/c.tif.tif: the content has changed"):
        verify_deep(store)
    mask.unlink()
    with pytest.raises(OutputDamaged, match="missing: masks/c.tif.tif"):
        verify_fast(store, write_success=False)
    with pytest.raises(OutputDamaged, match="missing"):
        open_masks(out)["c.tif"]
    for path in (out / "_dinoray/receipts").iterdir():
        if "masks/c.tif.tif" in path.read_text():
            path.unlink()  # what the message says to do
    run_segment(fields, checkpoint, out, unit_items=2)
    assert mask.read_bytes() == data
    (out / "masks" / "stray.tif").write_bytes(b"x")
    with pytest.raises(OutputDamaged, match="no receipt names: masks/stray.tif"):
        verify_fast(store, write_success=False)


def test_a_table_of_images_that_lacks_one_is_noticed(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    import hashlib

    out = tmp_path / "out"
    run_segment(fields, checkpoint, out)
    part = next((out / "images").iterdir())
    table = pq.read_table(part)
    pq.write_table(table.set_column(0, "item_id", [["x", *table["item_id"].to_pylist()[1:]]]), part)
    receipt = next((out / "_dinoray/receipts").iterdir())
    record = json.loads(receipt.read_text())
    for stored in record["objects"]:
        if stored["key"].startswith("images/"):
            stored |= {"bytes": part.stat().st_size, "sha256": hashlib.sha256(part.read_bytes()).hexdigest()}
    receipt.write_text(json.dumps(record))
    with pytest.raises(OutputDamaged, match="table of images"):
        verify_deep(open_store(str(out)))


def test_names_that_file_systems_dislike(checkpoint: Path, tmp_path: Path) -> None:
    names = ["a b.tif", "ä.tif", ".hidden/_x.tif", "100%.tif", "x.tif/y.tif", "x.tif.tif"]
    for i, name in enumerate(names):
        write(tmp_path / "in" / name, as_16_bit(blobs((48, 48), 2, i)))
    (tmp_path / "in.csv").write_text("path,item_id\n" + "".join(f"in/{n},{n}\n" for n in names) + "in/a b.tif,../../up\n"
                                     + "in/a b.tif,/abs//two\n")
    for masks in ("tiff", "zarr"):
        out = tmp_path / "deep" / masks
        run_segment(tmp_path / "in.csv", checkpoint, out, masks=masks)
        check_whole(out)
        found = open_masks(out)
        assert set(names) <= set(found)
        assert all(found[name].max() == 2 for name in found)
        assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == sorted(p.name for p in (tmp_path / "deep").iterdir()
                                                                               if p.name in ("tiff", "zarr"))


# ---------------------------------------------------------------- the same, however it is computed


def test_same_bytes_for_any_number_of_threads(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    outs = []
    for i, (decode, compute) in enumerate([(1, 1), (4, 3), (2, 5)]):
        outs.append(tmp_path / f"out{i}")
        run_segment(fields, checkpoint, outs[-1], decode_threads=decode, compute_threads=compute, token_budget=64, unit_items=4)
    first = data_objects(outs[0])
    assert len(first) == 5 + 2 * 2
    assert data_objects(outs[1]) == first == data_objects(outs[2])


def test_windows_of_several_images_share_batches(fields: Path, checkpoint: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[set[int]] = []
    launch = Gathering._launch

    def watched(self: Gathering, key: tuple) -> None:
        groups.append({position for (position, _, _), _ in self._waiting[key]})
        launch(self, key)

    monkeypatch.setattr(Gathering, "_launch", watched)
    run_segment(fields, checkpoint, tmp_path / "together")
    assert any(len(group) > 1 for group in groups)
    run_segment(fields, checkpoint, tmp_path / "alone", unit_items=1)
    a, b = open_masks(tmp_path / "together"), open_masks(tmp_path / "alone")
    for name in COUNTS:
        assert np.array_equal(a[name], b[name])
    x, y = ({(r["item_id"], r["object_id"]): r["feature"] for r in open_features(str(tmp_path / n)).table().to_pylist()}
            for n in ("together", "alone"))
    assert x.keys() == y.keys()
    for key in x:
        np.testing.assert_allclose(x[key], y[key], rtol=1e-4, atol=1e-4)


def test_a_mask_left_by_an_attempt_that_was_killed_is_removed_when_its_image_is_bad_by_now(
        fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_segment(fields, checkpoint, out, unit_items=8)
    for name in ("receipts", "quarantine"):
        for path in (out / "_dinoray" / name).glob("*"):
            path.unlink()  # as if it had been killed before its receipt
    (fields / "c.tif").write_bytes(b"II*\0 no more")
    assert (out / "masks/c.tif.tif").exists()
    store, plan, ledger = open_run(str(out))
    from dinoray.config import recorded_job
    from dinoray.runners.build import RunnerSpec, build_runner

    record = json.loads(store.get("_dinoray/job.json"))
    runner = build_runner(RunnerSpec("cell-masks", str(out), job=recorded_job(record["job"]).model_dump(mode="json"),
                                     digest=record["weights"]["digest"]))
    try:
        receipts = list(runner.lease([0]))
    finally:
        runner.close()
    assert [(r.quarantined, r.attempt) for r in receipts] == [(1, 2)]
    assert not (out / "masks/c.tif.tif").exists()
    assert {key for key in data_objects(out)} == {stored.key for stored in receipts[0].objects if "/quarantine/" not in stored.key}


# ---------------------------------------------------------------- requests


def test_another_checkpoint_is_another_request(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    run_segment(fields, checkpoint, tmp_path / "out")
    other = seeing_checkpoint(tmp_path / "other", fill=0.2)
    with pytest.raises(ChangedRequest, match="settings.fill: 0.09 -> 0.2"):
        run_segment(fields, other, tmp_path / "out")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert run_segment(fields, copy, tmp_path / "out").executed_units == 0, "the same checkpoint elsewhere is the same"


def test_the_range_of_sizes_that_are_left_as_they_are_is_part_of_the_request(fields: Path, tmp_path: Path) -> None:
    """It decides estimated scales."""
    first, second = (seeing_checkpoint(tmp_path / name, median_diameter_px=20.0, diameter_range_px=seen)
                     for name, seen in (("a", (15.0, 30.0)), ("b", (5.0, 30.0))))
    run_segment(fields, first, tmp_path / "out")
    assert run_segment(fields, first, tmp_path / "out").executed_units == 0
    with pytest.raises(ChangedRequest, match=r"checkpoint.diameter_range_px: \[15.0, 30.0\] -> \[5.0, 30.0\]"):
        run_segment(fields, second, tmp_path / "out")


def test_a_shared_staging_holds_each_config_of_the_same_weights(tmp_path: Path) -> None:
    """What actors load is what the driver has read: a config.json that was changed is staged beside the older one."""
    found = []
    for name, diameter in (("a", 20.0), ("b", 40.0), ("c", 20.0)):
        checkpoint = seeing_checkpoint(tmp_path / name, median_diameter_px=diameter)
        job = SegmentCellsJob(sources=("in",), out=str(tmp_path / "out"), checkpoint=str(checkpoint), no_ray=True,
                              staging=str(tmp_path / "shared"))
        resolved = resolve_checkpoint(job)
        found.append((resolved.digest, resolved.weights_location()))
        assert load_segmenter(found[-1][1])[1].median_diameter_px == diameter
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]
    assert found[2] == found[0], "the same checkpoint elsewhere is not staged again"


def test_a_damaged_or_missing_checkpoint_leaves_no_trace(fields: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no checkpoint"):
        run_segment(fields, tmp_path / "nothing", tmp_path / "out")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "model.safetensors":
            data[-2] ^= 64
        (broken / file.name).write_bytes(data)
    with pytest.raises(WeightsError, match="digest"):
        run_segment(fields, broken, tmp_path / "out")
    with pytest.raises(BadRequest, match="fill 0.5 is not below peak 0.47"):
        run_segment(fields, checkpoint, tmp_path / "out", fill=0.5)
    assert not (tmp_path / "out").exists()


def test_a_plates_scaling_is_shared(checkpoint: Path, tmp_path: Path) -> None:
    """Percentiles per folder: a dim image beside a bright one stays dim, and has no cells."""
    bright, dim = blobs((64, 64), 5, 1), blobs((64, 64), 5, 2)
    write(tmp_path / "in" / "bright.tif", as_16_bit(bright))
    write(tmp_path / "in" / "dim.tif", (dim * 2_000).astype(np.uint16))
    run_segment(tmp_path / "in", checkpoint, tmp_path / "image", scaling="image")
    run_segment(tmp_path / "in", checkpoint, tmp_path / "plate", scaling="plate")
    counts = [{row["item_id"]: row["num_cells"] for row in open_masks(tmp_path / n).images.table().to_pylist()}
              for n in ("image", "plate")]
    assert counts == [{"bright.tif": 5, "dim.tif": 5}, {"bright.tif": 5, "dim.tif": 0}]
    check_whole(tmp_path / "plate")


def cut_blob(shape: tuple[int, int]) -> np.ndarray:
    """A cell that the border cuts: it tells no size."""
    y, x = np.indices(shape)
    return np.clip(1 - np.hypot(y - shape[0] / 2, x) / 8, 0, 1).astype(np.float32)


def test_the_scale_is_estimated_where_nobody_tells_it(tmp_path: Path) -> None:
    """Cells of 9 px (as they are found) for a model of 20 px cells; one image shows none that is whole."""
    checkpoint = seeing_checkpoint(tmp_path / "ck", median_diameter_px=20.0)
    for i, count in enumerate((20, 1, 30, 12)):
        write(tmp_path / "in" / f"{i}.tif", as_16_bit(blobs((128, 160), count, i) if count > 1 else cut_blob((128, 160))))
    lines: list[str] = []
    run_segment(tmp_path / "in", checkpoint, tmp_path / "out", say=lines.append)
    check_whole(tmp_path / "out")
    rows = open_masks(tmp_path / "out").images.table().to_pylist()
    assert [row["scale_source"] for row in rows] == ["estimated", "unknown", "estimated", "estimated"]
    assert [row["num_cells"] for row in rows] == [20, 1, 30, 12]
    for row in rows:
        assert row["scale"] == 1.0 if row["scale_source"] == "unknown" else 1.5 < row["scale"] < 2.8
    assert any(line.startswith("scale estimated for 3 images: median factor 2") for line in lines)
    assert any(line.startswith("scale unknown for 1 image (no whole cell") for line in lines)
    for i, threads in enumerate(((1, 1), (4, 3))):
        run_segment(tmp_path / "in", checkpoint, tmp_path / f"again{i}", decode_threads=threads[0], compute_threads=threads[1])
        assert data_objects(tmp_path / f"again{i}") == data_objects(tmp_path / "out")


def test_the_smallest_area_takes_no_part_in_the_estimate(tmp_path: Path) -> None:
    """Cells of some 600 px, for a model whose cells have a ninth of that: 200 px is small in the image, not at that scale."""
    checkpoint = seeing_checkpoint(tmp_path / "ck", median_diameter_px=9.0)
    write(tmp_path / "in" / "a.tif", as_16_bit(np.kron(blobs((96, 112), 18, 1), np.ones((3, 3)))))
    for name, smallest in (("all", 0), ("large", 200)):
        run_segment(tmp_path / "in", checkpoint, tmp_path / name, min_area_px=smallest)
    rows = [open_masks(tmp_path / name).images.table().to_pylist()[0] for name in ("all", "large")]
    assert rows[0]["scale_source"] == "estimated" and rows[0]["scale"] < 0.5
    assert rows[0]["scale"] == rows[1]["scale"] and rows[0]["num_cells"] == rows[1]["num_cells"] == 18


@pytest.mark.parametrize("model_um", [None, 0.5])
def test_a_pixel_size_that_sets_no_scale_is_said_and_not_advised(tmp_path: Path, model_um: float | None) -> None:
    checkpoint = seeing_checkpoint(tmp_path / "ck", median_diameter_px=20.0, pixel_size_um=model_um)
    write(tmp_path / "in/a.tif", as_16_bit(blobs((128, 160), 20, 0)))
    write(tmp_path / "in/b.tif", as_16_bit(cut_blob((128, 160))))
    lines: list[str] = []
    run_segment(tmp_path / "in", checkpoint, tmp_path / "out", say=lines.append, pixel_size_um=None if model_um else 0.5)
    assert ("scale estimated per image: --pixel-size-um does not set it, because the model has no pixel size" in lines[0]) \
        == (model_um is None)
    advice = [line for line in lines if line.startswith("scale ")]
    assert len(advice) == 2 and all(("--pixel-size-um" in line) == (model_um is not None) for line in advice)
    assert all("--diameter-px" in line for line in advice)


def test_a_scale_that_cannot_be_is_a_reason(tmp_path: Path) -> None:
    checkpoint = seeing_checkpoint(tmp_path / "ck", pixel_size_um=0.5)
    write(tmp_path / "in" / "a.tif", as_16_bit(blobs((64, 64), 3, 1)))
    assert run_segment(tmp_path / "in", checkpoint, tmp_path / "out", pixel_size_um=10.0).exit_code == 3
    assert reasons_of(tmp_path / "out") == {"a.tif": "scale"}
    with pytest.raises(BadRequest, match="how large its cells were"):
        run_segment(tmp_path / "in", checkpoint, tmp_path / "no", diameter_px=10.0)


@pytest.mark.slow
def test_seventy_thousand_cells_in_one_image(checkpoint: Path, tmp_path: Path) -> None:
    """Each of 3 x 3 px; no id is folded into 16 bits, and every cell has its row."""
    image = np.zeros((1060, 1064), np.uint16)
    centres = np.add.outer(np.arange(0, 1060, 4) * 1064, np.arange(0, 1064, 4)).ravel()
    image.flat[centres] = 60_000
    image[1:] |= image[:-1]
    image[:, 1:] |= image[:, :-1]
    write(tmp_path / "in" / "a.tif", image)
    out = tmp_path / "out"
    outcome = run_segment(tmp_path / "in", checkpoint, out, min_area_px=4)
    assert outcome.tally.rows == len(centres) > 70_000
    labels = open_masks(out)["a.tif"]
    assert labels.max() == len(centres) and np.array_equal(labels > 0, image > 0)
    table = open_features(str(out))
    assert np.array_equal(table.table()["object_id"].to_numpy(), np.arange(1, len(centres) + 1))
    assert set(table.table()["area_px"].to_pylist()) == {4}
    assert np.isfinite(table.matrix("feature")).all()
    check_whole(out)
