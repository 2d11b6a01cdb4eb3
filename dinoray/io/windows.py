"""Windows of a slab: which there are, where each lies in the slab's pixels, and their tokens blended into one grid.

A token's value is a sum over the windows that contain it, in the order of the lattice, with weights that depend on the
lattice alone: bit-equal whichever slab asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dinoray.io.volume_grid import Lattice, PlaneGrid


@dataclass(frozen=True, slots=True)
class Window:
    """Window (row, col) of a plane's lattice, and its first pixel in the slab's pixels."""

    row: int
    col: int
    y: int
    x: int


@dataclass(frozen=True)
class SlabWindows:
    """The windows of tokens [rows) x [cols) of a plane; `rows`, `cols` count tokens."""

    plane: PlaneGrid
    rows: tuple[int, int]
    cols: tuple[int, int]
    margin_px: int = 0
    """Pixels around all windows that the slab has as well (foreground is looked for there)."""

    @property
    def lattices(self) -> tuple[Lattice, Lattice]:
        """Of the rows and of the columns."""
        return self.plane.lattice(self.plane.axes[0]), self.plane.lattice(self.plane.axes[1])

    @property
    def size_px(self) -> tuple[int, int]:
        """Rows and columns of a window in pixels."""
        patch = self.plane.grid.patch
        return self.lattices[0].window * patch, self.lattices[1].window * patch

    def pixel_box(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Absolute square pixels [first, stop) of the slab's rows and columns."""
        patch, boxes = self.plane.grid.patch, []
        for lattice, (first, stop) in zip(self.lattices, (self.rows, self.cols), strict=True):
            touching = lattice.touching(first, stop)
            boxes.append((lattice.start(touching[0]) * patch - self.margin_px,
                          (lattice.start(touching[-1]) + lattice.window) * patch + self.margin_px))
        return tuple(boxes)  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Window]:
        patch = self.plane.grid.patch
        (top, _), (left, _) = self.pixel_box()
        rows, cols = self.lattices
        for i in rows.touching(*self.rows):
            for j in cols.touching(*self.cols):
                yield Window(i, j, rows.start(i) * patch - top, cols.start(j) * patch - left)


class TokenGrid:
    """The tokens of a slab: float32 [planes, rows, cols, D], filled window by window in the order of SlabWindows."""

    def __init__(self, windows: SlabWindows, num_planes: int, dim: int):
        self.windows = windows
        shape = (num_planes, windows.rows[1] - windows.rows[0], windows.cols[1] - windows.cols[0])
        self.tokens = np.zeros((*shape, dim), np.float32)
        self.missing = np.zeros(shape, bool)

    def _place(self, window: Window) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """(rows, cols) in the grid and in the window's own tokens."""
        ours, theirs = [], []
        for lattice, number, (first, stop) in zip(self.windows.lattices, (window.row, window.col),
                                                  (self.windows.rows, self.windows.cols), strict=True):
            start = lattice.start(number)
            low, high = max(first, start, 0), min(stop, start + lattice.window, lattice.tokens)
            ours.append(slice(low - first, high - first))
            theirs.append(slice(low - start, high - start))
        return tuple(ours), tuple(theirs)  # type: ignore[return-value]

    def add(self, window: Window, first_plane: int, maps: np.ndarray) -> None:
        """The window's tokens [n, h, w, D] on the planes [first_plane, first_plane + n) of the slab."""
        ours, theirs = self._place(window)
        rows, cols = self.windows.lattices
        weights = rows.weights(window.row)[theirs[0], None] * cols.weights(window.col)[None, theirs[1]]
        part = maps[:, theirs[0], theirs[1]]
        target = self.tokens[first_plane:first_plane + len(maps), ours[0], ours[1]]
        target += part if (weights == 1).all() else part * weights[None, :, :, None]

    def skip(self, window: Window, first_plane: int, num_planes: int) -> None:
        """The window is not computed there: the tokens that it takes part in stay unknown."""
        ours, _ = self._place(window)
        self.missing[first_plane:first_plane + num_planes, ours[0], ours[1]] = True

    def finished(self, cast: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """The tokens [D, z, y, x] as `cast(tokens [planes, rows, cols, D], missing [planes, rows, cols])` makes them."""
        return np.moveaxis(np.moveaxis(cast(self.tokens, self.missing), 0, self.windows.plane.normal), -1, 0)
