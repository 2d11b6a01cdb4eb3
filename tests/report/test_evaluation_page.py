"""The page of an evaluation: self-contained, escaped, with the worst images drawn as they are."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinoray.evaluation import evaluate_cells
from dinoray.io.label_pairs import LabelPair, list_predictions, list_truth, pair_up
from dinoray.report.curves import Series, counts_scatter, curves
from dinoray.report.evaluation_page import render_evaluation
from dinoray.report.mask_pictures import FOUND, INVENTED, MISSED, SIDE, classified, outlined
from dinoray.report.outlines import BOTH, PRED, TRUTH, display_size, resized_labels

HOSTILE = "<script>alert(1)</script>&\"'"


def page_of(pairs: list[LabelPair], **options) -> str:
    found = evaluate_cells(pairs, resamples=20, **options)
    return render_evaluation(found.scores, found.summary, found.groups, found.settings, found.notes,
                             {pair.image_id: pair for pair in pairs})


@pytest.fixture
def pairs(tmp_path: Path) -> list[LabelPair]:
    """Nine images: image i has 9 true squares of which i are predicted; images lie beside their labels."""
    rng = np.random.default_rng(0)
    for place in ("pred", "truth"):
        (tmp_path / place).mkdir()
    for i in range(10):
        truth = np.zeros((40, 50), np.uint16)
        for k in range(9):
            truth[12 * (k // 3) + 2:12 * (k // 3) + 9, 12 * (k % 3) + 2:12 * (k % 3) + 9] = k + 1
        tifffile.imwrite(tmp_path / f"truth/i{i}_masks.tif", truth)
        tifffile.imwrite(tmp_path / f"truth/i{i}.tif", (truth * 300 + rng.integers(0, 99, truth.shape)).astype(np.uint16))
        tifffile.imwrite(tmp_path / f"pred/i{i}.tif", np.where(truth <= i, truth, 0).astype(np.int32))
    return pair_up(list_predictions(str(tmp_path / "pred")), list_truth(str(tmp_path / "truth")))[0]


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in found]


def test_the_worst_images_come_first(pairs: list[LabelPair]) -> None:
    page = page_of(pairs)
    worst = page.split('id="worst"')[1]
    assert re.findall(r'<b class="name">(i\d)</b>', worst) == [f"i{i}" for i in range(6)]
    assert "AP 0.222 · 9 true, 2 predicted: 2 found, 0 invented, 7 missed · 50 × 40 px" in worst
    assert len(pictures(page)) == 12
    outlines, objects = pictures(page)[4:6]  # of i2: two objects found, seven missed
    assert outlines.shape == objects.shape == (440, 550, 3)
    green, orange = ((np.abs(objects.astype(int) - (0.75 * np.array(c) + 60)).max(axis=-1) < 70).mean() for c in (FOUND, MISSED))
    assert 0.03 < green < 0.08 and 0.13 < orange < 0.25


def test_it_is_self_contained_and_names_are_escaped(pairs: list[LabelPair]) -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[tuple[str, dict[str, str | None]]] = []

        def handle_starttag(self, tag, attributes):
            self.found.append((tag, dict(attributes)))

    renamed = [LabelPair(f"{HOSTILE}{pair.image_id}", pair.truth, pair.pred, pair.image) for pair in pairs]
    page = page_of(renamed, groups={f"{HOSTILE}{pair.image_id}": HOSTILE for pair in pairs}, settings={"pred": HOSTILE})
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    tags = Tags()
    tags.feed(page)
    for tag, attributes in tags.found:
        assert tag != "script" and not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,"))
    assert page == page_of(renamed, groups={f"{HOSTILE}{pair.image_id}": HOSTILE for pair in pairs}, settings={"pred": HOSTILE})


def test_what_cannot_be_shown_is_said(pairs: list[LabelPair]) -> None:
    found = evaluate_cells([LabelPair("nothing", pairs[0].truth, None, pairs[0].image), *pairs[1:3]], resamples=0)
    Path(pairs[1].pred.files[0].uri).unlink()
    Path(pairs[2].image.files[0].uri).write_bytes(b"II*\0")
    page = render_evaluation(found.scores, found.summary, found.groups, found.settings, found.notes,
                             {pair.image_id: pair for pair in found.pairs})
    assert "1 image without a prediction, scored as empty: nothing" in page and "<b>no prediction</b>" in page
    assert "no such file" in page and "the image cannot be shown" in page
    assert "No intervals were asked for." in page


def test_a_perfect_set_has_no_worst_image(pairs: list[LabelPair]) -> None:
    page = page_of(pairs[9:])
    assert "Every image has an AP of 1 at IoU 0.5." in page and not pictures(page)


def test_outlines_and_objects_have_their_colours() -> None:
    truth, pred = np.zeros((9, 20), int), np.zeros((9, 20), int)
    truth[1:8, 1:8], pred[1:8, 1:8] = 5, 9  # the same
    truth[2:7, 10:15] = 6  # missed
    pred[2:7, 16:19] = 4  # invented
    black = np.zeros((9, 20, 3), np.uint8)
    lines = outlined(black, pred, truth)
    assert tuple(lines[1, 4]) == BOTH and tuple(lines[2, 12]) == TRUTH and tuple(lines[2, 17]) == PRED
    assert not lines[4, 4].any() and not lines[4, 12].any()
    objects = classified(black, pred, truth, pred, truth)
    for (y, x), colour in {(4, 4): FOUND, (4, 12): MISSED, (4, 17): INVENTED}.items():
        assert tuple(objects[y, x]) == tuple(int(0.75 * c) for c in colour), colour
    assert not objects[0, 0].any()


def test_sizes() -> None:
    sizes = {(256, 256): (512, 512), (1024, 2048): (280, 560), (600, 300): (560, 280)}
    assert {size: display_size(*size, SIDE) for size in sizes} == sizes
    labels = np.arange(6).reshape(2, 3)
    assert np.array_equal(resized_labels(labels, 4, 6), np.kron(labels, np.ones((2, 2), int)))
    assert np.array_equal(resized_labels(np.kron(labels, np.ones((5, 5), int)), 2, 3), labels)


def test_curves_and_scatter() -> None:
    drawn = curves([Series("a", 0, (0.5, 0.7, 0.9), (1.0, float("nan"), 0.0))], x_label="IoU <b>", y_label="AP")
    points = re.search(r'points="([^"]*)"', drawn)[1].split()
    assert len(points) == 2 and float(points[0].split(",")[1]) < float(points[1].split(",")[1]) and "nan" not in drawn
    assert "&lt;b&gt;" in drawn
    linear = counts_scatter([1, 20, 40], [0, 20, 45], ["x", "<i>", "z"], x_label="t", y_label="p")
    assert linear.count("<circle") == 3 and "&lt;i&gt;: 20 true, 20 predicted" in linear
    wide = counts_scatter([1, 2, 90_000], [1, 2, 70_000], list("abc"), x_label="t", y_label="p")
    assert "10,000" in wide and counts_scatter([0], [0], ["a"], x_label="t", y_label="p").count("<circle") == 1
    assert counts_scatter(range(9000), range(9000), ["n"] * 9000, x_label="t", y_label="p").count("<circle") == 3000
