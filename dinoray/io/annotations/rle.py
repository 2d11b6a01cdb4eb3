"""COCO's run lengths: counts of pixels, by turns background and object, down the columns (column-major order).

The compressed form is six bits of a count per character, as pycocotools writes it. Ours checks what it reads: pycocotools
writes beyond its buffer when the counts of a damaged file do not add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def parse_counts(text: bytes) -> np.ndarray:
    """Counts [N] int64 of the compressed form. Raises ValueError for text that is none."""
    counts: list[int] = []
    value = shift = 0
    for byte in text:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 50:
            raise ValueError(f"character {byte} within run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]  # from the fourth on: the difference to the one before the last
        counts.append(value)
        value = shift = 0
    if shift:
        raise ValueError("run lengths that end within a count")
    return np.array(counts, np.int64)


def object_runs(counts: Sequence[int] | np.ndarray, num_pixels: int) -> np.ndarray:
    """Where an object's pixels are, [N, 2] int64: start and end of its runs in the column-major image.

    Raises ValueError when the counts are negative or do not add up to the image.
    """
    lengths = np.asarray(counts, np.int64)
    if (lengths < 0).any() or (lengths > num_pixels).any() or lengths.sum() != num_pixels:
        raise ValueError(f"run lengths over {lengths.sum():,} pixels for an image of {num_pixels:,}")
    ends = np.cumsum(lengths)
    runs = np.stack([ends - lengths, ends], 1)[1::2]
    return runs[runs[:, 1] > runs[:, 0]]
