"""Perimeter and convex hull of all objects at once: equal to scikit-image's, which takes them one by one."""

from __future__ import annotations

import numpy as np

from dinoray.vision.label_runs import Runs

_S = 1 / np.sqrt(2)
_CROFTON = np.pi / 4 * np.array([0, 1 + _S, _S, 2 * _S, 0, 1 + _S, 0, _S, 1, 2, _S, _S, 1, 2, 0, 0])
"""Crofton's formula in four directions (Rivollier 2010; `skimage.measure.perimeter_crofton`): what a 2 x 2 square adds
to the perimeter, by which of its pixels are in the object: 8, 2 (upper row), 4, 1 (lower row)."""
_ROWS = 512
_HULL_ROWS = 1_000_000


def crofton_perimeter(numbered: np.ndarray, n: int) -> np.ndarray:
    """Perimeter in px, float64 [n], of the objects 1..n of a label image int32 [Y, X]; always above 0."""
    padded, perimeter = np.pad(numbered, 1), np.zeros(n + 1)
    for top in range(0, padded.shape[0] - 1, _ROWS):
        rows = padded[top:top + _ROWS + 1]
        corners = (rows[:-1, :-1], rows[:-1, 1:], rows[1:, :-1], rows[1:, 1:])
        mixed = (corners[0] != corners[1]) | (corners[0] != corners[2]) | (corners[0] != corners[3])
        square = [corner[mixed] for corner in corners]
        for k, label in enumerate(square):
            first = label > 0
            for earlier in square[:k]:  # every object counts once in a square
                first &= earlier != label
            code = sum(weight * (other == label) for weight, other in zip((8, 2, 4, 1), square, strict=True))
            perimeter += np.bincount(label[first], _CROFTON[code[first]], minlength=n + 1)
    return perimeter[1:]


def convex_area(runs: Runs) -> np.ndarray:
    """Pixels in the convex hull of each object, int64 [n]; the hull goes through the middles of the outer pixels' sides
    (`skimage.measure.regionprops` area_convex). Computed in integers: no tolerance."""
    area, n = np.zeros(len(runs.ids), np.int64), len(runs.ids)
    if not n:
        return area
    order = np.argsort(runs.index, kind="stable")  # by object, then row, then column
    index, y, x0, x1 = (values[order] for values in (runs.index, runs.y, runs.x0, runs.x1))
    begins = np.flatnonzero(np.diff(index, prepend=-1).astype(bool) | np.diff(y, prepend=-1).astype(bool))
    ends = np.append(begins[1:], len(index)) - 1
    index, y, left, right = index[begins], y[begins], x0[begins], x1[ends] - 1
    firsts = np.searchsorted(index, np.arange(n + 1))
    first = 0
    while first < n:  # bounded memory: so many rows of objects at a time
        last = max(first + 1, int(np.searchsorted(firsts, firsts[first] + _HULL_ROWS, side="right")) - 1)
        part = slice(firsts[first], firsts[last])
        area[first:last] = _convex_area(index[part] - first, y[part], left[part], right[part], last - first)
        first = last
    return area


def _convex_area(index: np.ndarray, y: np.ndarray, left: np.ndarray, right: np.ndarray, n: int) -> np.ndarray:
    """The same for objects given by the first and last column of each of their rows, sorted by object and row."""
    top, bottom = np.zeros(n, np.int64), np.zeros(n, np.int64)
    top[index[::-1]], bottom[index] = y[::-1], y  # the last one written stays
    height = bottom - top + 1
    rows_of = np.repeat(np.arange(n), height)
    rows = np.arange(len(rows_of)) - np.repeat(np.cumsum(height) - height, height) + top[rows_of]
    first = _least(index, y, left, rows_of, rows)
    last = -_least(index, y, -right, rows_of, rows)
    return np.bincount(rows_of, last - first + 1, minlength=n).astype(np.int64)


def _least(index: np.ndarray, y: np.ndarray, x: np.ndarray, rows_of: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """First whole column of the hull in each row (rows_of, rows), from the first column `x` of each row of the objects.

    In half pixels, a row adds three points: (2y - 1, 2x), (2y, 2x - 1), (2y + 1, 2x), of which those between two
    adjacent rows coincide: the lesser counts.
    """
    at = (2 * y[:, None] + np.array([-1, 0, 1])).ravel()
    value = (2 * x[:, None] + np.array([0, -1, 0])).ravel()
    owner = np.repeat(index, 3)
    twin = np.flatnonzero((owner[1:] == owner[:-1]) & (at[1:] == at[:-1]))
    value[twin] = np.minimum(value[twin], value[twin + 1])
    keep = np.ones(len(at), bool)
    keep[twin + 1] = False
    owner, at, value = _lower_hull(owner[keep], at[keep], value[keep])
    stride = int(at.max(initial=0)) + 2
    i = np.searchsorted(owner * stride + at, rows_of * stride + 2 * rows, side="right") - 1
    run, rise = at[i + 1] - at[i], value[i + 1] - value[i]
    numerator, denominator = value[i] * run + rise * (2 * rows - at[i]), 2 * run
    return -(-numerator // denominator)


def _lower_hull(owner: np.ndarray, at: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points of each owner's lower convex hull; `at` ascends within an owner.

    A point on or above the line between any two others of its owner is no corner of the hull, so all that lie so
    between their neighbours may go at once; repeated, on the owners that still lose points, until none does.
    """
    done = []
    while len(owner):
        inner = np.zeros(len(owner), bool)
        inner[1:-1] = (owner[:-2] == owner[1:-1]) & (owner[1:-1] == owner[2:])
        i = np.flatnonzero(inner)
        above = (value[i] - value[i - 1]) * (at[i + 1] - at[i - 1]) >= (value[i + 1] - value[i - 1]) * (at[i] - at[i - 1])
        lost = i[above]
        active = np.zeros(int(owner.max()) + 1, bool)
        active[owner[lost]] = True
        stay = np.ones(len(owner), bool)
        stay[lost] = False
        still = active[owner]
        done.append((owner[~still], at[~still], value[~still]))
        owner, at, value = owner[still & stay], at[still & stay], value[still & stay]
    owner, at, value = (np.concatenate(column) for column in zip(*done, strict=True))
    order = np.argsort(owner, kind="stable")
    return owner[order], at[order], value[order]
