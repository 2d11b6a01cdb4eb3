"""Counts of images -> metrics: one formula each, applied to the counts of every image, or to their sums.

**Image-mean** is the mean of the metric over images: every image weighs the same. **Pooled** is the metric of the summed
counts: every object weighs the same (for SEG and DET that is how the Cell Tracking Challenge scores a sequence).

Empty images (t true, p predicted objects):

* t = p = 0: AP, F1, precision, recall, PQ and DET are 1: nothing was to be found, and nothing was.
* only one of them 0: the same metrics are 0. DET of an image with t = 0 < p is 0 by this rule (its formula divides by 0).
* SEG and OP_CSB need a true object, SQ needs a match: without one they are undefined (NaN), and the image takes no part in
  their image-mean. Pooled values do not need any of this unless all images are empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dinoray.errors import BadRequest
from dinoray.vision.instance_metrics import THRESHOLDS, ImageScore

SPLIT, MISSED, SPURIOUS = 5, 10, 1
"""Costs of DET: a predicted object to be split, a missed one, a spurious one (Cell Tracking Challenge)."""
MEAN_AP = "AP@0.5:0.95"
"""Mean of AP over the thresholds 0.5, 0.55, ..., 0.95."""
_FIXED = ("truth", "pred", "jaccard", "splits", "missed", "spurious")


@dataclass(frozen=True)
class Counts:
    """The counts of images, or sums of them: `sums` float64 [..., 6 + 2 * thresholds], exact up to 2^53."""

    thresholds: tuple[float, ...]
    sums: np.ndarray

    @classmethod
    def of(cls, scores: Sequence[ImageScore]) -> Counts:
        """One row per image. Raises BadRequest without images, and when their thresholds differ."""
        if not scores:
            raise BadRequest("no image was scored", todo="give at least one pair of label images")
        if len(kinds := {score.thresholds for score in scores}) != 1:
            raise BadRequest(f"images scored at different IoU thresholds: {sorted(kinds)}", todo="score all of them alike")
        rows = [[*(getattr(score, name) for name in _FIXED), *score.tp, *score.iou] for score in scores]
        return cls(scores[0].thresholds, np.array(rows, dtype=np.float64))

    def total(self) -> Counts:
        """The sum over images."""
        return Counts(self.thresholds, self.sums.sum(axis=0))

    def named(self, name: str) -> np.ndarray:
        """`truth`, `pred`, `jaccard`, `splits`, `missed` or `spurious` [...]."""
        return self.sums[..., _FIXED.index(name)]

    def at(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """(matched pairs [...], sum of their IoU [...]) at an IoU threshold. Raises BadRequest for one not scored."""
        place = min(range(len(self.thresholds)), key=lambda i: abs(self.thresholds[i] - threshold))
        if not abs(self.thresholds[place] - threshold) < 1e-9:
            raise BadRequest(f"the IoU threshold {threshold} was not scored", where="thresholds",
                             todo=f"scored were {', '.join(map(threshold_name, self.thresholds))}")
        start = len(_FIXED) + place
        return self.sums[..., start], self.sums[..., start + len(self.thresholds)]


def evaluate(counts: Counts, metric: str) -> np.ndarray:
    """A metric [...] of counts [...]: `SEG`, `DET`, `OP_CSB`, `AP@0.5:0.95`, or `AP`, `F1`, `precision`, `recall`, `SQ`
    (mean IoU of matched pairs), `PQ` (panoptic quality) with `@` and an IoU threshold. NaN where it is undefined.

    Raises BadRequest for another name.
    """
    name, _, at = metric.partition("@")
    if metric == MEAN_AP:
        return np.mean([_AT["AP"](counts, t) for t in THRESHOLDS], axis=0)
    try:
        return _AT[name](counts, float(at)) if at else _WHOLE[name](counts)
    except (KeyError, ValueError):
        known = ", ".join([*_WHOLE, MEAN_AP, *(f"{key}@0.5" for key in _AT)])
        raise BadRequest(f"an unknown metric {metric!r}", where="metric", todo=f"known: {known}") from None


def image_mean(values: np.ndarray) -> float:
    """The mean of a metric over the images [N] where it is defined; NaN when there is none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def threshold_name(threshold: float) -> str:
    """An IoU threshold as names of metrics have it: short, and never rounded to another number."""
    short = f"{threshold:g}"
    return short if float(short) == threshold else repr(float(threshold))


def default_metrics(thresholds: Sequence[float]) -> list[str]:
    """The metrics of a summary: those of each of `thresholds`, and those without one."""
    at = [f"{name}@{threshold_name(threshold)}" for threshold in thresholds for name in _AT]
    return ["SEG", "DET", "OP_CSB", MEAN_AP, *at]


def _divide(above: np.ndarray, below: np.ndarray, otherwise: np.ndarray | float) -> np.ndarray:
    """above / below, `otherwise` where below is 0."""
    return np.where(below > 0, above / np.where(below > 0, below, 1), otherwise)


def _nothing_wanted(counts: Counts) -> np.ndarray:
    """1 where there is neither a true nor a predicted object, else 0."""
    return (counts.named("truth") + counts.named("pred") == 0).astype(np.float64)


def _seg(counts: Counts) -> np.ndarray:
    return _divide(counts.named("jaccard"), counts.named("truth"), np.nan)


def _det(counts: Counts) -> np.ndarray:
    cost = SPLIT * counts.named("splits") + MISSED * counts.named("missed") + SPURIOUS * counts.named("spurious")
    from_scratch = MISSED * counts.named("truth")
    return _divide(from_scratch - np.minimum(cost, from_scratch), from_scratch, _nothing_wanted(counts))


def _op_csb(counts: Counts) -> np.ndarray:
    return (_seg(counts) + _det(counts)) / 2


def _of_objects(above: str, weight: float, below: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
                ) -> Callable[[Counts, float], np.ndarray]:
    """weight * (tp or iou) / below(tp, truth, pred), with the rule for empty images."""

    def value(counts: Counts, threshold: float) -> np.ndarray:
        tp, iou = counts.at(threshold)
        whole = below(tp, counts.named("truth"), counts.named("pred"))
        return _divide(weight * (iou if above == "iou" else tp), whole, _nothing_wanted(counts))

    return value


def _sq(counts: Counts, threshold: float) -> np.ndarray:
    tp, iou = counts.at(threshold)
    return _divide(iou, tp, np.nan)


_WHOLE = {"SEG": _seg, "DET": _det, "OP_CSB": _op_csb}
_AT: dict[str, Callable[[Counts, float], np.ndarray]] = {
    "AP": _of_objects("tp", 1, lambda tp, truth, pred: truth + pred - tp),
    "F1": _of_objects("tp", 2, lambda tp, truth, pred: truth + pred),
    "precision": _of_objects("tp", 1, lambda tp, truth, pred: pred),
    "recall": _of_objects("tp", 1, lambda tp, truth, pred: truth),
    "SQ": _sq,
    "PQ": _of_objects("iou", 2, lambda tp, truth, pred: truth + pred),
}
