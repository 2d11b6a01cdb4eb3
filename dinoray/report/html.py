"""`write_report`: one self-contained HTML page about a run, for a person who wants to see it at a glance.

The page needs no network and no JavaScript, and holds no time of day: the same output and inputs give the
same bytes. Names come from files and are hostile input: everything is escaped, and a content security policy
allows nothing but inline pictures and styles.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from dinoray.errors import BadRequest
from dinoray.io.stores import filesystem, is_local, local_path
from dinoray.report import plots
from dinoray.report.gallery import Gallery, build_gallery
from dinoray.report.quarantine import quarantine_reasons
from dinoray.report.sample import Run, Sample, open_for_report, read_sample
from dinoray.report.stages import LOOP, StageTotals, verdict

HISTOGRAM_CHANNELS = 8
WORKERS_SHOWN = 12
_QC = (("p50", "median intensity"), ("focus", "focus (sharpness)"), ("frac_saturated", "saturated share"))
_STAGES = (("read", "Read", "files from storage", "decode"), ("decode", "Decode", "bytes to pixels", "decode"),
           ("prepare", "Prepare", "check, cut tiles, measure quality", "decode"),
           ("compute", "Compute", "pixels to features", "compute"), ("write", "Write", "store, commit", "write"))
_PARTS = (("decode", "waiting for images"), ("compute", "waiting for compute"), ("write", "storing"),
          (LOOP, "gathering, packing"))


def write_report(out: str, to: str | None = None) -> str:
    """Write the report of the run in `out` (folder or URL), finished or not; returns the file's path or URL.

    `to` is the file to write, default `OUT/report.html`. Inputs are read again for thumbnails; those that
    cannot be read get a placeholder. Raises BadRequest when `out` holds no run or `to` cannot be written,
    OutputDamaged when files that the receipts name are missing or unreadable.
    """
    run = open_for_report(out)
    page = render(run).encode("utf-8", "replace")
    if to is None:
        run.store.put("report.html", page)
        return f"{run.store.url}/report.html"
    return _write(to, page)


def render(run: Run) -> str:
    """The page's text."""
    sample = read_sample(run)
    gallery = build_gallery(run, sample)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"n": lambda value: f"{value:,}", "size": plots.size, "duration": plots.duration,
                            "number": plots.number, "ticks": plots.ticks, "percent": lambda value: f"{value:.0%}"}
    template = environment.from_string(files("dinoray.report").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(head=_head(run, gallery), sample=sample, gallery=gallery, qc=_quality(sample),
                           stages=_stages(run), reasons=quarantine_reasons(run), run=run, tally=run.tally,
                           reading=_reading(run, sample))


def _head(run: Run, gallery: Gallery) -> dict[str, Any]:
    described, settings, numerics = run.plan.facts["described"], run.settings, run.plan.facts["numerics"]
    normalisation = described["normalisation"]
    mean, std = (", ".join(f"{v:g}" for v in normalisation[key]) for key in ("mean", "std"))
    weights = run.job["weights"]
    rule = weights.get("normalisation_rule") or normalisation.get("rule")
    scaling = {"plate": f"per plate or folder and channel, percentiles {settings['scaling_low_percent']:g} to "
                        f"{settings['scaling_high_percent']:g}",
               "image": f"per image, percentiles {settings['scaling_low_percent']:g} to "
                        f"{settings['scaling_high_percent']:g}", "dtype": "the full range of the dtype"}
    layers = f"layers {', '.join(str(v) for v in settings['layers'])}" if settings["layers"] else "last layer"
    kinds = sorted(run.tally.device_kinds.items())
    used = ", ".join(f"{kind} ({count:,} units)" if len(kinds) > 1 else kind for kind, count in kinds)
    return {
        "model": described["model"], "weights": weights["source"], "digest": weights["digest"],
        "random": weights["source"].startswith("random"), "fingerprint": described["fingerprint"],
        "sources": run.job["job"]["sources"], "out": run.store.url, "num_units": len(run.plan),
        "num_items": run.plan.num_items, "complete": run.tally.units == len(run.plan),
        "precision": described["precision"], "device": used or numerics["device_kind"],
        "normalisation": f"{rule + ': ' if rule else ''}mean {mean}; std {std}",
        "features": f"{', '.join(settings['features'])} of the {layers}; {settings['vector_dtype']} vectors",
        "scaling": f"{scaling[settings['scaling']]}; 8-bit RGB is divided by 255",
        "contrast": settings["contrast"], "tiles": _size(settings), "channels": settings["channels"],
        "has_maps": gallery.basis is not None, "command": run.job["command"],
    }


def _size(settings: dict[str, Any]) -> str:
    """What part of an image a row is."""
    if "crop_um" in settings:
        masked = ", other cells masked" if settings["mask_neighbours"] else ""
        return f"one row per cell: {settings['crop_um']:g} µm around its centroid, resampled to {settings['crop_px']} px{masked}"
    tile = settings["tile_px"]
    return {"auto": f"tiles of {tile} px where a side exceeds {2 * tile} px, else whole images", "tiles": f"tiles of {tile} px",
            "native": "whole images", "resize": f"resized to {settings['resize_px']} px"}[settings["size"]]


def _quality(sample: Sample) -> list[dict[str, Any]]:
    """Histograms per channel, the channels with most rows first (ties: order of appearance)."""
    if not sample.table.num_rows:
        return []
    names = np.array(sample.table["channel"].to_pylist(), dtype=object)
    counts = {channel: int((names == channel).sum()) for channel in sample.channels}
    values = {name: sample.table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name, _ in _QC}
    shown = sorted(counts, key=lambda channel: -counts[channel])[:HISTOGRAM_CHANNELS]
    return [{"channel": channel, "rows": counts[channel],
             "plots": [(title, plots.histogram(values[name][names == channel])) for name, title in _QC]}
            for channel in shown]


def _stages(run: Run) -> dict[str, Any]:
    totals: StageTotals = run.stages
    device = run.plan.facts["numerics"]["device"]
    wall, items, parts = totals.get("wall"), max(1, totals.items), totals.loop_parts()
    rows = [{"name": title, "what": what, "seconds": totals.get(stage), "part": part,
             "per_item": totals.get(stage) / items, "busy": totals.get(stage) / wall if wall else 0.0}
            for stage, title, what, part in _STAGES]
    busiest = max((row["busy"] for row in rows), default=0) or 1.0
    for row in rows:
        row["bar"] = row["busy"] / busiest
    workers = [{"name": f"{host} · {pid}", "units": worker.units, "items": worker.items,
                "rate": worker.items / worker.wall if worker.wall else 0.0}
               for (host, pid), worker in totals.workers.items()]
    return {"rows": rows, "verdict": verdict(totals, run.job["job"], device=device), "wall": wall,
            "parts": [(name, title, parts[name]) for name, title in _PARTS if parts],
            "workers": workers[:WORKERS_SHOWN], "num_workers": len(workers),
            "num_hosts": len({host for host, _ in totals.workers}), "rate": _rate(totals)}


def _rate(totals: StageTotals) -> str:
    """`8.1` or, where storing may have overlapped much, `4.2 to 8.1`; empty without times."""
    rate = totals.rate()
    if rate is None:
        return ""
    least, most = plots.number(rate[0]), plots.number(rate[1])
    return f"{least} to {most}" if rate[1] > 1.1 * rate[0] else least


def _reading(run: Run, sample: Sample) -> dict[str, Any]:
    vectors = sample.vector_column
    return {"out": repr(run.store.url), "vector": vectors,
            "dim": None if sample.vectors is None else sample.vectors.shape[1],
            "dense": sample.dense_column, "index": sample.index_column}


def _write(to: str, page: bytes) -> str:
    """Write the page to a local path (atomically) or a URL. Raises BadRequest when that cannot be done."""
    try:
        if not is_local(to):
            fs, path = filesystem(to)
            fs.pipe_file(path, page)
            return to
        target = local_path(to)
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, page)
        return str(target)
    except OSError as error:
        raise BadRequest(f"the report cannot be written: {error.strerror or error}", where=to,
                         todo="give --to a file in a folder that you may write to") from error


def _replace(target: Path, page: bytes) -> None:
    descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(page)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
