"""How maps become cells: thresholds chosen on the validation images, by all workers, from maps that are computed once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dinoray.config.training import TrainDistanceMapJob
from dinoray.memory.budget import default_token_budget
from dinoray.training.distance_map import DistanceMapTask, at_scale
from dinoray.training.workers import Workers
from dinoray.vision.distance_model import SegmenterConfig
from dinoray.vision.instances import H
from dinoray.vision.segmenter import Segmenter
from dinoray.vision.thresholds import PEAKS, average_precision, counts_at_half, label_images, seg

FILLS = tuple(round(0.03 + 0.02 * i, 2) for i in range(9))
"""Fill thresholds tried. Lower than the seeds' grid goes: of perfect maps of nuclei 0.05 is better than 0.09, which costs large
cells their outermost ring."""
MARKERS = (("components", H), ("hmaxima", 0.1), ("hmaxima", 0.25))
"""Kinds of markers tried, with the height of maxima. A trained map has lower peaks and shallower saddles than a perfect one: low
maxima part touching cells that the connected parts above any peak join."""
SEARCH_IMAGES = 200
"""Most validation images that are looked at, spread evenly."""


def segmenter_of(job: TrainDistanceMapJob, task: DistanceMapTask, config: SegmenterConfig) -> Segmenter:
    """What computes maps as `dinoray segment cells` will."""
    return Segmenter(task.model, config, token_budget=default_token_budget(config.backbone.model, job.device, "float32"))


def choose_thresholds(job: TrainDistanceMapJob, task: DistanceMapTask, segmenter: Segmenter,
                      workers: Workers) -> tuple[dict[str, Any], dict[str, Any]]:
    """(peak, fill, markers and marker_height, figures) with the best mean of AP50 and SEG over the validation images, at the scale
    of the training. AP50 alone does not care how well a cell is outlined: it is nearly the same over a wide range of fills."""
    numbers = np.arange(len(task.validation.pool))
    if len(numbers) > SEARCH_IMAGES:
        numbers = numbers[np.linspace(0, len(numbers) - 1, SEARCH_IMAGES).round().astype(int)]

    def counts(number: int) -> np.ndarray:
        """`Counts` of one image at each kind of markers and pair, float64 [kinds, peaks, fills, 4]."""
        planes, truth = at_scale(task.validation, number)
        distance = np.clip(segmenter.distance(planes), 0, 1)
        found = np.zeros((len(MARKERS), len(PEAKS), len(FILLS), 4))
        for k, (markers, h) in enumerate(MARKERS):
            for i, j, labels in label_images(distance, PEAKS, FILLS, markers=markers, h=h):
                found[k, i, j] = counts_at_half(labels, truth)
        return found

    mine = workers.share([int(n) for n in numbers])
    sums = np.zeros((len(MARKERS), len(PEAKS), len(FILLS), 6))
    with ThreadPoolExecutor(job.data_threads, thread_name_prefix="thresholds") as threads:
        for found in threads.map(counts, mine):
            sums += np.concatenate([np.stack([average_precision(found), seg(found)], axis=-1), found], axis=-1)
    flat = workers.total(*sums.ravel().tolist(), float(len(mine)))
    images, sums = int(flat[-1]), np.array(flat[:-1]).reshape(sums.shape)
    best = int(np.argmax(sums[..., 0] + sums[..., 1]))  # the first of equals: the same on every machine
    k, i, j = np.unravel_index(best, sums.shape[:3])
    ap, outlines, *pooled = sums[k, i, j]
    chosen = {"peak": PEAKS[i], "fill": FILLS[j], "markers": MARKERS[k][0], "marker_height": MARKERS[k][1]}
    return chosen, {"validation_images": images, "validation_ap50_image_mean": ap / images,
                    "validation_ap50_pooled": float(average_precision(np.array(pooled))),
                    "validation_seg_image_mean": outlines / images}
