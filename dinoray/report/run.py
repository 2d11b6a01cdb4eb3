"""A run opened for its report: the job's record, all its generations, and every receipt once.

Memory is one small record per unit. Nothing of the rows is read here (`sample`, `plates`, `leakage` do).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.generations import Generation, generations, quarantined_now, replaced_reasons
from dinoray.io.items import Item
from dinoray.io.stores import Store
from dinoray.io.volume_grid import VolumeGrid
from dinoray.ledger import Tally
from dinoray.report.stages import StageTotals
from dinoray.report.volume_totals import VolumeTotals
from dinoray.units import Plan
from dinoray.verification import TABLES, open_run


@dataclass(frozen=True, slots=True)
class Part:
    """One Parquet file of features: its unit's number in its generation's plan, its key, its rows, the plate."""

    number: int
    key: str
    rows: int
    plate: str | None = None
    generation: int = 0
    """Position in `Run.generations`."""


@dataclass
class Run:
    """A run opened for its report: the first plan and what `retry` and `extend` added."""

    store: Store
    generations: list[Generation]
    job: dict[str, Any]
    """Content of `_dinoray/job.json`."""
    tally: Tally = field(default_factory=Tally)
    stages: StageTotals = field(default_factory=StageTotals)
    parts: list[Part] = field(default_factory=list)
    image_parts: list[Part] = field(default_factory=list)
    """Of a segmentation: the tables of images, whose rows are images."""
    row_items: int = 0
    verified: bool = False
    restarted_units: int = 0
    quarantine_units: set[tuple[int, int]] = field(default_factory=set)
    """(generation, unit number) of the units that quarantined something when they were done."""
    volume: VolumeTotals | None = None
    """What was stored, when this is a run over a volume."""

    @property
    def plan(self) -> Plan:
        """The first plan: it holds what is true of all generations (model, settings, numerics)."""
        return self.generations[0].plan

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that changed results."""
        return self.job["identity"]["settings"]

    @property
    def is_volume(self) -> bool:
        """Whether this is a run over a volume, not over images."""
        return self.volume is not None

    @property
    def is_segmentation(self) -> bool:
        """Whether this is a run of `dinoray segment cells`."""
        return self.plan.facts.get("kind") == "cell-masks"

    @property
    def num_units(self) -> int:
        """Planned units of all generations."""
        return sum(len(part.plan) for part in self.generations)

    @property
    def num_items(self) -> int:
        """Planned inputs; a retry plans none that were not planned before."""
        return sum(part.plan.num_items for part in self.generations if part.kind != "retry")

    @cached_property
    def quarantined(self) -> pa.Table:
        """The items that are quarantined by their latest receipt. Raises OutputDamaged when a table is missing."""
        if not self.quarantine_units:
            return quarantined_now([])
        try:
            return quarantined_now(self.generations)
        except (OSError, pa.ArrowException) as error:
            raise OutputDamaged(f"a quarantine table is missing or cannot be read: {error}",
                                where=f"{self.store.url}/_dinoray", todo="see `dinoray verify`") from error

    def planned_of_plates(self, plates: set[str]) -> Iterator[tuple[Item, bool]]:
        """Every planned input of these plates once, and whether its unit quarantined anything."""
        for position, part in enumerate(self.generations):
            if part.kind == "retry":
                continue
            for number, plate in enumerate(part.plan.index["plate"].to_pylist()):
                if plate in plates:
                    troubled = (position, number) in self.quarantine_units
                    yield from ((item, troubled) for item in part.plan.unit(number).items)


_SETTINGS = frozenset({"scaling", "scaling_low_percent", "scaling_high_percent", "channels", "vector_dtype", "layers"})
"""What every run of images has among its settings."""


class _Weights(BaseModel):
    source: str
    digest: str


class _Job(BaseModel):
    model_config = ConfigDict(extra="allow")
    sources: list[str]


class _Identity(BaseModel):
    settings: dict[str, Any]


class _Record(BaseModel):
    """What the report needs of `_dinoray/job.json`."""

    command: str
    identity: _Identity
    job: _Job
    weights: _Weights


def open_for_report(out: str) -> Run:
    """Read the job, the plans' indices and all receipts of `out` (finished or not).

    Raises BadRequest when `out` holds no planned run, OutputDamaged for records that are missing
    or cannot be read.
    """
    store, _, _ = open_run(out)
    run = Run(store, generations(store), _read_job(store))
    if run.plan.facts.get("kind") == "volume":
        run.volume = _volume_totals(run)
    elif "features" not in run.settings and not run.is_segmentation and run.plan.facts.get("kind") != "volume-labels":
        raise BadRequest("there is no report for this kind of run yet", where=out, todo="see `dinoray status`")
    for position, part in enumerate(run.generations):
        done = part.ledger.done()
        for receipt in part.ledger.receipts([unit for unit in part.plan.unit_ids if unit in done]):
            run.tally.add(receipt, replaces=replaced_reasons(part.plan, receipt.unit))
            run.stages.add(receipt)
            run.row_items += receipt.row_items
            if run.volume is not None:
                run.volume.add(receipt, part.plan.unit(receipt.number), again=part.kind == "retry")
            if receipt.quarantined:
                run.quarantine_units.add((position, receipt.number))
            run.parts += [Part(receipt.number, stored.key, receipt.rows, receipt.plate, position)
                          for stored in receipt.objects if stored.key.startswith(TABLES) and receipt.rows]
            run.image_parts += [Part(receipt.number, stored.key, receipt.row_items + len(receipt.without_objects), receipt.plate,
                                     position) for stored in receipt.objects if stored.key.startswith("images/")]
        run.restarted_units += sum(count > 1 for count in part.ledger.attempts().values())
    run.verified = run.tally.units == run.num_units and store.exists("_SUCCESS")
    return run


def _volume_totals(run: Run) -> VolumeTotals:
    try:
        return VolumeTotals(VolumeGrid.read(run.plan.facts["grid"]))
    except (KeyError, TypeError, BadRequest) as error:
        raise OutputDamaged(f"the plan's grid cannot be read: {error!r}", where=f"{run.store.url}/_dinoray/plan",
                            todo="restore the folder _dinoray from a copy") from error


def _read_job(store: Store) -> dict[str, Any]:
    where = f"{store.url}/_dinoray/job.json"
    try:
        job = json.loads(store.get("_dinoray/job.json"))
        _Record.model_validate(job)
    except FileNotFoundError as error:
        raise OutputDamaged("the record of the job is missing", where=where,
                            todo="restore the folder _dinoray from a copy") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise OutputDamaged(f"the record of the job cannot be read: {'.'.join(map(str, first['loc'])) or 'all of it'}: "
                            f"{first['msg']}", where=where, todo="restore it from a copy") from error
    except ValueError as error:  # no JSON, no UTF-8
        raise OutputDamaged(f"the record of the job cannot be read: {error}", where=where,
                            todo="restore it from a copy") from error
    missing = _SETTINGS - job["identity"]["settings"].keys()
    if missing and "features" in job["identity"]["settings"]:
        raise OutputDamaged(f"the record of the job lacks the settings {', '.join(sorted(missing))}", where=where,
                            todo="restore it from a copy")
    return job
