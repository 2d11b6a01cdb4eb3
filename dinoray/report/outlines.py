"""Outlines of cells as small transparent pictures that lie over a picture of the image.

Labels are first brought to the size that is shown (nearest pixel centre) and outlined there: outlines are of one width,
whatever the image's size, and no thin line is lost by shrinking. The outlines are PNG with a palette: crisp, and a few kB each.
"""

from __future__ import annotations

import base64
import colorsys
import io

import numpy as np
from markupsafe import Markup
from PIL import Image
from skimage.segmentation import find_boundaries

TRUTH, PRED, BOTH = (25, 211, 255), (255, 79, 163), (255, 255, 255)
"""Outlines: only the true one, only the predicted one, both."""
HUES = 14
"""Colours of cells; touching cells get different ones, so far as there are enough."""
_NEAR = 2
"""Cells no farther apart than so many shown pixels count as touching."""
_STRIDE = 5
"""Consecutive ids (which often lie side by side) are so many hues apart; no common divisor with `HUES`."""


def palette() -> np.ndarray:
    """Bright colours uint8 [HUES, 3], evenly spaced hues, every second one paler."""
    found = [colorsys.hls_to_rgb(i / HUES, 0.55 + 0.13 * (i % 2), 1.0) for i in range(HUES)]
    return (np.array(found) * 255 + 0.5).astype(np.uint8)


def display_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Longest side about `side` px: large images shrink to it, small ones grow by a whole factor."""
    factor = side // max(height, width)
    if factor > 1:
        return height * factor, width * factor
    shrink = min(1.0, side / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def resized_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels [Y, X] at another size, by the nearest pixel centre."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    return labels[rows[:, None], columns]


def boundaries(labels: np.ndarray) -> np.ndarray:
    """The outermost pixels of each cell, bool [Y, X]; not along the border of the image."""
    return find_boundaries(labels, mode="inner")


def hues(labels: np.ndarray) -> np.ndarray:
    """A colour number 0..HUES-1 of each pixel's cell, -1 on background, int [Y, X].

    A function of the labels alone: a cell's colour comes from its id, unless a touching cell of smaller id has it.
    """
    ids, places = np.unique(labels, return_inverse=True)
    places = places.reshape(labels.shape)
    neighbours: dict[int, set[int]] = {}
    for dy in range(_NEAR + 1):
        for dx in range(-_NEAR, _NEAR + 1):
            if dy or dx > 0:
                a = places[:places.shape[0] - dy, max(0, -dx):places.shape[1] - max(0, dx)]
                b = places[dy:, max(0, dx):places.shape[1] - max(0, -dx)]
                touching = (a != b) & (ids[a] > 0) & (ids[b] > 0)
                for low, high in np.unique(np.sort(np.stack([a[touching], b[touching]], 1), axis=1), axis=0).tolist():
                    neighbours.setdefault(high, set()).add(low)
    colours = np.full(len(ids), -1)
    for place, number in enumerate(ids.tolist()):
        if number > 0:
            taken = {int(colours[other]) for other in neighbours.get(place, ())}
            wanted = [(number * _STRIDE + step) % HUES for step in range(HUES)]
            colours[place] = next((colour for colour in wanted if colour not in taken), wanted[0])
    return colours[places]


def cell_outlines(labels: np.ndarray, height: int, width: int, *, thickness: int = 1) -> Markup:
    """Data URI of the cells' outlines at [height, width] px, each cell in another colour than those it touches.

    `thickness` in px, inwards: above 1 for pictures that the page shows smaller than they are."""
    shown = resized_labels(labels, height, width)
    lines = boundaries(shown)
    for _ in range(thickness - 1):
        lines |= boundaries(np.where(lines, 0, shown))
    return _png(np.where(lines, hues(shown) + 1, 0), palette())


def filled_cells(labels: np.ndarray, height: int, width: int) -> Markup:
    """Data URI of the cells as coloured areas with dark outlines, where there is no image to lie over."""
    shown = resized_labels(labels, height, width)
    return _png(np.where(boundaries(shown), 0, hues(shown) + 1), palette())


def compared_outlines(pred: np.ndarray, truth: np.ndarray, height: int, width: int) -> Markup:
    """Data URI of the outlines of two label images of one shape: `TRUTH`, `PRED`, and `BOTH` where they agree."""
    of_pred, of_truth = (boundaries(resized_labels(labels, height, width)) for labels in (pred, truth))
    return _png(of_truth + 2 * of_pred, np.array([TRUTH, PRED, BOTH], np.uint8))


def _png(index: np.ndarray, colours: np.ndarray) -> Markup:
    """A data URI of [h, w] numbers: 0 is transparent, n is `colours[n - 1]`."""
    image = Image.fromarray(index.astype(np.uint8), mode="P")
    image.putpalette(np.concatenate([np.zeros((1, 3), np.uint8), colours]).tobytes())
    sink = io.BytesIO()
    image.save(sink, "PNG", transparency=0, optimize=True)
    return Markup("data:image/png;base64,") + base64.b64encode(sink.getvalue()).decode()
