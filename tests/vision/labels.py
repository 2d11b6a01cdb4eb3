"""Label images for tests: random blobs, the four cells of the issue, concave cells."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


def disc(shape: tuple[int, int], y: float, x: float, radius: float) -> np.ndarray:
    """Mask of a disc."""
    rows, columns = np.ogrid[:shape[0], :shape[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius ** 2


def four_cells() -> np.ndarray:
    """Four cells, three of them touching: two large ones, a small one wedged between them, and one by itself."""
    labels = np.zeros((96, 128), np.int32)
    for i, (y, x, radius) in enumerate([(40, 30, 16), (40, 63, 16), (55, 46, 7), (70, 100, 16)], 1):
        labels[disc(labels.shape, y, x, radius) & (labels == 0)] = i
    return labels


def blobs(seed: int, shape: tuple[int, int], count: int, radius: tuple[int, int] = (1, 6)) -> np.ndarray:
    """Up to `count` discs and boxes that touch and cut each other, ids in random order; connected or not."""
    rng, labels = np.random.default_rng(seed), np.zeros(shape, np.int32)
    for i in rng.permutation(count) + 1:
        y, x, r = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.integers(*radius, endpoint=True)
        if rng.random() < 0.5:
            labels[disc(shape, y, x, r)] = i
        else:
            labels[max(0, int(y) - r):int(y) + r, max(0, int(x) - r):int(x) + r] = i
    return labels


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """True when two label images have the same background and the same objects, whatever their ids."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return bool(((pairs[0] == 0) == (pairs[1] == 0)).all()
                and len(np.unique(pairs[0])) == pairs.shape[1] == len(np.unique(pairs[1])))


def label_images(side: int = 24, ids: int = 5):
    """Hypothesis strategy: small label images [Y, X] of blobs, or of plain noise (scattered instances)."""
    sides = st.integers(1, side)
    cut = st.builds(blobs, st.integers(0, 2 ** 32 - 1), st.tuples(sides, sides), st.integers(0, ids))
    noise = st.builds(lambda seed, shape: np.random.default_rng(seed).integers(0, ids + 1, shape).astype(np.int32),
                      st.integers(0, 2 ** 32 - 1), st.tuples(sides, sides))
    return st.one_of(cut, noise)
