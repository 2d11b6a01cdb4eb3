"""The probe: planted effects are found, absent ones are not, sites of a well never straddle; which plates are taken."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.io.items import Item
from dinoray.report import leakage as leakage_module
from dinoray.report.layout import parse_well, well_name
from dinoray.report.leakage import (
    Labelled,
    Leakage,
    _read_images,
    choose_plates,
    collect,
    measure,
    measure_leakage,
    sentence,
)
from dinoray.report.probe import Probe, evenly_by_class, probe
from dinoray.report.run import open_for_report
from dinoray.report.sample import read_sample
from tests.report.outputs import item, write_units

DIM = 24
WELLS = [(row, column) for row in range(4) for column in range(6)]


def images(seed: int, *, plates: int = 4, sites: int = 2, plate: float = 0, row: float = 0, edge: float = 0, batch: float = 0,
           well: float = 1) -> list[Labelled]:
    """Images of 24 wells per plate; the sizes of the effects are standard deviations (a well's own content: `well`)."""
    rng = np.random.default_rng(seed)
    of_plate, of_row, of_edge = rng.normal(size=(plates, DIM)), rng.normal(size=(4, DIM)), rng.normal(size=(2, DIM))
    of_batch = rng.normal(size=(2, DIM))
    found = []
    for number in range(plates):
        for place in WELLS:
            content = well * rng.normal(size=DIM)
            is_edge = place[0] in (0, 3) or place[1] in (0, 5)
            mean = (plate * of_plate[number] + row * of_row[place[0]] + edge * of_edge[int(is_edge)]
                    + batch * of_batch[number % 2] + content)
            for _ in range(sites):
                key = ("s", f"b{number % 2}", f"P{number}")
                found.append(Labelled(key, place, (mean + 0.3 * rng.normal(size=DIM)).astype(np.float32)))
    return found


def scores(result: Leakage) -> dict[str, Probe]:
    """The first channel's probe by question."""
    return {target.title: target.probes[0] for target in result.targets}


@pytest.mark.parametrize(("effect", "title"), [("plate", "plate"), ("row", "row of the plate"), ("edge", "edge or interior")])
def test_a_planted_effect_is_found_and_the_others_are_not(effect: str, title: str) -> None:
    found = scores(measure({"DNA": images(0, **{effect: 3.0})}))
    assert found[title].score > 0.95 and found[title].above_chance
    others = {"plate", "row of the plate", "edge or interior"} - {title} - ({"edge or interior"} if effect == "row" else set())
    for other in others - ({"row of the plate"} if effect == "edge" else set()):  # rows A and D are edge
        assert not found[other].above_chance, (other, found[other])


def test_a_batch_effect_is_seen_on_plates_that_were_not_fitted_on() -> None:
    found = scores(measure({"DNA": images(1, plates=16, batch=3.0)}))
    assert found["batch"].score > 0.95 and found["batch"].above_chance and found["batch"].groups == 16
    assert "source" in found and found["source"].problem == "one only"
    plain = scores(measure({"DNA": images(1, plates=16, plate=3.0)}))
    assert plain["plate"].score > 0.95 and not plain["batch"].above_chance, "a plate's own mark is no batch effect"


def test_chance_is_seldom_exceeded() -> None:
    alarms = Counter()
    for seed in range(20):
        for title, one in scores(measure({"DNA": images(seed)})).items():
            alarms[title] += one.above_chance
            if not one.problem:
                assert one.chance < one.bound < 1 and 0 <= one.score <= 1
    assert sum(alarms.values()) <= 5 and max(alarms.values()) <= 3, alarms  # of 20 for each question


def test_sites_of_a_well_never_straddle() -> None:
    """Sites that are copies of each other would give the plate away at once."""
    copies = images(3, sites=6, well=5.0)
    found = scores(measure({"DNA": copies}))
    assert not found["plate"].above_chance
    labels, groups = [one.plate[-1] for one in copies], [str(i) for i in range(len(copies))]
    straddling = probe(np.stack([one.vector for one in copies]), labels, groups)
    assert straddling.score > straddling.bound + 0.1, "without groups the same features look like a plate effect"


def test_too_few_to_tell() -> None:
    vectors = np.random.default_rng(0).normal(size=(12, 4))
    assert probe(vectors, ["a"] * 12, list("abcdefghijkl")).problem == "one only"
    assert probe(vectors[:0], [], []).problem == "none known"
    assert "too few" in probe(vectors, ["a"] * 6 + ["b"] * 6, ["w1", "w2"] * 6).problem
    assert "too few to tell" in probe(vectors[:6], ["a"] * 3 + ["b"] * 3, ["1", "2", "3"] * 2).problem
    assert "more than" in probe(np.zeros((300, 2)), [str(i % 60) for i in range(300)], [str(i) for i in range(300)]).problem
    few = measure({"DNA": [one for one in images(0) if one.place in WELLS[:2]]})
    assert all(target.sentence.startswith("Cannot be told: ") for target in few.targets)


def test_sentences() -> None:
    strong, weak, none = Probe(0.93, 0.25, 0.4, 4, 96, 200), Probe(0.45, 0.25, 0.4, 4, 96, 200), Probe(0.3, 0.25, 0.4, 4, 96, 200)
    assert sentence("plate", [strong], ["DNA"]) == \
        "0.93 where chance is 0.25: plate effects dominate; see docs/profiling.md."
    assert sentence("plate", [none, weak, Probe(problem="one only")], ["DNA", "ER", "AGP"]) == \
        "0.45 where chance is 0.25 (channel ER, of 3): plate effects are clear; see docs/profiling.md."
    assert sentence("edge or interior", [none], ["DNA"]) == \
        "0.30 where chance is 0.25: no edge effect seen; chance alone gets up to 0.40."


def test_several_plates_of_several_batches_are_taken() -> None:
    few = {(None, None, f"P{i}"): (None, None) for i in range(16)}
    assert choose_plates(few) == set(few)
    many = {(None, f"b{i // 30}", f"P{i}"): (None, f"b{i // 30}") for i in range(300)}
    chosen = choose_plates(many)
    assert len(chosen) == 16 and sorted(Counter(key[1] for key in chosen).values()) == [4] * 4
    one = {(None, "b", f"P{i}"): (None, "b") for i in range(300)}
    assert len(choose_plates(one)) == 16


@given(st.lists(st.sampled_from("abcdefg"), max_size=80), st.integers(1, 60), st.integers(0, 5))
def test_a_selection_is_bounded_ordered_and_fair(labels: list[str], limit: int, turn: int) -> None:
    kept = evenly_by_class(labels, limit, turn)
    assert kept == sorted(set(kept)) and len(kept) <= max(limit, 0) and (len(kept) == len(labels) or len(labels) > limit)
    if len(labels) > limit >= len(set(labels)):
        counts, share = Counter(labels), limit // len(set(labels))
        assert Counter(labels[i] for i in kept) == {label: min(share, n) for label, n in counts.items()}


def test_rows_become_images(tmp_path: Path) -> None:
    items = [item("x", "P", "B02"), item("y", "P", "nowhere"), item("z", None, "A01")]
    write_units(tmp_path, items, channels=("A", "B"), objects=3, vector=lambda one, channel: np.full(4, ord(channel)))
    sample = read_sample(open_for_report(str(tmp_path)))
    found = collect(sample.table, sample.vectors)
    assert {channel: [(one.plate[-1], one.place, one.vector[0]) for one in ones] for channel, ones in found.items()} == {
        "A": [("P", (1, 1), 65.0)], "B": [("P", (1, 1), 66.0)]}


def effects(tmp_path: Path, plates: int) -> Path:
    """A run whose vectors know the plate in channel B and nothing in channel A."""
    rng = np.random.default_rng(0)
    marks = rng.normal(size=(plates, 8)) * 4
    items = [item(f"P{p}/{well_name(w)}_{s}", f"P{p}", well_name(w)) for p in range(plates) for w in WELLS for s in (1, 2)]
    contents: dict[tuple[str, str, str], np.ndarray] = {}

    def vector(one: Item, channel: str) -> np.ndarray:
        well = contents.setdefault((one.plate or "", one.metadata["Metadata_Well"] or "", channel), rng.normal(size=8))
        return well + (marks[int((one.plate or "P0")[1:])] if channel == "B" else 0) + 0.2 * rng.normal(size=8)

    write_units(tmp_path, items, channels=("A", "B"), max_items=12, vector=vector)
    return tmp_path


def test_of_a_run_by_channel(tmp_path: Path) -> None:
    run = open_for_report(str(effects(tmp_path, 4)))
    result = measure_leakage(run, read_sample(run))
    plate = result.targets[0]
    assert result.channels == ["A", "B"] and (result.num_plates, result.num_wells, result.num_images) == (4, 96, 192)
    assert plate.title == "plate" and not plate.probes[0].above_chance and plate.probes[1].score > 0.95
    assert "(channel B, of 2): plate effects dominate" in plate.sentence
    assert [target.title for target in result.targets] == ["plate", "row of the plate", "column of the plate", "edge or interior"]


def test_a_large_run_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage_module, "MAX_PLATES", 6)
    monkeypatch.setattr(leakage_module, "MAX_FILES", 12)
    monkeypatch.setattr(leakage_module, "MAX_IMAGES", 90)
    run = open_for_report(str(effects(tmp_path, 20)))
    opened: list[str] = []
    real = run.store.open
    monkeypatch.setattr(run.store, "open", lambda key: opened.append(key) or real(key))
    found = _read_images(run)
    assert len(opened) == len(set(opened)) == 12
    assert {len(ones) for ones in found.values()} == {72}, "at most 7 from each of 12 files, as many of each of its 6 wells"
    assert len({one.plate for one in found["A"]}) == 6
    assert {one.place for one in found["A"]} == set(WELLS), "not the first and last rows of every plate"
    result = measure_leakage(run, read_sample(run, max_rows=50))
    assert result.all_plates == 20 and result.num_plates == 6 and result.targets[0].probes[1].score > 0.9


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    write_units(tmp_path / "plain", [item("x"), item("y")])
    run = open_for_report(str(tmp_path / "plain"))
    assert "Plate and well are unknown" in measure_leakage(run, read_sample(run)).problem
    write_units(tmp_path / "odd", [item("x", "P", "here")])
    run = open_for_report(str(tmp_path / "odd"))
    assert "No row names a plate and a well" in measure_leakage(run, read_sample(run)).problem
    write_units(tmp_path / "none", [item("x", "P", "A01")], bad={"x": "nan"})
    run = open_for_report(str(tmp_path / "none"))
    assert measure_leakage(run, read_sample(run)).problem == "No rows."
    assert parse_well("A01") == (0, 0)
