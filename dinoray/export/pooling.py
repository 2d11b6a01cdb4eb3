"""Mean and median over runs of rows, NaN left out; the only arithmetic of an export, in float64."""

from __future__ import annotations

import numpy as np

STEP_BYTES = 32 * 2**20
"""Rows are taken in steps near this size, so that the float64 copies stay small."""


def pool(values: np.ndarray, starts: np.ndarray, how: str) -> np.ndarray:
    """Pool runs of rows: values [n, D] (float16 or float32), run i = rows starts[i]..starts[i+1]-1 -> [runs, D] float64.

    `how` is `mean` or `median`. `starts` is strictly increasing from 0. NaN counts as absent, as in pandas; NaN comes
    out where a run has nothing else.
    """
    pooled = np.full((len(starts), values.shape[1]), np.nan)
    ends = np.append(starts[1:], len(values))
    step = max(1, STEP_BYTES // max(1, values.shape[1] * 8))
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + step, side="right")))
        part = values[starts[first]:ends[last - 1]].astype(np.float64)
        runs = starts[first:last] - starts[first]
        pooled[first:last] = part if len(part) == len(runs) else _mean(part, runs) if how == "mean" else _median(part, runs)
        first = last
    return pooled


def _mean(part: np.ndarray, starts: np.ndarray) -> np.ndarray:
    known = ~np.isnan(part)
    counts = np.add.reduceat(known, starts, axis=0, dtype=np.int64)
    with np.errstate(invalid="ignore"):  # inf - inf, and 0 / 0 where a run is all NaN: both are NaN
        return np.add.reduceat(np.where(known, part, 0.0), starts, axis=0) / counts


def _median(part: np.ndarray, starts: np.ndarray) -> np.ndarray:
    lengths = np.diff(np.append(starts, len(part)))
    medians = np.empty((len(starts), part.shape[1]))
    for length in np.unique(lengths):  # runs of equal length are sorted together
        chosen = np.flatnonzero(lengths == length)
        runs = np.sort(part[starts[chosen][:, None] + np.arange(length)], axis=1)  # [runs, length, D], NaN last
        count = np.sum(~np.isnan(runs), axis=1, keepdims=True)
        low = np.take_along_axis(runs, np.maximum((count - 1) // 2, 0), axis=1)  # NaN itself where the count is 0
        high = np.take_along_axis(runs, count // 2, axis=1)
        with np.errstate(invalid="ignore"):
            medians[chosen] = np.where(low == high, low, (low + high) / 2)[:, 0]
    return medians
