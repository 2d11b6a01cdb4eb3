"""Summaries and their intervals: by hand, against plain resampling, and whether 95 % are 95 %."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dinoray.errors import BadRequest
from dinoray.vision import bootstrap as module
from dinoray.vision.bootstrap import bootstrap, paired_bootstrap, summarise
from dinoray.vision.instance_metrics import ImageScore
from dinoray.vision.score_summary import MEAN_AP, Counts, evaluate, image_mean


def score(name: str, truth: int, pred: int, tp: int, *, jaccard: float = 0.0, splits: int = 0, missed: int = 0,
          spurious: int = 0) -> ImageScore:
    """A score with the same matches at 0.5 and 0.75, of IoU 0.8."""
    return ImageScore(name, truth, pred, jaccard, splits, missed, spurious, (0.5, 0.75), (tp, tp), (0.8 * tp, 0.8 * tp))


def many(seed: int, n: int, quality: float = 0.7) -> list[ImageScore]:
    """Images of 0 to 60 objects, each found with probability `quality`."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        truth, pred = rng.integers(0, 60), rng.integers(0, 60)
        tp = rng.binomial(min(truth, pred), quality)
        found.append(score(f"i{i}", int(truth), int(pred), int(tp), jaccard=0.8 * tp, missed=int(truth - tp),
                           spurious=int(pred - tp)))
    return found


SMALL = [score("one", 1, 1, 1, jaccard=0.8), score("many", 9, 11, 5, jaccard=4.0, splits=1, missed=3, spurious=5),
         score("none", 0, 0, 0), score("invented", 0, 4, 0, spurious=4)]
NAMES = ["SEG", "DET", "OP_CSB", "AP@0.5", "F1@0.5", "precision@0.5", "recall@0.5", "SQ@0.5", "PQ@0.5"]


def test_image_mean_and_pooled_by_hand() -> None:
    found = summarise(SMALL, NAMES)
    assert (found.images, found.truth, found.pred) == (4, 10, 16)
    means = {name: estimates["image_mean"].value for name, estimates in found.metrics.items()}
    pooled = {name: estimates["pooled"].value for name, estimates in found.metrics.items()}
    det = [1, 1 - (5 + 30 + 5) / 90, 1, 0]
    assert means == pytest.approx({
        "SEG": (0.8 + 4 / 9) / 2, "DET": sum(det) / 4, "OP_CSB": ((0.8 + det[0]) / 2 + (4 / 9 + det[1]) / 2) / 2,
        "AP@0.5": (1 + 5 / 15 + 1 + 0) / 4, "F1@0.5": (1 + 10 / 20 + 1 + 0) / 4, "precision@0.5": (1 + 5 / 11 + 1 + 0) / 4,
        "recall@0.5": (1 + 5 / 9 + 1 + 0) / 4, "SQ@0.5": 0.8, "PQ@0.5": (0.8 + 2 * 4 / 20 + 1 + 0) / 4})
    assert pooled == pytest.approx({
        "SEG": 4.8 / 10, "DET": 1 - (5 + 30 + 9) / 100, "OP_CSB": (0.48 + 0.56) / 2, "AP@0.5": 6 / 20, "F1@0.5": 12 / 26,
        "precision@0.5": 6 / 16, "recall@0.5": 6 / 10, "SQ@0.5": 0.8, "PQ@0.5": 2 * 4.8 / 26})
    assert {name: e["image_mean"].images for name, e in found.metrics.items() if e["image_mean"].images < 4} == {
        "SEG": 2, "OP_CSB": 2, "SQ@0.5": 2}
    assert np.isnan(found.metrics["SEG"]["pooled"].low), "no draws were asked for"


def test_intervals_equal_plain_resampling(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = many(0, 23)
    rng = np.random.default_rng(5)
    draws = rng.integers(23, size=(400, 23))
    pooled, means = [], []
    for draw in draws:
        chosen = Counts.of([scores[i] for i in draw])
        pooled.append([float(evaluate(chosen.total(), name)) for name in NAMES])
        means.append([image_mean(evaluate(chosen, name)) for name in NAMES])
    found = summarise(scores, NAMES, resamples=400, seed=5)
    for i, name in enumerate(NAMES):
        for pooling, values in (("pooled", pooled), ("image_mean", means)):
            low, high = np.percentile([row[i] for row in values], (2.5, 97.5))
            estimate = found.metrics[name][pooling]
            assert (estimate.low, estimate.high) == pytest.approx((low, high)), (name, pooling)
    assert bootstrap(scores, "SEG", "pooled", n=400, seed=5) == found.metrics["SEG"]["pooled"]
    assert bootstrap(scores, "SEG", n=400, seed=6) != found.metrics["SEG"]["image_mean"]
    whole = found.metrics["SEG"]["image_mean"]
    monkeypatch.setattr(module, "_DRAWS_AT_ONCE", 23 * 64)  # memory bounded by blocks of draws: 7 here
    blocks = bootstrap(scores, "SEG", n=400, seed=5)
    assert blocks.value == whole.value and (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high))


def test_95_percent_are_about_95_percent() -> None:
    """Of 200 samples from a known population, the interval holds the population's value in about 95 of 100."""
    population = many(1, 4000)
    truth = {p: summarise(population, ["AP@0.5"]).metrics["AP@0.5"][p].value for p in ("pooled", "image_mean")}
    rng, held = np.random.default_rng(2), {"pooled": 0, "image_mean": 0}
    for i in range(200):
        sample = [population[k] for k in rng.choice(4000, 60, replace=False)]
        found = summarise(sample, ["AP@0.5"], resamples=400, seed=i).metrics["AP@0.5"]
        for pooling in held:
            held[pooling] += found[pooling].low <= truth[pooling] <= found[pooling].high
    assert all(176 <= count <= 199 for count in held.values()), held


def test_pairs_tell_what_images_alone_do_not() -> None:
    """One model finds one more object in each image: certain in pairs, invisible between two wide intervals."""
    rng = np.random.default_rng(3)
    a = [score(f"i{i}", 20, 20, int(tp)) for i, tp in enumerate(rng.integers(2, 18, 40))]
    b = [replace(one, tp=(one.tp[0] + 1,) * 2) for one in a]
    for pooling in ("image_mean", "pooled"):
        difference = paired_bootstrap(b, list(reversed(a)), "recall@0.5", pooling)
        assert (difference.value, difference.low, difference.high) == pytest.approx((0.05, 0.05, 0.05))
        alone = [bootstrap(scores, "recall@0.5", pooling) for scores in (a, b)]
        assert alone[0].high > alone[1].low
    same = paired_bootstrap(a, a, MEAN_AP.replace("0.5:0.95", "0.75"))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_pairs_leave_out_what_one_of_them_lacks() -> None:
    """SQ needs a match: images where only one model has one would compare unlike sets."""
    a = [score("x", 4, 4, 2), score("y", 4, 4, 0), score("z", 4, 4, 4)]
    b = [replace(score("x", 4, 4, 2), iou=(1.0, 1.0)), score("y", 4, 4, 3), score("z", 4, 4, 4)]
    difference = paired_bootstrap(a, b, "SQ@0.5")
    assert difference.images == 2 and difference.value == pytest.approx((0.8 - 0.5 + 0) / 2)


def test_what_is_refused() -> None:
    with pytest.raises(BadRequest, match="no image was scored"):
        summarise([])
    with pytest.raises(BadRequest, match="an unknown metric 'mAP'"):
        bootstrap(SMALL, "mAP")
    with pytest.raises(BadRequest, match="the IoU threshold 0.6 was not scored"):
        bootstrap(SMALL, "AP@0.6")
    with pytest.raises(BadRequest, match="pooling 'mean'"):
        bootstrap(SMALL, "SEG", "mean")
    with pytest.raises(BadRequest, match="different IoU thresholds"):
        summarise([SMALL[0], replace(SMALL[1], thresholds=(0.5,), tp=(1,), iou=(0.8,))])
    with pytest.raises(BadRequest, match="only one of them scored 'none'"):
        paired_bootstrap(SMALL, SMALL[:2] + SMALL[3:], "SEG")
    with pytest.raises(BadRequest, match="scored twice"):
        paired_bootstrap(SMALL[:1] * 2, SMALL[:1] * 2, "SEG")


def test_one_image_has_no_interval() -> None:
    found = bootstrap(SMALL[:1], "SEG", n=100)
    assert found.value == 0.8 and np.isnan(found.low) and np.isnan(found.high)
    nothing = bootstrap(SMALL[2:], "SEG", n=100)
    assert np.isnan(nothing.value) and np.isnan(nothing.low) and nothing.images == 0
