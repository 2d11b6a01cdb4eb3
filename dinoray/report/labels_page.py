"""The page of a run of `dinoray segment volume`: views through the middle, what was found, what it cost."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from dinoray.config import SegmentVolumeJob, recorded_job
from dinoray.errors import OutputDamaged
from dinoray.io.prediction_grid import PredictionGrid
from dinoray.io.zarr_reading import open_array
from dinoray.label_planning import Forecast
from dinoray.label_units import COUNTS, MERGE_KEY, table_key
from dinoray.report import plots
from dinoray.report.labels_views import draw_planes
from dinoray.report.page import Wording, environment, stage_facts
from dinoray.report.plots import number
from dinoray.report.quarantine import quarantine_reasons
from dinoray.report.run import Run
from dinoray.runners.volume_blocks import table
from dinoray.volume_planning import nm

LABELS = Wording("block", (
    ("read", "Read", "layers of voxels from storage, decoded", "decode"),
    ("compute", "Compute", "windows to probabilities", "compute"),
    ("write", "Write", "encode shards, store, commit", "write")))
MOST_BLOCKS = 4096
"""Blocks whose instances are counted for the page, at most."""
MOST_BOXES = 64
"""Boxes whose voxels are counted by class."""


def render_labels(run: Run) -> str:
    """The page's text. Raises OutputDamaged for records or shards that are missing or cannot be read, TransientError,
    SystemicError."""
    facts = run.plan.facts
    try:
        job = recorded_job(run.job["job"])
        grid = PredictionGrid.read(facts["grid"])
        head = _head(run, grid)
        forecast = facts["forecast"]
    except (KeyError, TypeError, ValueError) as error:
        raise OutputDamaged(f"the records of the run lack {error}", where=f"{run.store.url}/_dinoray",
                            todo="restore job.json and plan/ from a copy") from error
    assert isinstance(job, SegmentVolumeJob)
    complete = run.tally.units == run.num_units
    classes = not facts["instances"]
    drawn = draw_planes(run.store, grid, job, facts["inputs"][0][2], tuple(facts["limits"]), classes=classes,  # type: ignore[arg-type]
                        with_probabilities=facts["instances"] or facts["probabilities"]) if run.tally.units else []
    found = Forecast(grid, 1, facts["instances"], facts["probabilities"])
    return environment().get_template("labels.html.j2").render(
        head=head, run=run, tally=run.tally, drawn=drawn, problem=next((d.view.problem for d in drawn if d.view.problem), ""),
        classes=_classes(run, grid, head["classes"]) if classes and run.tally.units else [],
        sizes=_sizes(run, grid) if complete and facts["instances"] else None, forecast=forecast, bytes_before=found.output_bytes,
        stages=stage_facts(run, LABELS), reasons=quarantine_reasons(run), losses=[], num_losses=0, lost="labels")


def _head(run: Run, grid: PredictionGrid) -> dict[str, Any]:
    facts = run.plan.facts
    described, settings, weights = facts["described"], run.settings, run.job["weights"]
    checkpoint = weights["checkpoint"]
    backbone = checkpoint["backbone"]
    rule = (f"affinities above {facts['threshold']:g}, "
            + {"components": "connected components", "mutex": "mutex watershed"}[settings["instances"]]
            if facts["instances"] else "the most probable class")
    base = {
        "fingerprint": described["fingerprint"], "sources": run.job["job"]["sources"], "out": run.store.url,
        "num_units": run.num_units, "complete": run.tally.units == run.num_units,
        "command": run.job["command"], "digest": weights["digest"], "weights": weights["source"],
        "precision": described["precision"], "device": facts["numerics"]["device_kind"]}
    return base | {
        "classes": checkpoint["classes"], "shape": " × ".join(map(str, grid.shape)), "voxel": nm(grid.voxel_nm),
        "raw_voxel": nm(grid.raw_voxel_nm), "rule": rule, "backbone": "none" if backbone is None else backbone["model"],
        "random": backbone is not None and str(backbone["weights"]).startswith("random"),
        "inputs": checkpoint["model"]["inputs"], "fusion": checkpoint["model"]["fusion"], "crop": settings["crop"],
        "windows": f"{' × '.join(map(str, grid.window))} voxels, margins of {' × '.join(map(str, grid.halo))}, "
                   + ("blended" if grid.blend else "thrown away"),
        "limits": " to ".join(number(v) for v in facts["limits"])}


def _classes(run: Run, grid: PredictionGrid, names: list[str]) -> list[dict[str, Any]]:
    """Share of each class in boxes spread over the volume."""
    labels, counts = open_array(run.store, grid.labels), np.zeros(len(names), np.int64)
    per_axis = tuple(-(-n // s) for n, s in zip(grid.shape, grid.chunks, strict=True))
    chosen = np.unique(np.linspace(0, prod(per_axis) - 1, MOST_BOXES).round().astype(np.int64))
    for place in zip(*(p.tolist() for p in np.unravel_index(chosen, per_axis)), strict=True):
        box = tuple(slice(i * s, min((i + 1) * s, n)) for i, s, n in zip(place, grid.chunks, grid.shape, strict=True))
        counts += np.bincount(labels[box].ravel().astype(np.int64), minlength=len(names))
    return [{"name": name, "share": counts[k] / counts.sum(), "voxels": int(counts[k])} for k, name in enumerate(names)]


def _sizes(run: Run, grid: PredictionGrid) -> dict[str, Any] | None:
    """Number and sizes of instances; None for volumes of too many blocks."""
    blocks = grid.blocks()
    if len(blocks) > MOST_BLOCKS:
        return None
    voxels = np.concatenate([np.zeros(0, np.int64), *(table(run.store, table_key(COUNTS, start)) for start, _ in blocks)])
    ids = table(run.store, MERGE_KEY).astype(np.int64)
    sums = np.bincount(ids, voxels, minlength=1)[1:]
    size_nm3 = prod(grid.voxel_nm)
    return {"count": len(sums), "median": number(float(np.median(sums))) if len(sums) else "–",
            "largest": number(float(sums.max()) / max(1, prod(grid.shape)) * 100) if len(sums) else "–",
            "volume": number(float(np.median(sums)) * size_nm3 / 1e9) if len(sums) else "–",
            "covered": float(sums.sum() / prod(grid.shape)), "plot": plots.histogram(sums.astype(np.float64))}
