"""Plate geometry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.report.layout import LAYOUTS, is_edge, parse_well, smallest_layout, well_name


@given(st.tuples(st.integers(0, 31), st.integers(0, 47)))
def test_every_well_has_one_name(place: tuple[int, int]) -> None:
    assert parse_well(well_name(place)) == place
    assert parse_well(well_name(place).lower()) == place


@pytest.mark.parametrize(("name", "place"), [("A1", (0, 0)), ("C03", (2, 2)), ("P24", (15, 23)), ("AF48", (31, 47)),
                                             (" b002 ", (1, 1))])
def test_known_names(name: str, place: tuple[int, int]) -> None:
    assert parse_well(name) == place


@given(st.one_of(st.none(), st.text(max_size=8), st.sampled_from(["AG01", "A49", "A00", "A", "7", "AAA1", "Ä1", "A١", "A1.5"])))
def test_what_is_no_well_is_none(name: str | None) -> None:
    place = parse_well(name)
    assert place is None or parse_well(well_name(place)) == place


def test_smallest_layout_and_edges() -> None:
    assert [smallest_layout([(rows - 1, columns - 1)]) for rows, columns in LAYOUTS] == list(LAYOUTS)
    assert smallest_layout([(0, 3)]) == (3, 4) and smallest_layout([(8, 0)]) == (16, 24)
    assert [is_edge(place, (8, 12)) for place in ((0, 5), (7, 5), (3, 0), (3, 11), (1, 1), (6, 10))] == [True] * 4 + [False] * 2
