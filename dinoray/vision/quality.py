"""Quality figures of raw pixels, one set per row of the output, and the checks that quarantine an image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dinoray.errors import ItemError

QC_COLUMNS = ("p01", "p50", "p999", "frac_saturated", "focus")
_PERCENTS = (1.0, 50.0, 99.9)
_AT_ONCE = 2**22
"""Values that are counted at once: counting takes 8 bytes for each."""


def percentiles(values: np.ndarray, percents: tuple[float, ...]) -> list[float]:
    """Percentiles with linear interpolation (numpy's default rule) of an array of any shape and dtype.

    8- and 16-bit unsigned values go through an exact histogram, band by band: several times faster, and without a copy.
    """
    flat = values.reshape(-1)
    if flat.dtype in (np.uint8, np.uint16) and flat.size > 4096:
        size = int(flat.max()) + 1
        counts = np.zeros(size, np.int64)
        for band in _bands(flat):
            counts += np.bincount(band, minlength=size)
        return histogram_percentiles(np.arange(size, dtype=np.float64), counts, percents)
    return [float(v) for v in np.percentile(flat.astype(np.float64, copy=False), percents)]


def percentiles_around(values: np.ndarray, common: float, percents: tuple[float, ...]) -> list[float]:
    """The same percentiles of values most of which are `common`: only the others are copied, as float64."""
    flat = values.reshape(-1)
    others = np.sort(np.concatenate([band[band != common].astype(np.float64, copy=False) for band in _bands(flat)]))
    at = int(np.searchsorted(others, common))
    counts = np.ones(len(others) + 1, np.int64)
    counts[at] = flat.size - len(others)
    return histogram_percentiles(np.insert(others, at, common), counts, percents)


def _bands(flat: np.ndarray) -> Iterator[np.ndarray]:
    return (flat[start:start + _AT_ONCE] for start in range(0, flat.size, _AT_ONCE))


def histogram_percentiles(values: np.ndarray, counts: np.ndarray, percents: tuple[float, ...]) -> list[float]:
    """The same percentiles from sorted distinct `values` and how often each occurs."""
    edges = np.cumsum(counts)
    total = int(edges[-1])
    result = []
    for percent in percents:
        position = percent / 100 * (total - 1)
        low = int(np.floor(position))
        ranks = np.searchsorted(edges, [low, min(low + 1, total - 1)], side="right")
        a, b = float(values[ranks[0]]), float(values[ranks[1]])
        result.append(a + (b - a) * (position - low))
    return result


def quality(pixels: np.ndarray) -> dict[str, float | None]:
    """QC of raw pixels [C, h, w] in the file's dtype: the channels of one row, pooled.

    `p01`, `p50`, `p999`: percentiles 1, 50, 99.9. `frac_saturated`: share of values at the dtype's maximum,
    None for float. `focus`: variance of the 3x3 Laplacian over the window's inside, divided by the squared
    mean, of the mean over channels; None where the mean is 0 or a side is below 3 px.
    """
    p01, p50, p999 = percentiles(pixels, _PERCENTS)
    saturated = None
    if np.issubdtype(pixels.dtype, np.integer):
        saturated = float(np.count_nonzero(pixels == np.iinfo(pixels.dtype).max) / pixels.size)
    plane = pixels[0].astype(np.float32) if len(pixels) == 1 else pixels.mean(axis=0, dtype=np.float32)
    return {"p01": p01, "p50": p50, "p999": p999, "frac_saturated": saturated, "focus": focus(plane)}


def focus(plane: np.ndarray) -> float | None:
    """Variance of the 3x3 Laplacian (4 neighbours) of `plane` [h, w] float32 over its squared mean."""
    mean = float(plane.mean(dtype=np.float64))
    if min(plane.shape) < 3 or mean == 0:
        return None
    laplacian = plane[:-2, 1:-1] + plane[2:, 1:-1]
    laplacian += plane[1:-1, :-2]
    laplacian += plane[1:-1, 2:]
    laplacian -= 4 * plane[1:-1, 1:-1]
    return float(laplacian.var(dtype=np.float64) / mean**2)


def check_finite(pixels: np.ndarray) -> None:
    """Raises ItemError `nan` for NaN or infinity anywhere in pixels of any shape and dtype."""
    if np.issubdtype(pixels.dtype, np.floating) and not np.isfinite(pixels).all():
        bad = int(pixels.size - np.count_nonzero(np.isfinite(pixels)))
        raise ItemError("nan", f"{bad} of {pixels.size} values are NaN or infinite", todo="fill or mask them")


def check_pixels(pixels: np.ndarray) -> None:
    """Refuse what cannot give meaningful features: pixels [C, Y, X].

    Raises ItemError `nan` for NaN or infinity anywhere, `constant` when every channel holds one value only.
    """
    check_finite(pixels)
    if all(channel.min() == channel.max() for channel in pixels):
        raise ItemError("constant", f"every channel is constant ({pixels[0].flat[0]})",
                        todo="nothing can be seen in it; check the acquisition")
