"""`status`: what the ledger says of a run, finished or not."""

from __future__ import annotations

from collections.abc import Iterator

from dinoray.ledger import Tally
from dinoray.verification import open_run

STAGES = ("read", "decode", "prepare", "compute", "write")
"""Stages of work as they stand in receipts, in order; seconds summed over threads."""


def status_lines(out: str) -> Iterator[str]:
    """Lines for a person: progress, quarantine by reason, stages, whether it was verified."""
    store, plan, ledger = open_run(out)
    done = ledger.done()
    tally = Tally()
    for receipt in ledger.receipts([u for u in plan.unit_ids if u in done]):
        tally.add(receipt)
    yield f"{plan.facts['fingerprint']}  {out}"
    yield f"units   {tally.units} of {len(plan)} done, {len(plan) - tally.units} pending"
    yield f"images  {tally.items} of {plan.num_items} done, {tally.rows} rows, {tally.quarantined} quarantined"
    for reason, count in sorted(tally.reasons.items(), key=lambda pair: -pair[1]):
        yield f"        {count:>8}  {reason}"
    repeated = {unit: n for unit, n in ledger.attempts().items() if n > 1}
    if repeated:
        yield f"units started more than once: {len(repeated)} (most often {max(repeated.values())} times)"
    if tally.units:
        yield "stage seconds, summed over threads: " + ", ".join(f"{s} {tally.seconds.get(s, 0):.1f}" for s in STAGES)
        yield f"read {tally.bytes_read:,} bytes, wrote {tally.bytes_written:,} bytes, largest process {tally.rss_peak:,} bytes"
        yield "computed on " + ", ".join(f"{kind} ({n} units)" for kind, n in sorted(tally.device_kinds.items()))
    if tally.degraded_units:
        yield f"{tally.degraded_units} units have degraded numerics (see docs/reliability.md)"
    yield "verified: yes (_SUCCESS)" if tally.units == len(plan) and store.exists("_SUCCESS") else "verified: not yet"
