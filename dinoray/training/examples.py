"""A few validation images as the trained model sees them, kept for the report of the training.

A handful of images spread over the validation set are looked at; of them the first, the middle, the last and the worst are
kept. All choices are functions of the images, so the same training keeps the same examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dinoray.io.stores import Store
from dinoray.io.training_examples import Example
from dinoray.io.training_examples import store_examples as store_all
from dinoray.training.distance_map import Images, at_scale
from dinoray.vision.instance_metrics import score_image
from dinoray.vision.instances import instances
from dinoray.vision.targets import distance_map

LOOKED_AT = 24
"""Most validation images that are predicted to choose among."""
KEPT = 6
"""Most examples."""
SIDE_PX = 384
"""Longest side of an example: of a larger image the part around its cells is taken."""


def store_examples(store: Store, images: Images, predict: Callable[[np.ndarray], np.ndarray], **thresholds: Any) -> None:
    """Predict, choose and store. `predict`: planes [3, y, x] -> distance map [y, x], both at the scale of the training;
    `thresholds`: of `instances`."""
    count = len(images.pool)
    numbers = [int(n) for n in np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).round())]
    found = [_example(images, number, predict, thresholds) for number in numbers]
    store_all(store, _chosen(found))


def _chosen(found: list[Example]) -> list[Example]:
    """First, middle and last, then the worst of the others; no image twice."""
    reasons = {0: "first", len(found) // 2: "middle", len(found) - 1: "last"}
    if len(found) < 3:
        reasons = dict.fromkeys(range(len(found)), "all")
    others = sorted((i for i in range(len(found)) if i not in reasons), key=lambda i: (found[i].ap50, i))
    reasons |= dict.fromkeys(others[:KEPT - len(reasons)], "worst")
    return [Example(**{**vars(found[i]), "why": why}) for i, why in reasons.items()]


def _example(images: Images, number: int, predict: Callable[[np.ndarray], np.ndarray], thresholds: dict[str, Any]) -> Example:
    planes, labels = at_scale(images, number)
    y, x = _start(labels.any(axis=1)), _start(labels.any(axis=0))
    part = np.s_[y:y + SIDE_PX, x:x + SIDE_PX]
    planes, truth = np.ascontiguousarray(planes[:, *part]), np.ascontiguousarray(labels[part])
    predicted = predict(planes)
    cells = instances(predicted, **thresholds)
    score = score_image(cells, truth, thresholds=(0.5,))
    union = score.pred + score.truth - score.tp[0]
    return Example(images.pool.images[number].image_id, "", (y, x), labels.shape, score.tp[0] / union if union else 1.0,
                   (np.clip(planes, 0, 1) * 255 + 0.5).astype(np.uint8), distance_map(truth), predicted, truth, cells)


def _start(occupied: np.ndarray) -> int:
    """Where a part of `SIDE_PX` begins along one axis: around the middle of the rows (or columns) that have cells."""
    places = np.flatnonzero(occupied)
    middle = float(np.median(places)) if len(places) else len(occupied) / 2
    return int(np.clip(middle - SIDE_PX / 2, 0, max(0, len(occupied) - SIDE_PX)))
