"""Curves over steps: axes that hold all values, gaps, logarithms only where they are possible, nothing that breaks."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dinoray.report.curves import Series
from dinoray.report.lines import HEIGHT, WIDTH, chart


def points(svg: str) -> list[list[tuple[float, float]]]:
    return [[tuple(map(float, pair.split(","))) for pair in found.split()] for found in re.findall(r'points="([^"]*)"', svg)]


FINITE = st.floats(-1e9, 1e9, allow_subnormal=False)


@given(st.lists(st.tuples(st.integers(0, 10**7), FINITE | st.just(math.nan) | st.just(math.inf)), max_size=40), st.booleans(),
       st.booleans())
def test_every_value_lies_inside_the_frame(values: list[tuple[int, float]], log: bool, from_zero: bool) -> None:
    drawn = chart("Any", [Series("one", 0, [x for x, _ in values], [y for _, y in values])], log=log, from_zero=from_zero)
    finite = [(x, y) for x, y in values if math.isfinite(y)]
    if not finite:
        assert drawn is None
        return
    HTMLParser().feed(drawn.svg)
    (line,) = points(drawn.svg)
    assert len(line) == len(finite)
    assert all(-0.1 <= x <= WIDTH + 0.1 and -0.1 <= y <= HEIGHT + 0.1 for x, y in line)
    for (x0, y0), (x1, y1), (step0, value0), (step1, value1) in zip(line, line[1:], finite, finite[1:], strict=False):
        assert (x1 - x0) * (step1 - step0) >= -0.11 * abs(step1 - step0)  # coordinates have one decimal
        assert (y0 - y1) * np.sign(value1 - value0) >= -0.11


def test_the_axis_is_logarithmic_only_where_values_span_much_and_are_above_zero() -> None:
    steps = [1.0, 2.0, 3.0]
    assert chart("L", [Series("a", 0, steps, [1e-4, 1e-2, 1.0])], log=True).note == "log axis"
    for values in ([0.0, 1e-2, 1.0], [0.5, 0.6, 1.0], [-1e-4, 1e-2, 1.0]):
        assert chart("L", [Series("a", 0, steps, values)], log=True).note == ""
    y = [point[1] for point in points(chart("L", [Series("a", 0, steps, [1e-4, 1e-2, 1.0])], log=True).svg)[0]]
    assert math.isclose(y[0] - y[1], y[1] - y[2], abs_tol=0.11)


def test_a_long_curve_is_thinned_and_its_spike_stays() -> None:
    values = np.sin(np.arange(20_000) / 500)
    values[12_345] = 9.0
    drawn = chart("Long", [Series("a", 0, np.arange(20_000.0), values)])
    (line,) = points(drawn.svg)
    whole = points(chart("Spike", [Series("a", 0, [12_345.0, 19_999.0], [9.0, float(values.min())])]).svg)[0]
    assert len(line) <= 800 and min(y for _, y in line) == whole[0][1]


def test_the_marked_point_is_ringed_where_it_lies_and_its_text_is_escaped() -> None:
    drawn = chart("M", [Series("a", 1, [0.0, 10.0], [1.0, 0.5])], mark=(10.0, 0.5, "<best>"))
    x, y = points(drawn.svg)[0][1]
    assert f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}"' in drawn.svg and "&lt;best&gt;" in drawn.svg
