"""Instance metrics by hand, at the edges, and by properties. (Against other implementations: test_instance_metrics_oracles.)"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from dinoray.errors import BadRequest
from dinoray.vision.instance_metrics import THRESHOLDS, ImageScore, match, overlaps, score_image
from dinoray.vision.score_summary import MEAN_AP, Counts, default_metrics, evaluate


def value(score: ImageScore, metric: str) -> float:
    return float(evaluate(Counts.of([score]), metric)[0])


def boxes(shape: tuple[int, int], **objects: tuple[int, int, int, int]) -> np.ndarray:
    """A label image: _ID=(y0, y1, x0, x1), drawn in order."""
    labels = np.zeros(shape, np.int32)
    for name, (y0, y1, x0, x1) in objects.items():
        labels[y0:y1, x0:x1] = int(name[1:])
    return labels


MERGED = (boxes((6, 10), _7=(0, 2, 0, 10), _9=(3, 5, 0, 3), _11=(5, 6, 8, 10)),  # 20, 6 and 2 px
          boxes((6, 10), _1=(0, 2, 0, 5), _2=(0, 2, 5, 10), _3=(3, 5, 0, 4)))  # 10, 10 and 8 px
"""Object 7 is exactly the union of 1 and 2 (IoU 10/20 each), 9 is three quarters of 3 (IoU 6/8), 11 is nothing."""


def test_merged_objects_by_hand() -> None:
    score = score_image(*MERGED)
    assert (score.truth, score.pred, score.splits, score.missed, score.spurious) == (3, 3, 1, 0, 1)
    assert score.jaccard == 0.5 + 0.5 + 0.75
    assert value(score, "SEG") == pytest.approx(1.75 / 3)
    assert value(score, "DET") == pytest.approx(1 - (5 * 1 + 1 * 1) / (10 * 3))
    assert value(score, "OP_CSB") == pytest.approx((1.75 / 3 + 0.8) / 2)
    # at 0.5: 7 with one of its halves, and 9 with 3: TP 2, FP 1, FN 1
    assert value(score, "AP@0.5") == 2 / 4
    assert value(score, "precision@0.5") == value(score, "recall@0.5") == value(score, "F1@0.5") == 2 / 3
    assert value(score, "SQ@0.5") == (0.5 + 0.75) / 2
    assert value(score, "PQ@0.5") == pytest.approx((0.5 + 0.75) / (2 + 0.5 + 0.5))
    # from 0.55 to 0.75: 9 with 3 alone; then nothing
    assert score.tp == (2, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    assert value(score, "AP@0.75") == 1 / 5
    assert value(score, MEAN_AP) == pytest.approx((2 / 4 + 5 * 1 / 5) / 10)
    assert np.isnan(value(score, "SQ@0.8")) and value(score, "PQ@0.8") == 0


def test_a_divided_object_by_hand() -> None:
    """Two halves: neither covers more than half, so the object is missed and both are spurious: worse than no detection."""
    score = score_image(boxes((4, 8), _1=(0, 2, 0, 4), _2=(0, 2, 4, 8)), boxes((4, 8), _5=(0, 2, 0, 8)))
    assert (score.splits, score.missed, score.spurious, score.jaccard) == (0, 1, 2, 0)
    assert value(score, "DET") == 0 and value(score, "SEG") == 0
    assert score.tp[:2] == (1, 0) and value(score, "AP@0.5") == 1 / 2


def test_an_iou_at_the_threshold_counts() -> None:
    """3 of 5 pixels: 0.5 + 2 * 0.05 in floating point would be above it."""
    score = score_image(boxes((1, 6), _1=(0, 1, 0, 3)), boxes((1, 6), _1=(0, 1, 0, 5)))
    assert score.tp == (1, 1, 1, 0, 0, 0, 0, 0, 0, 0)
    assert value(score, "SEG") == 0.6


def test_one_prediction_over_everything_by_hand() -> None:
    truth = np.zeros((9, 9), np.uint8)
    truth[1::3, 1::3] = np.arange(1, 10).reshape(3, 3)
    score = score_image(np.ones((9, 9), np.uint16), truth)
    assert (score.truth, score.pred, score.splits, score.missed, score.spurious) == (9, 1, 8, 0, 0)
    assert value(score, "DET") == pytest.approx(1 - 40 / 90)
    assert value(score, "SEG") == pytest.approx(1 / 81)
    assert value(score, "AP@0.5") == 0


def test_below_half_the_most_pairs_are_matched() -> None:
    """The pair of largest IoU (A, P: 6/12) would leave B and Q alone; A with Q and B with P are two."""
    truth = np.array([[1] * 8 + [2] * 4 + [0] * 4])
    pred = np.array([[4] * 2 + [3] * 8 + [0] * 6])
    table = overlaps(pred, truth)
    ious = {(int(table.truth_ids[t]), int(table.pred_ids[p])): iou
            for t, p, iou in zip(table.truth, table.pred, table.iou, strict=True)}
    assert ious == {(1, 3): 6 / 10, (1, 4): 2 / 8, (2, 3): 2 / 10}
    pairs = {(int(table.truth_ids[table.truth[k]]), int(table.pred_ids[table.pred[k]])) for k in match(table, 0.15)}
    assert pairs == {(1, 4), (2, 3)}
    assert [len(match(table, t)) for t in (0.15, 0.21, 0.5)] == [2, 1, 1]
    assert score_image(pred, truth, thresholds=(0.15, 0.21, 0.5)).iou == pytest.approx((0.25 + 0.2, 0.6, 0.6))


@pytest.mark.parametrize(("truth", "pred", "ap", "det"), [(0, 0, 1, 1), (0, 2, 0, 0), (2, 0, 0, 0)])
def test_empty_images(truth: int, pred: int, ap: float, det: float) -> None:
    def image(objects: int) -> np.ndarray:
        labels = np.zeros((5, 5), np.uint8)
        labels[0, :objects] = np.arange(1, objects + 1)
        return labels

    score = score_image(image(pred), image(truth))
    assert (score.truth, score.pred) == (truth, pred)
    for name in ("AP", "F1", "precision", "recall", "PQ"):
        assert value(score, f"{name}@0.5") == ap, name
    assert value(score, "DET") == det
    seg = value(score, "SEG")
    assert np.isnan(seg) if truth == 0 else seg == 0
    assert np.isnan(value(score, "OP_CSB")) == (truth == 0) and np.isnan(value(score, "SQ@0.5"))


def test_images_without_background_or_pixels() -> None:
    whole = np.full((3, 3), 9, np.int64)
    assert value(score_image(whole, whole), "PQ@0.95") == 1
    assert value(score_image(np.zeros((0, 4), int), np.zeros((0, 4), int)), "AP@0.5") == 1
    one_pixel = np.zeros((3, 3), int)
    one_pixel[1, 1] = 2**62
    assert value(score_image(one_pixel, whole), "SEG") == 0 and score_image(one_pixel, whole).spurious == 1


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint64"])
def test_many_objects_do_not_overflow(dtype: str) -> None:
    """65,025 objects of uint16 (their pairs need 32 bits), 70,225 of the others; half of them are shrunk to 4 of 9 px."""
    side = 255 if dtype == "uint16" else 265
    truth = np.kron(np.arange(1, side * side + 1).reshape(side, side), np.ones((3, 3), int))
    pred = truth.astype(dtype)
    shrunk = truth % 2 == 1
    shrunk[0::3], shrunk[:, 0::3] = False, False  # of each odd object the lower right 4 px are taken out ...
    pred[shrunk] = 0  # ... which leaves 5 of 9
    score = score_image(pred, truth)
    odd = (side * side + 1) // 2
    assert (score.truth, score.pred, score.splits, score.missed, score.spurious) == (side**2, side**2, 0, 0, 0)
    assert score.tp == (side**2, side**2, *[side**2 - odd] * 8)
    assert score.jaccard == pytest.approx(side**2 - odd + odd * 5 / 9)


def test_what_is_refused() -> None:
    labels = np.ones((4, 4), int)
    with pytest.raises(BadRequest, match="predicted labels are float32"):
        score_image(labels.astype(np.float32), labels)
    with pytest.raises(BadRequest, match="true labels are bool"):
        score_image(labels, labels > 0)
    with pytest.raises(BadRequest, match="true labels reach down to -1"):
        score_image(labels, -labels)
    with pytest.raises(BadRequest, match="4 x 4 px, the true ones 4 x 5 px"):
        score_image(labels, np.ones((4, 5), int))
    for thresholds in ((), (0.0, 0.5), (0.5, 1.5), (0.75, 0.5), (0.5, 0.5)):
        with pytest.raises(BadRequest, match="IoU thresholds"):
            score_image(labels, labels, thresholds=thresholds)


label_images = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.integers(0, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[3]).integers(0, drawn[2] + 1, size=drawn[:2]))


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    """(pred, truth) of one shape: pixels drawn apart, or one with a few pixels of the other changed."""
    truth = draw(label_images)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    changed = rng.random(truth.shape) < draw(st.sampled_from([0.05, 0.3, 1.0]))
    return np.where(changed, rng.integers(0, draw(st.integers(1, 6)) + 1, truth.shape), truth), truth


METRICS = default_metrics((0.3, 0.5, 0.75))
ALL = tuple(sorted({0.1, 0.3, *THRESHOLDS}))


@given(label_images)
def test_an_image_against_itself_is_perfect(labels: np.ndarray) -> None:
    score = score_image(labels, labels, thresholds=ALL)
    for metric in METRICS:
        if score.truth or metric.split("@")[0] not in ("SEG", "OP_CSB", "SQ"):
            assert value(score, metric) == 1, metric


@given(pairs(), st.randoms(use_true_random=False))
def test_names_of_objects_do_not_matter(pair: tuple[np.ndarray, np.ndarray], random) -> None:
    def renamed(labels: np.ndarray, dtype: str, highest: int) -> np.ndarray:
        ids = np.unique(labels[labels > 0])
        names = dict(zip(ids.tolist(), random.sample(range(1, highest), len(ids)), strict=True)) | {0: 0}
        return np.array([names[v] for v in labels.ravel().tolist()], dtype).reshape(labels.shape)

    pred, truth = pair
    score = score_image(pred, truth, thresholds=ALL)
    other = score_image(renamed(pred, "uint64", 2**63), renamed(truth, "int32", 200), thresholds=ALL)
    # which half is taken at exactly 0.5, and the order of summation, may differ: not the counts
    assert other.tp == score.tp and (other.splits, other.missed, other.spurious) == (score.splits, score.missed, score.spurious)
    assert other.iou == pytest.approx(score.iou) and other.jaccard == pytest.approx(score.jaccard)


@given(pairs())
def test_matches_are_symmetric_and_fall_with_the_threshold(pair: tuple[np.ndarray, np.ndarray]) -> None:
    pred, truth = pair
    score, turned = score_image(pred, truth, thresholds=ALL), score_image(truth, pred, thresholds=ALL)
    assert score.tp == turned.tp and score.iou == pytest.approx(turned.iou)
    assert list(score.tp) == sorted(score.tp, reverse=True)
    assert value(score, "recall@0.5") == value(turned, "precision@0.5")


@settings(max_examples=200)
@given(pairs())
def test_everything_as_the_definitions_say_it(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Object by object on full masks, with dense assignment: slow and plain."""
    pred, truth = pair
    a, b = ([labels == i for i in np.unique(labels) if i] for labels in (truth, pred))
    iou = np.array([[(t & p).sum() / (t | p).sum() for p in b] for t in a]).reshape(len(a), len(b))
    most = np.array([[(t & p).sum() > 0.5 * t.sum() for p in b] for t in a], dtype=bool).reshape(len(a), len(b))
    score = score_image(pred, truth, thresholds=ALL)
    assert score.jaccard == pytest.approx(iou[most].sum())
    assert score.missed == (~most.any(axis=1)).sum() and score.spurious == (~most.any(axis=0)).sum()
    assert score.splits == sum(max(0, k - 1) for k in most.sum(axis=0))
    for threshold, tp, total in zip(ALL, score.tp, score.iou, strict=True):
        good = iou >= threshold
        rows, columns = linear_sum_assignment(good * (1 + iou / (1 + min(iou.shape, default=0))), maximize=True)
        taken = good[rows, columns]
        assert tp == taken.sum() and total == pytest.approx(iou[rows, columns][taken].sum()), threshold
