"""The table of cells against scikit-image's regionprops, one object after the other, and against hand values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import regionprops

from dinoray.errors import BadRequest
from dinoray.vision import outlines, shapes
from dinoray.vision.label_runs import runs
from dinoray.vision.outlines import convex_area
from dinoray.vision.shapes import cell_table
from tests.vision.labels import blobs, disc, label_images

SAME = {"area_px": "area", "equivalent_diameter_px": "equivalent_diameter_area", "major_axis_px": "axis_major_length",
        "minor_axis_px": "axis_minor_length", "extent": "extent", "solidity": "solidity", "eccentricity": "eccentricity"}


def edge_distances(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Least distance between pixels of each pair of objects, by a distance transform of each."""
    out = np.full((len(ids), len(ids)), np.inf)
    for i, a in enumerate(ids):
        away = ndimage.distance_transform_edt(labels != a)
        for j, b in enumerate(ids):
            if i != j:
                out[i, j] = away[labels == b].min()
    return out


def check(labels: np.ndarray, image: np.ndarray, distance: float = 4.0) -> None:
    """Every column against the slow way."""
    names = [f"c{i}" for i in range(len(image))]
    table = cell_table(labels, image, names, 0.5, distance)
    regions = regionprops(labels, intensity_image=np.moveaxis(image, 0, -1).astype(np.float64))
    assert table["object_id"].tolist() == [r.label for r in regions]
    assert {len(column) for column in table.values()} == {len(regions)}
    if not regions:
        return
    for column, name in SAME.items():
        np.testing.assert_allclose(table[column], [getattr(r, name) for r in regions], rtol=1e-9, atol=1e-6, err_msg=column)
    np.testing.assert_allclose(np.stack([table["centroid_y_px"], table["centroid_x_px"]], 1), [r.centroid for r in regions])
    assert np.stack([table[c] for c in ("y0", "x0", "y1", "x1")], 1).tolist() == [list(r.bbox) for r in regions]
    np.testing.assert_allclose(table["area_um2"], 0.25 * table["area_px"])
    np.testing.assert_allclose(table["perimeter_px"], [r.perimeter_crofton for r in regions])
    np.testing.assert_allclose(table["form_factor"], np.minimum(1, 4 * np.pi * table["area_px"] / table["perimeter_px"] ** 2))
    turned = np.array([r.orientation for r in regions]) - table["orientation"]
    slender = table["major_axis_px"] - table["minor_axis_px"] > 1e-6  # a round object points nowhere
    np.testing.assert_allclose(np.abs(np.sin(turned))[slender], 0, atol=1e-6)
    height, width = labels.shape
    for row, r in enumerate(regions):
        assert table["touches_border"][row] == (r.bbox[0] == 0 or r.bbox[1] == 0 or r.bbox[2] == height or r.bbox[3] == width)
    distances = edge_distances(labels, table["object_id"])
    assert table["neighbours_touching"].tolist() == (distances < 1.5).sum(1).tolist()
    assert table["neighbours_within"].tolist() == (distances <= distance).sum(1).tolist()
    centroids = np.array([r.centroid for r in regions])
    apart = np.linalg.norm(centroids[:, None] - centroids[None], axis=2) + np.diag([np.inf] * len(regions))
    np.testing.assert_allclose(table["nearest_neighbour_px"], apart.min(1) if len(regions) > 1 else [np.nan])
    for i, name in enumerate(names):
        for statistic, value in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max), ("integrated", np.sum)):
            expected = [value(image[i][labels == r.label].astype(np.float64)) for r in regions]
            np.testing.assert_allclose(table[f"intensity_{statistic}_{name}"], expected, rtol=1e-9, atol=1e-6)


@settings(deadline=None, max_examples=80)
@given(labels=label_images(22, 6), seed=st.integers(0, 2 ** 32 - 1), dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
       distance=st.sampled_from([0.0, 1.0, 1.5, 3.3, 10.0, 40.0]), factor=st.sampled_from([1, 1000]))
def test_equals_regionprops(labels, seed, dtype, distance, factor) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (2, *labels.shape)).astype(dtype)
    check(labels * factor, image, distance)


def test_more_rows_than_a_band_and_more_objects_than_a_part(monkeypatch) -> None:
    monkeypatch.setattr(shapes, "_ROWS", 7)
    monkeypatch.setattr(outlines, "_ROWS", 5)
    monkeypatch.setattr(outlines, "_HULL_ROWS", 20)
    labels = blobs(3, (60, 50), 40, (2, 9))
    check(labels, np.random.default_rng(0).integers(0, 65536, (1, 60, 50), dtype=np.uint16))


def test_a_heart_has_a_hull() -> None:
    """Two convex arcs that meet in a notch: the notch is filled step by step."""
    labels = (disc((120, 160), 40, 50, 35) | disc((120, 160), 40, 110, 35) | disc((120, 160), 70, 80, 40)).astype(np.int32)
    labels[90:, 70:75] = 0
    for turned in (labels, np.ascontiguousarray(labels.T), labels[::-1].copy()):
        assert convex_area(runs(turned)).tolist() == [regionprops(turned)[0].area_convex]


def test_hand_values() -> None:
    labels = np.zeros((20, 30), np.uint16)
    labels[2:6, 3:9] = 40_000  # 4 x 6
    labels[10, 10] = 7
    labels[6, 9] = 9  # touches the corner of the first
    image = np.zeros((1, 20, 30), np.uint16)
    image[0, 2:6, 3:9] = np.arange(24).reshape(4, 6) + 65_000
    table = cell_table(labels, image, ["DNA"])
    assert table["object_id"].tolist() == [7, 9, 40_000]
    place = ("centroid_y_px", "centroid_x_px", "y0", "x0", "y1", "x1", "area_px")
    assert [table[column][2] for column in place] == [3.5, 5.5, 2, 3, 6, 9, 24]
    assert table["major_axis_px"][2] == pytest.approx(4 * math.sqrt((6 ** 2 - 1) / 12))
    assert table["minor_axis_px"][2] == pytest.approx(4 * math.sqrt((4 ** 2 - 1) / 12))
    assert abs(table["orientation"][2]) == pytest.approx(math.pi / 2), "its long axis runs along the columns"
    assert (table["solidity"][2], table["extent"][2], table["touches_border"][2]) == (1, 1, False)
    assert table["intensity_integrated_DNA"][2] == 24 * 65_000 + 276, "far above uint16"
    assert (table["intensity_min_DNA"][2], table["intensity_max_DNA"][2]) == (65_000, 65_023)
    assert table["intensity_std_DNA"][2] == pytest.approx(math.sqrt((24 ** 2 - 1) / 12))
    assert (table["area_px"][0], table["solidity"][0], table["eccentricity"][0], table["form_factor"][0]) == (1, 1, 0, 1)
    assert table["neighbours_touching"].tolist() == [0, 1, 1]
    assert table["neighbours_within"].tolist() == [2, 2, 2], "(10, 10) is 5.4 px from (5, 8)"
    assert cell_table(labels, neighbour_distance_px=4.5)["neighbours_within"].tolist() == [1, 2, 1], "and 4.1 px from (6, 9)"
    assert np.isnan(table["area_um2"]).all()


def test_a_disc_is_round() -> None:
    table = cell_table(disc((201, 201), 100, 100, 80).astype(np.uint8))
    assert table["form_factor"][0] == pytest.approx(1, abs=0.02)
    assert table["perimeter_px"][0] == pytest.approx(2 * math.pi * 80, rel=0.01)
    assert table["major_axis_px"][0] == pytest.approx(160, rel=0.01)
    assert table["eccentricity"][0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("shape", [(0, 0), (5, 0), (4, 6)])
def test_no_object(shape) -> None:
    table = cell_table(np.zeros(shape, np.int32), np.zeros((1, *shape)), ["a"])
    assert {len(column) for column in table.values()} == {0}
    assert table["object_id"].dtype == table["area_px"].dtype == np.int64
    assert table["touches_border"].dtype == bool


def test_one_object_fills_the_image() -> None:
    table = cell_table(np.full((300, 7), 3, np.int64))
    assert (table["area_px"][0], table["solidity"][0], table["extent"][0], table["touches_border"][0]) == (2100, 1, 1, True)
    assert np.isnan(table["nearest_neighbour_px"][0])


def test_seventy_thousand_objects() -> None:
    side = 265
    labels = np.zeros((4 * side, 4 * side), np.int32)
    labels[::4, ::4] = labels[1::4, ::4] = np.arange(1, side ** 2 + 1).reshape(side, side)
    table = cell_table(labels, np.full((1, *labels.shape), 65_535, np.uint16), ["a"], neighbour_distance_px=4)
    assert table["object_id"].tolist() == list(range(1, side ** 2 + 1))
    assert (table["area_px"] == 2).all()
    assert (table["intensity_integrated_a"] == 2 * 65_535).all()
    inner = ~table["touches_border"] & (table["y1"] < 4 * side - 3) & (table["x1"] < 4 * side - 3)
    assert (table["neighbours_within"][inner] == 4).all(), "two beside at 4 px, above and below at 3 px"
    assert (table["nearest_neighbour_px"] == 4).all()


LABELS = np.ones((4, 5), np.int32)


@pytest.mark.parametrize(("arguments", "match"), [
    ((LABELS.astype(np.float32),), "integer"),
    ((LABELS, np.zeros((4, 5)), ["a"]), "intensities"),
    ((LABELS, np.zeros((1, 5, 4)), ["a"]), "intensities"),
    ((LABELS, np.zeros((2, 4, 5)), ["a"]), "channels"),
    ((LABELS, np.zeros((2, 4, 5)), ["a", "a"]), "channels"),
    ((LABELS, None, (), 0.0), "pixel_size_um"),
    ((LABELS, None, (), None, -1.0), "neighbour"),
])
def test_refusals(arguments, match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        cell_table(*arguments)
