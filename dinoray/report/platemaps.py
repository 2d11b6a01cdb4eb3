"""Plate maps as inline SVG: one small picture per plate, one colour scale for all of them.

Colours are CSS classes `k0`..`k31` of the page. A well without rows is hollow when inputs of it were planned, and a
dot when it is not part of the run; a red cross marks wells with quarantined inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from dinoray.io.plates import row_letters
from dinoray.report.layout import smallest_layout, well_name
from dinoray.report.plates import METRICS, Place, PlateData, Plates, Well
from dinoray.report.plots import number

LEVELS = 32
_ANCHORS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
"""Matplotlib's viridis at nine places (CC0)."""
RANGE_PERCENTS = (2.0, 98.0)
CHANNELS = 8
MAX_WELLS = 240_000
"""Wells drawn on the whole page: above, fewer plates are drawn."""
TITLED_WELLS = 24_000
"""Up to so many wells each says its value where the pointer rests."""
TITLES = {"focus": "focus (sharpness)", "p50": "median intensity", "p999": "bright end (99.9th percentile)",
          "frac_saturated": "saturated share", "rows": "rows", "sites": "sites", "images": "images",
          "quarantined": "quarantined images", "cells": "cells", "cells_per_image": "cells per image"}


@dataclass
class Map:
    """One plate of a block."""

    name: str
    why: str
    svg: Markup


@dataclass
class Block:
    """One quantity over all drawn plates: `low` and `high` are the ends of the scale; a sentence instead of maps
    where the quantity is the same everywhere."""

    title: str
    maps: list[Map] = field(default_factory=list)
    low: str = ""
    high: str = ""
    clipped: bool = False
    """Values beyond the ends are drawn as the ends."""
    same: str = ""


@dataclass
class PlateView:
    """Everything that the section on plates shows."""

    counts: list[Block] = field(default_factory=list)
    quality: list[tuple[str, list[Block]]] = field(default_factory=list)
    """(channel, its blocks)."""
    lead: str = ""
    notes: list[str] = field(default_factory=list)
    wells: int = 0
    colours: list[tuple[int, str]] = field(default_factory=list)
    """(level, colour) of the CSS."""


def view_plates(plates: Plates) -> PlateView:
    """Draw all maps."""
    if plates.problem:
        return PlateView(lead=plates.problem)
    channels = _most_seen(plates)
    layout = smallest_layout(place for plate in plates.drawn for place in plate.wells)
    blocks = len(channels) * len(METRICS) + 4
    per_plate = blocks * layout[0] * layout[1]
    drawn = plates.drawn[:max(1, MAX_WELLS // per_plate)]
    titled = per_plate * len(drawn) <= TITLED_WELLS
    view = PlateView(wells=layout[0] * layout[1], colours=list(enumerate(colour_ramp())))

    def block(title: str, value: Callable[[Well], float], percents: tuple[float, float]) -> Block:
        return _block(title, drawn, layout, value, percents, titled=titled)

    for name, value in _counts(plates):
        view.counts.append(block(TITLES[name], value, (0, 100)))
    for channel in channels:
        view.quality.append((channel, [block(TITLES[metric], lambda well, m=metric, c=channel: well.mean(c, m), RANGE_PERCENTS)
                                       for metric in METRICS]))
    view.lead, view.notes = _lead(plates, drawn), _notes(plates, drawn, channels)
    return view


def _counts(plates: Plates) -> Iterable[tuple[str, Callable[[Well], float]]]:
    def seen(value: Callable[[Well], int]) -> Callable[[Well], float]:
        return lambda well: value(well) if well.rows else float("nan")

    if not plates.rows_are_images:
        yield "rows", seen(lambda well: well.rows)
    yield ("sites", seen(lambda well: len(well.sites))) if plates.has_sites else ("images", seen(lambda well: well.images))
    if plates.has_cells:
        yield "cells", seen(lambda well: well.cells)
    if plates.rows_are_images:
        yield "cells_per_image", lambda well: well.cells / well.images if well.images else float("nan")
    yield "quarantined", lambda well: well.quarantined if well.planned else float("nan")


def _most_seen(plates: Plates) -> list[str]:
    """The channels in most wells, at most `CHANNELS`, in order of appearance."""
    counts = {name: 0 for name in plates.channels}
    for plate in plates.drawn:
        for well in plate.wells.values():
            for name in well.sums:
                counts[name] += 1
    kept = sorted(counts, key=lambda name: -counts[name])[:CHANNELS]
    return [name for name in counts if name in kept]


def _lead(plates: Plates, drawn: list[PlateData]) -> str:
    if len(drawn) == plates.num_plates:
        return "The only plate." if len(drawn) == 1 else f"All {len(drawn)} plates."
    said = f"{len(drawn)} of {plates.num_plates:,} plates are drawn; {plates.num_plates - len(drawn):,} are not."
    if plates.num_looked_at < plates.num_plates:
        said += (f" {plates.num_looked_at} were looked at: those with the largest share quarantined, and others spread evenly. "
                 "Of these the worst and some typical ones are drawn; the label says which.")
    elif len(drawn) < len(plates.drawn):
        said += " More would make this page too large."
    return said


def _notes(plates: Plates, drawn: list[PlateData], channels: list[str]) -> list[str]:
    notes = []
    if len(channels) < len(plates.channels):
        notes.append(f"The {len(channels)} channels in most wells, of {len(plates.channels)}.")
    for plate in drawn:
        if plate.units_read < plate.units:
            notes.append(f"{plate.name}: {plate.units_read:,} of its {plate.units:,} files were read; hollow wells may have "
                         "rows in the others.")
        if plate.misplaced:
            notes.append(f"{plate.name}: rows whose well is no place on a plate: {plate.misplaced:,}.")
    return notes


def _block(title: str, plates: list[PlateData], layout: Place, value: Callable[[Well], float],
           percents: tuple[float, float], *, titled: bool) -> Block:
    values = [{place: value(well) for place, well in plate.wells.items()} for plate in plates]
    known = np.array([v for one in values for v in one.values() if np.isfinite(v)])
    if not len(known):
        return Block(title, same="no values")
    if known.min() == known.max():
        return Block(title, same=f"{number(float(known[0]))} in every well")
    low, high = (float(v) for v in np.percentile(known, percents))
    if low == high:  # nearly all wells are equal: show the few that are not
        low, high = float(known.min()), float(known.max())
    maps = [Map(plate.name, plate.why, draw_plate(plate, one, layout, low, high, titled=titled))
            for plate, one in zip(plates, values, strict=True)]
    return Block(title, maps, number(low), number(high), bool(known.min() < low or known.max() > high))


def level(value: float, low: float, high: float) -> int:
    """The colour 0..31 of a value on a scale from `low` to `high`; values beyond get its ends."""
    return int(np.clip((value - low) / (high - low) * LEVELS, 0, LEVELS - 1))


def draw_plate(plate: PlateData, values: dict[Place, float], layout: Place, low: float, high: float, *, titled: bool) -> Markup:
    """The map of one plate. `values` by (row, column), NaN for none; one SVG unit is one well."""
    rows, columns = layout
    filled: dict[str, list[tuple[Place, str]]] = {}
    crosses = []
    for row in range(rows):
        for column in range(columns):
            place = row, column
            well, value = plate.wells.get(place), values.get(place, float("nan"))
            if np.isfinite(value):
                kind, text = f"k{level(value, low, high)}", number(value) if titled else ""
            elif well is not None and well.planned:
                kind, text = "planned", "no rows"
            else:
                kind, text = "empty", "not in the run"
            if well is not None and well.quarantined:
                crosses.append(f"M{column + .2:g} {row + .2:g}l.5 .5m0-.5l-.5 .5")
                text += f", {well.quarantined} of {well.planned} quarantined"
            filled.setdefault(kind, []).append((place, f"{well_name(place)}: {text}" if titled else ""))
    body = Markup("").join(_shapes(kind, wells, titled) for kind, wells in sorted(filled.items()))
    if crosses:
        body += Markup('<path class="cross" d="{}"/>').format("".join(crosses))
    margin = rows / 9
    labels = Markup("").join(
        Markup('<text x="{}" y="{}" font-size="{}">{}</text>').format(f"{x:.2f}", f"{y:.2f}", f"{margin * .85:.2f}", text)
        for x, y, text in ((.1, -.2 * margin, "1"), (columns - 1.2 * margin, -.2 * margin, str(columns)),
                           (-1.35 * margin, .9 * margin, "A"), (-1.35 * margin, rows - .1, row_letters(rows))))
    box = f"{-1.4 * margin:.2f} {-1.1 * margin:.2f} {columns + 1.5 * margin:.2f} {rows + 1.2 * margin:.2f}"
    return Markup('<svg class="plate" viewBox="{}" role="img" aria-label="{}">{}{}</svg>').format(box, plate.name, labels, body)


def _shapes(kind: str, wells: list[tuple[Place, str]], titled: bool) -> Markup:
    """Wells of one class: a path each with a title, or one path for all of them."""
    def outline(place: Place) -> str:
        if kind == "empty":
            return f"M{place[1] + .38:g} {place[0] + .38:g}h.2v.2h-.2z"
        return f"M{place[1]} {place[0]}h.92v.92h-.92z"

    if titled:
        paths: Any = Markup("").join(Markup('<path d="{}"><title>{}</title></path>').format(outline(place), text)
                                     for place, text in wells)
    else:
        paths = Markup('<path d="{}"/>').format("".join(outline(place) for place, _ in wells))
    return Markup('<g class="{}">{}</g>').format(kind, paths)


def colour_ramp() -> list[str]:
    """The colours `#rrggbb` of the levels, dark to light, of even steps for the eye."""
    anchors = np.array([[int(text[i:i + 2], 16) for i in (0, 2, 4)] for text in _ANCHORS])
    places = np.linspace(0, len(anchors) - 1, LEVELS)
    mixed = np.stack([np.interp(places, range(len(anchors)), anchors[:, i]) for i in range(3)], axis=1)
    return ["#" + "".join(f"{round(float(v)):02x}" for v in colour) for colour in mixed]
