"""By which factor an image must be resampled so that its cells have the size of those the model was trained on.

A network that saw cells of 20 px finds pieces of cells of 100 px, and specks where they are 4 px. What is known decides,
in this order: the diameter that the user gives; pixel sizes of the image and of the training; else an estimate.

The estimate segments a centred part of the image at a few factors and believes the one at which most of it looks as the
training's cells did: objects of their size, whose distance maps rise near to 1. Pieces of a cell that is seen too large,
clumps of cells that are seen too small, and noise have neither. It then looks again at the size that follows from what is
seen there. Cells of a size that the training had enough of are left as they are. Specks do not count. An estimate beyond
1/4..4 is not believed: so small or large are specks and debris more often than cells, and who has such cells can say so. It
is a function of the image and the model alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from dinoray.errors import BadRequest, ItemError
from dinoray.vision.distance_model import SegmenterConfig
from dinoray.vision.resampling2d import resample, scaled_shape

LARGEST = 8.0
"""Factors beyond 1/8..8 are refused: the sizes that lead to them are wrong more often than not."""
BELIEVED = 4.0
"""An estimate beyond 1/4..4 counts as none."""
KEPT = 1.2
"""An estimate within this factor of 1 leaves the image as it is: resampling costs more than it gains."""
PART_PX = 1024
"""Side of the part that an estimate segments, in px at the factor that is tried."""
TRIALS = (1.0, 0.5, 0.25)
MAGNIFIED = 2.0
"""Tried too (it costs most) where what is seen at 1 is smaller than the model's cells, or nothing looks like cells."""
SEEN_PX = int(PART_PX / min(TRIALS))
"""Side of the centred part, in px of the image, beyond which an estimate never looks."""
SIZE_OCTAVES = 0.3
"""Standard deviation, in octaves, of the sizes that are taken for the model's cells."""
SAME = 1.5
"""A second look that finds objects that differ by more than this shows other things."""
SPECK = 0.1
"""Objects of less than this share of the area of the object in which the median labelled pixel lies (pixels of low maps count less)
are no cells."""
PEAK_POWER = 8
"""How much the height of a map counts: at the right size it is about 0.85 at the cells' middles, at others 0.5 to 0.7."""
CONVINCING = 0.1
"""Likeness (see `_Seen`) below which nothing looks like cells."""
LEAST_LIKENESS = 0.03
"""An estimate needs as much: below it nothing that is seen has the size and the height of cells."""
Look = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Scale:
    """`factor` times the image's resolution is the model's; `diameter_px` is the median of its cells in px of the image,
    where given or estimated. `unknown`: there was nothing to go by (or nothing to believe), and the factor is 1."""

    factor: float
    source: Literal["diameter", "pixel_size", "estimated", "unknown"]
    diameter_px: float | None = None


def cell_scale(image: np.ndarray, config: SegmenterConfig, look: Look, *,
               pixel_size_um: float | None = None, diameter_px: float | None = None) -> Scale:
    """The `Scale` of an image float32 [3, Y, X] in [0, 1] (or of its centred part of `SEEN_PX`).

    `look` gives the label image and the distance map [h, w] of an image [3, h, w] that is taken to be at the model's scale
    (`Segmenter.look`); it is called for an estimate only. `pixel_size_um` is the image's, `diameter_px` the median of
    its cells as the user knows it; an image is not resampled for a pixel size within 1 % of the model's.

    Raises ItemError `scale` when the factor of given sizes is not within 1/8..8, and BadRequest for a diameter where the checkpoint
    says none, and for sizes that are not positive.
    """
    for name, value in (("pixel_size_um", pixel_size_um), ("diameter_px", diameter_px)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadRequest(f"{name}={value}", todo="give a size above 0")
    if diameter_px is not None:
        if config.median_diameter_px is None:
            raise BadRequest("the checkpoint does not say how large its cells were", where="diameter_px",
                             todo="give pixel_size_um, or no size, or train again from label images")
        return _checked(config.median_diameter_px / diameter_px, "diameter", diameter_px,
                        f"cells of {diameter_px:g} px against {config.median_diameter_px:g} px of the model's")
    if pixel_size_um is not None and config.pixel_size_um is not None:
        factor = pixel_size_um / config.pixel_size_um
        return _checked(1.0 if abs(math.log(factor)) < 0.01 else factor, "pixel_size", None,
                        f"pixels of {pixel_size_um:g} µm against {config.pixel_size_um:g} µm of the model's")
    if config.median_diameter_px is None:
        return Scale(1.0, "unknown")
    return _estimated(image, config.median_diameter_px, config.diameter_range_px, look)


def _checked(factor: float, source: str, diameter_px: float | None, why: str) -> Scale:
    if not 1 / LARGEST <= factor <= LARGEST:
        raise ItemError("scale", f"{why}: a factor of {factor:.3g}",
                        todo=f"check the sizes; factors from 1/{LARGEST:g} to {LARGEST:g} are possible")
    return Scale(factor, source, diameter_px)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Seen:
    """What a look at a factor shows."""

    cover: float
    """Share of the part that objects cover, each weighted by how much it looks like one of the model's cells, 0 to 1."""
    likeness: float
    """The mean of those weights over the covered area."""
    diameter_px: float | None
    """Median of the whole objects, each weighted by the height of its map, in px of the image; None without any."""


def _estimated(image: np.ndarray, model_px: float, seen_px: tuple[float, float] | None, look: Look) -> Scale:
    seen = {trial: _seen_at(image, trial, model_px, look) for trial in TRIALS}
    at_one = seen[1.0].diameter_px
    if at_one is None or at_one < model_px / math.sqrt(2) or max(s.likeness for s in seen.values()) < CONVINCING:
        seen[MAGNIFIED] = _seen_at(image, MAGNIFIED, model_px, look)
    best = max(seen, key=lambda trial: seen[trial].cover * seen[trial].likeness)
    found, likeness = seen[best].diameter_px, seen[best].likeness
    if found is None:
        return Scale(1.0, "unknown")
    factor = model_px / found
    if max(factor / best, best / factor) > KEPT and 1 / LARGEST <= factor <= LARGEST:
        again = _seen_at(image, factor, model_px, look)  # seen better at the size that follows, unless that shows other things
        if again.diameter_px is not None and 1 / SAME <= again.diameter_px / found <= SAME:
            found, likeness = again.diameter_px, max(likeness, again.likeness)
            factor = model_px / found
    if likeness < LEAST_LIKENESS:
        return Scale(1.0, "unknown")
    if seen_px is not None and seen_px[0] <= found <= seen_px[1]:
        return Scale(1.0, "estimated", found)
    if max(factor, 1 / factor) <= KEPT:
        factor = 1.0
    return Scale(factor, "estimated", found) if 1 / BELIEVED <= factor <= BELIEVED else Scale(1.0, "unknown")


def _seen_at(image: np.ndarray, factor: float, model_px: float, look: Look) -> _Seen:
    """Of a centred part."""
    side = math.ceil(PART_PX / factor)
    y0, x0 = (max(0, (n - side) // 2) for n in image.shape[1:])
    part = image[:, y0:y0 + side, x0:x0 + side]
    labels, distance = look(resample(part, scaled_shape(part.shape[1:], factor)))
    areas = np.bincount(labels.ravel())[1:].astype(float)
    if not areas.any():
        return _Seen(0.0, 0.0, None)
    peaks = np.clip(ndimage.maximum(distance, labels, np.arange(1, len(areas) + 1)), 0, 1)
    heights = peaks**PEAK_POWER
    octaves = np.log2(np.maximum(2 * np.sqrt(areas / math.pi), 1e-9) / model_px)
    weights = np.exp(-0.5 * (octaves / SIZE_OCTAVES) ** 2) * heights
    one_px = math.sqrt(labels.shape[0] / part.shape[1] * labels.shape[1] / part.shape[2])
    diameter = typical_diameter(areas * ~at_border(labels), heights)
    diameter = None if diameter is None else diameter / one_px
    return _Seen(float((areas * weights).sum()) / labels.size, float((areas * weights).sum() / areas.sum()), diameter)


def at_border(labels: np.ndarray) -> np.ndarray:
    """bool [n]: which of the objects 1..n of a label image [Y, X] touch its border."""
    touch = np.zeros(int(labels.max()) + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touch[edge] = True
    return touch[1:]


def typical_diameter(areas: np.ndarray, heights: np.ndarray) -> float | None:
    """Median diameter in px of objects of areas [n] in px (0: does not count), each counted by its height [n], without specks.
    None without objects. Noise has many specks, of low maps: counted alike, they would decide beside few cells."""
    if not (areas * heights).any():
        return None
    cells = areas >= SPECK * weighted_median(areas, areas * heights)
    return float(2 * np.sqrt(weighted_median(areas[cells], heights[cells]) / math.pi))


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """The smallest of values [n] at which half of the weights [n] is reached."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])
