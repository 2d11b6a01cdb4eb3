"""Instances out of distance maps: touching, concave, tiny, flat; and what the wrong target would cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import watershed

from dinoray.errors import BadRequest
from dinoray.vision.instances import EIGHT, instances
from dinoray.vision.targets import distance_map
from tests.vision.labels import disc, four_cells, label_images, same_partition


def overlap(found: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    """Best IoU of each true object."""
    best = {}
    for i in np.unique(truth[truth > 0]):
        mask = truth == i
        best[int(i)] = max(((mask & (found == j)).sum() / (mask | (found == j)).sum() for j in np.unique(found[mask]) if j),
                           default=0.0)
    return best


@pytest.mark.parametrize("markers", ["components", "hmaxima"])
def test_four_cells_three_touching(markers: str) -> None:
    truth = four_cells()
    assert ndimage.label(truth > 0, EIGHT)[1] == 2, "three of the four touch"
    found = instances(distance_map(truth), markers=markers)
    assert found.max() == 4
    assert min(overlap(found, truth).values()) > 0.8, "of a cell of 16 px radius the default `fill` leaves out the outermost ring"
    whole = instances(distance_map(truth), markers=markers, fill=0.0)
    assert min(overlap(whole, truth).values()) > 0.9


def test_a_merged_foreground_map_loses_one_of_four() -> None:
    """The seed's target (one transform of the whole foreground, divided by the image's maximum), perfectly predicted."""
    truth = four_cells()
    merged = ndimage.distance_transform_edt(truth > 0)
    assert instances((merged / merged.max()).astype(np.float32)).max() == 3


def ring(thickness: int) -> np.ndarray:
    return (disc((64, 64), 32, 32, 25) & ~disc((64, 64), 32, 32, 25 - thickness)).astype(np.int32)


def letter_c() -> np.ndarray:
    labels = ring(9)
    labels[24:40, 32:] = 0
    return labels


@pytest.mark.parametrize("truth", [ring(5), ring(12), letter_c()], ids=["thin ring", "thick ring", "C"])
@pytest.mark.parametrize("settings_", [{}, {"markers": "hmaxima", "h": 0.35}], ids=["components", "hmaxima"])
def test_concave_cells_keep_their_marker(truth: np.ndarray, settings_: dict) -> None:
    y, x = (int(c) for c in ndimage.center_of_mass(truth))
    assert truth[y, x] == 0, "its centroid lies outside: a marker there would lose the cell"
    found = instances(distance_map(truth), fill=0.0, **settings_)
    assert same_partition(found, truth)


def test_a_cell_within_a_ring() -> None:
    truth = ring(8)
    truth[disc(truth.shape, 32, 32, 6)] = 2
    assert same_partition(instances(distance_map(truth), fill=0.0), truth)


@settings(deadline=None, max_examples=150)
@given(labels=label_images(), peak=st.floats(0, 0.99), fill=st.floats(0, 0.99), dtype=st.sampled_from([np.float16, np.float32]),
       noise=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_what_always_holds(labels, peak, fill, dtype, noise, seed) -> None:
    peak, fill = max(peak, fill), min(peak, fill)
    noisy = distance_map(labels) + noise * np.random.default_rng(seed).standard_normal(labels.shape)
    distance = np.clip(noisy, 0, 1).astype(dtype)
    found = instances(distance, peak=peak, fill=fill)
    assert found.dtype == np.int32
    assert set(np.unique(found)) == set(range(found.max(initial=0) + 1)) - ({0} if found.all() else set()), "no gap in the ids"
    markers, count = ndimage.label(distance.astype(np.float32) > peak, EIGHT)
    assert found.max(initial=0) == count, "one instance for each marker"
    pieces, _ = ndimage.label(distance.astype(np.float32) > fill, EIGHT)
    marked = np.isin(pieces, pieces[markers > 0]) & (pieces > 0)
    np.testing.assert_array_equal(found > 0, marked)
    np.testing.assert_array_equal(found[markers > 0], markers[markers > 0])
    np.testing.assert_array_equal(found, instances(distance.copy(order="F"), peak=peak, fill=fill))
    for i in range(1, count + 1):
        assert ndimage.label(found == i, EIGHT)[1] == 1, "every instance is one piece"


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2 ** 32 - 1))
def test_without_ties_it_is_the_plain_watershed(seed: int) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((40, 40)), 2)
    distance = ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)
    if len(np.unique(distance)) < distance.size:
        return
    markers = ndimage.label(distance > 0.6, EIGHT)[0]
    expected = watershed(-distance, markers, mask=distance > 0.2, connectivity=2)
    np.testing.assert_array_equal(instances(distance, peak=0.6, fill=0.2), expected)


def test_a_plateau_is_shared() -> None:
    distance = np.full((3, 21), 0.3, np.float32)
    distance[:, 0] = distance[:, 20] = 0.9
    found = instances(distance)
    assert abs(int((found == 1).sum()) - int((found == 2).sum())) <= 3
    assert (np.diff(found, axis=1) >= 0).all(), "one border between them"


def test_flat_maps() -> None:
    for markers in ("components", "hmaxima"):
        assert (instances(np.ones((5, 6), np.float32), markers=markers) == 1).all()
        assert not instances(np.zeros((5, 6), np.float32), markers=markers).any()
        assert instances(np.zeros((0, 6), np.float32), markers=markers).shape == (0, 6)


def test_hmaxima_parts_what_a_ridge_joins_and_keeps_what_noise_parts() -> None:
    truth = np.zeros((7, 40), np.int32)
    truth[2:5, 2:5], truth[2:5, 5:8] = 1, 2  # 3 px cells: their sides stand at 0.5, above the peak threshold
    distance = distance_map(truth)
    assert instances(distance).max() == 1
    assert same_partition(instances(distance, markers="hmaxima", fill=0.0), truth)
    distance = np.zeros((5, 9), np.float32)
    distance[2] = [0, 0.2, 0.5, 0.46, 0.52, 0.3, 0, 0, 0]  # a dent of 0.04 below the peak threshold
    assert instances(distance).max() == 2
    assert instances(distance, markers="hmaxima", h=0.1).max() == 1
    assert instances(distance, markers="hmaxima", h=0.03).max() == 2


def test_what_has_no_marker_vanishes_and_small_ones_go() -> None:
    distance = np.zeros((9, 30), np.float32)
    distance[1:4, 1:4] = 0.3  # foreground without a peak
    distance[5:8, 5:8] = 0.8
    distance[2, 20] = 0.9
    distance[5:8, 24:28] = 0.7
    assert [np.count_nonzero(instances(distance) == i) for i in (1, 2, 3)] == [1, 9, 12]
    found = instances(distance, min_area=2)
    assert [np.count_nonzero(found == i) for i in (1, 2, 3)] == [9, 12, 0]


def test_many_objects() -> None:
    distance = np.zeros((2 * 265, 2 * 265), np.float32)
    distance[::2, ::2] = 1
    found = instances(distance)
    assert found.max() == 265 ** 2 == 70_225
    np.testing.assert_array_equal(found[::2, ::2].ravel(), np.arange(1, 265 ** 2 + 1))


@pytest.mark.parametrize(("distance", "settings_", "match"), [
    (np.full((3, 3), np.nan, np.float32), {}, "not finite"),
    (np.full((3, 3), np.inf, np.float16), {}, "not finite"),
    (np.zeros((3, 3), np.uint8), {}, "float array"),
    (np.zeros((1, 3, 3), np.float32), {}, "float array"),
    (np.zeros((3, 3), np.float32), {"peak": 0.05, "fill": 0.1}, "thresholds"),
    (np.zeros((3, 3), np.float32), {"peak": float("nan")}, "thresholds"),
    (np.zeros((3, 3), np.float32), {"markers": "centroids"}, "centroids"),
    (np.zeros((3, 3), np.float32), {"markers": "hmaxima", "h": 0.0}, "h=0"),
])
def test_refusals(distance, settings_, match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        instances(distance, **settings_)
