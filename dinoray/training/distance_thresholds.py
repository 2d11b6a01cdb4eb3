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
from dinoray.vision.instance_metrics import score_image
from dinoray.vision.instances import H
from dinoray.vision.segmenter import Segmenter
from dinoray.vision.thresholds import PEAKS, average_precision, label_images

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
    """(peak, fill, markers and marker_height, figures) with the best image-mean AP50 over the validation images, at the scale of
    the training."""
    numbers = np.arange(len(task.validation.pool))
    if len(numbers) > SEARCH_IMAGES:
        numbers = numbers[np.linspace(0, len(numbers) - 1, SEARCH_IMAGES).round().astype(int)]

    def counts(number: int) -> np.ndarray:
        """TP, FP, FN of one image at each kind of markers and pair, int [kinds, peaks, fills, 3]."""
        planes, truth = at_scale(task.validation, number)
        distance = np.clip(segmenter.distance(planes), 0, 1)
        found = np.zeros((len(MARKERS), len(PEAKS), len(FILLS), 3), int)
        for k, (markers, h) in enumerate(MARKERS):
            for i, j, labels in label_images(distance, PEAKS, FILLS, markers=markers, h=h):
                score = score_image(labels, truth, thresholds=(0.5,))
                found[k, i, j] = score.tp[0], score.pred - score.tp[0], score.truth - score.tp[0]
        return found

    mine = workers.share([int(n) for n in numbers])
    sums = np.zeros((len(MARKERS), len(PEAKS), len(FILLS), 4))
    with ThreadPoolExecutor(job.data_threads, thread_name_prefix="thresholds") as threads:
        for found in threads.map(counts, mine):
            sums += np.concatenate([average_precision(found)[..., None], found], axis=-1)
    flat = workers.total(*sums.ravel().tolist(), float(len(mine)))
    images, sums = int(flat[-1]), np.array(flat[:-1]).reshape(sums.shape)
    k, i, j = np.unravel_index(int(np.argmax(sums[..., 0])), sums.shape[:3])  # the first of equals: the same on every machine
    ap, *pooled = sums[k, i, j]
    chosen = {"peak": PEAKS[i], "fill": FILLS[j], "markers": MARKERS[k][0], "marker_height": MARKERS[k][1]}
    return chosen, {"validation_images": images, "validation_ap50_image_mean": ap / images,
                    "validation_ap50_pooled": float(average_precision(np.array(pooled)))}
