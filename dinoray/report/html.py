"""`write_report`: one self-contained HTML page about a run, for a person who wants to see it at a glance.

The page needs no network and no JavaScript, and holds no time of day: the same output and inputs give the
same bytes. Names come from files and are hostile input: everything is escaped, and a content security policy
allows nothing but inline pictures and styles.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.stores import filesystem, is_local, local_path
from dinoray.report import plots
from dinoray.report.gallery import Gallery, build_gallery
from dinoray.report.leakage import measure_leakage
from dinoray.report.platemaps import view_plates
from dinoray.report.plates import read_plates
from dinoray.report.quarantine import plates_by_loss, quarantine_reasons
from dinoray.report.run import Run, open_for_report
from dinoray.report.sample import Sample, read_sample
from dinoray.report.stages import LOOP, StageTotals, verdict
from dinoray.verification import DATA_FOLDERS

HISTOGRAM_CHANNELS = 8
WORKERS_SHOWN = 12
PLATES_LISTED = 12
TEXT_CHARS = 5000
"""Longest text of a name or a message."""
COMMAND_CHARS = 4000
"""Longer commands (thousands of sources) are cut; job.json has them whole."""
_GUARDED = (*DATA_FOLDERS, "_dinoray", "_SUCCESS")
"""Parts of an output that a page must not be written into: `verify` would find it, or miss what it replaced."""
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
    OutputDamaged when files that the receipts name, or the records of the run, are missing or unreadable.
    """
    if to is not None:
        _check_target(out, to)
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
    losses = plates_by_loss(run)
    environment = Environment(loader=PackageLoader("dinoray.report", "."), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_cut)
    environment.filters |= {"n": lambda value: f"{value:,}", "size": plots.size, "duration": plots.duration,
                            "number": plots.number, "ticks": plots.ticks, "percent": lambda value: f"{value:.0%}"}
    template = environment.get_template("report.html.j2")
    return template.render(head=_head(run, gallery), sample=sample, gallery=gallery, qc=_quality(sample),
                           plates=view_plates(read_plates(run)), leakage=measure_leakage(run, sample),
                           stages=_stages(run), reasons=quarantine_reasons(run), losses=losses[:PLATES_LISTED],
                           num_losses=len(losses), run=run, tally=run.tally, reading=_reading(run, sample))


def _cut(value: Any) -> Any:
    """Text from files is cut, so that no name can make the page large; what the report itself drew is Markup."""
    is_foreign = isinstance(value, str) and not isinstance(value, Markup)
    return f"{value[:TEXT_CHARS]}…" if is_foreign and len(value) > TEXT_CHARS else value


def _check_target(out: str, to: str) -> None:
    """Raises BadRequest for a target among the data or records of the output."""
    if is_local(out) != is_local(to):
        return
    if is_local(out):
        base, target = Path(os.path.realpath(local_path(out))), Path(os.path.realpath(local_path(to)))
        inside = target.relative_to(base).parts if target.is_relative_to(base) else ()
    else:
        base_url, url = (posixpath.normpath(text.split("://", 1)[-1]) for text in (out, to))
        inside = tuple(url.removeprefix(base_url + "/").split("/")) if url.startswith(base_url + "/") else ()
    if inside and inside[0] in _GUARDED:
        raise BadRequest("the report would stand among the data or records of the run", where=to,
                         todo="leave --to out (OUT/report.html), or give another place")


def _head(run: Run, gallery: Gallery) -> dict[str, Any]:
    """What ran. Raises OutputDamaged when the records lack what every run's have."""
    try:
        return _facts(run, gallery)
    except (KeyError, TypeError) as error:
        raise OutputDamaged(f"the records of the run lack {error}", where=f"{run.store.url}/_dinoray",
                            todo="restore job.json and plan/ from a copy") from error


def _facts(run: Run, gallery: Gallery) -> dict[str, Any]:
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
    command = run.job["command"]
    if len(command) > COMMAND_CHARS:
        command = f"{command[:COMMAND_CHARS]}… (all of it is in _dinoray/job.json)"
    return {
        "model": described["model"], "weights": weights["source"], "digest": weights["digest"],
        "random": weights["source"].startswith("random"), "fingerprint": described["fingerprint"],
        "sources": run.job["job"]["sources"], "out": run.store.url, "num_units": run.num_units,
        "num_items": run.num_items, "complete": run.tally.units == run.num_units,
        "later": [f"{g.kind} {g.number}: {g.plan.num_items:,} images" for g in run.generations[1:]],
        "precision": described["precision"], "device": used or numerics["device_kind"],
        "normalisation": f"{rule + ': ' if rule else ''}mean {mean}; std {std}",
        "features": f"{', '.join(settings['features'])} of the {layers}; {settings['vector_dtype']} vectors",
        "scaling": f"{scaling[settings['scaling']]}; 8-bit RGB is divided by 255",
        "contrast": settings.get("contrast", "none"), "tiles": _size(settings), "channels": settings["channels"],
        "has_maps": bool(gallery.bases), "command": command,
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
