"""Small drawings as inline SVG: numbers only, colours from the page's CSS, so they follow light and dark."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

BINS = 28
WIDTH, HEIGHT = 220, 56
_SPREAD = 30
"""Where percentiles 5 and 95 differ by more than this factor, the axis is logarithmic."""


@dataclass(frozen=True)
class Histogram:
    """A drawn histogram with its axis: texts for the low and high end (empty when all values are equal), the median."""

    svg: Markup
    low: str
    high: str
    median: str
    note: str = ""
    """`log` where the axis is logarithmic, `no values` where there are none."""


def histogram(values: np.ndarray) -> Histogram:
    """Draw values [n]; NaN is left out. The axis spans all values; it is logarithmic where most of
    them span decades."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return Histogram(Markup(""), "", "", "", "no values")
    low, high = float(values.min()), float(values.max())
    median = number(float(np.median(values)))
    if low == high:
        counts = np.zeros(BINS)
        counts[BINS // 2] = len(values)
        return Histogram(_bars(counts), "", "", median)
    p05, p95 = np.percentile(values, (5, 95))
    logarithmic = low > 0 and p95 / p05 > _SPREAD
    axis = np.log10(values) if logarithmic else values
    counts, _ = np.histogram(axis, bins=BINS, range=(float(axis.min()), float(axis.max())))
    return Histogram(_bars(counts), number(low), number(high), median, "log" if logarithmic else "")


def _bars(counts: np.ndarray) -> Markup:
    step = WIDTH / len(counts)
    top = max(1, float(counts.max()))
    bars = []
    for i, count in enumerate(counts):
        if count:
            height = max(1.5, (HEIGHT - 2) * float(count) / top)  # a single image stays visible
            bars.append(f'<rect x="{i * step + 0.5:.1f}" y="{HEIGHT - height:.1f}" width="{step - 1:.1f}" '
                        f'height="{height:.1f}"/>')
    return Markup(f'<svg class="hist" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
                  f'aria-hidden="true">{"".join(bars)}</svg>')


def number(value: float) -> str:
    """A number for people: 3 digits, thousands separated, no exponent between 0.001 and 10 million."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -3 or magnitude >= 7:
        return f"{value:.2g}"
    if magnitude >= 2:
        return f"{value:,.0f}"
    return f"{value:.{2 - magnitude}f}".rstrip("0").rstrip(".")


def size(num_bytes: float) -> str:
    """Bytes for people: `1.5 GB` (decimal)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def ticks(text: str) -> Markup:
    """Text in which `this` stands for code: escaped, with <code>."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 and i < len(parts) - 1 else part
                           for i, part in enumerate(parts))


def duration(seconds: float) -> str:
    """Seconds for people: `0.05 ms`, `80 ms`, `12.3 s`, `4 min 10 s`, `3 h 20 min`."""
    if seconds < 0.9995:
        return f"{number(round(1000 * seconds, 2))} ms"
    if seconds < 100:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
