"""Which objects of a label image lie near which: edge to edge for all at once, and centroid to centroid."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial import cKDTree

TOUCHING = math.sqrt(2)
"""Distance of the centres of two pixels that touch at a corner."""
_HELD = 4_000_000


def _boundary(padded: np.ndarray, pad: int) -> np.ndarray:
    """Flat places of the objects' pixels that have one of another id (or none) above, below, left or right; by object.

    The two nearest pixels of two objects are always among them.
    """
    inner = (slice(pad, -pad), slice(pad, -pad))
    centre, edge = padded[inner], np.zeros(padded.shape, bool)
    for axis in (0, 1):
        for step in (-1, 1):
            edge[inner] |= np.roll(padded, step, axis)[inner] != centre
    edge[inner] &= centre > 0
    places = np.flatnonzero(edge)
    return places[np.argsort(padded.ravel()[places], kind="stable")]


def pairs_within(numbered: np.ndarray, n: int, distance: float) -> np.ndarray:
    """Pairs int64 [m, 2], 0-based and smaller first, of the objects 1..n of a label image int32 [Y, X] that have pixels whose
    centres are at most `distance` px apart. Time grows with the boundary's length x distance^2."""
    reach = int(distance)
    if n < 2 or reach < 1:
        return np.zeros((0, 2), np.int64)
    padded = np.pad(numbered, reach)
    places, flat, width = _boundary(padded, reach), padded.ravel(), padded.shape[1]
    here, found, held = flat[places], [], 0
    for dy in range(reach + 1):
        for dx in range(-reach, reach + 1):
            if dy * dy + dx * dx > distance * distance or (dy == 0 and dx <= 0):
                continue  # the opposite offset finds the same pairs
            there = flat[places + (dy * width + dx)]
            near = np.flatnonzero((there != here) & (there > 0))
            a, b = here[near].astype(np.int64), there[near].astype(np.int64)
            keys = np.minimum(a, b) * (n + 1) + np.maximum(a, b)
            keys = keys[np.diff(keys, prepend=-1) != 0]  # boundaries run on: the next pixel has the same neighbour
            found.append(keys)
            held += len(keys)
            if held > _HELD:
                found = [np.unique(np.concatenate(found))]
                held = 0
    keys = np.unique(np.concatenate(found))
    return np.stack(np.divmod(keys, n + 1), axis=1) - 1


def partners(pairs: np.ndarray, n: int) -> np.ndarray:
    """How many pairs each of n objects is in, int64 [n]."""
    return np.bincount(pairs.ravel(), minlength=n)


def nearest(centroids: np.ndarray) -> np.ndarray:
    """Distance in px from each centroid float [n, 2] to the nearest other one, float64 [n]; NaN for a single object."""
    if len(centroids) < 2:
        return np.full(len(centroids), np.nan)
    return cKDTree(centroids).query(centroids, k=2)[0][:, 1]
