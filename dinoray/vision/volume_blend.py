"""Predictions of overlapping windows of a volume -> one box, layer by layer along z, so that only a few layers are in memory.

A voxel's value is a sum over the windows that contain it, in the order of the lattice, with weights that depend on the lattice
alone: bit-equal whichever box asks for it.
"""

from __future__ import annotations

import numpy as np

from dinoray.io.prediction_grid import PredictionGrid
from dinoray.io.volume_grid import Shape


class BlendedBox:
    """float32 [outputs, z, y, x] of the box [start, stop), filled by `add` in the order of the lattice and emptied by `take`."""

    def __init__(self, grid: PredictionGrid, start: Shape, stop: Shape):
        self.grid, self.start, self.stop = grid, start, stop
        self.first = start[0]
        """First z that has not been taken."""
        depth = min(stop[0] - start[0], grid.shards[0] + grid.lattice(0).window)
        shape = (depth, stop[1] - start[1], stop[2] - start[2])
        self._values = np.zeros((grid.outputs, *shape), np.float32)
        self._lost = np.zeros(shape, bool)

    def places(self, axis: int) -> range:
        """The windows along an axis that contribute to the box."""
        return self.grid.lattice(axis).touching(self.start[axis], self.stop[axis])

    def add(self, place: Shape, values: np.ndarray | None) -> None:
        """What window `place` of the lattice predicts for its voxels [outputs, z, y, x], those outside of the volume left out; None
        where it could not be predicted."""
        ours, theirs, weights = [], [], []
        for axis, w in enumerate(place):
            lattice = self.grid.lattice(axis)
            begin = lattice.start(w)
            base = self.first if axis == 0 else self.start[axis]
            low, high = max(self.start[axis], begin, 0), min(self.stop[axis], begin + lattice.window, lattice.tokens)
            ours.append(slice(low - base, high - base))
            theirs.append(slice(low - max(begin, 0), high - max(begin, 0)))
            weights.append(lattice.weights(w)[low - begin:high - begin])
        if values is None:
            self._lost[tuple(ours)] = True
            return
        part, target = values[(slice(None), *theirs)], self._values[(slice(None), *ours)]
        z, y, x = weights
        if (z == 1).all() and (y == 1).all() and (x == 1).all():
            target += part
        else:
            target += part * (z[:, None, None] * y[None, :, None] * x[None, None, :])

    def complete_until(self, layer: int) -> int:
        """The first z that windows after those of `layer` still contribute to; the box's end after the last."""
        later = [w for w in self.places(0) if w > layer]
        return self.stop[0] if not later else min(self.stop[0], max(self.start[0], self.grid.lattice(0).start(later[0])))

    def take(self, until: int) -> tuple[np.ndarray, np.ndarray]:
        """(values [outputs, z, y, x], lost bool [z, y, x]) of [first, until), which are complete; they are forgotten."""
        count = until - self.first
        values, lost = self._values[:, :count].copy(), self._lost[:count].copy()
        for array, axis in ((self._values, 1), (self._lost, 0)):
            keep = array.shape[axis] - count
            moved = np.moveaxis(array, axis, 0)
            moved[:keep] = moved[count:].copy()
            moved[keep:] = 0
        self.first = until
        return values, lost
