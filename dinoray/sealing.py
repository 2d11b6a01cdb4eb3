"""From a listing on the spool to the sealed plan of a generation: statistics units first, then the units.

The intensity scaling of a later generation (retry, extend) is the first one's, completed for groups and
channels that it did not know, so that equal plates are scaled alike whenever their images came.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.config import ExtractCellsJob, SegmentCellsJob, canonical_json
from dinoray.generations import generations
from dinoray.io.stores import Store
from dinoray.ledger import Ledger, Receipt, Tally
from dinoray.planning import Spool, write_plan
from dinoray.pools import Pool
from dinoray.progress import Progress
from dinoray.resolved import Resolved
from dinoray.runners import statistics
from dinoray.runners.build import RunnerSpec
from dinoray.units import CELL_ITEM_SCHEMA, ITEM_SCHEMA, Plan, PlanWriter, fingerprint_of

STATS_UNIT_ITEMS = 64


def seal_generation(store: Store, resolved: Resolved, spool: Spool, pool: Pool, progress: Progress, check: Any, *,
                    prefix: str = "_dinoray", replaces: Callable[[list[str]], dict[str, int]] | None = None,
                    **facts: Any) -> Plan:
    """Fix the scaling, write the units, and the index last. `check` is called while units run (Driver.check).

    `replaces` tells, for the item ids of a retry's unit, why they were quarantined before: {reason: count}.
    """
    job, salt = resolved.job, None
    if job.scaling == "plate":
        table = _scaling(store, resolved, spool, pool, progress, check, prefix)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        store.put(f"{prefix}/plan/scaling.parquet", sink.getbuffer())
        scaling = statistics.read_scaling(table)
        salt = lambda groups: canonical_json({g: scaling.get(g) for g in sorted(groups)})  # noqa: E731
    writer = PlanWriter(store, prefix, resolved.fingerprint, max_items=job.unit_items, max_bytes=job.unit_bytes,
                        group_salt=salt, id_salt="" if replaces is None else prefix,
                        schema=CELL_ITEM_SCHEMA if isinstance(job, ExtractCellsJob) else ITEM_SCHEMA)
    if replaces is not None:
        facts["replaces"] = replaced = {}  # filled while the units are written, before the facts are
        writer.on_unit = lambda unit_id, item_ids: replaced.update({unit_id: replaces(item_ids)})
    if isinstance(job, SegmentCellsJob):
        facts["kind"] = job.runner
    write_plan(spool, writer, numerics=resolved.numerics, described=resolved.described, **facts)
    return Plan(store, prefix)


def _scaling(store: Store, resolved: Resolved, spool: Spool, pool: Pool, progress: Progress, check: Any, prefix: str) -> pa.Table:
    """Rows of SCALING_SCHEMA: those of earlier generations, and for the sampled items what those lack."""
    known = [] if prefix == "_dinoray" else [known_scaling(store)]
    if any(spool.samples.values()):
        found = _statistics(store, resolved, spool, pool, progress, check, f"{prefix}/stats")
        have = {(row["group"], row["channel"]) for table in known for row in table.to_pylist()}
        known.append(found.filter(pa.array([(r["group"], r["channel"]) not in have for r in found.to_pylist()], pa.bool_())))
    table = pa.concat_tables(known) if known else statistics.SCALING_SCHEMA.empty_table()
    return table.sort_by([("group", "ascending"), ("channel", "ascending")])


def known_scaling(store: Store) -> pa.Table:
    """The scaling of all generations so far (rows of SCALING_SCHEMA); who set a row first has set it for good."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for part in generations(store):
        for row in pq.read_table(io.BytesIO(store.get(f"{part.prefix}/plan/scaling.parquet"))).to_pylist():
            rows.setdefault((row["group"], row["channel"]), row)
    return pa.Table.from_pylist(list(rows.values()), schema=statistics.SCALING_SCHEMA)


def _statistics(store: Store, resolved: Resolved, spool: Spool, pool: Pool, progress: Progress, check: Any,
                prefix: str) -> pa.Table:
    """Run the statistics units over the spool's sample; the percentiles that come out."""
    settings = {k: resolved.identity["settings"][k] for k in ("z_projection", "max_pixels", "max_file_bytes")}
    return run_statistics(store, resolved, spool.sampled(), sum(len(v) for v in spool.samples.values()), settings, pool, progress,
                          check, prefix, unit_bytes=resolved.job.unit_bytes)


def run_statistics(store: Store, resolved: Resolved, rows: Iterable[tuple[dict[str, Any], bytes]], num_items: int,
                   settings: dict[str, Any], pool: Pool, progress: Progress, check: Any, prefix: str, *, unit_bytes: int,
                   kind: str = "statistics") -> pa.Table:
    """Plan and run statistics units over `rows` (item rows and digests, equal groups together); rows of SCALING_SCHEMA.

    `settings`: what besides the inputs decides the histograms; `kind`: the runner.
    """
    job = resolved.job
    fingerprint = fingerprint_of({"statistics": settings, "libraries": resolved.identity["numerics"]["libraries"]})
    writer = PlanWriter(store, prefix, fingerprint, max_items=STATS_UNIT_ITEMS, max_bytes=unit_bytes, max_open=1)
    for row, digest in rows:
        writer.add(row, digest)
    writer.seal(num_items=num_items)
    plan, ledger = Plan(store, prefix), Ledger(store, prefix)
    tally = Tally()
    progress.begin("statistics", total=plan.num_items, tally=tally)

    def on_receipt(receipt: Receipt) -> None:
        tally.add(receipt)
        progress.advance(tally)

    pool(RunnerSpec(kind, job.out, prefix, job=job.model_dump(mode="json")),
         lambda: plan.pending(ledger.done()), on_receipt, check)
    progress.end()
    return statistics.scaling_table(store, ledger.receipts(plan.unit_ids), resolved.percents)
