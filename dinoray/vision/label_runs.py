"""Label images as runs (stretches of one id in one row): sums over every object at once, without a loop over objects.

A 4096 x 4096 image of 70,000 cells has 16 million pixels but a million runs, and area, centroid, moments and convex
hull follow from the runs alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinoray.vision.label_images import checked


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of the objects of a label image [Y, X], row by row; n objects, m runs."""

    shape: tuple[int, int]
    ids: np.ndarray
    """The objects' ids [n], ascending, in the image's dtype."""
    index: np.ndarray
    """Which object [m], 0..n-1 (int64)."""
    y: np.ndarray
    x0: np.ndarray
    x1: np.ndarray
    """Row, first column and the column after the last [m] (int64)."""

    @property
    def length(self) -> np.ndarray:
        """Pixels of each run [m]."""
        return self.x1 - self.x0

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum over the runs of each object [n], in float64 (exact for whole numbers below 2^53)."""
        return np.bincount(self.index, values, minlength=len(self.ids))

    def extreme(self, values: np.ndarray, ufunc: np.ufunc) -> np.ndarray:
        """`ufunc` (np.minimum or np.maximum) over the runs of each object [n], in the values' dtype."""
        start = np.zeros(len(self.ids), values.dtype)
        start[self.index] = values  # any value of the object's own
        ufunc.at(start, self.index, values)
        return start

    def image(self) -> np.ndarray:
        """The label image int32 [Y, X] with objects numbered 1..n in the order of `ids`."""
        flat, begin = np.zeros(self.shape, np.int32).ravel(), self.y * self.shape[1]
        # +number where a run begins, -number where it ends, then the running sum
        np.add.at(flat, begin + self.x0, (self.index + 1).astype(np.int32))
        ends = begin + self.x1
        inside = ends < flat.size
        np.subtract.at(flat, ends[inside], (self.index[inside] + 1).astype(np.int32))
        return np.cumsum(flat, out=flat).reshape(self.shape)


def runs(labels: np.ndarray) -> Runs:
    """The runs of a label image int [Y, X] (0 = background). Raises BadRequest for what is no label image."""
    labels = checked(labels)
    change = np.ones(labels.shape, bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=change[:, 1:])
    begin = np.flatnonzero(change)
    end = np.append(begin[1:], labels.size)
    values = labels.ravel()[begin]
    kept = values > 0
    begin, end = begin[kept], end[kept]
    ids, index = np.unique(values[kept], return_inverse=True)
    y = begin // max(labels.shape[1], 1)
    return Runs(labels.shape, ids, index, y, begin - y * labels.shape[1], end - y * labels.shape[1])
