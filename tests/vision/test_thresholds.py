"""The search over thresholds: the same as running `instances` for every pair, and the maps are read once."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dinoray.errors import BadRequest
from dinoray.vision.instances import instances
from dinoray.vision.targets import distance_map
from dinoray.vision.thresholds import FILLS, PEAKS, Candidate, counts_at_half, label_images, search
from tests.vision.labels import blobs, four_cells
from tests.vision.labels import label_images as images


def matches(pred: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, float]:
    """TP, FP, FN at IoU > 0.5 and the sum of SEG, object by object."""
    tp, jaccard = 0, 0.0
    for i in np.unique(truth[truth > 0]):
        mask = truth == i
        tp += any((mask & (pred == j)).sum() * 2 > (mask | (pred == j)).sum() for j in np.unique(pred[mask]) if j)
        jaccard += sum((mask & (pred == j)).sum() / (mask | (pred == j)).sum() for j in np.unique(pred[mask])
                       if j and 2 * (mask & (pred == j)).sum() > mask.sum())
    return tp, len(np.unique(pred[pred > 0])) - tp, len(np.unique(truth[truth > 0])) - tp, jaccard


def test_the_grid_of_the_seeds() -> None:
    assert PEAKS == (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
    assert FILLS == (0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.13, 0.14, 0.15)


@settings(deadline=None, max_examples=80)
@given(labels=images(20), seed=st.integers(0, 2 ** 32 - 1), noise=st.sampled_from([0.0, 0.1, 0.5]),
       smooth=st.sampled_from([0, 1.5]), dtype=st.sampled_from([np.float16, np.float32]),
       markers=st.sampled_from(["components", "hmaxima"]), min_area=st.integers(0, 6), levels=st.sampled_from([0, 4, 20]))
def test_one_flood_a_peak_equals_the_double_loop(labels, seed, noise, smooth, dtype, markers, min_area, levels) -> None:
    distance = distance_map(labels) + noise * np.random.default_rng(seed).standard_normal(labels.shape)
    distance = np.clip(ndimage.gaussian_filter(distance, smooth) if smooth else distance, 0, 1)
    if levels:  # a map of few levels is all plateaus and ties
        distance = np.round(distance * levels) / levels
    distance, peaks, fills = distance.astype(dtype), (0.4, 0.5, 0.8), (0.02, 0.1, 0.25, 0.4)
    seen = set()
    for i, j, found in label_images(distance, peaks, fills, markers=markers, min_area=min_area):
        expected = instances(distance, peak=peaks[i], fill=fills[j], markers=markers, min_area=min_area)
        np.testing.assert_array_equal(found, expected)
        seen.add((i, j))
    assert len(seen) == 12


@pytest.mark.parametrize("objective", ["image_mean", "pooled", "ap_seg"])
def test_search_equals_the_naive_search(objective: str) -> None:
    rng = np.random.default_rng(5)
    truths = [four_cells(), blobs(1, (60, 50), 12), np.zeros((20, 30), np.int32), blobs(2, (40, 40), 3)]
    maps = [np.clip(0.8 * distance_map(t) + 0.15 * ndimage.gaussian_filter(rng.standard_normal(t.shape), 1), 0, 1) for t in truths]
    peaks, fills = (0.3, 0.5, 0.7), (0.05, 0.15, 0.25)
    found = search(maps, truths, score=matches, peaks=peaks, fills=fills, objective=objective, threads=3)
    naive = []
    for peak in peaks:
        for fill in fills:
            counts = [matches(instances(m, peak=peak, fill=fill), t) for m, t in zip(maps, truths, strict=True)]
            tp, fp, fn = (sum(c[k] for c in counts) for k in range(3))
            each = [c[0] / sum(c[:3]) if sum(c[:3]) else 1.0 for c in counts]
            segs = [c[3] / (c[0] + c[2]) if c[0] + c[2] else float(c[1] == 0) for c in counts]
            ap, seg = float(np.mean(each)), float(np.mean(segs))
            naive.append(Candidate(peak, fill, ap, tp / (tp + fp + fn), tp, fp, fn, seg, (ap + seg) / 2))
    assert found.table == tuple(naive)
    assert all(matches(m.round().astype(int), t) == pytest.approx(counts_at_half(m.round().astype(int), t))
               for m, t in zip(maps, truths, strict=True))
    assert getattr(found.best, objective) == max(getattr(c, objective) for c in naive)
    assert len({c.tp for c in naive}) > 1, "the thresholds matter here"


def test_of_equal_candidates_the_first() -> None:
    truth = np.zeros((9, 9), np.int32)
    truth[4, 4] = 1
    assert search([distance_map(truth)], [truth], score=matches).best == Candidate(0.3, 0.05, 1.0, 1.0, 1, 0, 0, 1.0, 1.0)


class Counted:
    """A sequence that reads an image when asked, and counts how many readers are inside."""

    def __init__(self, arrays):
        self.arrays, self.asked, self.lock = arrays, [], threading.Lock()

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        with self.lock:
            self.asked.append(index)
        return self.arrays[index]


def test_maps_are_read_once() -> None:
    truths = [blobs(i, (20, 20), 3) for i in range(7)]
    maps = Counted([distance_map(t) for t in truths])
    search(maps, truths, score=matches, threads=2)
    assert sorted(maps.asked) == list(range(7))


MAP, TRUTH = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int32)


@pytest.mark.parametrize(("maps", "truths", "settings_", "match"), [
    ([], [], {}, "0 distance maps"),
    ([MAP], [TRUTH, TRUTH], {}, "1 distance maps for 2"),
    ([MAP], [TRUTH[:3]], {}, "image 0"),
    ([MAP], [TRUTH], {"peaks": []}, "0 peaks"),
    ([MAP], [TRUTH], {"objective": "f1"}, "f1"),
    ([MAP], [TRUTH], {"peaks": [0.1], "fills": [0.05, 0.2]}, "fill=0.2"),
    ([MAP + np.nan], [TRUTH], {}, "not finite"),
])
def test_refusals(maps, truths, settings_, match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        search(maps, truths, score=matches, **settings_)
