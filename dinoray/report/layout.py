"""Plate geometry: well names to (row, column), and the standard layout that holds them. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dinoray.io.plates import row_letters

LAYOUTS = ((2, 3), (3, 4), (4, 6), (6, 8), (8, 12), (16, 24), (32, 48))
"""(rows, columns) of plates with 6, 12, 24, 48, 96, 384 and 1536 wells."""
_NAME = re.compile(r"([A-Z]{1,2})0*([1-9]\d?)", re.ASCII)


def parse_well(name: str | None) -> tuple[int, int] | None:
    """`C03` -> (2, 2), 0-based (row, column), `AF48` -> (31, 47); None for what is no place on a plate."""
    match = _NAME.fullmatch((name or "").strip().upper())
    if match is None:
        return None
    row = 0
    for letter in match[1]:
        row = row * 26 + ord(letter) - ord("A") + 1
    place = row - 1, int(match[2]) - 1
    return place if place[0] < LAYOUTS[-1][0] and place[1] < LAYOUTS[-1][1] else None


def well_name(place: tuple[int, int]) -> str:
    """(2, 2) -> `C03`."""
    return f"{row_letters(place[0] + 1)}{place[1] + 1:02d}"


def smallest_layout(places: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(rows, columns) of the smallest standard plate with all these wells."""
    rows, columns = 0, 0
    for row, column in places:
        rows, columns = max(rows, row), max(columns, column)
    return next(layout for layout in LAYOUTS if rows < layout[0] and columns < layout[1])


def is_edge(place: tuple[int, int], layout: tuple[int, int]) -> bool:
    """Whether a well lies at the border of its plate."""
    return place[0] in (0, layout[0] - 1) or place[1] in (0, layout[1] - 1)
