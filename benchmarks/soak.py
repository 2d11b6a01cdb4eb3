"""Thousands of units on Ray while their actors are killed: nothing lost, nothing twice, nothing that grows.

    python benchmarks/soak.py [--units 3000] [--sleep 0.5] [--kill-every 30] [--workers 3] [--seed 0]

Units of the null runner (mark the start, sleep, write the receipt) run through the same pool, ledger and
rounds as any job; every `--kill-every` seconds an actor, drawn by the seed, gets SIGKILL. The resident memory of the driver,
of the actors and of Ray's own processes, open files, and the object store are sampled all along. Prints a
Markdown table; exit code 1 when a unit was lost or done twice, or when something grew.

Growth is the slope of a line through the samples after the first fifth (where modules are loaded and pools are
filled), given for 1,000 units. It fails the soak above `--max-growth-mb`: of memory in all, over those samples.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
import ray
from common import hardware, table

from dinoray.cluster.pool import run_units
from dinoray.cluster.resources import LOCAL_OBJECT_STORE_BYTES, ActorShape
from dinoray.io.items import FileRef, Item
from dinoray.io.stores import open_store
from dinoray.ledger import Ledger, Receipt
from dinoray.runners.build import RunnerSpec
from dinoray.units import Plan, PlanWriter, item_digest, item_row

SAMPLE_S = 2.0
SETTLED = 0.2
"""Share of the samples, from the start, that slopes leave out."""
MAX_FILES = 20
"""Open files may grow by so many over the settled part."""
ENOUGH_SAMPLES = 60
"""With fewer, growth is printed and not judged: one process that comes or goes is a slope then."""


def make_plan(out: str, units: int) -> Plan:
    """A sealed plan of `units` units of one item each; the items need not exist."""
    writer = PlanWriter(open_store(out), "_dinoray", "soak", max_items=1, max_bytes=10**9)
    for i in range(units):
        item = Item(f"{i:06d}", (FileRef(f"/none/{i:06d}", 1, "1"),))
        writer.add(item_row(item), item_digest(item))
    writer.seal()
    return Plan(open_store(out))


def actors() -> list[psutil.Process]:
    """The processes of this process's lease actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "LeaseActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


@dataclass
class Samples:
    """What was measured, by name; all lists are of one length. `done` is units with a receipt."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """One sample of each."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def settled(self, name: str) -> np.ndarray:
        """The samples after the first part."""
        values = np.array(self.values[name])
        return values[int(SETTLED * len(values)):]

    def growth(self, name: str) -> float:
        """Growth over the settled samples by a line through them, over units done."""
        done = self.settled("done")
        slope = np.polyfit(done, self.settled(name), 1)[0] if done[-1] > done[0] else 0.0
        return float(slope * (done[-1] - done[0]))

    def row(self, name: str, unit: float) -> list[str]:
        """Table cells: first, largest, last (means of ten samples at the ends), growth for 1,000 units."""
        values, done = self.settled(name) / unit, self.settled("done")
        per_1000 = self.growth(name) / unit / max(1.0, done[-1] - done[0]) * 1000
        return [f"{values[:10].mean():.1f}", f"{values.max():.1f}", f"{values[-10:].mean():.1f}", f"{per_1000:+.2f}"]


@contextlib.contextmanager
def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` every so many seconds in a thread; what it raises is raised at the end."""
    end, errors = threading.Event(), []

    def loop() -> None:
        try:
            while not end.wait(seconds):
                act()
        except Exception as error:  # noqa: BLE001 (raised below)
            errors.append(error)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    if errors:
        raise errors[0]


def object_store() -> Callable[[], int]:
    """A function that asks the raylet for the bytes in use in its object store."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return lambda: get_memory_info_reply(state).store_stats.object_store_bytes_used


def soak(given: argparse.Namespace, out: str) -> list[str]:
    """Run it and print the table; returns what is wrong."""
    plan, draw = make_plan(out, given.units), random.Random(given.seed)
    ledger, samples, seen, killed = Ledger(plan.store), Samples(), [], []
    ray.init(address="local", num_cpus=given.workers, include_dashboard=False, _node_ip_address="127.0.0.1",
             object_store_memory=LOCAL_OBJECT_STORE_BYTES, log_to_driver=False, logging_level="ERROR")
    in_store, me = object_store(), psutil.Process()

    def sample() -> None:
        mine = {process.pid for process in actors()}
        memory = {"actors": 0, "ray": 0}
        for process in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory["actors" if process.pid in mine else "ray"] += process.memory_info().rss
        if len(mine) == given.workers:  # not while one of them is being started
            samples.add(done=len(seen), driver=me.memory_info().rss, **memory, files=me.num_fds(), threads=me.num_threads(),
                        store=in_store())

    def kill() -> None:
        alive = actors()
        if alive and seen:
            victim = draw.choice(sorted(alive, key=lambda process: process.pid))
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                killed.append(victim.pid)

    def on_receipt(receipt: Receipt) -> None:
        seen.append(receipt.unit)

    began = time.monotonic()
    with every(min(SAMPLE_S, given.kill_every / 3), sample), every(given.kill_every, kill):
        run_units(RunnerSpec("null", out, job={"sleep_s": given.sleep}), lambda: plan.pending(ledger.done()), on_receipt,
                  shape=ActorShape(given.workers, given.workers, 1, 0), rounds=3, stall_timeout_s=300)
    seconds = time.monotonic() - began
    ray.shutdown()

    attempts, done = ledger.attempts(), ledger.done()
    pids = {receipt.worker["pid"] for receipt in ledger.receipts(sorted(done))}
    again = sum(attempts.values()) - len(attempts)
    scratch = len(list(plan.store.list("_dinoray/tmp")))
    grown = {name: samples.growth(name) / 1e6 for name in ("driver", "ray", "actors", "store")}
    files, judged = samples.growth("files"), len(samples.values["done"]) >= ENOUGH_SAMPLES
    print(f"{given.units:,} units that sleep {given.sleep} s on {given.workers} actors (Ray {ray.__version__}), "
          f"SIGKILL of one of them every {given.kill_every:g} s, seed {given.seed}\n")
    print(table(["soak", ""], [
        ["seconds", f"{seconds:.0f} ({given.units * given.sleep / given.workers:.0f} of them sleep)"],
        ["kills; processes that wrote receipts", f"{len(killed)}; {len(pids)}"],
        ["units planned; with a receipt; reported to the driver", f"{len(plan):,}; {len(done):,}; {len(seen):,}"],
        ["units lost", str(len(plan) - len(done & set(plan.unit_ids)))],
        ["units reported twice", str(len(seen) - len(set(seen)))],
        ["starts; of them repeated (at most one for each kill)", f"{sum(attempts.values()):,}; {again}"],
        ["scratch files left", str(scratch)],
    ]))
    header = [f"{len(samples.values['done'])} samples, the first fifth left out", "start", "largest", "end", "per 1,000 units"]
    print(table(header, [
        ["driver, MB resident", *samples.row("driver", 1e6)],
        ["Ray's own processes, MB resident", *samples.row("ray", 1e6)],
        [f"{given.workers} actors, MB resident", *samples.row("actors", 1e6)],
        ["object store, MB in use", *samples.row("store", 1e6)],
        ["driver, open files", *samples.row("files", 1)],
        ["driver, threads", *samples.row("threads", 1)],
    ]))
    problems = [text for wrong, text in (
        (done != set(plan.unit_ids), "units were lost"),
        (len(seen) != len(set(seen)) or set(seen) != done, "units were not reported exactly once"),
        (set(attempts) != done, "starts and receipts are not of the same units"),
        (again > len(killed), "more units were started again than actors were killed"),
        (not killed, "nothing was killed"),
        (not pids.isdisjoint({os.getpid()}), "the driver did the actors' work"),
        (scratch > len(killed), "more scratch files are left than actors were killed"),
        (judged and files > MAX_FILES, f"open files grew by {files:.0f}"),
        *((judged and value > given.max_growth_mb, f"{name}: grew by {value:.0f} MB") for name, value in grown.items())) if wrong]
    growth = "nothing grows" if judged else f"too few samples to judge growth (under {ENOUGH_SAMPLES})"
    print("verdict: " + ("; ".join(problems) if problems else f"nothing lost, nothing twice, {growth}"))
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=3000)
    parser.add_argument("--sleep", type=float, default=0.5, help="seconds a unit sleeps")
    parser.add_argument("--kill-every", type=float, default=30.0, help="seconds between kills")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-growth-mb", type=float, default=30.0)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    print(hardware())
    with tempfile.TemporaryDirectory(prefix="dinoray-soak-") as scratch_folder:
        sys.exit(1 if soak(parser.parse_args(), scratch_folder) else 0)
