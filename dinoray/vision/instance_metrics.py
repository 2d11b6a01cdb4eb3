"""How well predicted instances agree with true ones: everything is derived from one sparse table of overlaps.

A label image holds integers, 0 for background; ids need not be contiguous, and those of the two images have nothing to do
with each other. Definitions and sources: docs/evaluation.md.

* SEG, DET: Cell Tracking Challenge (Maška et al. 2014, doi 10.1093/bioinformatics/btu080; Matula et al. 2015,
  doi 10.1371/journal.pone.0144959). A true object is detected by the predicted object that covers more than half of it.
* Matching at an IoU threshold (Caicedo et al. 2019, doi 10.1038/s41592-019-0612-7; Kirillov et al. 2019,
  arXiv 1801.00868): pairs one to one with IoU >= threshold, as StarDist and Cellpose count them.

Counts are int64 throughout: tables of 8 or 16 bits overflow at 256 or 65,536 objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from dinoray.errors import BadRequest

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""IoU thresholds of every score. Literals: 0.5 + 2 * 0.05 is above 0.6, and would miss an IoU of 3/5."""
_TABLE_PER_PIXEL = 4
"""Ids up to so many times the number of pixels are counted in a table; larger ones are sorted."""


@dataclass(frozen=True)
class Overlaps:
    """Which objects of two label images share pixels. Memory: objects + overlapping pairs, never their product."""

    pred_ids: np.ndarray
    """[P], rising."""
    pred_px: np.ndarray
    """int64 [P]: pixels of each predicted object."""
    truth_ids: np.ndarray
    """[T], rising."""
    truth_px: np.ndarray
    """int64 [T]."""
    pred: np.ndarray
    """int64 [K]: position in `pred_ids` of each overlapping pair."""
    truth: np.ndarray
    """int64 [K]: position in `truth_ids`."""
    shared_px: np.ndarray
    """int64 [K]: pixels that the pair shares, at least 1."""

    @property
    def iou(self) -> np.ndarray:
        """float64 [K]: intersection over union of each pair."""
        return self.shared_px / (self.pred_px[self.pred] + self.truth_px[self.truth] - self.shared_px)


@dataclass(frozen=True)
class ImageScore:
    """The counts of one image; all metrics are functions of these (dinoray.vision.score_summary)."""

    image_id: str
    truth: int
    """True objects."""
    pred: int
    """Predicted objects."""
    jaccard: float
    """SEG times `truth`: sum over true objects of the IoU with the object that covers more than half of each, else 0."""
    splits: int
    """DET: for every predicted object that covers most of k > 1 true objects, k - 1."""
    missed: int
    """DET: true objects of which no predicted object covers more than half."""
    spurious: int
    """DET: predicted objects that cover more than half of no true object."""
    thresholds: tuple[float, ...]
    """IoU thresholds, rising."""
    tp: tuple[int, ...]
    """Matched pairs at each threshold; FP = pred - tp, FN = truth - tp."""
    iou: tuple[float, ...]
    """Sum of the IoU of the matched pairs at each threshold."""


def score_image(pred: np.ndarray, truth: np.ndarray, *, image_id: str = "",
                thresholds: tuple[float, ...] = THRESHOLDS) -> ImageScore:
    """Score the label image `pred` [Y, X] (or [Z, Y, X]) against `truth` of the same shape, any integer dtypes.

    Either may be empty. Raises BadRequest for floats, bools, negative values, different shapes, and thresholds that are
    not rising within (0, 1].
    """
    check_iou_thresholds(thresholds)
    table = overlaps(pred, truth)
    iou = table.iou
    most = 2 * table.shared_px > table.truth_px[table.truth]  # at most one pair of each true object
    covered = np.bincount(table.pred[most], minlength=len(table.pred_ids))
    matches = [match(table, threshold) for threshold in thresholds]
    return ImageScore(
        image_id, len(table.truth_ids), len(table.pred_ids), jaccard=float(iou[most].sum()),
        splits=int((covered[covered > 1] - 1).sum()), missed=len(table.truth_ids) - int(most.sum()),
        spurious=int((covered == 0).sum()), thresholds=tuple(map(float, thresholds)),
        tp=tuple(len(pairs) for pairs in matches), iou=tuple(float(iou[pairs].sum()) for pairs in matches))


def overlaps(pred: np.ndarray, truth: np.ndarray) -> Overlaps:
    """The table of overlaps of two label images of one shape. Raises BadRequest as `score_image`."""
    if pred.shape != truth.shape:
        raise BadRequest(f"the predicted labels are {_size(pred)}, the true ones {_size(truth)}",
                         todo="compare masks of one image, at the same resolution")
    pred_ids, pred_px, pred_at = _compact(pred, "predicted")
    truth_ids, truth_px, truth_at = _compact(truth, "true")
    both = (pred_at > 0) & (truth_at > 0)
    rows, columns = truth_at[both] - 1, pred_at[both] - 1
    shape = (max(1, len(truth_ids)), max(1, len(pred_ids)))
    # coo -> csr adds what stands at the same place, in linear time
    shared = csr_array(coo_array((np.ones(len(rows), np.int64), (rows, columns)), shape)).tocoo()
    truth_index, pred_index = (index.astype(np.int64) for index in shared.coords)
    return Overlaps(pred_ids, pred_px, truth_ids, truth_px, pred_index, truth_index, shared.data)


def match(table: Overlaps, threshold: float) -> np.ndarray:
    """The pairs (positions in the table, int64 [TP]) that are matched one to one with IoU >= `threshold`.

    From 0.5 on a pair has no rival: two disjoint objects cannot both have an IoU above 0.5 with a third; at exactly 0.5
    an object may be the union of two, of which one is matched. Below, the largest number of pairs is taken, and of the ways
    to do so the one with the largest sum of IoU.
    """
    iou = table.iou
    found = np.flatnonzero(iou >= threshold)
    if threshold >= 0.5:
        found = found[np.unique(table.truth[found], return_index=True)[1]]
        return np.sort(found[np.unique(table.pred[found], return_index=True)[1]])
    if not len(found):
        return found
    # Each true object is assigned one predicted object or "none" (a column of its own): a full matching always exists.
    # A match is worth 2 and its IoU as a tie-break of less than 1 in all, "none" is worth 1 (0 would be no entry at all).
    truths, row = np.unique(table.truth[found], return_inverse=True)
    preds, column = np.unique(table.pred[found], return_inverse=True)
    n, m = len(truths), len(preds)
    worth = np.concatenate([2 + iou[found] / (n + 1), np.ones(n)])
    graph = csr_array((worth, (np.concatenate([row, np.arange(n)]), np.concatenate([column, m + np.arange(n)]))), shape=(n, m + n))
    rows, columns = min_weight_full_bipartite_matching(graph, maximize=True)
    place = csr_array((found + 1, (row, column)), shape=(n, m))
    taken = columns < m
    return np.sort(np.asarray(place[rows[taken], columns[taken]]).ravel() - 1)


def _compact(labels: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [N] rising, pixels int64 [N], flat image of positions from 1, 0 for background)."""
    if labels.dtype.kind not in "ui":
        raise BadRequest(f"the {which} labels are {labels.dtype}, not integers",
                         todo="one integer per pixel: 0 for background, a number for each object")
    flat = labels.ravel()
    if not flat.size:
        return flat[:0], np.zeros(0, np.int64), np.zeros(0, np.int32)
    if flat.min() < 0:
        raise BadRequest(f"the {which} labels reach down to {flat.min()}", todo="0 is background, objects are above")
    highest = int(flat.max())
    if highest > _TABLE_PER_PIXEL * flat.size:
        ids, positions, px = np.unique(flat, return_inverse=True, return_counts=True)
        if ids[0] == 0:
            return ids[1:], px[1:].astype(np.int64), positions
        return ids, px.astype(np.int64), positions + 1
    px = np.bincount(flat.astype(np.int64, copy=False))
    px[0] = 0
    ids = np.flatnonzero(px)
    position = np.zeros(len(px), np.int32)
    position[ids] = np.arange(1, len(ids) + 1)
    return ids, px[ids].astype(np.int64), position[flat]


def check_iou_thresholds(thresholds: tuple[float, ...]) -> None:
    """Raises BadRequest unless they rise within (0, 1]."""
    if not thresholds or any(not 0 < t <= 1 for t in thresholds) or list(thresholds) != sorted(set(thresholds)):
        raise BadRequest(f"IoU thresholds {', '.join(map(str, thresholds)) or 'none'}", where="thresholds",
                         todo="give rising numbers above 0, at most 1")


def _size(labels: np.ndarray) -> str:
    return " x ".join(map(str, labels.shape)) + " px"
