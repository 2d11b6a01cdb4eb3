"""Label images -> what the network learns: each instance's distance to its own outside, divided by its own maximum.

Why each instance by itself: one distance transform of the merged foreground has no valley between touching cells, and
divided by the image's maximum it pushes small cells below the peak threshold (two or three cells come back as one).
"""

from __future__ import annotations

import math

import edt
import numpy as np

from dinoray.errors import BadRequest
from dinoray.vision.label_images import checked


def distance_map(labels: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Distance map float32 [Y, X] in [0, 1] of a label image int [Y, X] (0 = background, any ids).

    In the pixels of id i: the Euclidean distance to the nearest pixel that is not of id i (background or another
    instance, so touching cells stay apart), divided by the largest such distance of id i; background is 0. Equal to
    `scipy.ndimage.distance_transform_edt(labels == i, sampling=spacing)` divided by its maximum, for all ids in one
    pass. `spacing` is the pixel's (height, width) in any unit. Parts of a disconnected instance share one maximum; a
    1-pixel object is 1. The image's border is not background: a cell cut by it has its ridge at the border. An
    object that fills the whole image has no outside: 1 everywhere.

    Raises BadRequest for anything that is not a label image (`label_images.checked`) and for a spacing <= 0.
    """
    labels = checked(labels)
    if len(spacing) != 2 or not all(math.isfinite(side) and side > 0 for side in spacing):
        raise BadRequest(f"a pixel of {spacing} has no size", todo="give spacing=(height, width), both above 0")
    if not labels.size:
        return np.zeros(labels.shape, np.float32)
    distance = edt.edt(labels, anisotropy=tuple(map(float, spacing)), black_border=False)
    if np.isinf(distance[0, 0]):  # one id fills the image: there is nothing to measure a distance to
        return np.ones(labels.shape, np.float32)
    inside = np.flatnonzero(labels)
    ids, values = labels.ravel()[inside], distance.ravel()[inside]
    largest = int(ids.max(initial=0))
    if largest > 4 * labels.size:  # a table of all ids would be larger than the image: number the ids that occur
        _, ids = np.unique(ids, return_inverse=True)
        largest = int(ids.max(initial=0))
    maximum = np.zeros(largest + 1, np.float32)
    np.maximum.at(maximum, ids, values)
    distance.ravel()[inside] = values / maximum[ids]
    return distance


def median_diameter(labels: np.ndarray) -> float | None:
    """Median over the objects of a label image int [Y, X] of the diameter in px of the circle of equal area.

    Objects that touch the image's border are cut and left out, unless all do. None when there is no object.
    """
    labels = checked(labels)
    ids, areas = np.unique(labels, return_counts=True)
    ids, areas = ids[ids > 0], areas[ids > 0]
    if not len(ids):
        return None
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    whole = ~np.isin(ids, border)
    areas = areas[whole] if whole.any() else areas
    return float(np.median(2 * np.sqrt(areas / math.pi)))
