"""Plate maps: the right value at the right well, marks, which plates are drawn, hostile names, bounded size."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dinoray.io.items import Item
from dinoray.report import plates as plates_module
from dinoray.report.layout import parse_well, well_name
from dinoray.report.platemaps import LEVELS, Block, colour_ramp, draw_plate, level, view_plates
from dinoray.report.plates import METRICS, PlateData, Plates, Well, read_plates
from dinoray.report.run import open_for_report
from tests.report.outputs import item, write_job, write_units


class Wells(HTMLParser):
    """Of an SVG: {well: (class, title)}, the place where each is drawn, and the outline of the crosses."""

    def __init__(self, svg: str):
        super().__init__()
        self.wells: dict[str, tuple[str, str]] = {}
        self.places: dict[str, tuple[float, float]] = {}
        self.crosses, self.label, self._kind, self._d = "", "", "", ""
        self.feed(svg)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        assert set(values) <= {"class", "d", "viewbox", "role", "aria-label", "x", "y", "font-size"}
        if tag == "svg":
            self.label = values["aria-label"]
        elif tag == "g":
            self._kind = values["class"]
        elif values.get("class") == "cross":
            self.crosses = values["d"]
        elif tag == "path":
            self._d = values["d"]

    def handle_data(self, data: str) -> None:
        name, _, text = data.partition(": ")
        if text and parse_well(name) is not None:
            self.wells[name] = self._kind, text
            x, y = re.match(r"M([\d.]+) ([\d.]+)h", self._d).groups()
            self.places[name] = float(x), float(y)


def block(view_blocks: list[Block], title: str) -> Block:
    """The block with this title."""
    return next(one for one in view_blocks if one.title == title)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Plate P1: A01..B03 with two sites each, B02 quarantined whole, A02 in part; plate P2: A01 only."""
    items = [item(f"P1/{well}_{site}", "P1", well, Site=str(site)) for well in ("A01", "A02", "A03", "B01", "B02", "B03")
             for site in (1, 2)] + [item("P2/A01_1", "P2", "A01", Site="1")]

    def values(one: Item, channel: str, number: int) -> dict[str, float]:
        del number
        row, column = parse_well(one.metadata["Metadata_Well"])
        site = int(one.metadata["Metadata_Site"])
        nan = {"frac_saturated": float("nan")} if one.item_id == "P1/A01_1" else {}
        return {"p50": 100 * row + 10 * column + 2 * site + (1000 if channel == "B" else 0), **nan}

    write_units(tmp_path / "out", items, channels=("A", "B"), values=values, max_items=5,
                bad={"P1/B02_1": "truncated", "P1/B02_2": "empty", "P1/A02_2": "truncated"})
    return tmp_path / "out"


def test_the_value_placed_at_a_well_is_the_mean_of_its_rows(out: Path) -> None:
    plates = read_plates(open_for_report(str(out)))
    assert [plate.name for plate in plates.drawn] == ["P1", "P2"] and plates.channels == ["A", "B"]
    wells = plates.drawn[0].wells
    assert wells[0, 0].mean("A", "p50") == pytest.approx(3) and wells[1, 2].mean("B", "p50") == pytest.approx(1123)
    assert wells[0, 1].mean("A", "p50") == pytest.approx(12), "one site of A02 is quarantined"
    assert wells[0, 0].mean("A", "frac_saturated") == 1, "NaN is no value"
    assert np.isnan(wells[1, 1].mean("A", "p50")) and np.isnan(wells[0, 0].mean("no such", "p50"))
    assert {well_name(place): (well.rows, len(well.sites), well.images, well.planned, well.quarantined)
            for place, well in wells.items()} == {
        "A01": (4, 2, 2, 2, 0), "A02": (2, 1, 1, 2, 1), "A03": (4, 2, 2, 2, 0), "B01": (4, 2, 2, 2, 0), "B02": (0, 0, 0, 2, 2),
        "B03": (4, 2, 2, 2, 0)}
    view = view_plates(plates)
    assert view.wells == 6 and view.lead == "All 2 plates."
    median = block(view.quality[0][1], "median intensity")
    drawn = Wells(median.maps[0].svg)
    assert {name: text for name, (_, text) in drawn.wells.items()} == {
        "A01": "3", "A02": "12, 1 of 2 quarantined", "A03": "23", "B01": "103", "B02": "no rows, 2 of 2 quarantined", "B03": "123"}
    assert drawn.places["B03"] == (2, 1), "column 3 of row B: x, y"
    assert drawn.crosses == "M1.2 0.2l.5 .5m0-.5l-.5 .5M1.2 1.2l.5 .5m0-.5l-.5 .5"
    assert drawn.wells["B02"][0] == "planned" and drawn.wells["B03"][0] == f"k{LEVELS - 1}" and drawn.wells["A01"][0] == "k0"
    other = Wells(median.maps[1].svg)
    assert other.wells["A02"] == ("empty", "not in the run") and other.wells["A01"][0] == "k0", "one scale for both plates"
    assert block(view.quality[0][1], "focus (sharpness)").same == "1 in every well"
    assert block(view.counts, "quarantined images").high == "2"


def test_a_retry_takes_the_crosses_away(out: Path) -> None:
    mended = [item(f"P1/{name}", "P1", name[:3], Site=name[-1]) for name in ("B02_1", "A02_2")]
    write_units(out, mended, generation="001-retry", channels=("A", "B"), bad={"P1/A02_2": "nan"},
                replaces={"P1/B02_1": "truncated", "P1/A02_2": "truncated"})
    wells = read_plates(open_for_report(str(out))).drawn[0].wells
    assert (wells[1, 1].rows, wells[1, 1].planned, wells[1, 1].quarantined) == (2, 2, 1)
    assert (wells[0, 1].planned, wells[0, 1].quarantined) == (2, 1)


def test_an_extension_adds_plates(out: Path) -> None:
    write_units(out, [item("P3/H12", "P3", "H12")], generation="001-extend", channels=("A",))
    plates = read_plates(open_for_report(str(out)))
    assert [plate.name for plate in plates.drawn] == ["P1", "P2", "P3"]
    assert view_plates(plates).wells == 96 and plates.drawn[2].wells[7, 11].planned == 1


def test_cells_are_counted_once_whatever_the_channels(tmp_path: Path) -> None:
    items = [item(f"x{i}", "P", "A01", Site=str(i)) for i in range(2)]
    write_units(tmp_path, items, channels=("A", "B"), objects=7)
    plates = read_plates(open_for_report(str(tmp_path)))
    well = plates.drawn[0].wells[0, 0]
    assert (well.cells, well.rows, well.images, plates.has_cells) == (14, 28, 2, True)
    assert block(view_plates(plates).counts, "cells").same == "14 in every well"


def test_plates_of_one_name_in_two_batches_are_two(tmp_path: Path) -> None:
    write_units(tmp_path, [item(f"{b}/{w}", "P", w, Batch=b) for b in ("b1", "b2") for w in ("A01", "A02")])
    drawn = read_plates(open_for_report(str(tmp_path))).drawn
    assert [plate.name for plate in drawn] == ["b1 / P", "b2 / P"] and [len(plate.wells) for plate in drawn] == [2, 2]


def test_no_plates_no_wells_and_odd_wells(tmp_path: Path) -> None:
    write_units(tmp_path / "none", [item("x")])
    assert "Plates are unknown" in view_plates(read_plates(open_for_report(str(tmp_path / "none")))).lead
    write_units(tmp_path / "wells", [item("x", "P"), item("y", "P")])
    assert "Wells are unknown" in view_plates(read_plates(open_for_report(str(tmp_path / "wells")))).lead
    write_units(tmp_path / "odd", [item("x", "P", "somewhere"), item("y", "P", "A01")])
    view = view_plates(read_plates(open_for_report(str(tmp_path / "odd"))))
    assert view.notes == ["P: rows whose well is no place on a plate: 1."] and view.wells == 6


def test_of_many_plates_the_worst_and_some_typical_are_drawn(tmp_path: Path) -> None:
    items = [item(f"p{p:03d}/{well}_{s}", f"p{p:03d}", well) for p in range(40) for well in ("A01", "A02", "B01") for s in range(2)]
    rng = np.random.default_rng(0)

    def values(one: Item, channel: str, number: int) -> dict[str, float]:
        del channel, number
        return {"focus": (50 if one.plate == "p039" else 1) + 0.1 * rng.random()}

    write_units(tmp_path, items, values=values, max_items=10, bad={"p005/A01_0": "nan", "p031/A01_0": "nan", "p031/A02_0": "nan"})
    plates = read_plates(open_for_report(str(tmp_path)))
    names = [plate.name for plate in plates.drawn]
    assert len(names) == len(set(names)) == plates_module.DRAWN and plates.num_plates == 40
    assert names[:2] == ["p031", "p005"] and names[2] == "p039"
    assert [plate.why for plate in plates.drawn] == (["among those with most quarantined"] * 2
                                                     + ["quality far from the others'"] * 5 + ["typical"] * 5)
    lead = view_plates(plates).lead
    assert lead.startswith("12 of 40 plates are drawn; 28 are not. 24 were looked at")


def test_a_huge_plate_is_read_in_part_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plates_module, "MAX_ROWS", 10)
    write_units(tmp_path, [item(f"x{i}", "P", well_name((i // 12, i % 12))) for i in range(40)], max_items=4)
    plates = read_plates(open_for_report(str(tmp_path)))
    plate = plates.drawn[0]
    assert (plate.units_read, plate.units) == (2, 10) and sum(well.rows for well in plate.wells.values()) == 8
    assert "2 of its 10 files were read" in view_plates(plates).notes[0]


def test_hostile_plate_names_are_text(tmp_path: Path) -> None:
    name = '"><img src=x onerror=alert(1)>'
    write_units(tmp_path, [item("a", name, "A01"), item("b", name, "A02")],
                values=lambda one, channel, number: {"p50": 2.0 if one.item_id == "a" else 3.0})
    view = view_plates(read_plates(open_for_report(str(tmp_path))))
    svg = block(view.quality[0][1], "median intensity").maps[0].svg
    assert Wells(svg).label == name and "<img" not in svg


def test_the_drawing_is_bounded_for_the_largest_plates() -> None:
    rng = np.random.default_rng(0)
    plates = Plates(num_plates=12, num_looked_at=12)
    wells = [Well() for _ in range(31)]
    for well in wells:
        for channel in "ABCDEFGHIJ":
            well.add(channel, 1, 1, 0, rng.random(len(METRICS)), np.ones(len(METRICS), dtype=int))
    for number in range(12):
        full = {place: wells[i % 31] for i, place in enumerate(np.ndindex(32, 48))}
        plates.drawn.append(PlateData((None, None, f"P{number}"), f"P{number}", full))
    view = view_plates(plates)
    size = sum(len(one.svg) for blocks in [view.counts, *(blocks for _, blocks in view.quality)] for b in blocks for one in b.maps)
    assert 1e6 < size < 6e6 and view.wells == 1536 and len(view.quality) == 8
    assert "4 of 12 plates are drawn; 8 are not. More would make this page too large." in view.lead
    assert "The 8 channels in most wells, of 10." in view.notes


def test_colours_and_levels() -> None:
    ramp = colour_ramp()
    assert len(ramp) == len(set(ramp)) == LEVELS and ramp[0] == "#440154" and ramp[-1] == "#fde725"
    assert [level(v, 0, 1) for v in (-5, 0, 0.499, 0.5, 1, 9)] == [0, 0, 15, 16, 31, 31]
    svg = draw_plate(PlateData((None, None, "P"), "P", {(0, 0): Well()}), {(0, 0): 1.0}, (2, 3), 0.0, 2.0, titled=False)
    assert '<g class="k16"><path d="M0 0h.92v.92h-.92z"/></g>' in svg and "title" not in svg


def test_a_run_without_a_record_of_features_is_refused(tmp_path: Path) -> None:
    from dinoray.errors import BadRequest
    from dinoray.io.stores import open_store

    write_units(tmp_path, [item("x")])
    store = open_store(str(tmp_path))
    write_job(store)
    text = store.get("_dinoray/job.json").replace(b'"features"', b'"other"')
    store.put("_dinoray/job.json", text)
    with pytest.raises(BadRequest, match="no report for this kind"):
        open_for_report(str(tmp_path))
