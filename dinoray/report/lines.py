"""Curves over the steps of a training as inline SVG, with axes; colours from the page's CSS classes `c0`, `c1`, ..."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from dinoray.report.curves import Series
from dinoray.report.plots import number

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 40
POINTS = 400
"""Bins of a long curve; of each, its lowest and its highest value are drawn, so that no spike is lost."""
DECADES = 20
"""Where the largest value is above the smallest by this factor, the axis may be logarithmic."""
_DOTS = 60
"""Up to so many values each has a dot."""


@dataclass(frozen=True)
class Chart:
    """A drawn chart: what it shows, its lines for the legend, a note on its axis."""

    title: str
    svg: Markup
    lines: list[Series]
    note: str = ""


def chart(title: str, lines: Sequence[Series], *, log: bool = False, from_zero: bool = False,
          mark: tuple[float, float, str] | None = None) -> Chart | None:
    """Draw curves on one pair of axes, or None where there is no value.

    `log`: a logarithmic axis where the values span much (never with values at or below 0). `from_zero`: a linear axis that
    begins at 0. `mark`: (x, y, text) of one point that is ringed.
    """
    cleaned = [_finite(line) for line in lines]
    cleaned = [line for line in cleaned if len(line.x)]
    if not cleaned:
        return None
    values = np.concatenate([np.asarray(line.y) for line in cleaned])
    steps = np.concatenate([np.asarray(line.x) for line in cleaned])
    logarithmic = log and values.min() > 0 and values.max() / values.min() > DECADES
    least, most = float(values.min()), float(values.max())
    ticks = log_ticks(least, most) if logarithmic else round_ticks(0.0 if from_zero else least, most)
    low, high = min(ticks[0], least), max(ticks[-1], most)
    last = max(1.0, float(steps.max()))
    x_ticks = [tick for tick in round_ticks(0.0, last) if tick == round(tick) and tick <= last]

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log(y / low) / math.log(high / low) if logarithmic else (y - low) / (high - low)
        return _LEFT + x / last * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    parts = [_rules(ticks, x_ticks, last, low, place)]
    for line in cleaned:
        points = [place(x, y) for x, y in _thinned(line)]
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<polyline class="line c{line.colour}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"{dash}/>')
        if len(line.x) <= _DOTS and not line.dashed:
            parts += [f'<circle class="dot c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in points]
    if mark is not None:
        x, y = place(mark[0], mark[1])
        anchor, shift = ("end", -9) if x > WIDTH * 0.6 else ("start", 9)
        above = -9 if y > _TOP + 24 else 16
        parts.append(Markup('<circle class="ring" cx="{}" cy="{}" r="5.5"/><text class="marked" x="{}" y="{}" text-anchor="{}">{}'
                            '</text>').format(f"{x:.1f}", f"{y:.1f}", f"{x + shift:.1f}", f"{y + above:.1f}", anchor, mark[2]))
    svg = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{} over steps">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(Markup(part) for part in parts))
    return Chart(title, svg, cleaned, "log axis" if logarithmic else "")


def _finite(line: Series) -> Series:
    good = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return Series(line.label, line.colour, [x for x, _ in good], [y for _, y in good], line.dashed)


def round_ticks(low: float, high: float) -> list[float]:
    """3 to 7 round numbers that enclose [low, high]."""
    if high <= low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose [low, high], at most about eight: 1, 2, 5, 10, ... or powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [m * 10.0 ** power for power in range(first, last + 1) for m in (1, 2, 5)]
    below, above = max(t for t in fine if t <= low * (1 + 1e-9)), min(t for t in fine if t >= high * (1 - 1e-9))
    fine = [round(t, 12) if t > 1e-9 else t for t in fine if below <= t <= above]
    if 2 <= len(fine) <= 8:
        return fine
    step = max(1, math.ceil((last - first) / 6))
    return [10.0 ** power for power in range(first, last + step, step)]


def _thinned(line: Series) -> list[tuple[float, float]]:
    points = list(zip(line.x, line.y, strict=True))
    if len(points) <= 2 * POINTS:
        return points
    found = []
    for part in np.array_split(np.arange(len(points)), POINTS):
        ordered = sorted(part.tolist(), key=lambda i: points[i][1])
        found += [points[i] for i in sorted({ordered[0], ordered[-1]})]
    return found


def _rules(ticks: list[float], x_ticks: list[float], last: float, low: float, place) -> Markup:
    parts = []
    for tick in ticks:
        (x0, y), (x1, _) = place(0, tick), place(last, tick)
        parts.append(f'<line class="rule" x1="{x0:.1f}" y1="{y:.1f}" x2="{x1:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{x0 - 7:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x, y = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text class="axis-name" x="{_LEFT + (WIDTH - _LEFT - _RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">step'
                 f'</text>')
    return Markup("".join(parts))
