"""What limits a run, from the stage seconds in its receipts: one sentence, and the one setting to change.

How the numbers hang together (dinoray.runners.base): a unit loop takes prepared images in order, hands
batches to the device and gathers results; decode threads work ahead of it, also for the next unit; a writer
thread stores the unit before while the loop goes on. So thread seconds (`read`, `decode`, `prepare`,
`compute`, `write`) overlap and say how much work there was; what limits is where the loop *waited*:
`wait_decode` for images, `wait_compute` for the device, `wait_write` (and `write`, which ends a unit's
wall) for storage. Waits are parts of `wall`; thread seconds may exceed it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dinoray.ledger import Receipt

DECODE, COMPUTE, CELLS, WRITE, LOOP, UNITS = "decode", "compute", "cells", "write", "loop", "units"
_WORK = ("read", "decode", "prepare", "compute", "cells", "write")
_WAITS = ("wait_decode", "wait_compute", "wait_cells", "wait_write")
_CLOSE = 0.75
"""A runner-up with this share of the largest part is named too."""
_ENOUGH_S = 1.0
"""Below this many seconds of work in all, a verdict would be noise."""
MAX_THREADS = 64
_IDLE, _IDLE_FROM_S = 0.25, 60.0
"""Workers without a unit for this share of the longest one's time, in a run of so many seconds, are worth a change."""
UNITS_PER_WORKER = 8
"""Units that each worker should get, so that the last ones do not leave others idle."""
_SHORT_UNIT_S, _SMALL_UNIT = 2.0, 64
"""Below both (seconds, images) a unit's fixed costs show."""


@dataclass
class Worker:
    """One process (host and pid) that did units."""

    units: int = 0
    items: int = 0
    wall: float = 0.0
    """Sum of the units' wall seconds: an upper bound of its working time, for storing overlaps the next unit."""
    writes: float = 0.0
    first_write: float = 0.0
    last_write: float = 0.0

    def add(self, receipt: Receipt) -> None:
        """Count one unit; receipts come in plan order."""
        write = receipt.seconds.get("write", 0.0)
        self.first_write = write if not self.units else self.first_write
        self.units += 1
        self.items += receipt.items
        self.wall += receipt.seconds.get("wall", 0.0)
        self.writes += write
        self.last_write = write

    @property
    def least_wall(self) -> float:
        """Working seconds if storing always overlapped the next unit: the loops and one write, or all writes
        and one loop."""
        loops = self.wall - self.writes
        return min(self.wall, max(loops + self.last_write, self.writes + loops / max(1, self.units)))


@dataclass
class StageTotals:
    """Sums over receipts; `add` each once, in plan order."""

    seconds: dict[str, float] = field(default_factory=dict)
    units: int = 0
    items: int = 0
    workers: dict[tuple[str, str], Worker] = field(default_factory=dict)
    rss_peak: int = 0
    device_peak: int = 0
    dense_bytes: int = 0
    table_bytes: int = 0
    retries: dict[str, int] = field(default_factory=dict)
    """Storage requests that were tried again, by what was the matter."""
    isolated: int = 0
    """Units that were done item by item in a child process, because their process had died on them."""

    def add(self, receipt: Receipt) -> None:
        """Count one receipt."""
        self.units += 1
        self.items += receipt.items
        for stage, value in receipt.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value
        key = (str(receipt.worker.get("host", "?")), str(receipt.worker.get("pid", "?")))
        self.workers.setdefault(key, Worker()).add(receipt)
        self.rss_peak = max(self.rss_peak, receipt.memory.get("rss_peak", 0))
        self.device_peak = max(self.device_peak, receipt.memory.get("device_peak", 0))
        for stored in receipt.objects:
            self.dense_bytes += stored.bytes * stored.key.startswith("dense/")
            self.table_bytes += stored.bytes * stored.key.startswith("features/")
        self.isolated += bool(getattr(receipt, "isolated", False))
        for what, count in (getattr(receipt, "retries", None) or {}).items():  # older receipts have none
            self.retries[what] = self.retries.get(what, 0) + count

    def get(self, stage: str) -> float:
        """Summed seconds of a stage, 0 where receipts do not have it."""
        return self.seconds.get(stage, 0.0)

    def idle(self) -> float:
        """How much of the longest worker's time the others had no unit, 0..1 on average over all workers."""
        walls = [worker.wall for worker in self.workers.values()]
        longest = max(walls, default=0.0)
        return 0.0 if longest < _IDLE_FROM_S else 1 - sum(walls) / len(walls) / longest

    def rate(self) -> tuple[float, float] | None:
        """Images per second of one working worker, on average: (at least, at most); None without times."""
        longest = sum(worker.wall for worker in self.workers.values())
        shortest = sum(worker.least_wall for worker in self.workers.values())
        return None if longest <= 0 else (self.items / longest, self.items / max(shortest, 1e-9))

    def loop_parts(self) -> dict[str, float]:
        """Where the unit loops' wall went, as shares of it (sum 1): decode, compute, cells (of a segmentation), write, loop (the
        rest)."""
        wall = self.get("wall")
        if wall <= 0:
            return {}
        parts = {DECODE: self.get("wait_decode"), COMPUTE: self.get("wait_compute"),
                 WRITE: self.get("wait_write") + self.get("write")}
        if "wait_cells" in self.seconds:
            parts = {DECODE: parts[DECODE], COMPUTE: parts[COMPUTE], CELLS: self.get("wait_cells"), WRITE: parts[WRITE]}
        scale = max(wall, sum(parts.values()))
        return {**{name: value / scale for name, value in parts.items()}, LOOP: 1 - sum(parts.values()) / scale}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`limit`: decode, compute, write, loop, units, or None when it cannot be said. `sentence` why, `change` what to do."""

    limit: str | None
    sentence: str
    change: str


def verdict(totals: StageTotals, job: dict[str, Any], *, device: str) -> Verdict:
    """Which stage limits, and the one setting to change. `job`: fields of the job; `device`: cpu or cuda."""
    parts, noun = totals.loop_parts(), "slabs" if _of_volume(job) else "images"
    if not parts or totals.get("wall") < _ENOUGH_S:
        return Verdict(None, "The run was too short to say what limits it.",
                       "Try it on a larger part of the volume." if _of_volume(job) else "Try it on more images.")
    ranked = sorted(parts, key=lambda name: -parts[name])
    limit, second = ranked[0], ranked[1]
    idle = totals.idle()
    if _units_are_coarse(totals) and idle > _IDLE and (limit == COMPUTE or idle > parts[limit] * (1 - idle)):
        return _coarse(totals, idle, job)
    reasons = {
        DECODE: f"the unit loop waited {parts[DECODE]:.0%} of its time for {noun} to be read and decoded",
        COMPUTE: f"the unit loop waited {parts[COMPUTE]:.0%} of its time for the {_device(device)}",
        CELLS: f"the unit loop waited {parts.get(CELLS, 0):.0%} of its time for cells to be cut out of maps and measured",
        WRITE: f"{parts[WRITE]:.0%} of the units' time went into storing results",
        LOOP: f"the unit loop itself (gathering batches, packing results) took {parts[LOOP]:.0%} of the time",
    }
    names = {DECODE: _feeding(totals), COMPUTE: "Computing", CELLS: "The watershed", WRITE: "Writing", LOOP: "The unit loop"}
    sentence = f"{names[limit]} limits this run: {reasons[limit]}."
    if parts[second] >= _CLOSE * parts[limit]:
        sentence += f" It is nearly balanced: {reasons[second]}."
    advice = {DECODE: _feed_advice, COMPUTE: _compute_advice, CELLS: _cells_advice, WRITE: _write_advice, LOOP: _loop_advice}
    return Verdict(limit, sentence, advice[limit](totals, job, device))


def _of_volume(job: dict[str, Any]) -> bool:
    return "voxel_size" in job or "halo_voxels" in job


def _units_are_coarse(totals: StageTotals) -> bool:
    return len(totals.workers) > 1 and totals.units < UNITS_PER_WORKER * len(totals.workers)


def _units_are_tiny(totals: StageTotals, job: dict[str, Any]) -> bool:
    return job.get("unit_items", _SMALL_UNIT) < _SMALL_UNIT and totals.get("wall") < _SHORT_UNIT_S * totals.units


def _coarse(totals: StageTotals, idle: float, job: dict[str, Any]) -> Verdict:
    workers = len(totals.workers)
    wanted = max(1, totals.items // (UNITS_PER_WORKER * workers))
    smaller = (("A smaller `--unit-planes`" if "voxel_size" in job else "A smaller `--unit-windows`") if _of_volume(job)
               else f"`--unit-items {wanted}`")
    return Verdict(UNITS, f"The size of the units limits this run: {totals.units:,} units for {workers:,} workers left them "
                   f"without work for {idle:.0%} of the longest one's time, on average.",
                   f"{smaller} with a new `--out`: about {UNITS_PER_WORKER} units for each worker. (Workers that "
                   "started late or were lost look the same.)")


def _device(device: str) -> str:
    return "GPU" if device == "cuda" else "CPU to compute"


def _feeding(totals: StageTotals) -> str:
    return "Reading" if totals.get("read") > totals.get("decode") + totals.get("prepare") else "Decoding"


def _feed_advice(totals: StageTotals, job: dict[str, Any], device: str) -> str:
    work = sum(totals.get(stage) for stage in ("read", "decode", "prepare"))
    wall = totals.get("wall")
    now = job.get("decode_threads") or max(1, round(work / wall))
    enough = math.ceil(1.2 * work / max(wall - totals.get("wait_decode"), wall / 20))
    threads = min(MAX_THREADS, max(enough, now + 1))
    if _feeding(totals) == "Reading":
        return (f"`--decode-threads {threads}`: the threads mostly wait for storage, so more of them cost little. "
                "Workers nearer to the data (the same region) help too.")
    if device == "cuda":
        return f"`--decode-threads {threads}`: each takes one more CPU of the node for a worker."
    return ("More CPUs per worker (`--decode-threads` up to its cores), or `--workers N` on a cluster: "
            "here decoding and computing share the cores.")


def _compute_advice(totals: StageTotals, job: dict[str, Any], device: str) -> str:
    del totals
    if device != "cuda":
        return ("A GPU: `--device cuda` with a new `--out`. Without one: `--workers N` on a Ray cluster with more "
                "machines, or a smaller model.")
    if job.get("precision") == "float32":
        return "`--precision bfloat16` with a new `--out`: the GPU computes several times faster in it."
    return "Nothing: the GPU is kept busy, which is as it should be. `--workers N` with more GPUs ends sooner."


def _cells_advice(totals: StageTotals, job: dict[str, Any], device: str) -> str:
    del device
    now = job.get("decode_threads") or 1
    enough = math.ceil(totals.get("cells") / max(totals.get("wall") - totals.get("wait_cells"), totals.get("wall") / 20))
    return (f"`--decode-threads {min(MAX_THREADS, max(enough, now + 1))}`: as many threads cut out and measure cells, on cores of "
            "their own if there are some; else `--workers N` on more machines.")


def _write_advice(totals: StageTotals, job: dict[str, Any], device: str) -> str:
    del device
    if _units_are_tiny(totals, job):
        return f"{_larger_units(job)} with a new `--out`: fewer, larger objects to store."
    if totals.dense_bytes > totals.table_bytes:
        share = totals.dense_bytes / (totals.dense_bytes + totals.table_bytes)
        if job.get("dense_dtype") == "float32":
            return f"`--dense-dtype float16` with a new `--out`: patch grids are {share:.0%} of what is stored."
        if _of_volume(job):
            return ("`--output planes` with a new `--out`: the fused features can be had from the planes at any time."
                    if job.get("output") == "fused" else "`--out` on storage nearer to the workers, or a coarser `--voxel-size`.")
        return (f"Leave `patches` out of `--features` (new `--out`) if you can: patch grids are {share:.0%} of what is "
                "stored. Otherwise storage nearer to the workers.")
    if job.get("vector_dtype") == "float32":
        return "`--vector-dtype float16` with a new `--out`: half the bytes. Otherwise storage nearer to the workers."
    return "`--out` on storage nearer to the workers, or more workers that store at the same time (`--workers N`)."


def _larger_units(job: dict[str, Any]) -> str:
    return "A larger `--unit-items` (128)" if "checkpoint" in job else "`--unit-items 256` (the default)"


def _loop_advice(totals: StageTotals, job: dict[str, Any], device: str) -> str:
    del device
    if _units_are_tiny(totals, job):
        return f"{_larger_units(job)} with a new `--out`: units this small cost more to begin and end than to do."
    if totals.dense_bytes > totals.table_bytes and not _of_volume(job):
        return "Leave `patches` out of `--features` (new `--out`) if you can: packing patch grids is most of this work."
    return "`--workers N`: more workers do this side by side."
