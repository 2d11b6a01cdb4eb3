"""Which windows of an image become rows: pure geometry, in source pixels.

Rules (design 4.5): `tiles` cuts an axis longer than `tile_px` into n = ceil(side / tile_px) tiles whose
starts are spread evenly over the axis, so that the last one ends at the border and nothing is dropped; an
axis of `tile_px` or less is one tile, cut (centred) to a multiple of the patch size. `native` is one window,
cut (centred) to multiples of the patch size. `auto` is `tiles` where a side exceeds 2 * tile_px, else
`native`. `resize` is the whole image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinoray.errors import BadRequest, ItemError


@dataclass(frozen=True, slots=True)
class Window:
    """A half-open box [y0, y1) x [x0, x1) in source pixels, and its number within the image."""

    tile: int
    y0: int
    x0: int
    y1: int
    x1: int

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.y1 - self.y0

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return self.x1 - self.x0


def centred(side: int, multiple: int) -> tuple[int, int]:
    """Start and end of the largest centred part of an axis whose length is a multiple of `multiple`."""
    length = side // multiple * multiple
    start = (side - length) // 2
    return start, start + length


def tile_spans(side: int, tile_px: int, patch: int) -> list[tuple[int, int]]:
    """Starts and ends of the tiles of one axis."""
    if side <= tile_px:
        return [centred(side, patch)]
    n = math.ceil(side / tile_px)
    starts = [round(i * (side - tile_px) / (n - 1)) for i in range(n)]
    return [(start, start + tile_px) for start in starts]


def windows(height: int, width: int, *, size: str, tile_px: int, patch: int) -> list[Window]:
    """The windows of an image of `height` x `width` px, row by row.

    Raises ItemError `too_small` when a side is smaller than a patch, BadRequest when tile_px is no multiple
    of the patch size.
    """
    if tile_px % patch:
        raise BadRequest(f"tile_px={tile_px} is not a multiple of the patch size {patch}",
                         todo=f"use {max(1, tile_px // patch) * patch}")
    if size == "resize":
        return [Window(0, 0, 0, height, width)]
    if min(height, width) < patch:
        raise ItemError("too_small", f"{height} x {width} px is smaller than one patch of {patch} px",
                        todo="use size=resize, or leave such images out")
    if size == "tiles" or (size == "auto" and max(height, width) > 2 * tile_px):
        rows, columns = tile_spans(height, tile_px, patch), tile_spans(width, tile_px, patch)
    else:
        rows, columns = [centred(height, patch)], [centred(width, patch)]
    spans = [(y, x) for y in rows for x in columns]
    return [Window(i, y[0], x[0], y[1], x[1]) for i, (y, x) in enumerate(spans)]
