"""An image that is too large for one map: segmented in overlapping blocks, whose cells are joined (dinoray.vision.stitching).

In memory are the decoded image, its labels, and two blocks: the next one's maps are computed while the cells of one are
flooded. Intensities are scaled alike everywhere. A cell's feature is the mean over the parts of it that lie in the cores
of blocks, weighted by area.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from dinoray.config import SegmentCellsJob
from dinoray.runners.compute import ComputePool
from dinoray.runners.fields import Field, Segmented, measure
from dinoray.vision.cell_blocks import overlap_for, segment_blocks
from dinoray.vision.resampling2d import resample
from dinoray.vision.segmenter import Segmenter, WindowedImage
from dinoray.vision.stitching import Block, Box, blocks


def middle(shape: tuple[int, int], side: int) -> Box:
    """The centred box of an image of (Y, X) px, at most `side` px a side."""
    (y0, y1), (x0, x1) = ((max(0, (n - side) // 2), min(n, max(0, (n - side) // 2) + side)) for n in shape)
    return Box(y0, x0, y1, x1)


def segment_large(found: Field, segmenter: Segmenter, pool: ComputePool, job: SegmentCellsJob,
                  beat: Callable[[], None]) -> Segmented:
    """Segment and measure an image in blocks of `job.block_px`, at the image's or the model's scale, whichever is finer.
    `beat` is called for each block. Raises ItemError."""
    found.fix_limits()
    factor = found.scale.factor
    model_px = segmenter.config.median_diameter_px
    overlap = overlap_for(found.scale.diameter_px or (None if model_px is None else model_px / factor))
    side = max(int(job.block_px / max(1.0, factor)), overlap)
    work = _Work(found, segmenter, pool, blocks(*found.shape, side, overlap), job.cell_features, beat)
    labels = np.zeros(found.shape, np.int32)

    def write(core: Box, part: np.ndarray) -> None:
        labels[core.y0:core.y1, core.x0:core.x1] = part

    segment_blocks(work.read, *found.shape, work.segment, block_px=side, overlap_px=overlap, write=write)
    return measure(found, labels, (lambda ids: work.features(labels, len(ids))) if job.cell_features else None, job)


@dataclass
class _Running:
    """A block whose windows are being computed."""

    windowed: WindowedImage
    batches: list[Future[tuple[np.ndarray, np.ndarray | None]]]


@dataclass
class _Sums:
    """Of the cells that touch the core of a block: a pixel [2] of each there, its area there, its mean feature there."""

    at: np.ndarray
    area: np.ndarray
    feature: np.ndarray


class _Work:
    """The blocks of one image, one after the other; the one after is always on its way."""

    def __init__(self, found: Field, segmenter: Segmenter, pool: ComputePool, order: list[Block], features: bool,
                 beat: Callable[[], None]):
        self._found, self._segmenter, self._pool, self._features, self._beat = found, segmenter, pool, features, beat
        self._order = order
        self._running: dict[int, _Running] = {}
        self._next = 0
        self._sums: list[_Sums] = []

    def read(self, box: Box) -> Block:
        """What `segment` takes: the block of this outer box."""
        block = self._order[self._next]
        assert block.outer == box, "blocks come in order"
        return block

    def segment(self, block: Block) -> np.ndarray:
        """Labels int32 [y, x] of the block's outer box."""
        number = self._next
        self._next += 1
        for ahead in (number, number + 1):
            if ahead < len(self._order) and ahead not in self._running:
                self._running[ahead] = self._start(self._order[ahead])
        running = self._running.pop(number)
        results = [future.result() for future in running.batches]
        self._beat()
        labels = self._segmenter.cells(running.windowed.merge(m for maps, _ in results for m in maps), block.outer.shape)
        if self._features:
            self._add_sums(block, labels, running.windowed.merge_tokens([t for _, tokens in results for t in tokens]))
        return labels

    def _start(self, block: Block) -> _Running:
        windowed = self._segmenter.plan_image(resample(self._found.seen(block.outer), self._found.scale.factor))
        step = self._segmenter.micro_batch(*windowed.key)
        batches = [self._pool.submit(self._segmenter.predict, windowed.windows[i:i + step], tokens=self._features)
                   for i in range(0, len(windowed.windows), step)]
        return _Running(windowed, batches)

    def _add_sums(self, block: Block, labels: np.ndarray, tokens: np.ndarray) -> None:
        inside = block.core.within(block.outer)
        in_core = np.zeros_like(labels)
        in_core[inside] = labels[inside]
        ids, first, area = np.unique(in_core, return_index=True, return_counts=True)
        ids, first, area = (values[ids > 0] for values in (ids, first, area))
        at = np.stack(np.unravel_index(first, labels.shape), axis=1) + (block.outer.y0, block.outer.x0)
        feature = self._segmenter.cell_features(tokens, in_core, self._found.scale.factor, ids)
        self._sums.append(_Sums(at, area, feature))

    def features(self, labels: np.ndarray, count: int) -> np.ndarray:
        """Mean features float32 [count, D] of the cells 1..count of the joined labels [Y, X]."""
        total = np.zeros((count, self._sums[0].feature.shape[1]))
        area = np.zeros(count)
        for sums in self._sums:
            cell = labels[sums.at[:, 0], sums.at[:, 1]] - 1
            np.add.at(total, cell, sums.feature * sums.area[:, None])
            np.add.at(area, cell, sums.area)
        return (total / area[:, None]).astype(np.float32)
