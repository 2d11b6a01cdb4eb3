"""Per well of a plate: quality of the raw pixels and counts, from a bounded part of an output.

Plates are chosen first, then all their rows are read (columns of quality and metadata only, never vectors),
one file at a time. Of many plates, those that lost most inputs, those whose quality is farthest from the
others', and a few typical ones are kept. A value of a well is the mean over its rows of one channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dinoray.errors import OutputDamaged
from dinoray.io.items import Item
from dinoray.report.layout import parse_well
from dinoray.report.pictures import one_line
from dinoray.report.quarantine import plates_by_loss
from dinoray.report.run import Part, Run
from dinoray.report.sample import evenly

METRICS = ("focus", "p50", "p999", "frac_saturated")
PLATE_COLUMNS = ("Metadata_Source", "Metadata_Batch", "Metadata_Plate")
DRAWN = 12
"""Plates on the page at most."""
LOOKED_AT = 24
"""Plates read at most when there are more than `DRAWN`."""
LOST_MOST, FARTHEST = 4, 5
"""Of the drawn ones: by share quarantined, and by quality; the rest are the most typical."""
MAX_ROWS = 4_000_000
"""Rows read at most (some 50 bytes each, one file at a time)."""
NAME_CHARS = 120
"""Longest name of a plate, which stands beside each of its maps."""
Place = tuple[int, int]
Key = tuple[str | None, ...]
"""Source, batch (None where unknown) and plate."""


@dataclass(eq=False)
class Well:
    """What one well holds. `sums` and `counts` per channel: [metrics], to give means."""

    rows: int = 0
    images: int = 0
    """Distinct inputs with rows, of the channel that has most."""
    cells: int = 0
    sites: set[str] = field(default_factory=set)
    planned: int = 0
    quarantined: int = 0
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    _images: dict[str, int] = field(default_factory=dict)
    _cells: dict[str, int] = field(default_factory=dict)

    def add(self, channel: str, rows: int, images: int, cells: int, sums: np.ndarray, counts: np.ndarray) -> None:
        """Count the rows of one channel in one file."""
        self.rows += rows
        self._images[channel] = self._images.get(channel, 0) + images
        self._cells[channel] = self._cells.get(channel, 0) + cells
        self.images, self.cells = max(self._images.values()), max(self._cells.values())
        self.sums[channel] = self.sums.get(channel, 0) + sums
        self.counts[channel] = self.counts.get(channel, 0) + counts

    def mean(self, channel: str, metric: str) -> float:
        """Mean of a metric over the rows of a channel; NaN where there is none."""
        place = METRICS.index(metric)
        count = self.counts[channel][place] if channel in self.counts else 0
        return float(self.sums[channel][place] / count) if count else float("nan")


@dataclass(eq=False)
class PlateData:
    """One plate: its name as shown, why it is drawn, its wells by (row, column)."""

    key: Key
    name: str
    wells: dict[Place, Well] = field(default_factory=dict)
    why: str = ""
    misplaced: int = 0
    """Rows whose well is no place on a plate."""
    units_read: int = 0
    units: int = 0

    def well(self, place: Place) -> Well:
        """The well at a place, made when it is new."""
        return self.wells.setdefault(place, Well())


@dataclass
class Plates:
    """The plates to draw, worst first, and how many there are."""

    drawn: list[PlateData] = field(default_factory=list)
    num_plates: int = 0
    num_looked_at: int = 0
    has_sites: bool = False
    has_cells: bool = False
    rows_are_images: bool = False
    """Whether the tables have a row for each image with its number of cells, not for each cell or tile."""
    problem: str = ""
    """Why there are none, as a sentence."""

    @property
    def channels(self) -> list[str]:
        """Channels of the drawn plates, in order of appearance."""
        return list(dict.fromkeys(c for plate in self.drawn for well in plate.wells.values() for c in well.sums))


def read_plates(run: Run) -> Plates:
    """Choose plates and read them. Raises OutputDamaged when a file that a receipt names is unreadable."""
    parts: dict[str, list[Part]] = {}
    for part in run.parts:
        if part.plate:
            parts.setdefault(part.plate, []).append(part)
    names = list(dict.fromkeys(plate for part in run.generations if part.kind != "retry"
                               for plate in part.plan.index["plate"].to_pylist() if plate))
    if not names:
        return Plates(problem="Plates are unknown here, so there are no plate maps. They come from the names of files and "
                              "folders (`--pattern`), or from columns Metadata_Plate and Metadata_Well of a manifest.")
    losses = [loss.plate for loss in plates_by_loss(run)]
    chosen = names
    if len(names) > DRAWN:
        lost = losses[:LOST_MOST]
        others = [name for name in names if name not in lost]
        chosen = lost + [others[i] for i in evenly(len(others), LOOKED_AT - len(lost))]
    found, result = {}, Plates(num_plates=len(names), num_looked_at=len(chosen))
    rows_left = MAX_ROWS
    for name in chosen:
        wanted = _within(parts.get(name, []), max(rows_left, MAX_ROWS // LOOKED_AT))
        rows_left -= sum(part.rows for part in wanted)
        for part in wanted:
            _add_part(run, part, found, result)
        for plate in found.values():
            if plate.key[-1] == name:
                plate.units_read, plate.units = len(wanted), len(parts.get(name, []))
    _add_planned(run.planned_of_plates(set(chosen)), run, found)
    usable = [plate for plate in found.values() if plate.wells]
    if not usable:
        result.problem = ("Wells are unknown here (no Metadata_Well that is a place on a plate, such as C03), so there are "
                          "no plate maps.")
        return result
    result.drawn = _choose(usable, losses) if len(names) > DRAWN else _by_loss(usable, losses)
    _name(result.drawn)
    return result


def _within(parts: list[Part], max_rows: int) -> list[Part]:
    """The files of a plate, or so many of them, spread evenly, that have about `max_rows` rows."""
    total = sum(part.rows for part in parts)
    if total <= max_rows:
        return parts
    return [parts[i] for i in evenly(len(parts), max(1, len(parts) * max_rows // total))]


def _add_part(run: Run, part: Part, found: dict[Key, PlateData], result: Plates) -> None:
    try:
        with run.store.open(part.key) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            columns = [*PLATE_COLUMNS, "Metadata_Well", "Metadata_Site", "item_id", "channel", "object_id", "num_cells", *METRICS]
            columns = [name for name in columns if name in names]
            if "Metadata_Well" not in names or "Metadata_Plate" not in names:
                return
            table = parquet.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise OutputDamaged(f"features cannot be read: {error}", where=f"{run.store.url}/{part.key}",
                            todo="see `dinoray verify`, then run the extraction again") from error
    result.has_sites |= "Metadata_Site" in columns
    result.has_cells |= "object_id" in columns or "num_cells" in columns
    result.rows_are_images |= "num_cells" in columns
    for metric in METRICS:  # NaN is no value
        values = table[metric]
        table = table.set_column(table.column_names.index(metric), metric,
                                 pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type)))
    keys = [name for name in (*PLATE_COLUMNS, "Metadata_Well") if name in columns]
    asked = [("item_id", "count"), ("item_id", "count_distinct")] + ([("object_id", "count")] if "object_id" in columns else [])
    asked += [("num_cells", "sum")] if "num_cells" in columns else []
    asked += [(metric, how) for metric in METRICS for how in ("sum", "count")]
    for row in table.group_by([*keys, "channel"]).aggregate(asked).to_pylist():
        plate, place = _plate_of(row, found), parse_well(row["Metadata_Well"])
        if place is None:
            plate.misplaced += row["item_id_count"]
            continue
        cells = row.get("object_id_count") or row.get("num_cells_sum") or 0
        plate.well(place).add(row["channel"], row["item_id_count"], row["item_id_count_distinct"], cells,
                              np.array([row[f"{m}_sum"] or 0.0 for m in METRICS]), np.array([row[f"{m}_count"] for m in METRICS]))
    if "Metadata_Site" in columns:
        for row in table.group_by([*keys, "Metadata_Site"]).aggregate([]).to_pylist():
            place = parse_well(row["Metadata_Well"])
            if place is not None and row["Metadata_Site"] is not None:
                _plate_of(row, found).well(place).sites.add(row["Metadata_Site"])


def _plate_of(metadata: dict[str, str | None], found: dict[Key, PlateData]) -> PlateData:
    key = tuple(metadata.get(name) for name in PLATE_COLUMNS)
    return found.setdefault(key, PlateData(key, key[-1] or ""))


def _add_planned(planned: Iterable[tuple[Item, bool]], run: Run, found: dict[Key, PlateData]) -> None:
    """Count planned and quarantined inputs per well."""
    quarantined = set(run.quarantined["item_id"].to_pylist())
    for item, troubled in planned:
        place = parse_well(item.metadata.get("Metadata_Well"))
        if place is not None:
            well = _plate_of(item.metadata, found).well(place)
            well.planned += 1
            well.quarantined += troubled and item.item_id in quarantined


def _by_loss(plates: list[PlateData], losses: list[str]) -> list[PlateData]:
    """The plates that lost inputs first, the others in plan order."""
    order = {name: position for position, name in enumerate(losses)}
    return sorted(plates, key=lambda plate: order.get(plate.key[-1] or "", len(order)))


def _choose(plates: list[PlateData], losses: list[str]) -> list[PlateData]:
    """The `DRAWN` plates of those looked at: most lost, farthest in quality, most typical."""
    lost = [plate for plate in _by_loss(plates, losses) if plate.key[-1] in losses][:LOST_MOST]
    for plate in lost:
        plate.why = "among those with most quarantined"
    distance = distances(plates)
    rest = sorted((i for i, plate in enumerate(plates) if plate not in lost), key=lambda i: -distance[i])
    far, typical = rest[:FARTHEST], rest[FARTHEST:][::-1][:DRAWN - FARTHEST - len(lost)]
    for i in far:
        plates[i].why = "quality far from the others'"
    for i in typical:
        plates[i].why = "typical"
    return lost + [plates[i] for i in [*far, *typical]]


def distances(plates: list[PlateData]) -> np.ndarray:
    """How far each plate [n] is from the others: its largest robust z over the medians of every channel and metric."""
    channels = dict.fromkeys(c for plate in plates for well in plate.wells.values() for c in well.sums)
    worst = np.zeros(len(plates))
    for channel in channels:
        for metric in METRICS:
            medians = np.array([_median([w.mean(channel, metric) for w in p.wells.values()]) for p in plates])
            known = np.isfinite(medians)
            if known.sum() < 3:
                continue
            away = np.abs(medians - np.median(medians[known]))
            spread = np.median(away[known]) + 1e-3 * np.abs(medians[known]).mean() + 1e-12
            worst = np.fmax(worst, away / spread)
    return worst


def _median(values: list[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.median(finite)) if finite else float("nan")


def _name(plates: list[PlateData]) -> None:
    """Put source and batch before names that stand for several plates."""
    names = [plate.key[-1] for plate in plates]
    for plate in plates:
        if names.count(plate.key[-1]) > 1:
            plate.name = " / ".join(part for part in plate.key if part)
        plate.name = one_line(plate.name, NAME_CHARS)
