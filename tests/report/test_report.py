"""The report: what stands on the page, hostile names, lost inputs, one colour scale, the verdict on the stages."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinoray.config import ExtractImagesJob
from dinoray.errors import BadRequest, OutputDamaged
from dinoray.extraction import extract_images
from dinoray.ledger import Receipt, StoredObject
from dinoray.report import plots
from dinoray.report.gallery import build_gallery, planned_items
from dinoray.report.html import render, write_report
from dinoray.report.neighbours import ItemVectors, item_vectors, nearest, unit_vectors
from dinoray.report.pca import basis_of, draw_map
from dinoray.report.pictures import draw_composites, read_picture
from dinoray.report.run import open_for_report
from dinoray.report.sample import evenly, pick_dense, pick_vector, read_sample
from dinoray.report.stages import COMPUTE, DECODE, LOOP, WRITE, StageTotals, verdict
from tests.conftest import texture

HOSTILE = "<script>alert(1)</script>.png"
"""As a path: a folder and a file, so the item id is exactly this text."""
ALL = ("cls", "patch_mean", "patches")


def extract(source: Path | str, out: Path | str, **fields: object) -> str:
    """Run a small job in this process; returns its output."""
    job = ExtractImagesJob(sources=(str(source),), out=str(out), model="vitt16", weights="random", no_ray=True,
                           **fields)
    return extract_images(job, say=lambda line: None).out


def save_rgb(path: Path, seed: int, side: int = 64) -> Path:
    """A PNG picture of colour texture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(np.moveaxis(texture((3, side, side), seed), 0, -1))).save(path)
    return path


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colour, gray, 16-bit and 5-channel pictures, two equal ones, and files that are quarantined."""
    folder = tmp_path_factory.mktemp("collection")
    for i in range(4):
        save_rgb(folder / "a" / f"rgb{i}.png", i)
    shutil.copyfile(folder / "a" / "rgb0.png", folder / "z_same.png")
    save_rgb(folder / HOSTILE, 9)
    save_rgb(folder / "\" onerror=alert(1) x='.png", 10)
    for i in range(2):
        tifffile.imwrite(folder / f"gray{i}.tif", texture((48, 80), 20 + i, "uint16"), photometric="minisblack")
    for i in range(3):
        tifffile.imwrite(folder / f"multi{i}.tif", texture((5, 64, 64), 30 + i, "uint16"), photometric="minisblack",
                         metadata={"axes": "CYX"})
    save_rgb(folder / "wide.png", 40, side=600)
    (folder / "broken.png").write_bytes((folder / "z_same.png").read_bytes()[:200])
    (folder / "empty<img src=x>.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def run_out(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with patches over the collection, in several units."""
    return extract(collection, tmp_path_factory.mktemp("run") / "out", features=ALL, unit_items=4)


@pytest.fixture(scope="module")
def page(run_out: str) -> str:
    """Its report."""
    return Path(write_report(run_out)).read_text()


class Tags(HTMLParser):
    """All start tags with their attributes, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def pixels_of(uri: str) -> np.ndarray:
    """The pixels [h, w, 3] of a data URI."""
    data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


# ---------------------------------------------------------------- the page


def test_page_says_what_ran(run_out: str, page: str) -> None:
    text = " ".join(Tags(page).text.split())
    job = json.loads((Path(run_out) / "_dinoray/job.json").read_text())
    for wanted in (job["fingerprint"], "vitt16", "random:0", "random weights: texture only", "✓ verified",
                   "float32 on cpu", "13 images with features", "2 quarantined (13.3 %)", job["command"],
                   "dinoray.open_features", "percentiles 0.1 to 99.9", "mean 0.485, 0.456, 0.406",
                   "mean of the 13 images compared (every image of the run)"):
        assert wanted in text, wanted
    assert "truncated" in text and "broken.png" in text and "copy it again" in text
    assert "dense_array" in text  # how to read patch grids back


def test_page_is_self_contained_and_names_are_escaped(page: str) -> None:
    parsed = Tags(page)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert HOSTILE in parsed.text and "\" onerror=alert(1) x='.png" in parsed.text  # shown as they are, as text
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value and value.startswith(("data:image/", "#")), (tag, value)
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page
    assert all(attributes.get("src", "").startswith("data:") for tag, attributes in parsed.tags if tag == "img")


def test_same_bytes_again_and_where_it_is_written(run_out: str, page: str, tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "page.html"
    assert write_report(run_out, str(target)) == str(target)
    assert target.read_text() == page
    assert [p.name for p in target.parent.iterdir()] == ["page.html"]
    write_report(run_out, "memory://report-test/page.html")
    import fsspec

    assert fsspec.filesystem("memory").cat_file("/report-test/page.html").decode() == page
    with pytest.raises(BadRequest, match="cannot be written"):
        write_report(run_out, str(tmp_path))
    with pytest.raises(BadRequest, match="not an output"):
        write_report(str(tmp_path))


def test_report_knows_neither_torch_nor_ray() -> None:
    code = "import sys, dinoray.report.html; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_remote_output(collection: Path) -> None:
    out = extract(collection / "a", "memory://report-remote/out", features=ALL)
    assert write_report(out) == "memory://report-remote/out/report.html"
    import fsspec

    assert b"feature map" in fsspec.filesystem("memory").cat_file("/report-remote/out/report.html")


def test_unfinished_run_and_damaged_output(run_out: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run_out, out)
    (out / "_SUCCESS").unlink()
    receipts = sorted((out / "_dinoray/receipts").iterdir())
    receipts[0].unlink()
    text = Tags(Path(write_report(str(out))).read_text()).text
    assert f"{len(receipts) - 1} of {len(receipts)} units are done" in text and "unfinished" in text
    shutil.rmtree(out / "dense")
    with pytest.raises(OutputDamaged, match="patch grids cannot be read"):
        write_report(str(out))
    shutil.rmtree(out / "features")
    with pytest.raises(OutputDamaged, match="features cannot be read"):
        write_report(str(out))


# ---------------------------------------------------------------- variants of runs


def test_lost_and_changed_inputs_become_placeholders(tmp_path: Path) -> None:
    for i in range(4):
        save_rgb(tmp_path / "in" / f"{i}.png", i)
    out = extract(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "1.png").unlink()
    save_rgb(tmp_path / "in" / "2.png", 77)
    text = Tags(Path(write_report(out)).read_text()).text
    assert "missing: no such file" in text and "changed: the file is not the one that was listed" in text
    assert "--features cls,patch_mean,patches" in text and "feature map" not in text.replace("feature maps", "")


def test_all_quarantined(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(7):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"")
    text = Tags(Path(write_report(extract(tmp_path / "in", tmp_path / "out"))).read_text()).text
    assert "7" in text and "all were quarantined" in text and "and 2 more" in text and "0 bytes: copy" in text


def test_layers_float16_one_row_and_plates(tmp_path: Path) -> None:
    for well in ("A01", "B02"):
        for site in (1, 2):
            save = tmp_path / "in" / f"BR001_{well}_s{site}.png"
            save_rgb(save, site)
    rows = "image,Metadata_Plate,Metadata_Well,Metadata_Site\n" + "".join(
        f"{p},P 1/x,{p.name[6:9]},{p.name[-5]}\n" for p in sorted((tmp_path / "in").iterdir()))
    (tmp_path / "list.csv").write_text(rows.replace("image,", "uri,"))
    out = extract(tmp_path / "list.csv", tmp_path / "out", features=ALL, layers=(3, 11), vector_dtype="float16")
    page = Path(write_report(out)).read_text()
    text = Tags(page).text
    assert "cls_l11" in text and "dense_array_l11" in text and "layers 3, 11" in text and "Well A01" in text
    assert "feature map" in page
    single = extract(tmp_path / "in" / "BR001_A01_s1.png", tmp_path / "single", features=("patches",))
    assert "has no vectors" in Tags(Path(write_report(single)).read_text()).text
    single = extract(tmp_path / "in" / "BR001_A01_s1.png", tmp_path / "single2")
    assert "At least three images" in Tags(Path(write_report(single)).read_text()).text


# ---------------------------------------------------------------- pictures, maps, neighbours


def test_same_picture_same_colours(run_out: str) -> None:
    run = open_for_report(run_out)
    cards = {card.item_id: card for card in build_gallery(run, read_sample(run)).cards}
    first, second, other = (pixels_of(cards[name].rows[0].map) for name in ("a/rgb0.png", "z_same.png", "a/rgb1.png"))
    assert np.abs(first - second).max() <= 2
    assert np.abs(first - other).mean() > 5
    assert len(cards["multi0.tif"].rows) == 5 and cards["multi0.tif"].composite
    assert cards["wide.png"].rows[0].tiles == 9
    assert pixels_of(cards["wide.png"].rows[0].map).shape == pixels_of(cards["wide.png"].rows[0].image).shape


def test_equal_pictures_are_nearest(run_out: str) -> None:
    run = open_for_report(run_out)
    sample = read_sample(run)
    names = [item.item_id for item in sample.items]
    found = {names[one.query]: [(names[i], s) for i, s in one.found]
             for one in nearest(item_vectors(sample), queries=100, count=5)}
    assert list(found) == names and all(query not in dict(others) for query, others in found.items())
    for query, twin in (("a/rgb0.png", "z_same.png"), ("z_same.png", "a/rgb0.png")):
        assert found[query][0] == (twin, pytest.approx(1, abs=1e-4))
    assert {name[:5] for name, _ in found["multi0.tif"]} == {"multi"} and len(found["multi0.tif"]) == 2
    rows = build_gallery(run, sample).neighbours
    assert len(rows) == 8 and [[thumb.item_id for thumb in row[1:]] for row in rows] == [
        [name for name, _ in found[row[0].item_id]] for row in rows]


def test_similarity_is_the_mean_cosine_of_centred_channels() -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 3, 8)).astype(np.float32)
    centred = vectors - vectors.mean(axis=0)
    expected = np.mean([np.dot(centred[4, c], centred[7, c]) / np.linalg.norm(centred[4, c])
                        / np.linalg.norm(centred[7, c]) for c in range(3)])
    unit = unit_vectors(vectors)
    assert unit[4] @ unit[7] == pytest.approx(expected, abs=1e-5)
    found = nearest([ItemVectors(np.arange(20), vectors)], queries=3, count=5)
    assert [one.query for one in found] == [0, 10, 19]
    every = unit @ unit.T
    np.fill_diagonal(every, -2)
    assert [i for i, _ in found[1].found] == list(np.argsort(-every[10])[:5])


def test_basis_is_deterministic_and_survives_few_tokens() -> None:
    tokens = np.random.default_rng(1).normal(size=(500, 16)).astype(np.float32) * np.arange(1, 17, dtype=np.float32)
    basis = basis_of(tokens, num_grids=1)
    largest = np.abs(basis.components).argmax(axis=1)
    assert (basis.components[np.arange(3), largest] > 0).all()
    np.testing.assert_array_equal(basis.components, basis_of(tokens.copy(), num_grids=1).components)
    shares = basis.colour(basis.project(tokens))
    assert 0.01 < (shares == 0).mean() < 0.03 and 0.01 < (shares == 1).mean() < 0.03  # 2nd and 98th percentile
    for few in (tokens[:1], tokens[:2], np.zeros((9, 16), np.float32)):
        colours = basis_of(few, num_grids=1).colour(basis_of(few, num_grids=1).project(few))
        assert np.isfinite(colours).all()


def test_map_places_tiles_in_the_frame() -> None:
    tokens = np.random.default_rng(2).normal(size=(300, 4)).astype(np.float32)
    basis = basis_of(tokens, num_grids=1)
    low, high = np.full((2, 2, 4), -9, np.float32), np.full((2, 2, 4), 9, np.float32)
    boxes = np.array([[0, 0, 32, 32], [32, 32, 64, 64]])
    drawn = draw_map(basis, iter([low, high]), boxes, frame=(64, 70), size=(64, 70))
    np.testing.assert_allclose(drawn[:32, :32], np.broadcast_to(basis.colour(basis.project(low[0, 0])), (32, 32, 3)))
    np.testing.assert_allclose(drawn[40, 40], basis.colour(basis.project(high[0, 0])))
    assert (drawn[:32, 32:] == 0.5).all() and (drawn[:, 64:] == 0.5).all()
    both = draw_map(basis, iter([low, high]), boxes[[0, 0]], frame=(32, 32), size=(16, 16))
    middle = basis.colour((basis.project(low[0, 0]) + basis.project(high[0, 0])) / 2)
    np.testing.assert_allclose(both, np.broadcast_to(middle, (16, 16, 3)), atol=1e-6)


def test_thumbnail_is_scaled_as_the_model_saw_it(run_out: str, tmp_path: Path) -> None:
    run = open_for_report(run_out)
    sample = read_sample(run)
    wanted = [item for item in sample.items if item.item_id.startswith(("gray0", "multi0", "wide"))]
    gray, multi, wide = planned_items(run, wanted)
    pixels = tifffile.imread(gray.files[0].uri).astype(np.float32)
    picture = read_picture(gray, run.settings, {".": {"gray": (1000.0, 30000.0)}}, side=288)
    expected = np.clip((pixels - 1000) / 29000, 0, 1) * 255
    assert np.abs(picture.channels["gray"][..., 0] - expected).max() <= 0.51
    no_scaling = read_picture(gray, run.settings, {}, side=288)
    assert not no_scaling.channels and no_scaling.problem.startswith("no_scaling: ")
    assert max(read_picture(wide, run.settings, {}, side=288).channels["rgb"].shape) == 288
    together = read_picture(multi, {**run.settings, "scaling": "dtype"}, None, side=64)
    assert together.composite is None
    draw_composites([together])
    assert together.composite is not None and together.composite.shape == (64, 64, 3)


def test_bright_background_stays_out_of_composites(run_out: str) -> None:
    run = open_for_report(run_out)
    item = planned_items(run, [i for i in read_sample(run).items if i.item_id == "multi0.tif"])[0]
    picture = read_picture(item, {**run.settings, "scaling": "dtype"}, None, side=64)
    for name in picture.channels:
        picture.channels[name] = picture.channels[name] // 8
    picture.channels["2"] = np.full_like(picture.channels["2"], 160)
    draw_composites([picture])
    assert picture.coloured == ("0", "1", "3", "4")


# ---------------------------------------------------------------- the sample


def test_sample_of_a_large_run_is_bounded(run_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_for_report(run_out)
    whole = read_sample(run)
    assert whole.complete and whole.table.num_rows == run.tally.rows == len(whole.vectors)
    assert [i.item_id for i in whole.items] == list(dict.fromkeys(whole.table["item_id"].to_pylist()))
    part = read_sample(run, max_rows=12, max_units=2)
    assert not part.complete and part.num_units == 2 and part.table.num_rows <= 12
    assert [p.number for p in (run.parts[0], run.parts[-1])] == sorted({i.part.number for i in part.items})
    for item in part.items:  # whole items, with their own vectors
        twin = next(i for i in whole.items if i.item_id == item.item_id)
        if twin.stop - twin.start <= 6:
            np.testing.assert_array_equal(part.vectors[item.start:item.stop], whole.vectors[twin.start:twin.stop])
    monkeypatch.setattr("dinoray.report.html.read_sample", lambda run: part)
    text = " ".join(Tags(render(run)).text.split())
    assert f"a sample of {part.table.num_rows} rows from 2 units" in text
    assert f"Raw pixels of a sample of {part.table.num_rows} rows" in text


def test_columns_and_positions() -> None:
    assert pick_vector(["patch_mean", "cls"]) == "cls"
    assert pick_vector(["patch_mean_l03", "cls_l03", "cls_l11"]) == "cls_l11"
    assert pick_vector(["patch_mean"]) == "patch_mean" and pick_vector(["p01"]) is None
    assert pick_dense(["dense_array_l03", "dense_array_l11", "dense_index_l11"]) == "dense_array_l11"
    assert pick_dense(["cls"]) is None
    assert evenly(3, 5) == [0, 1, 2] and evenly(10, 3)[0::2] == [0, 9] and evenly(0, 3) == [] and evenly(9, 1) == [0]
    assert len(evenly(1_000_000, 64)) == 64


# ---------------------------------------------------------------- the verdict


def totals_of(*receipts: Receipt) -> StageTotals:
    """Sums over receipts."""
    totals = StageTotals()
    for receipt in receipts:
        totals.add(receipt)
    return totals


def receipt_of(**seconds: float) -> Receipt:
    """A receipt of a unit of 100 images with these stage seconds."""
    return Receipt(unit="u", number=0, fingerprint="f", items=100, seconds=seconds, worker={"host": "h", "pid": 1})


DECODE_BOUND = {"wall": 10, "wait_decode": 8, "wait_compute": 0.5, "write": 0.5, "read": 2, "decode": 25, "prepare": 5,
                "compute": 1.5}
COMPUTE_BOUND = {"wall": 10, "wait_decode": 0.3, "wait_compute": 9, "write": 0.5, "read": 1, "decode": 9, "prepare": 2,
                 "compute": 9.5}
WRITE_BOUND = {"wall": 6, "wait_decode": 0.2, "wait_compute": 0.8, "wait_write": 0.5, "write": 3, "compute": 1,
               "read": 1}


def test_decode_bound() -> None:
    said = verdict(totals_of(receipt_of(**DECODE_BOUND)), {"decode_threads": 4}, device="cuda")
    assert said.limit == DECODE and said.sentence.startswith("Decoding limits") and "80%" in said.sentence
    threads = int(re.search(r"--decode-threads (\d+)", said.change).group(1))
    assert threads == 20  # 32 s of work must fit into the 2 s that the rest takes, and a fifth to spare
    on_cpu = verdict(totals_of(receipt_of(**DECODE_BOUND)), {"decode_threads": 4}, device="cpu")
    assert "--workers" in on_cpu.change
    reading = verdict(totals_of(receipt_of(**{**DECODE_BOUND, "read": 40})), {"decode_threads": None}, device="cpu")
    assert reading.sentence.startswith("Reading limits") and "--decode-threads" in reading.change


def test_compute_bound() -> None:
    totals = totals_of(receipt_of(**COMPUTE_BOUND))
    assert verdict(totals, {}, device="cpu").limit == COMPUTE
    assert "--device cuda" in verdict(totals, {}, device="cpu").change
    assert "bfloat16" in verdict(totals, {"precision": "float32"}, device="cuda").change
    assert "--workers" in verdict(totals, {"precision": "bfloat16"}, device="cuda").change
    close = verdict(totals_of(receipt_of(wall=10, wait_decode=4.2, wait_compute=4.8)), {}, device="cuda")
    assert close.limit == COMPUTE and "nearly balanced" in close.sentence


def test_write_bound_and_loop_bound() -> None:
    receipt = receipt_of(**WRITE_BOUND)
    said = verdict(totals_of(receipt, receipt), {"vector_dtype": "float32"}, device="cuda")
    assert said.limit == WRITE and "--vector-dtype float16" in said.change
    dense = replace(receipt, objects=[StoredObject("dense/part-u.zarr/c", 900, ""),
                                      StoredObject("features/part-u.parquet", 100, "")])
    assert "90%" in verdict(totals_of(dense), {"dense_dtype": "float16"}, device="cuda").change
    assert "--dense-dtype float16" in verdict(totals_of(dense), {"dense_dtype": "float32"}, device="cuda").change
    loop = receipt_of(wall=10, wait_decode=1, wait_compute=1, write=1)
    assert verdict(totals_of(loop), {}, device="cuda").limit == LOOP


def test_short_runs_get_no_verdict_and_shares_add_up() -> None:
    assert verdict(totals_of(receipt_of(wall=0.2, wait_decode=0.2)), {}, device="cpu").limit is None
    assert verdict(totals_of(), {}, device="cpu").limit is None
    for seconds in (DECODE_BOUND, COMPUTE_BOUND, WRITE_BOUND, {"wall": 1, "wait_decode": 2, "write": 1}):
        parts = totals_of(receipt_of(**seconds)).loop_parts()
        assert sum(parts.values()) == pytest.approx(1) and min(parts.values()) >= -1e-9


def test_throughput_range() -> None:
    one = totals_of(receipt_of(wall=6, write=3))
    assert one.rate() == pytest.approx((100 / 6, 100 / 6))  # a single unit: nothing overlaps
    # storing (3 s) hides the loop (1 s) of the next unit, which then waits 2 s for its turn: 3 s per unit
    many = totals_of(*(receipt_of(wall=6, write=3) for _ in range(100)))
    least, most = many.rate()
    assert least == pytest.approx(100 / 6) and most == pytest.approx(100 / 3, rel=0.02)
    assert totals_of(receipt_of()).rate() is None


def test_numbers_for_people() -> None:
    assert [plots.number(v) for v in (0, 0.0123, 3.14159, 0.5, 1234.5, 65535, 1e-7)] == [
        "0", "0.0123", "3.14", "0.5", "1,234", "65,535", "1e-07"]
    assert [plots.size(v) for v in (0, 999, 1500, 999_700, 2.5e9, 3e13)] == [
        "0 bytes", "999 bytes", "1.5 kB", "1 MB", "2.5 GB", "30 TB"]
    assert [plots.duration(v) for v in (0.05, 12.34, 250, 12_000)] == ["50 ms", "12.3 s", "4 min 10 s", "3 h 20 min"]
    assert str(plots.ticks("a <b> `--x <y>` c")) == "a &lt;b&gt; <code>--x &lt;y&gt;</code> c"
    assert plots.histogram(np.array([np.nan])).note == "no values"
    assert plots.histogram(np.array([3.0, 3.0])).median == "3"
    assert plots.histogram(np.logspace(-3, 3, 50)).note == "log"
