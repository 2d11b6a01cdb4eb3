"""Scores of volumes: by hand, against scikit-image, by blocks, and where there is nothing to score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import adapted_rand_error, variation_of_information

from dinoray.vision.instance_metrics import score_image
from dinoray.vision.volume_metrics import Contingency, average_precision, class_scores, confusion, instance_score


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
def test_instances_agree_with_scikit_image(seed: int, true: int, predicted: int) -> None:
    rng = np.random.default_rng(seed)
    truth, pred = rng.integers(0, true + 1, (4, 5, 6)), rng.integers(1, predicted + 1, (4, 5, 6))
    if not truth.any():
        return
    found = instance_score(Contingency().add(pred, truth))
    # scikit-image leaves out the pairs of a voxel with itself, CREMI's and SNEMI3D's scripts do not: far from it in a large volume
    table = np.zeros((true + 1, predicted + 1))
    np.add.at(table, (truth.ravel(), pred.ravel()), 1)
    joint, per_true, per_pred = (table[1:]**2).sum(), (table[1:].sum(1)**2).sum(), (table[1:].sum(0)**2).sum()
    assert found.rand_error == pytest.approx(1 - 2 * joint / (per_true + per_pred), abs=1e-9)
    assert (found.rand_precision, found.rand_recall) == pytest.approx((joint / per_pred, joint / per_true))
    large = np.kron(truth, np.ones((8, 8, 8), int)), np.kron(pred, np.ones((8, 8, 8), int))
    error, *_ = adapted_rand_error(*large, ignore_labels=(0,))
    assert instance_score(Contingency().add(large[1], large[0])).rand_error == pytest.approx(error, abs=1e-3)
    split, merge = variation_of_information(truth[truth > 0], pred[truth > 0])  # H(pred | truth), H(truth | pred)
    assert found.vi_split == pytest.approx(split, abs=1e-9) and found.vi_merge == pytest.approx(merge, abs=1e-9)


def test_splits_and_merges_are_told_apart() -> None:
    truth = np.repeat([[1], [2]], 8, axis=1)[None]
    halves = np.arange(16).reshape(1, 2, 8) // 4 + 1
    split, merge = instance_score(Contingency().add(halves, truth)), instance_score(Contingency().add(np.ones_like(truth), truth))
    assert (split.vi_split, split.vi_merge) == pytest.approx((1, 0)) and (merge.vi_split, merge.vi_merge) == pytest.approx((0, 1))
    assert split.rand_precision == 1 > split.rand_recall and merge.rand_recall == 1 > merge.rand_precision
    perfect = instance_score(Contingency().add(truth + 40, truth))
    assert perfect.rand_error == pytest.approx(0) and perfect.vi == pytest.approx(0)
    nothing = instance_score(Contingency().add(np.zeros_like(truth), truth))
    assert nothing.rand_error > 0.7 and nothing.vi_split == pytest.approx(3), "predicting nothing is no way to score well"


def test_blocks_add_up_and_masks_leave_out() -> None:
    rng = np.random.default_rng(1)
    truth, pred = rng.integers(0, 4, (8, 9, 10)), rng.integers(0, 5, (8, 9, 10))
    whole = instance_score(Contingency().add(pred, truth))
    blocks = Contingency()
    for z in range(0, 8, 3):
        blocks.add(pred[z:z + 3], truth[z:z + 3])
    assert instance_score(blocks) == whole
    known = rng.random(truth.shape) > 0.5
    spoiled = np.where(known, pred, 9)
    assert instance_score(Contingency().add(spoiled, truth, known)) == instance_score(Contingency().add(pred, truth, known))


def test_classes_by_hand() -> None:
    truth, pred = np.array([[[0, 0, 1, 1, 1, 2]]]), np.array([[[0, 1, 1, 1, 0, 1]]])
    table = confusion(pred, truth, 4)
    assert table.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    background, one, two, never = class_scores(table, ["background", "one", "two", "never"])
    assert (one.iou, one.dice, one.precision, one.recall) == pytest.approx((2 / 5, 4 / 7, 1 / 2, 2 / 3))
    assert (two.iou, two.recall, two.true_voxels, two.predicted_voxels) == (0, 0, 1, 0) and math.isnan(two.precision)
    assert math.isnan(never.iou) and math.isnan(never.dice), "a class that never occurs is no failure and no success"
    assert background.iou == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="0..2"):
        confusion(np.array([3]), np.array([0]), 3)


def test_nothing_to_score_is_nan() -> None:
    assert math.isnan(instance_score(Contingency().add(np.ones((2, 2, 2), int), np.zeros((2, 2, 2), int))).rand_error)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_average_precision_is_that_of_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, 5, (2, 3, 4)), np.ones((2, 2, 2), int))
    pred = np.where(rng.random(truth.shape) < 0.8, truth, rng.integers(0, 9, truth.shape))
    score = score_image(pred, truth, thresholds=(0.5,))
    wanted = score.tp[0] / max(1, score.truth + score.pred - score.tp[0])
    found = average_precision(Contingency().add(pred[:2], truth[:2]).add(pred[2:], truth[2:]))
    assert found == pytest.approx(wanted) or (math.isnan(found) and not score.truth + score.pred)
