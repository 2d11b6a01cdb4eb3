"""Cells of an image larger than memory: segmented block by block, with the objects of neighbouring blocks joined.

What is held at once: one block as read and whatever `segment` needs for it, its labels, and the overlaps of one row of
blocks (dinoray.vision.stitching, which also says when the result is that of the whole image). The blocks' labels wait,
compressed, in a scratch folder, because the final ids are known only after the last block.

Intensities must be scaled alike in all blocks, or seams would show: take the limits of the whole image from
`sample_pixels` before, and let `segment` use them.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dinoray.vision.stitching import Box, Stitcher

SAMPLE_BOXES = 8
"""Boxes per axis of `sample_pixels`."""
SAMPLE_PX = 256
"""Side of each of its boxes."""


def overlap_for(diameter_px: float | None) -> int:
    """An overlap of blocks in px for cells of a median diameter: six diameters, so that cells up to three times the median
    are seen whole by both blocks at a seam; at least 128. Where nothing is known: 512."""
    return 512 if diameter_px is None else max(128, 2 * math.ceil(3 * diameter_px))


def sample_pixels(read: Callable[[Box], np.ndarray], height: int, width: int) -> np.ndarray:
    """Raw values [C, n] of up to 8 x 8 boxes of 256 px that are spread evenly over an image: all of it where it is small."""
    def spans(side: int) -> list[tuple[int, int]]:
        if side <= SAMPLE_BOXES * SAMPLE_PX:
            return [(0, side)]
        return [(start, start + SAMPLE_PX) for start in np.linspace(0, side - SAMPLE_PX, SAMPLE_BOXES).round().astype(int).tolist()]

    boxes = [Box(y0, x0, y1, x1) for y0, y1 in spans(height) for x0, x1 in spans(width)]
    return np.concatenate([(pixels := read(box)).reshape(len(pixels), -1) for box in boxes], axis=1)


def segment_blocks(read: Callable[[Box], np.ndarray], height: int, width: int, segment: Callable[[np.ndarray], np.ndarray],
                   *, block_px: int, overlap_px: int, write: Callable[[Box, np.ndarray], None],
                   scratch: str | Path | None = None) -> int:
    """Segment an image of `height` x `width` px in blocks; returns the number of its cells.

    `read(box)` gives the raw pixels [C, y, x] of a box, `segment(pixels)` their label image [y, x] with any ids.
    `write(core, labels)` gets every part of the result once, row by row of blocks of `block_px`: int32 [y, x] with ids 1..n
    over the whole image. `scratch`: folder for the labels meanwhile; default the system's temporary one.

    Raises BadRequest for more than 2^31 - 1 objects, and for `segment` giving another shape.
    """
    with tempfile.TemporaryDirectory(prefix="dinoray-blocks-", dir=scratch) as folder:
        cores: list[Box] = []

        def keep(core: Box, ids: np.ndarray) -> None:
            (Path(folder) / str(len(cores))).write_bytes(zlib.compress(np.ascontiguousarray(ids), level=1))
            cores.append(core)

        stitcher = Stitcher(height, width, block_px, overlap_px, keep)
        for block in stitcher.blocks:
            stitcher.add(block, segment(read(block.outer)))
        table = stitcher.finish()
        for number, core in enumerate(cores):
            ids = np.frombuffer(zlib.decompress((Path(folder) / str(number)).read_bytes()), np.int32).reshape(core.shape)
            write(core, table[ids])
    return int(table.max(initial=0))
