"""What the pages of all kinds of runs share: the environment of their templates, and the section on what limits a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dinoray.report import plots
from dinoray.report.run import Run
from dinoray.report.stages import LOOP, StageTotals, verdict
from dinoray.wording import device_words, plural

WORKERS_SHOWN = 12
TEXT_CHARS = 5000
"""Longest text of a name or a message."""
COMMAND_CHARS = 4000
"""Longer commands (thousands of sources) are cut; job.json has them whole."""


@dataclass(frozen=True)
class Wording:
    """What the section on the stages calls things: one item, and (stage, title, what it does, part of the loop)."""

    noun: str
    stages: tuple[tuple[str, str, str, str], ...]


IMAGES = Wording("image", (
    ("read", "Read", "files from storage", "decode"), ("decode", "Decode", "bytes to pixels", "decode"),
    ("prepare", "Prepare", "check, cut tiles, measure quality", "decode"), ("compute", "Compute", "pixels to features", "compute"),
    ("write", "Write", "store, commit", "write")))
CELLS = Wording("image", (
    ("read", "Read", "files from storage", "decode"), ("decode", "Decode", "bytes to pixels", "decode"),
    ("prepare", "Prepare", "check, choose the channel, resample, cut windows", "decode"),
    ("compute", "Compute", "windows to distance maps", "compute"),
    ("cells", "Cells", "blend, watershed, measure, store masks", "cells"), ("write", "Write", "store tables, commit", "write")))
VOLUMES = Wording("slab", (
    ("read", "Read", "chunks from storage, decoded", "decode"),
    ("prepare", "Prepare", "check, slices at the target's pitch", "decode"),
    ("compute", "Compute", "windows to tokens", "compute"), ("write", "Write", "encode shards, store, commit", "write")))


def environment() -> Environment:
    """Of the templates of this package: everything is escaped, nothing may be undefined, long foreign text is cut."""
    found = Environment(loader=PackageLoader("dinoray.report", "."), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True, finalize=_cut)
    found.filters |= {"n": lambda value: f"{value:,}", "size": plots.size, "duration": plots.duration,
                      "number": plots.number, "ticks": plots.ticks, "percent": lambda value: f"{value:.0%}"}
    return found


def _cut(value: Any) -> Any:
    """Text from files is cut, so that no name can make the page large; what the report itself drew is Markup."""
    is_foreign = isinstance(value, str) and not isinstance(value, Markup)
    return f"{value[:TEXT_CHARS]}…" if is_foreign and len(value) > TEXT_CHARS else value


def run_facts(run: Run) -> dict[str, Any]:
    """What the head of every page says of a run: model, weights, numerics, command. Raises KeyError, TypeError for records
    that lack what every run's have."""
    described, numerics, weights = run.plan.facts["described"], run.plan.facts["numerics"], run.job["weights"]
    normalisation = described["normalisation"]
    mean, std = (", ".join(f"{v:g}" for v in normalisation[key]) for key in ("mean", "std"))
    rule = weights.get("normalisation_rule") or normalisation.get("rule")
    kinds = sorted(run.tally.device_kinds.items())
    used = ", ".join(device_words(kind) + (f": {plural(count, 'unit')}" if len(kinds) > 1 else "") for kind, count in kinds)
    command = run.job["command"]
    if len(command) > COMMAND_CHARS:
        command = f"{command[:COMMAND_CHARS]}… (all of it is in _dinoray/job.json)"
    return {"model": described["model"], "weights": weights["source"], "digest": weights["digest"],
            "random": weights["source"].startswith("random"), "fingerprint": described["fingerprint"],
            "sources": run.job["job"]["sources"], "out": run.store.url, "num_units": run.num_units, "num_items": run.num_items,
            "complete": run.tally.units == run.num_units, "precision": described["precision"],
            "device": used or device_words(numerics["device_kind"]),
            "normalisation": f"{rule + ': ' if rule else ''}mean {mean}; std {std}",
            "command": command}


def stage_facts(run: Run, wording: Wording) -> dict[str, Any]:
    """What `limits.html.j2` shows: seconds by stage, where the loop waited, the verdict, the workers."""
    totals: StageTotals = run.stages
    device = run.plan.facts["numerics"]["device"]
    wall, items, shares = totals.get("wall"), max(1, totals.items), totals.loop_parts()
    rows = [{"name": title, "what": what, "seconds": totals.get(stage), "part": part,
             "per_item": totals.get(stage) / items, "busy": totals.get(stage) / wall if wall else 0.0}
            for stage, title, what, part in wording.stages]
    busiest = max((row["busy"] for row in rows), default=0) or 1.0
    for row in rows:
        row["bar"] = row["busy"] / busiest
    workers = [{"name": f"{host} · {pid}", "units": worker.units, "items": worker.items,
                "rate": worker.items / worker.wall if worker.wall else 0.0}
               for (host, pid), worker in totals.workers.items()]
    titles = (("decode", f"waiting for {wording.noun}s"), ("compute", "waiting for compute"),
              ("cells", "waiting for cells"), ("write", "storing"),
              (LOOP, "gathering, packing"))
    return {"rows": rows, "verdict": verdict(totals, run.job["job"], device=device), "wall": wall,
            "parts": [(name, title, shares[name]) for name, title in titles if name in shares], "noun": wording.noun,
            "workers": workers[:WORKERS_SHOWN], "num_workers": len(workers),
            "num_hosts": len({host for host, _ in totals.workers}), "rate": _rate(totals)}


def _rate(totals: StageTotals) -> str:
    """`8.1` or, where storing may have overlapped much, `4.2 to 8.1`; empty without times."""
    rate = totals.rate()
    if rate is None:
        return ""
    least, most = plots.number(rate[0]), plots.number(rate[1])
    return f"{least} to {most}" if rate[1] > 1.1 * rate[0] else least
