"""A scatter of many points as inline SVG: one path, so that thousands of points stay small; colours from the page's CSS."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup

from dinoray.report.lines import DECADES, log_ticks, round_ticks
from dinoray.report.plots import number

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 30, 12, 40
POINTS = 4000
"""Most points drawn; of more, evenly spread ones."""


def scatter(x: np.ndarray, y: np.ndarray, *, x_label: str, y_label: str) -> Markup:
    """Points [n] against each other; those that are not finite are left out. An axis is logarithmic where its values are above
    0 and span much. Empty text without a point."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    good = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if not len(good):
        return Markup("")
    good = good[np.unique(np.linspace(0, len(good) - 1, min(len(good), POINTS)).astype(int))]
    x_places, x_ticks = _axis(x[good], _LEFT, WIDTH - _RIGHT)
    y_places, y_ticks = _axis(y[good], HEIGHT - _BOTTOM, _TOP)
    parts = [f'<line class="rule" x1="{_LEFT}" y1="{place:.1f}" x2="{WIDTH - _RIGHT}" y2="{place:.1f}"/>'
             f'<text x="{_LEFT - 7}" y="{place + 3.5:.1f}" text-anchor="end">{text}</text>' for place, text in y_ticks]
    parts += [f'<text x="{place:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{text}</text>' for place, text in x_ticks]
    dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x_places, y_places, strict=True))
    names = Markup('<text class="axis-name" x="{0}" y="{1}" text-anchor="middle">{2}</text><text class="axis-name" x="12" y="{3}" '
                   'text-anchor="middle" transform="rotate(-90 12 {3})">{4}</text>').format(
                       (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5, x_label, (_TOP + HEIGHT - _BOTTOM) / 2, y_label)
    body = Markup("".join(parts)) + names + Markup(f'<path class="points c0" d="{dots}"/>')
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{} against {}">{}</svg>').format(
        WIDTH, HEIGHT, y_label, x_label, body)


def _axis(values: np.ndarray, start: float, end: float) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """(places of the values between `start` and `end`, ticks as (place, text))."""
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high / low > DECADES
    ticks = log_ticks(low, high) if logarithmic else round_ticks(low, high)
    scaled = np.log(values) if logarithmic else values
    marks = [math.log(tick) for tick in ticks] if logarithmic else ticks
    first, last = min(marks[0], float(scaled.min())), max(marks[-1], float(scaled.max()))
    return start + (scaled - first) / (last - first) * (end - start), [
        (start + (mark - first) / (last - first) * (end - start), number(tick)) for mark, tick in zip(marks, ticks, strict=True)]
