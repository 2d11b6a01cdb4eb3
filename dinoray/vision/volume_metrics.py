"""Scores of volumes: per class IoU, Dice, precision and recall; of instances variation of information and adapted Rand error.

All are sums over a contingency table, so a volume that does not fit in memory is scored block by block and the tables are
added. Voxels without ground truth are left out by a mask.

Instances follow Arganda-Carreras et al. 2015 (SNEMI3D, CREMI): background of the truth (id 0) is not scored. Adapted Rand
error = 1 - F-score of the pairs of voxels; variation of information = H(pred | truth) + H(truth | pred) in bits, its parts called
split and merge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinoray.vision.instance_metrics import Overlaps, match


@dataclass(frozen=True)
class ClassScore:
    """Of one class. NaN where neither truth nor prediction has it."""

    name: str
    iou: float
    dice: float
    precision: float
    recall: float
    true_voxels: int
    predicted_voxels: int


def confusion(pred: np.ndarray, truth: np.ndarray, classes: int, known: np.ndarray | None = None) -> np.ndarray:
    """[classes, classes] int64: voxels by (truth, prediction). Raises ValueError for a class outside."""
    pred, truth = (a[known] if known is not None else a.ravel() for a in (pred, truth))
    for name, values in (("prediction", pred), ("truth", truth)):
        if values.size and not (int(values.min()) >= 0 and int(values.max()) < classes):
            raise ValueError(f"the {name} has classes {values.min()}..{values.max()}, not 0..{classes - 1}")
    table = np.bincount(truth.astype(np.int64) * classes + pred.astype(np.int64), minlength=classes**2)
    return table.reshape(classes, classes)


def class_scores(table: np.ndarray, names: list[str]) -> list[ClassScore]:
    """Scores of each class from a confusion table."""
    found = []
    for k, name in enumerate(names):
        both, true, predicted = int(table[k, k]), int(table[k].sum()), int(table[:, k].sum())
        found.append(ClassScore(name, _ratio(both, true + predicted - both), _ratio(2 * both, true + predicted),
                                _ratio(both, predicted), _ratio(both, true), true, predicted))
    return found


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


class Contingency:
    """Voxels by (id of the truth, id of the prediction), added up over blocks; ids are those of the whole volume."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], int] = {}

    def add(self, pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> Contingency:
        """A block; only `known` voxels count. Returns itself."""
        if known is not None:
            pred, truth = pred[known], truth[known]
        pairs, counts = np.unique(np.stack([truth.ravel().astype(np.int64), pred.ravel().astype(np.int64)]),
                                  axis=1, return_counts=True)
        for t, p, n in zip(*pairs.tolist(), counts.tolist(), strict=True):
            self._pairs[t, p] = self._pairs.get((t, p), 0) + n
        return self

    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(true id, predicted id, voxels) of each pair that occurs, background (0) included."""
        if not self._pairs:
            return (np.zeros(0, np.int64),) * 3
        keys = np.array(list(self._pairs), np.int64)
        return keys[:, 0], keys[:, 1], np.array(list(self._pairs.values()), np.int64)

    def overlaps(self) -> Overlaps:
        """The same as a table of overlapping objects, for matching by IoU."""
        truth, pred, counts = self.table()
        (truth_ids, truth_px), (pred_ids, pred_px) = (_sizes(ids, counts) for ids in (truth, pred))
        both = (truth != 0) & (pred != 0)
        return Overlaps(pred_ids, pred_px, truth_ids, truth_px, np.searchsorted(pred_ids, pred[both]),
                        np.searchsorted(truth_ids, truth[both]), counts[both])


@dataclass(frozen=True)
class InstanceScore:
    """`rand_error` 0..1 and its precision and recall; `vi_split`, `vi_merge` in bits. Low is good, but for the two."""

    rand_error: float
    rand_precision: float
    rand_recall: float
    vi_split: float
    vi_merge: float
    voxels: int

    @property
    def vi(self) -> float:
        """Variation of information, bits."""
        return self.vi_split + self.vi_merge


def instance_score(found: Contingency) -> InstanceScore:
    """Adapted Rand error and variation of information. NaN where the truth has no object.

    Predicted background counts as one segment more for each of its voxels: a voxel that nothing claims is an object of its own,
    as in SNEMI3D's script, so that predicting nothing is no way to score well.
    """
    true_ids, pred_ids, counts = found.table()
    scored = true_ids != 0
    true_ids, pred_ids, counts = true_ids[scored], pred_ids[scored], counts[scored]
    total = int(counts.sum())
    if not total:
        return InstanceScore(*(float("nan"),) * 5, 0)
    lone = pred_ids == 0
    n = float(total)
    joint, lonely = counts[~lone].astype(float), float(counts[lone].sum())
    per_true = _sums(true_ids, counts)
    per_pred = _sums(pred_ids[~lone], counts[~lone])
    pairs = (joint**2).sum() + lonely
    precision = pairs / ((per_pred**2).sum() + lonely)
    recall = pairs / (per_true**2).sum()
    # conditional entropies in bits: H(pred | truth) is how far true objects are split, H(truth | pred) how far they are merged
    h_joint = _entropy(joint, n) + lonely / n * np.log2(n)
    h_true, h_pred = _entropy(per_true, n), _entropy(per_pred, n) + lonely / n * np.log2(n)
    return InstanceScore(1 - 2 * precision * recall / (precision + recall), precision, recall, max(0.0, h_joint - h_true),
                         max(0.0, h_joint - h_pred), total)


def average_precision(found: Contingency, threshold: float = 0.5) -> float:
    """TP / (TP + FP + FN) of objects matched at an IoU of `threshold` or more; NaN without any object."""
    table = found.overlaps()
    matched = len(match(table, threshold))
    return _ratio(matched, len(table.truth_ids) + len(table.pred_ids) - matched)


def _sizes(ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids above 0, rising; their voxels)."""
    found, inverse = np.unique(ids, return_inverse=True)
    sums = np.zeros(len(found), np.int64)
    np.add.at(sums, inverse, counts)
    return found[found != 0], sums[found != 0]


def _sums(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.bincount(np.unique(ids, return_inverse=True)[1], weights=counts) if len(ids) else np.zeros(0)


def _entropy(counts: np.ndarray, total: float) -> float:
    """Of segments of so many voxels, as shares of `total`, bits."""
    p = counts[counts > 0] / total
    return float(-(p * np.log2(p)).sum())
