"""The watershed's two thresholds, searched over stored distance maps: the network is not run again.

A grid of P peaks and F fills costs P floods an image, not P x F. For one peak a flood down to the lowest fill holds
all the others: a watershed takes the highest pixel first, so whatever lies above a higher fill, in a part of the
foreground that holds a marker, has its label before the flood goes below that fill; and the parts without a marker
are those that vanish (`instances`). So each (peak, fill) is that flood, cut; the tests compare with the double loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dinoray.errors import BadRequest
from dinoray.vision.instance_metrics import score_image
from dinoray.vision.instances import EIGHT, H, check_thresholds, checked_map, find_markers, flood, without_small

PEAKS = tuple(round(0.30 + 0.05 * i, 2) for i in range(9))
FILLS = tuple(round(0.05 + 0.01 * i, 2) for i in range(11))
"""The grid of DINOCell and SAMCell: peaks 0.30 to 0.70, fills 0.05 to 0.15."""

Counts = tuple[int, int, int, float]
"""Of one image: true positives, false positives, false negatives, and the sum over its true objects of the IoU with the object
that covers more than half of each (SEG times their number)."""
Score = Callable[[np.ndarray, np.ndarray], Counts]
"""(predicted labels int32 [Y, X], true labels [Y, X]) -> `Counts`. Called from `threads` threads at a time."""
OBJECTIVES = ("image_mean", "pooled", "ap_seg")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pair of thresholds: the mean over images of AP = TP / (TP + FP + FN) (1 for an image without objects where
    none were found), the AP of the pooled counts, these counts, the mean over images of SEG (1 or 0 likewise), and the mean of the
    two means: AP at one IoU counts cells and does not care how well they are outlined, SEG does."""

    peak: float
    fill: float
    image_mean: float
    pooled: float
    tp: int
    fp: int
    fn: int
    seg: float
    ap_seg: float


@dataclass(frozen=True, slots=True)
class Search:
    """The best pair of thresholds, and all candidates, peak by peak."""

    best: Candidate
    table: tuple[Candidate, ...]


def average_precision(counts: np.ndarray) -> np.ndarray:
    """TP / (TP + FP + FN) of `Counts` [..., 4] (or of the first three); 1 where all three are 0."""
    total = counts[..., :3].sum(axis=-1)
    return np.where(total == 0, 1.0, counts[..., 0] / np.maximum(total, 1))


def seg(counts: np.ndarray) -> np.ndarray:
    """SEG of `Counts` [..., 4] of one image each; without true objects 1, or 0 where any were found."""
    truth = counts[..., 0] + counts[..., 2]
    return np.where(truth == 0, counts[..., 1] == 0, counts[..., 3] / np.maximum(truth, 1))


def counts_at_half(labels: np.ndarray, truth: np.ndarray) -> Counts:
    """At IoU 0.5."""
    score = score_image(labels, truth, thresholds=(0.5,))
    return score.tp[0], score.pred - score.tp[0], score.truth - score.tp[0], score.jaccard


def label_images(distance: np.ndarray, peaks: Sequence[float], fills: Sequence[float], *, markers: str = "components",
                 h: float = H, min_area: int = 0) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (peak index, fill index, labels): the labels are those of `instances(distance, peak=..., fill=...)`."""
    distance = checked_map(distance)
    floods = []
    for peak in peaks:
        seeds = find_markers(distance, peak, markers, h)
        floods.append((flood(distance, seeds, min(fills)), np.flatnonzero(seeds)))
    for j, fill in enumerate(fills):
        pieces, _ = ndimage.label(distance > fill, EIGHT)
        for i, (labels, seeds) in enumerate(floods):
            marked = np.zeros(int(pieces.max(initial=0)) + 1, bool)
            marked[pieces.ravel()[seeds]] = True
            cut = np.where(marked[pieces], labels, 0)
            yield i, j, without_small(cut, min_area) if min_area > 1 else cut


def search(maps: Sequence[np.ndarray], truths: Sequence[np.ndarray], *, score: Score, peaks: Sequence[float] = PEAKS,
           fills: Sequence[float] = FILLS, objective: str = "image_mean", threads: int = 1, markers: str = "components",
           h: float = H, min_area: int = 0) -> Search:
    """The thresholds that score best on distance maps float [Y, X] with known label images int [Y, X].

    `maps` and `truths` may be any sequences, also ones that read an image when it is asked for: each is asked once,
    and `threads` of them are in memory at a time. `objective`: `image_mean` or `pooled`; of equal candidates the one
    that is better by the other objective wins, then the lowest peak, then the lowest fill. `markers`, `h` and
    `min_area` as in `instances`.

    Raises BadRequest for no images, another number of truths than maps, a pair of unequal shapes, an empty grid and
    any pair of the grid with peak < fill.
    """
    peaks, fills = tuple(sorted(set(peaks))), tuple(sorted(set(fills)))
    if not peaks or not fills or objective not in OBJECTIVES:
        raise BadRequest(f"a search over {len(peaks)} peaks and {len(fills)} fills for {objective!r}",
                         todo=f"give at least one of each, and an objective of {', '.join(OBJECTIVES)}")
    for peak, fill in itertools.product(peaks, fills):
        check_thresholds(peak, fill)
    if not len(maps) or len(maps) != len(truths):
        raise BadRequest(f"{len(maps)} distance maps for {len(truths)} label images", todo="give one label image for each map")

    def counts(index: int) -> np.ndarray:
        distance, truth = maps[index], truths[index]
        if distance.shape != truth.shape:
            raise BadRequest(f"map {distance.shape} and labels {truth.shape} differ in shape", where=f"image {index}",
                             todo="both must have the size of the image")
        found = np.zeros((len(peaks), len(fills), 4))
        for i, j, labels in label_images(distance, peaks, fills, markers=markers, h=h, min_area=min_area):
            found[i, j] = score(labels, truth)
        return found

    with ThreadPoolExecutor(threads) as pool:
        each = np.stack(list(pool.map(counts, range(len(maps)))))
    total, means, segs = each.sum(axis=0), average_precision(each).mean(axis=0), seg(each).mean(axis=0)
    pooled = average_precision(total)
    table = tuple(Candidate(peak, fill, float(means[i, j]), float(pooled[i, j]), *map(int, total[i, j, :3]), float(segs[i, j]),
                            float(means[i, j] + segs[i, j]) / 2)
                  for i, peak in enumerate(peaks) for j, fill in enumerate(fills))
    return Search(max(table, key=lambda c: getattr(c, objective)), table)  # max keeps the first of equals
