"""`status`: what the ledgers say of a run, finished or not."""

from __future__ import annotations

from collections.abc import Iterator

from dinoray.generations import Generation, generations, total_tally, unfinished_notes
from dinoray.io.stores import open_store
from dinoray.training.standing import standing_lines
from dinoray.verification import open_run, training_record
from dinoray.wording import device_words, plural

STAGES = ("read", "decode", "prepare", "compute", "cells", "write")
"""Stages of work as they stand in receipts, in order; seconds summed over threads."""


NOUNS = {"volume": ("slabs", "tokens"), "volume-labels": ("blocks", "voxels"), "cell-masks": ("images", "cells")}
"""What the items and rows of a kind of plan are called, where not images and rows."""


def status_lines(out: str) -> Iterator[str]:
    """Lines for a person: progress, quarantine by reason, stages, whether it was verified; of a training, step and losses.

    An output with `retry` or `extend` has a line for each generation; the totals count what a retry settled
    once. Raises BadRequest when `out` holds no run, OutputDamaged for records that cannot be read.
    """
    record = training_record(open_store(out))
    if record is not None:
        yield from standing_lines(open_store(out), record)
        return
    store, _, _ = open_run(out)
    parts = generations(store)
    tally = total_tally(parts)
    units = sum(len(part.plan) for part in parts)
    items = sum(part.plan.num_items for part in parts if part.kind != "retry")
    yield f"{parts[0].plan.facts['fingerprint']}  {out}"
    yield f"units   {tally.units} of {units} done, {units - tally.units} pending"
    noun, rows = NOUNS.get(parts[0].plan.facts.get("kind"), ("images", "rows"))
    planned = parts[0].plan.facts.get("num_tokens")
    rows += "" if planned is None else f" of {planned} ({tally.rows / planned:.1%})"
    yield f"{noun:<7} {tally.items} of {items} done, {tally.rows} {rows}, {tally.quarantined} quarantined"
    for reason, count in sorted(tally.reasons.items(), key=lambda pair: -pair[1]):
        yield f"        {count:>8}  {reason}"
    if len(parts) > 1:
        yield from (_generation_line(part, noun) for part in parts)
    repeated = [count for part in parts for count in part.ledger.attempts().values() if count > 1]
    if repeated:
        yield f"units started more than once: {len(repeated)} (most often {max(repeated)} times)"
    if tally.units:
        yield "stage seconds, summed over threads: " + ", ".join(
            f"{s} {tally.seconds.get(s, 0):.1f}" for s in STAGES if s != "cells" or s in tally.seconds)
        yield f"read {tally.bytes_read:,} bytes, wrote {tally.bytes_written:,} bytes, largest process {tally.rss_peak:,} bytes"
        kinds = sorted(tally.device_kinds.items())
        yield "computed on " + ", ".join(f"{device_words(kind)}: {plural(count, 'unit')}" for kind, count in kinds)
    if tally.degraded_units:
        yield f"{plural(tally.degraded_units, 'unit')} with degraded numerics (see docs/reliability.md)"
    yield from unfinished_notes(store)
    yield "verified: yes (_SUCCESS)" if tally.units == units and store.exists("_SUCCESS") else "verified: not yet"


def _generation_line(part: Generation, noun: str) -> str:
    """`generation 1 (retry): 2 of 2 units done, 5 images planned`."""
    done = part.ledger.done()
    count = sum(unit in done for unit in part.plan.unit_ids)
    return f"generation {part.number} ({part.kind}): {count} of {len(part.plan)} units done, {part.plan.num_items} {noun} planned"
