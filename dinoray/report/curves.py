"""Curves and a scatter as inline SVG, with axes: colours from the page's CSS classes `c0`, `c1`, ..., names escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 40
POINTS = 3000
"""Most points of a scatter; of more, evenly spread ones are drawn."""
_WIDE = 30
"""A largest count over the median by this factor makes the axes of a scatter logarithmic."""


@dataclass(frozen=True)
class Series:
    """One curve: y [n] over x [n]; NaN leaves a gap. `dashed`: the second of two that share a colour."""

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def curves(series: Sequence[Series], *, x_label: str, y_label: str) -> Markup:
    """Curves with y from 0 to 1."""
    xs = [x for one in series for x in one.x]
    low, high = min(xs), max(xs)
    span = (high - low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (x - low) / span * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - y * (HEIGHT - _TOP - _BOTTOM)

    parts = [_grid([(i / 5, f"{i / 5:g}") for i in range(6)], [(x, f"{x:g}") for x in sorted(set(xs))[::2]], place,
                   (low, high), (0.0, 1.0)), _labels(x_label, y_label)]
    for one in series:
        points = [place(x, y) for x, y in zip(one.x, one.y, strict=True) if not math.isnan(y)]
        dash = Markup(' stroke-dasharray="6 4"') if one.dashed else Markup("")
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(Markup('<polyline class="line c{}" points="{}"{}/>').format(one.colour, line, dash))
        parts += [Markup(f'<circle class="dot c{one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>') for x, y in points]
    return _svg(parts, f"{y_label} over {x_label}")


def counts_scatter(x: Sequence[int], y: Sequence[int], names: Sequence[str], *, x_label: str, y_label: str) -> Markup:
    """Counts against counts on equal axes, with the diagonal; logarithmic (of count + 1) where they span decades."""
    x, y = np.asarray(x), np.asarray(y)
    top = int(max(x.max(initial=0), y.max(initial=0), 1))
    logarithmic = top > _WIDE * max(1.0, float(np.median(x)))

    def scale(value: float) -> float:
        return math.log1p(value) / math.log1p(top) if logarithmic else value / top

    def place(a: float, b: float) -> tuple[float, float]:
        return _LEFT + scale(a) * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - scale(b) * (HEIGHT - _TOP - _BOTTOM)

    marks = [0, *(10**i for i in range(8) if 10**i <= top)] if logarithmic else _round_marks(top)
    ticks = [(mark, f"{mark:,}") for mark in marks]
    parts = [_grid(ticks, ticks, place, (0, top), (0, top)), _labels(x_label, y_label)]
    (x0, y0), (x1, y1) = place(0, 0), place(top, top)
    parts.append(Markup(f'<line class="diagonal" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'))
    for i in np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).astype(int)):
        a, b = place(x[i], y[i])
        parts.append(Markup('<circle class="point c0" cx="{}" cy="{}" r="3.2"><title>{}: {} true, {} predicted</title></circle>')
                     .format(f"{a:.1f}", f"{b:.1f}", names[i][:200], int(x[i]), int(y[i])))
    return _svg(parts, f"{y_label} against {x_label}")


def _round_marks(top: int) -> list[int]:
    """0 and up to five multiples of 1, 2 or 5 times a power of ten."""
    power = 10 ** max(0, len(str(top)) - 2)
    step = next(m * power for m in (1, 2, 5, 10, 20, 50) if top / (m * power) <= 5)
    return list(range(0, top + 1, step))


def _grid(y_ticks, x_ticks, place, x_range: tuple[float, float], y_range: tuple[float, float]) -> Markup:
    parts = []
    for value, text in y_ticks:
        (x0, y), (x1, _) = place(x_range[0], value), place(x_range[1], value)
        parts.append(f'<line class="rule" x1="{x0:.1f}" y1="{y:.1f}" x2="{x1:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{x0 - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for value, text in x_ticks:
        x, y = place(value, y_range[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{text}</text>')
    return Markup("".join(parts))


def _labels(x_label: str, y_label: str) -> Markup:
    middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
    height = _TOP + (HEIGHT - _TOP - _BOTTOM) / 2
    return Markup('<text class="axis-name" x="{}" y="{}" text-anchor="middle">{}</text><text class="axis-name" x="12" y="{}" '
                  'text-anchor="middle" transform="rotate(-90 12 {})">{}</text>').format(
                      middle, HEIGHT - 5, x_label, height, height, y_label)


def _svg(parts: Sequence[Markup], title: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts))
