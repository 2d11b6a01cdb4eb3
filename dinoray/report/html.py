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

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.stores import filesystem, is_local, local_path, open_store
from dinoray.report import plots
from dinoray.report.fusion_page import is_fusion, render_fusion
from dinoray.report.gallery import Gallery, build_gallery
from dinoray.report.labels_page import render_labels
from dinoray.report.leakage import measure_leakage
from dinoray.report.page import IMAGES, environment, run_facts, stage_facts
from dinoray.report.platemaps import view_plates
from dinoray.report.plates import read_plates
from dinoray.report.quarantine import plates_by_loss, quarantine_reasons
from dinoray.report.run import Run, open_for_report
from dinoray.report.sample import Sample, read_sample
from dinoray.report.segmentation_page import render_segmentation
from dinoray.report.training_page import render_training
from dinoray.report.training_records import is_training
from dinoray.report.volume_page import render_volume
from dinoray.verification import DATA_FOLDERS

HISTOGRAM_CHANNELS = 8
PLATES_LISTED = 12
_GUARDED = (*DATA_FOLDERS, "checkpoint", "tensorboard", "history.json", "_dinoray", "_SUCCESS")
"""Parts of an output that a page must not be written into: `verify` would find it, or miss what it replaced."""
_QC = (("p50", "median intensity"), ("focus", "focus (sharpness)"), ("frac_saturated", "saturated share"))


def write_report(out: str, to: str | None = None) -> str:
    """Write the report of the run or training in `out` (folder or URL), finished or not; returns the file's path or URL.

    `to` is the file to write, default `OUT/report.html`. Inputs are read again for thumbnails; those that
    cannot be read get a placeholder. Raises BadRequest when `out` holds no run or `to` cannot be written,
    OutputDamaged when files that the receipts name, or the records of the run, are missing or unreadable.
    """
    if to is not None:
        _check_target(out, to)
    store = open_store(out)
    if is_training(store):
        text = render_fusion(store) if is_fusion(store) else render_training(store)
    else:
        text = render(open_for_report(out))
    page = text.encode("utf-8", "replace")
    if to is None:
        store.put("report.html", page)
        return f"{store.url}/report.html"
    return write_page(to, page)


def render(run: Run) -> str:
    """The page's text."""
    if run.is_volume:
        return render_volume(run)
    if run.plan.facts.get("kind") == "volume-labels":
        return render_labels(run)
    if run.is_segmentation:
        return render_segmentation(run)
    sample = read_sample(run)
    gallery = build_gallery(run, sample)
    losses = plates_by_loss(run)
    template = environment().get_template("report.html.j2")
    return template.render(head=_head(run, gallery), sample=sample, gallery=gallery, qc=_quality(sample),
                           plates=view_plates(read_plates(run)), leakage=measure_leakage(run, sample),
                           stages=stage_facts(run, IMAGES), reasons=quarantine_reasons(run), losses=losses[:PLATES_LISTED],
                           num_losses=len(losses), run=run, tally=run.tally, reading=_reading(run, sample))


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
    settings = run.settings
    scaling = {"plate": f"per plate or folder and channel, percentiles {settings['scaling_low_percent']:g} to "
                        f"{settings['scaling_high_percent']:g}",
               "image": f"per image, percentiles {settings['scaling_low_percent']:g} to "
                        f"{settings['scaling_high_percent']:g}", "dtype": "the full range of the dtype"}
    layers = f"layers {', '.join(str(v) for v in settings['layers'])}" if settings["layers"] else "last layer"
    return {
        **run_facts(run), "later": [f"{g.kind} {g.number}: {g.plan.num_items:,} images" for g in run.generations[1:]],
        "features": f"{', '.join(settings['features'])} of the {layers}; {settings['vector_dtype']} vectors",
        "scaling": f"{scaling[settings['scaling']]}; 8-bit RGB is divided by 255",
        "contrast": settings.get("contrast", "none"), "tiles": _size(settings), "channels": settings["channels"],
        "has_maps": bool(gallery.bases),
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


def _reading(run: Run, sample: Sample) -> dict[str, Any]:
    vectors = sample.vector_column
    return {"out": repr(run.store.url), "vector": vectors,
            "dim": None if sample.vectors is None else sample.vectors.shape[1],
            "dense": sample.dense_column, "index": sample.index_column}


def write_page(to: str, page: bytes) -> str:
    """Write a page (or what goes with it) to a local path (atomically) or a URL. Raises BadRequest when that cannot be done."""
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
                         todo="name a file in a folder that you may write to") from error


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
