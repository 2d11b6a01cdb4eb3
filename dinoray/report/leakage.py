"""How well the features tell the plate, the batch, the source and the place of a well: what should not be in them.

One vector per image and channel (mean over tiles or cells), from a bounded, deterministic selection of plates
and images. What is held out: for plates and places on a plate, a well position on all plates at once, so that
neither the sites of a well nor its replicates help; for batches and sources, whole plates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dinoray.errors import OutputDamaged
from dinoray.report.layout import is_edge, parse_well, smallest_layout, well_name
from dinoray.report.pictures import one_line
from dinoray.report.plates import PLATE_COLUMNS, Key
from dinoray.report.probe import Probe, evenly_by_class, probe, staggered
from dinoray.report.run import Part, Run
from dinoray.report.sample import Sample, evenly, pick_vector

MAX_PLATES = 16
PER_BATCH = 4
"""Plates of one batch at most, while there are several batches."""
PLATES_LISTED = 256
"""Plates whose batch is looked up when there are more than `MAX_PLATES`."""
MAX_IMAGES = 1000
"""Images per channel that a probe takes."""
MAX_FILES, ROW_GROUPS = 64, 2
"""Files read of a large run, and row groups (64 MiB) of each."""
CHANNELS = 8
DOCS = "docs/profiling.md"


@dataclass(frozen=True, slots=True)
class Labelled:
    """One image in one channel: where it is from, and its mean vector."""

    plate: Key
    place: tuple[int, int]
    vector: np.ndarray


@dataclass
class Target:
    """One question: its probes by channel and the answer as a sentence."""

    title: str
    probes: list[Probe] = field(default_factory=list)
    sentence: str = ""


@dataclass
class Leakage:
    """The answers; `problem` says why there are none."""

    targets: list[Target] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)
    num_plates: int = 0
    num_wells: int = 0
    num_images: int = 0
    """Of the channel with most."""
    all_plates: int = 0
    column: str = ""
    problem: str = ""


def measure_leakage(run: Run, sample: Sample) -> Leakage:
    """Probe all targets in all channels. Raises OutputDamaged when a file that a receipt names is unreadable."""
    if sample.vectors is None:
        return Leakage(problem="This run has no vectors, so nothing can be told from them." if sample.items else "No rows.")
    names = sample.table.column_names
    if "Metadata_Plate" not in names or "Metadata_Well" not in names:
        return Leakage(problem="Plate and well are unknown here (Metadata_Plate, Metadata_Well), so plate effects cannot be "
                               "measured.")
    if sample.complete:
        images = collect(sample.table, sample.vectors)
        chosen = choose_plates({one.plate: one.plate[:2] for ones in images.values() for one in ones})
        images = {channel: [one for one in ones if one.plate in chosen] for channel, ones in images.items()}
    else:
        images = _read_images(run)
    images = {channel: ones for channel, ones in images.items() if ones}
    kept = sorted(images, key=lambda channel: -len(images[channel]))[:CHANNELS]
    result = measure({channel: images[channel] for channel in images if channel in kept})
    result.all_plates = max(result.num_plates, sum(1 for name in run.tally.plates if name))
    result.column = sample.vector_column or ""
    return result


def measure(images: dict[str, list[Labelled]]) -> Leakage:
    """Probe labelled images by channel."""
    thinned = {}
    for channel, ones in images.items():
        thinned[channel] = [ones[i] for i in evenly_by_class([_text(one.plate) for one in ones], MAX_IMAGES)]
    everything = [one for ones in thinned.values() for one in ones]
    if not everything:
        return Leakage(problem="No row names a plate and a well such as C03, so plate effects cannot be measured.")
    layout = smallest_layout(one.place for one in everything)
    result = Leakage(channels=list(thinned), num_plates=len({one.plate for one in everything}),
                     num_wells=len({(one.plate, one.place) for one in everything}),
                     num_images=max(len(ones) for ones in thinned.values()))
    questions: list[tuple[str, Callable[[Labelled], str], Callable[[Labelled], str]]] = [
        ("plate", lambda one: _text(one.plate), lambda one: well_name(one.place)),
        ("batch", lambda one: _text(one.plate[:2]), lambda one: _text(one.plate)),
        ("source", lambda one: one.plate[0] or "", lambda one: _text(one.plate)),
        ("row of the plate", lambda one: str(one.place[0]), lambda one: well_name(one.place)),
        ("column of the plate", lambda one: str(one.place[1]), lambda one: well_name(one.place)),
        ("edge or interior", lambda one: str(is_edge(one.place, layout)), lambda one: well_name(one.place))]
    for title, label, group in questions:
        known = {"batch": 1, "source": 0}.get(title)
        if known is not None and not any(one.plate[known] for one in everything):
            continue  # not recorded
        target = Target(title)
        for ones in thinned.values():
            target.probes.append(probe(np.stack([one.vector for one in ones]), [label(one) for one in ones],
                                       [group(one) for one in ones]))
        target.sentence = sentence(title, target.probes, list(thinned))
        result.targets.append(target)
    return result


def sentence(title: str, probes: Sequence[Probe], channels: Sequence[str]) -> str:
    """The answer in plain words, of the channel in which the label is told best."""
    told = [i for i, one in enumerate(probes) if not one.problem]
    if not told:
        return f"Cannot be told: {probes[0].problem}."
    best = max(told, key=lambda i: (probes[i].above_chance, probes[i].strength))
    one = probes[best]
    said = f"{one.score:.2f} where chance is {one.chance:.2f}"
    said += f" (channel {one_line(channels[best], 80)}, of {len(channels)})" if len(channels) > 1 else ""
    if not one.above_chance:
        return f"{said}: no {title.split()[0]} effect seen; chance alone gets up to {one.bound:.2f}."
    what = {"plate": "plate effects", "batch": "batch effects", "source": "differences between sources"}.get(
        title, "effects of the well's position")
    how = "dominate" if one.strength >= 0.6 else "are clear" if one.strength >= 0.2 else "are weak but there"
    return f"{said}: {what} {how}; see {DOCS}."


def choose_plates(batches: dict[Key, Key]) -> set[Key]:
    """At most `MAX_PLATES` of the plates (plate -> its source and batch): several plates of several batches, evenly."""
    plates = list(batches)
    if len(plates) <= MAX_PLATES:
        return set(plates)
    by_batch: dict[Key, list[Key]] = {}
    for plate, batch in batches.items():
        by_batch.setdefault(batch, []).append(plate)
    several = [ones for ones in by_batch.values() if len(ones) >= 3]
    if len(several) < 2:
        return {plates[i] for i in evenly(len(plates), MAX_PLATES)}
    several = [several[i] for i in evenly(len(several), MAX_PLATES // PER_BATCH)]
    share = MAX_PLATES // len(several)
    return {ones[i] for ones in several for i in evenly(len(ones), share)}


def collect(table: pa.Table, vectors: np.ndarray) -> dict[str, list[Labelled]]:
    """Rows [n] with vectors [n, D] -> images by channel, in order; those without a plate and a place are left out."""
    columns = {name: table[name].to_pylist() for name in (*PLATE_COLUMNS, "Metadata_Well") if name in table.column_names}
    rows: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(table["channel"].to_pylist(), table["item_id"].to_pylist(), strict=True)):
        rows.setdefault(key, []).append(row)
    found: dict[str, list[Labelled]] = {}
    for (channel, _), mine in rows.items():
        first = {name: values[mine[0]] for name, values in columns.items()}
        place = parse_well(first.get("Metadata_Well"))
        if place is not None and first.get("Metadata_Plate"):
            key = tuple(first.get(name) for name in PLATE_COLUMNS)
            found.setdefault(channel, []).append(Labelled(key, place, vectors[mine].mean(axis=0)))
    return found


def _read_images(run: Run) -> dict[str, list[Labelled]]:
    """Images of a run that is too large to be read whole: some files of each chosen plate, some images of each file."""
    parts: dict[str, list[Part]] = {}
    for part in run.parts:
        if part.plate:
            parts.setdefault(part.plate, []).append(part)
    names = [list(parts)[i] for i in evenly(len(parts), PLATES_LISTED)]
    batches: dict[Key, Key] = {}
    for name in names:
        first = parts[name][0]
        metadata = run.generations[first.generation].plan.unit(first.number).items[0].metadata
        batches[tuple(metadata.get(column) for column in PLATE_COLUMNS[:2]) + (name,)] = \
            tuple(metadata.get(column) for column in PLATE_COLUMNS[:2])
    chosen = sorted(key[-1] or "" for key in choose_plates(batches))
    found: dict[str, list[Labelled]] = {}
    for turn, name in enumerate(chosen):
        files = [parts[name][i] for i in staggered(len(parts[name]), max(1, MAX_FILES // len(chosen)), turn)]
        per_file = max(1, MAX_IMAGES // len(chosen) // len(files))
        for part in files:
            for channel, ones in _read_file(run, part, per_file, turn).items():
                found.setdefault(channel, []).extend(ones)
    return found


def _read_file(run: Run, part: Part, count: int, turn: int) -> dict[str, list[Labelled]]:
    try:
        with run.store.open(part.key) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            vector = pick_vector(names)
            if vector is None or "Metadata_Well" not in names:
                return {}
            columns = [name for name in (*PLATE_COLUMNS, "Metadata_Well", "item_id", "channel") if name in names]
            groups = evenly(parquet.num_row_groups, ROW_GROUPS)
            table = parquet.read_row_groups(groups, columns=[*columns, vector])
    except (OSError, pa.ArrowException) as error:
        raise OutputDamaged(f"features cannot be read: {error}", where=f"{run.store.url}/{part.key}",
                            todo="see `dinoray verify`, then run the extraction again") from error
    wells = dict(zip(table["item_id"].to_pylist(), table["Metadata_Well"].to_pylist(), strict=True))
    ids = list(wells)
    kept = pa.array([ids[i] for i in evenly_by_class([wells[name] or "" for name in ids], count, turn)])
    table = table.filter(pc.is_in(table["item_id"], value_set=kept))
    vectors = table[vector].combine_chunks()
    matrix = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), -1).astype(np.float32)
    return collect(table, matrix)


def _text(key: Key) -> str:
    return " / ".join(part or "?" for part in key)
