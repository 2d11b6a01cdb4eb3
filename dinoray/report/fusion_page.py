"""The page of a context-fusion training: where it stands, its curves, how good it is on the validation regions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from pydantic import ValidationError

from dinoray.config import TrainContextFusionJob
from dinoray.errors import OutputDamaged
from dinoray.io.stores import Store
from dinoray.report.curves import Series
from dinoray.report.lines import Chart, chart
from dinoray.report.page import environment
from dinoray.report.plots import number
from dinoray.report.training_records import read_history, read_json

SOURCES_LISTED = 12
OF_A_CLASS = ("iou", "dice", "precision", "recall")
"""Figures of a class, as the training names them (validation_iou_NAME)."""


def is_fusion(store: Store) -> bool:
    """Whether an output of a training is of this kind."""
    record = read_json(store, "_dinoray/job.json")
    return isinstance(record, dict) and record.get("kind") == "train context-fusion"


def render_fusion(store: Store) -> str:
    """The page's text. Raises OutputDamaged for records that cannot be read."""
    record, where = read_json(store, "_dinoray/job.json"), f"{store.url}/_dinoray/job.json"
    try:
        job = TrainContextFusionJob(**record["job"])
        head = _head(store, record, job)
    except (ValidationError, KeyError, TypeError) as error:
        raise OutputDamaged(f"the record of the job cannot be read: {error!r}"[:300], where=where,
                            todo="restore it from a copy") from error
    history = read_history(store)
    checkpoint = read_json(store, "checkpoint/config.json")
    metrics = (checkpoint or {}).get("metrics", {})
    keys = {(name, what): f"validation_{what}_{name}" for name in job.classes for what in OF_A_CLASS}
    classes = [(name, [f"{metrics[keys[name, what]]:.4f}" if keys[name, what] in metrics else "–" for what in OF_A_CLASS])
               for name in job.classes if any(keys[name, what] in metrics for what in OF_A_CLASS)]
    figures = [(name.removeprefix("validation_").replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value))
               for name, value in metrics.items() if name not in keys.values()]
    return environment().get_template("fusion.html.j2").render(head=head, charts=_charts(history, head), figures=figures,
                                                               checkpoint=checkpoint, sources=_sources(job), classes=classes,
                                                               of_a_class=OF_A_CLASS)


def _head(store: Store, record: dict[str, Any], job: TrainContextFusionJob) -> dict[str, Any]:
    progress, identity = read_json(store, "_dinoray/progress.json") or {}, record["identity"]
    speeds = [row["samples_per_s"] for row in read_history(store) if row.get("samples_per_s")]
    settings = [(name, json.dumps(value)) for name, value in identity["settings"].items()
                if name in TrainContextFusionJob.model_fields and name not in ("device", "precision") and value != _default(name)]
    shares = [(what, progress[key])
              for what, key in (("extraction", "extraction_share"), ("waiting for samples", "wait_share")) if key in progress]
    return {"model": identity["model"] or "none", "digest": identity["weights_digest"] or "", "weights": job.weights or "official",
            "random": (job.weights or "").startswith("random") and job.uses_backbone, "fingerprint": record["fingerprint"],
            "command": record["command"], "out": store.url, "step": int(progress.get("step", 0)),
            "steps": int(progress.get("steps", job.steps)),
            "ended": progress.get("ended") or "", "seconds": progress.get("seconds"),
            "complete": bool(progress.get("ended")) and store.exists("checkpoint/config.json"),
            "speed": float(np.median(speeds)) if speeds else None, "best_step": progress.get("best_step"),
            "best_loss": progress.get("best_loss") if progress.get("best_step") else None, "settings": settings, "shares": shares,
            "batch": job.batch_size, "crop": " × ".join(map(str, job.crop_shape)), "precision": job.precision, "device": job.device,
            "workers": "in one process" if job.no_ray else f"{job.workers} on Ray Train", "inputs": job.inputs,
            "fusion": job.fusion, "target": job.target}


def _default(name: str) -> Any:
    default = TrainContextFusionJob.model_fields[name].get_default(call_default_factory=True)
    if hasattr(default, "model_dump_json"):
        return json.loads(default.model_dump_json())
    return list(default) if isinstance(default, tuple) else default


def _charts(history: list[dict[str, float | None]], head: dict[str, Any]) -> list[Chart]:
    def values(name: str) -> tuple[list[float], list[float]]:
        rows = [row for row in history if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]  # type: ignore[misc]

    best = (head["best_step"], head["best_loss"], f"best: {number(head['best_loss'])} at step {head['best_step']:,}") \
        if head["best_loss"] else None
    shown = [chart("Loss", [Series("training, mean since the last point", 0, *values("loss")),
                            Series("validation, without augmentation", 1, *values("val_loss"))], log=True, mark=best),
             chart("Validation IoU", [Series("mean over classes but the first", 0, *values("val_iou"))], from_zero=True),
             chart("Learning rate", [Series("of the UNet", 0, *values("lr"))], from_zero=True),
             chart("Gradient norm", [Series("before clipping", 0, *values("grad_norm"))], log=True),
             chart("Speed", [Series("samples per second of steps", 0, *values("samples_per_s"))], from_zero=True),
             chart("Where the time goes", [Series("extraction", 0, *values("extraction_share")),
                                           Series("waiting for samples", 1, *values("wait_share"))], from_zero=True)]
    return [one for one in shown if one is not None]


def _sources(job: TrainContextFusionJob) -> list[tuple[str, str]]:
    rows = [(name, source) for name, sources in (("train", job.train), ("validation", job.validation)) for source in sources]
    shown = [(name, f"{source.raw} [{source.region or 'all'}], labels {source.labels}"
              + (f", tokens {source.tokens}" if source.tokens else ""))
             for name, source in rows[:SOURCES_LISTED]]
    return shown + ([("", f"and {len(rows) - SOURCES_LISTED} more")] if len(rows) > SOURCES_LISTED else [])
