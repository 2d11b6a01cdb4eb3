"""The page of a segmentation: outlines over the very cells, lost images, plates, hostile names, what there is of a run."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoray.errors import OutputDamaged
from dinoray.io.decoded import Limits
from dinoray.report import overlays
from dinoray.report.html import render, write_report
from dinoray.report.outlines import boundaries, resized_labels
from dinoray.report.overlays import WINDOW, choose, densest_window, draw_overlays
from dinoray.report.plates import read_plates
from dinoray.report.run import open_for_report
from dinoray.report.segmented import border_shares, read_segmented
from dinoray.report.stages import CELLS, verdict
from tests.report.segmentations import lost, saved, write_segmented
from tests.report.test_report import HOSTILE, Tags
from tests.vision.labels import blobs, four_cells

EMPTY = np.zeros((40, 40), np.int32)
NAMED = f"{HOSTILE}.tif"


def pixels(uri: str) -> np.ndarray:
    """RGBA [h, w, 4] of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGBA"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images with files and without, hostile names, one without cells, two quarantined, scales of every source."""
    folder = tmp_path_factory.mktemp("segmented")
    found = [(saved(folder, f"a/im{i}.tif", blobs(i, (60, 80), 6 + i)), blobs(i, (60, 80), 6 + i)) for i in range(7)]
    found += [(saved(folder, NAMED, four_cells()), four_cells()), (saved(folder, "empty.tif", EMPTY), EMPTY),
              (lost("gone.tif"), blobs(3, (90, 90), 60)), (saved(folder, "replaced.tif", EMPTY), four_cells()),
              (lost("broken.tif"), "truncated"), (lost("odd.tif"), "scale")]
    scales = {"a/im1.tif": (0.25, "pixel_size"), "a/im2.tif": (3.0, "diameter"), "gone.tif": (1.0, "unknown")}
    write_segmented(folder / "out", found, scales=scales)
    return str(folder / "out")


def test_the_page_is_self_contained_and_says_what_was_found(out: str) -> None:
    page = Path(write_report(out)).read_text()
    assert write_report(out).endswith("report.html") and Path(out, "report.html").read_text() == page
    parsed = Tags(page)
    total = sum(len(np.unique(labels)) - 1 for labels in (*(blobs(i, (60, 80), 6 + i) for i in range(7)), blobs(3, (90, 90), 60)))
    assert f"{total + 8} cells in 11 images" in re.sub(r"\s+", " ", parsed.text)
    assert "script" not in {tag for tag, _ in parsed.tags} and NAMED in parsed.text
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/")
    assert not re.search(r"url\(|@import", page) and not re.search(r"\bnan\b|None(?! of this)", parsed.text)
    for said in ("estimated: 8 images", "from the pixel size", "image without cells", "The watershed limits this run", "truncated",
                 "2 of these images cannot be shown", "missing:", "the image has other sides than its mask", "dinoray.open_masks("):
        assert said in parsed.text, said


def test_outlines_lie_on_the_cells(out: str) -> None:
    run = open_for_report(out)
    drawn = {one.item_id: one for one in draw_overlays(run, read_segmented(run))}
    one = drawn[NAMED]
    seen, lines = pixels(one.image), pixels(one.outlines)
    labels = resized_labels(four_cells(), *lines.shape[:2])
    assert seen.shape == lines.shape and ((lines[..., 3] > 0) & (labels == 0)).sum() == 0
    assert (lines[..., 3] > 0)[boundaries(labels)].all()
    assert np.median(seen[labels > 0, 0]) > 120 > 40 > np.median(seen[labels == 0, 0])  # contrast as the model saw it
    colours = {tuple(np.unique(lines[(labels == i) & (lines[..., 3] > 0)], axis=0)[0]) for i in (1, 2, 3)}
    assert len(colours) == 3  # they touch
    assert drawn["gone.tif"].image == "" and pixels(drawn["gone.tif"].outlines)[..., 3].any() and drawn["gone.tif"].problem


def test_choice_has_the_extremes_and_is_spread(out: str) -> None:
    found = read_segmented(open_for_report(out))
    chosen = {found.images["item_id"][row].as_py(): why for row, why in choose(found).items()}
    assert chosen["empty.tif"] == "no cells" and "most cells" in chosen["gone.tif"]
    assert "enlarged least" in chosen["a/im1.tif"] and "enlarged most" in chosen["a/im2.tif"]
    assert len(chosen) <= overlays.SPREAD + 3 * overlays.EXTREMES


def test_of_a_large_image_the_window_with_most_cells_is_shown(tmp_path: Path) -> None:
    labels = np.zeros((1500, 2600), np.int32)
    labels[1200:1290, 2200:2290], labels[100:120, 100:120] = 1, 2
    y, x = densest_window(labels)
    assert y <= 1200 and y + WINDOW >= 1290 and x <= 2200 and x + WINDOW >= 2290
    assert densest_window(np.zeros((10, 5000), int)) == (0, 0) and densest_window(labels[:WINDOW, :WINDOW]) == (0, 0)
    write_segmented(tmp_path / "out", [(saved(tmp_path, "large.tif", labels), labels)], masks="zarr")
    run = open_for_report(str(tmp_path / "out"))
    (one,) = draw_overlays(run, read_segmented(run))
    assert "1,024 × 1,024 px from x" in one.part and pixels(one.outlines).shape == pixels(one.image).shape == (560, 560, 4)
    assert "OME-Zarr labels" in render(run)


@pytest.mark.parametrize("masks", ["tiff", "zarr"])
def test_above_the_limit_a_part_of_the_mask_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masks: str) -> None:
    labels = np.zeros((1100, 1300), np.int32)
    labels[500:600, 600:700], labels[:30, :30] = 1, 2
    write_segmented(tmp_path / "out", [(saved(tmp_path, "large.tif", labels), labels)], masks=masks)
    monkeypatch.setattr(overlays, "LIMITS", Limits(max_pixels=10**6, max_bytes=10**9, max_file_bytes=10**9))
    for name in ("read_mask", "load_item"):
        monkeypatch.setattr(overlays, name, lambda *_, **__: pytest.fail("something too large was decoded whole"))
    run = open_for_report(str(tmp_path / "out"))
    (one,) = draw_overlays(run, read_segmented(run))
    assert "too large" in one.problem and not one.image and "from x 138, y 38, its middle" in one.part
    seen = pixels(one.outlines)
    assert np.array_equal(seen[..., 3] > 0, (lambda shown: (shown == 1) & ~boundaries(shown))(
        resized_labels(labels[38:1062, 138:1162], 560, 560)))


def test_damage_is_told(tmp_path: Path) -> None:
    for damaged in ("masks", "images", "cells"):
        out = tmp_path / damaged
        write_segmented(out, [(lost("one.tif"), four_cells())])
        (file,) = (path for path in (out / damaged).rglob("*") if path.is_file())
        file.write_bytes(b"no table, no mask")
        with pytest.raises(OutputDamaged):
            write_report(str(out))


def test_wells_have_their_cells_and_their_cells_per_image(tmp_path: Path) -> None:
    def place(well: str, site: int) -> dict:
        return {"group": "P1", "plate": "P1",
                "metadata": {"Metadata_Plate": "P1", "Metadata_Well": well, "Metadata_Site": str(site)}}

    found = [(lost(f"{well}-{site}.tif", **place(well, site)), labels) for well, site, labels in (
        ("A01", 1, four_cells()), ("A01", 2, blobs(0, (40, 40), 3)), ("B07", 1, EMPTY), ("H12", 1, "scale"))]
    write_segmented(tmp_path / "out", found)
    run = open_for_report(str(tmp_path / "out"))
    run.parts = run.image_parts
    plates = read_plates(run)
    wells = plates.drawn[0].wells
    cells = 4 + len(np.unique(blobs(0, (40, 40), 3))) - 1
    assert (wells[0, 0].images, wells[0, 0].cells, wells[1, 6].cells, wells[7, 11].quarantined) == (2, cells, 0, 1)
    page = render(open_for_report(str(tmp_path / "out")))
    assert "cells per image" in page and f"A01: {cells / 2:g}" in page and ">rows<" not in page


def test_an_unfinished_run_and_one_without_images(tmp_path: Path) -> None:
    found = [(lost(f"i{n}.tif"), four_cells()) for n in range(4)]
    write_segmented(tmp_path / "half", found, undone=[1])
    assert "1 of 2 units are done" in Tags(render(open_for_report(str(tmp_path / "half")))).text.replace("  ", " ")
    write_segmented(tmp_path / "none", found, undone=[0, 1])
    text = Tags(render(open_for_report(str(tmp_path / "none")))).text
    assert "0 cells in 0 images" in text and "No image is segmented yet" in text and "No unit is done yet" in text
    write_segmented(tmp_path / "bad", [(lost("i.tif"), "truncated")])
    assert "all were quarantined" in render(open_for_report(str(tmp_path / "bad")))
    write_segmented(tmp_path / "empty", [(lost("i.tif"), EMPTY)])
    text = Tags(render(open_for_report(str(tmp_path / "empty")))).text
    assert "0 cells in 1 image" in text and "no cells" in text


def test_later_generations_are_counted_in(tmp_path: Path) -> None:
    write_segmented(tmp_path / "out", [(lost("a.tif"), four_cells()), (lost("b.tif"), "truncated")])
    write_segmented(tmp_path / "out", [(lost("c.tif"), four_cells())], generation="001-extend")
    run = open_for_report(str(tmp_path / "out"))
    found = read_segmented(run)
    assert found.images["item_id"].to_pylist() == ["a.tif", "c.tif"] and found.complete and found.cells.table.num_rows == 8
    assert [one.item_id for one in draw_overlays(run, found)] == ["a.tif", "c.tif"]


def test_border_shares_and_the_stage_that_limits(out: str) -> None:
    run = open_for_report(out)
    shares = {item_id: (count, share) for item_id, count, share in border_shares(read_segmented(run).cells)}
    assert shares[NAMED] == (4, 0.0)
    labels = blobs(4, (60, 80), 10)
    touching = {*np.unique(labels[[0, -1]]), *np.unique(labels[:, [0, -1]])} - {0}
    assert shares["a/im4.tif"][1] == pytest.approx(len(touching) / (len(np.unique(labels)) - 1))
    assert run.stages.loop_parts()[CELLS] == 0.5
    said = verdict(run.stages, run.job["job"], device="cpu")
    assert said.limit == CELLS and "--decode-threads" in said.change
