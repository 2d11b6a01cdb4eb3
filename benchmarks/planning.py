"""What planning and the ledger cost, without pixels: per unit at 10^4 and 10^5 units, 10^7 items in bounded
memory, and null units through Ray.

    python benchmarks/planning.py [--quick]

Prints markdown tables. Times are medians of interleaved repetitions in one run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from common import hardware, table

from dinoray.io.items import FileRef, Item
from dinoray.io.stores import open_store
from dinoray.ledger import Ledger
from dinoray.memory.meter import rss_peak
from dinoray.planning import spool_items, write_plan
from dinoray.runners.build import RunnerSpec
from dinoray.runners.null import NullRunner
from dinoray.units import Plan, PlanWriter


def synthetic(count: int) -> Iterator[Item]:
    """Items as a listing of plates of 3,456 fields would give them."""
    for i in range(count):
        plate = f"BR{i // 3456:06d}"
        name = f"{plate}/Images/r{i % 16 + 1:02d}c{i % 24 + 1:02d}f{i % 9 + 1:02d}-{i:09d}.tiff"
        yield Item(name, (FileRef(f"s3://bucket/project/{name}", 2_180_000, f"{i:032x}"),), (), plate, plate,
                   {"Metadata_Plate": plate, "Metadata_Site": str(i % 9 + 1)})


def plan(out: str, num_items: int, unit_items: int) -> Plan:
    """List, spool and seal a plan of synthetic items."""
    store = open_store(out)
    with spool_items(synthetic(num_items)) as spool:
        writer = PlanWriter(store, "_dinoray", "benchmark", max_items=unit_items, max_bytes=10**15)
        write_plan(spool, writer, numerics={}, described={}, root="s3://bucket/project")
    return Plan(store)


def ledger_costs(num_units: int) -> dict[str, float]:
    """Seconds per unit: planning (4 items a unit), running a null unit, listing what is done, reading receipts."""
    with tempfile.TemporaryDirectory(prefix="dinoray-bench-") as out:
        t0 = time.perf_counter()
        made = plan(out, 4 * num_units, 4)
        t1 = time.perf_counter()
        ledger = Ledger(made.store)
        for _ in NullRunner(made, ledger).lease(range(len(made))):
            pass
        t2 = time.perf_counter()
        pending = made.pending(ledger.done())
        t3 = time.perf_counter()
        total = sum(receipt.items for receipt in ledger.receipts(made.unit_ids))
        t4 = time.perf_counter()
        assert not pending and total == made.num_items == 4 * num_units
        n = len(made)
    return {"plan": (t1 - t0) / n, "null unit": (t2 - t1) / n, "resume listing": (t3 - t2) / n,
            "read receipts": (t4 - t3) / n}


def linearity(small: int, large: int, repeats: int) -> None:
    """Per-unit cost at two sizes, interleaved: the small size before and after each large one."""
    runs: dict[int, list[dict[str, float]]] = {small: [], large: []}
    for _ in range(repeats):
        for size in (small, large, small):
            runs[size].append(ledger_costs(size))
    rows = []
    for name in runs[small][0]:
        a, b = (statistics.median(run[name] for run in runs[size]) * 1e6 for size in (small, large))
        rows.append([name, f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}"])
    totals = [statistics.median(sum(run.values()) for run in runs[size]) * 1e6 for size in (small, large)]
    rows.append(["**all**", f"{totals[0]:.0f}", f"{totals[1]:.0f}", f"**{totals[1] / totals[0]:.2f}**"])
    print(table(["µs per unit", f"{small:,} units", f"{large:,} units", "ratio"], rows))


def plan_in_child(num_items: int) -> None:
    """Plan in a fresh process, so that its peak memory is the planning's own."""
    code = ("import sys, tempfile, time; sys.path.insert(0, sys.argv[2]); import planning as p\n"
            "with tempfile.TemporaryDirectory() as out:\n"
            "    t = time.perf_counter(); made = p.plan(out, int(sys.argv[1]), 256)\n"
            "    print(len(made), time.perf_counter() - t, p.rss_peak())")
    done = subprocess.run([sys.executable, "-c", code, str(num_items), sys.path[0]], capture_output=True, text=True, check=True)
    units, seconds, peak = done.stdout.split()
    print(table(["items", "units", "seconds", "µs per item", "peak memory (GB)"],
                [[f"{num_items:,}", f"{int(units):,}", f"{float(seconds):.0f}", f"{float(seconds) / num_items * 1e6:.1f}",
                  f"{int(peak) / 1e9:.2f}"]]))


def through_ray(num_units: int) -> None:
    """Null units through the pool: what Ray and the ledger add to each unit. Ray's start is printed apart."""
    from dinoray.cluster.pool import run_units
    from dinoray.cluster.resources import ActorShape, connect, disconnect

    with tempfile.TemporaryDirectory(prefix="dinoray-bench-") as out:
        made = plan(out, num_units, 1)
        ledger = Ledger(made.store)
        t0 = time.perf_counter()
        local = connect()
        t1 = time.perf_counter()
        stamps: list[float] = []
        run_units(RunnerSpec("null", out), lambda: made.pending(ledger.done()),
                  lambda receipt: stamps.append(time.perf_counter()), shape=ActorShape(2, 2, 1, 0), rounds=3,
                  stall_timeout_s=600)
        disconnect(local)
        seconds = stamps[-1] - stamps[0]
    print(table(["null units through Ray", "Ray's start (s)", "first receipt after (s)", "ms per unit after it"],
                [[f"{num_units:,}", f"{t1 - t0:.1f}", f"{stamps[0] - t1:.1f}", f"{seconds / (len(stamps) - 1) * 1e3:.2f}"]]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the sizes")
    quick = parser.parse_args().quick
    print(hardware())
    linearity(*((1_000, 10_000, 1) if quick else (10_000, 100_000, 1)))
    plan_in_child(10**6 if quick else 10**7)
    through_ray(300 if quick else 3_000)
    assert rss_peak() > 0
