"""Label images too large for one map: segmented in overlapping blocks, and the blocks' objects joined into one labelling.

An image is cut into cores that tile it (a grid of `block_px` from the image's origin) and outer boxes, which reach
half of `overlap_px` beyond their core. Every pixel gets its object from the block in whose core it lies. Objects of
neighbouring blocks are one if both touch their own core and their IoU, within what both blocks see, exceeds 0.5
(no object can have two such partners in one neighbour). Neighbours are also those across a corner.

When is that exact? If no object is larger than `overlap_px // 2` in height and width, and objects are connected or
`block_px` is no smaller than they are: then each block sees every object that touches its core as a whole, both
blocks at a seam see the same object, and the result is the labelling of the whole image up to the ids' names.
For labels out of distance maps by `instances` with `components` as markers the same holds, where "object" means what
the watershed of the whole image gives: a block cuts only objects that do not touch its core, and what floods in their
place comes too late to change another object (`instances` on ties). `hmaxima` has no such bound: a maximum is compared
with higher ones at any distance.

What can happen to larger objects, and where the blocks' maps differ: seen in part by both blocks, an object is joined
if the parts agree by more than half, and is then whole. Else it is cut along the seam into pieces of different ids.
Two objects become one only if one block saw them as one and its neighbours' pieces match it. Parts of one id that no
block sees together (a disconnected object) get several ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinoray.errors import BadRequest

LARGEST_ID = 2 ** 31 - 1


class Box(NamedTuple):
    """Half-open box of pixels."""

    y0: int
    x0: int
    y1: int
    x1: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.y1 - self.y0, self.x1 - self.x0

    def within(self, other: Box) -> tuple[slice, slice]:
        """This box in an array that holds `other`."""
        return slice(self.y0 - other.y0, self.y1 - other.y0), slice(self.x0 - other.x0, self.x1 - other.x0)

    def meet(self, other: Box) -> Box:
        """What both boxes hold; it may be empty."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        return Box(y0, x0, max(y0, min(self.y1, other.y1)), max(x0, min(self.x1, other.x1)))


class Block(NamedTuple):
    """One block: its place in the grid, the box it answers for, and the box it must be segmented in."""

    row: int
    column: int
    core: Box
    outer: Box


def blocks(height: int, width: int, block_px: int, overlap_px: int) -> list[Block]:
    """The blocks of an image of `height` x `width` px, row by row; the last ones of an axis may be smaller.

    Cores are `block_px` x `block_px` from the origin; outer boxes reach `overlap_px // 2` further, within the image.
    Raises BadRequest for an empty image, a block below 1 px, and a negative overlap.
    """
    if min(height, width, block_px) < 1 or overlap_px < 0:
        raise BadRequest(f"blocks of {block_px} px with an overlap of {overlap_px} px for {height} x {width} px",
                         todo="use an image and blocks of at least 1 px, and an overlap of at least 0")
    margin = overlap_px // 2
    found = []
    for row, y in enumerate(range(0, height, block_px)):
        for column, x in enumerate(range(0, width, block_px)):
            core = Box(y, x, min(y + block_px, height), min(x + block_px, width))
            outer = Box(max(0, y - margin), max(0, x - margin), min(core.y1 + margin, height), min(core.x1 + margin, width))
            found.append(Block(row, column, core, outer))
    return found


class _Strip(NamedTuple):
    """What a later neighbour needs of a block: labels by their provisional ids (0 where an object does not touch the core)."""

    box: Box
    ids: np.ndarray


def matches(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pairs int64 [n, 2] of ids (int32) of two label images of one shape whose IoU exceeds 0.5: each id in at most one."""
    (ids_a, px_a), (ids_b, px_b) = (np.unique(x[x > 0], return_counts=True) for x in (a, b))
    both, factor = (a > 0) & (b > 0), int(b.max(initial=0)) + 1
    pairs, shared = np.unique(a[both].astype(np.int64) * factor + b[both], return_counts=True)
    i, j = np.divmod(pairs, factor)
    same = 2 * shared > px_a[np.searchsorted(ids_a, i)] + px_b[np.searchsorted(ids_b, j)] - shared
    return np.stack([i[same], j[same]], axis=1)


class Stitcher:
    """Takes the label image of each block's outer box, in the order of `blocks`, and joins the objects.

    `write(core, ids)` is called once for each block with its core box and int32 ids [y, x] that are provisional:
    store them, and after the last block pass what was stored, box by box, through the table that `finish()` returns
    (`final = table[ids]`). In memory stay the overlaps that later blocks need, (image width + overlap) x overlap
    pixels (`held_bytes`), and a few numbers for each object of a seam.
    """

    def __init__(self, height: int, width: int, block_px: int, overlap_px: int, write: Callable[[Box, np.ndarray], None],
                 largest_id: int = LARGEST_ID):
        self.blocks = blocks(height, width, block_px, overlap_px)
        self._margin, self._write, self._largest = overlap_px // 2, write, largest_id
        self._taken, self._count = 0, 0
        self._left: _Strip | None = None
        self._above: dict[int, _Strip] = {}
        self._below: dict[int, _Strip] = {}
        self._pairs: list[np.ndarray] = []

    @property
    def held_bytes(self) -> int:
        """Bytes of the overlaps that are kept for later blocks."""
        strips = [*self._above.values(), *self._below.values(), *([self._left] if self._left else [])]
        return sum(strip.ids.nbytes for strip in strips)

    def add(self, block: Block, labels: np.ndarray) -> None:
        """The labels, any integer ids, of `block.outer`: 0 is background.

        Raises BadRequest for a block out of turn, labels of another shape, and more objects than int32 has ids.
        """
        if self._taken == len(self.blocks) or block != self.blocks[self._taken]:
            raise BadRequest(f"block ({block.row}, {block.column}) is not the next one", where=f"after {self._taken} blocks",
                             todo="add every block of `blocks` once, in that order")
        if labels.shape != block.outer.shape:
            raise BadRequest(f"labels {labels.shape} for an outer box of {block.outer.shape}",
                             where=f"block ({block.row}, {block.column})", todo="segment block.outer, not block.core")
        if block.column == 0:
            self._above, self._below, self._left = self._below, {}, None
        ids = self._number(block, labels)
        self._join(block, _Strip(block.outer, ids))
        self._keep(block, ids)
        self._write(block.core, ids[block.core.within(block.outer)])
        self._taken += 1

    def finish(self) -> np.ndarray:
        """The table int32 [n + 1] from provisional ids to final ones: 0 stays 0, objects are 1..m in the order of the
        blocks and, within one, of its ids. Raises BadRequest when blocks are missing."""
        if self._taken != len(self.blocks):
            raise BadRequest(f"{len(self.blocks) - self._taken} of {len(self.blocks)} blocks are missing", todo="add them first")
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *self._pairs])
        graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(self._count + 1, self._count + 1))
        _, group = connected_components(graph, directed=False)  # 0 is in no pair: a group of its own, the first
        _, first, group = np.unique(group, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int32)
        rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
        return rank[group]

    def _number(self, block: Block, labels: np.ndarray) -> np.ndarray:
        """The labels by provisional ids: 1, 2, ... over all blocks for objects that touch the core, 0 for all others."""
        found = np.unique(labels[block.core.within(block.outer)])
        found = found[found != 0]
        if self._count + len(found) > self._largest:
            raise BadRequest(f"more than {self._largest:,} objects, counted once for each block they touch",
                             where=f"block ({block.row}, {block.column})", todo="cut the image into several, or raise min_area")
        place = np.minimum(np.searchsorted(found, labels), max(len(found) - 1, 0))
        known = found[place] == labels if len(found) else np.zeros(labels.shape, bool)
        ids = np.where(known, place + (self._count + 1), 0).astype(np.int32)
        self._count += len(found)
        return ids

    def _join(self, block: Block, here: _Strip) -> None:
        earlier = [self._left, *(self._above.get(block.column + step) for step in (-1, 0, 1))]
        for strip in earlier:
            if strip is None:
                continue
            both = strip.box.meet(here.box)
            if both.shape[0] and both.shape[1]:
                self._pairs.append(matches(strip.ids[both.within(strip.box)], here.ids[both.within(here.box)]))

    def _keep(self, block: Block, ids: np.ndarray) -> None:
        """Copies of the block's overlaps with its right and its lower neighbours; the rest of `ids` can go."""
        outer, core = block.outer, block.core
        right = Box(outer.y0, max(outer.x0, core.x1 - self._margin), outer.y1, outer.x1)
        low = Box(max(outer.y0, core.y1 - self._margin), outer.x0, outer.y1, outer.x1)
        self._left = _Strip(right, ids[right.within(outer)].copy())
        self._below[block.column] = _Strip(low, ids[low.within(outer)].copy())
        self._above.pop(block.column - 1, None)  # no later block of this row touches it
