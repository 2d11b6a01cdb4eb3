"""The page of a training: what was trained on what, its curves, the labelled images, the checkpoint, pictures."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from dinoray.io.stores import Store
from dinoray.io.training_examples import Example
from dinoray.report import outlines
from dinoray.report.curves import Series
from dinoray.report.lines import Chart, chart
from dinoray.report.page import environment
from dinoray.report.pictures import data_uri, one_line
from dinoray.report.plots import histogram, number
from dinoray.report.training_records import SETS, Training, open_training

SIDE = 288
"""Longest side of a picture, px; small ones are enlarged by a whole factor."""
SOURCES_LISTED = 12
BAD_LISTED = 5
_FIGURES = {"validation_ap50_image_mean": "AP at IoU 0.5, image-mean", "validation_ap50_pooled": "AP at IoU 0.5, pooled",
            "validation_seg_image_mean": "SEG, image-mean",
            "validation_images": "validation images"}


def render_training(store: Store) -> str:
    """The page's text. Raises OutputDamaged for records that cannot be read."""
    found = open_training(store)
    return environment().get_template("training.html.j2").render(
        head=_head(found), charts=_charts(found), surveys=[_survey(found, name) for name in SETS if name in found.surveys],
        checkpoint=found.checkpoint, figures=_figures(found), examples=[_picture(one) for one in found.examples],
        best=found.progress.get("best_step"), colours=_colours(), scaled=_scale(found))


def _head(found: Training) -> dict[str, Any]:
    job, progress, record = found.job, found.progress, found.record
    speeds = found.values("samples_per_s")[1]
    step, steps = int(progress.get("step", 0)), int(progress.get("steps", job.steps))
    settings = [(name, _text(value)) for name, value in found.changed_settings() if name not in ("device", "precision")]
    backbone = "frozen" if job.backbone_learning_rate is None else "trained with the decoder"
    return {"kind": "distance maps of cells", "model": record.identity.model, "backbone": backbone,
            "weights": job.weights or "official", "from_scratch": (job.weights or "").startswith("random"),
            "digest": record.identity.weights_digest,
            "fingerprint": record.fingerprint, "command": record.command, "out": found.store.url, "step": step, "steps": steps,
            "ended": progress.get("ended") or "", "complete": bool(progress.get("ended")) and found.checkpoint is not None,
            "seconds": progress.get("seconds"), "speed": float(np.median(speeds)) if speeds else None,
            "best_loss": progress.get("best_loss") if progress.get("best_step") else None, "best_step": progress.get("best_step"),
            "settings": settings, "sources": _sources(found), "batch": job.batch_size, "precision": job.precision,
            "device": job.device, "crop": job.crop_px, "workers": "in one process" if job.no_ray else f"{job.workers} on Ray Train"}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sources(found: Training) -> list[tuple[str, str]]:
    """(what it is for, where it lies), as the job names them."""
    job = found.job
    rows = [(name, source) for name, sources in (("train", job.train), ("validation", job.validation)) for source in sources]
    shown = [(name, f"{source.images}{f' (ids {source.ids})' if isinstance(source.ids, str) else ''}"
              f"{f', weight {source.weight:g}' if source.weight != 1 else ''}") for name, source in rows[:SOURCES_LISTED]]
    if len(rows) > SOURCES_LISTED:
        shown.append(("", f"and {len(rows) - SOURCES_LISTED} more"))
    if not job.validation:
        shown.append(("validation", f"{job.validation_fraction:.0%} of these images, set aside by the hash of their ids"))
    return shown


def _charts(found: Training) -> list[Chart]:
    progress, values = found.progress, found.values
    best_step, best_loss = progress.get("best_step"), progress.get("best_loss")
    mark = (best_step, best_loss, f"best: {number(best_loss)} at step {best_step:,}") if best_step and best_loss else None
    last = [found.history[0]["step"], found.history[-1]["step"]] if found.history else []
    shown = [chart("Loss", [Series("training, mean since the last point", 0, *values("loss")),
                            Series("validation, without augmentation", 1, *values("val_loss"))], log=True, mark=mark),
             chart("Learning rate", [Series("of the decoder", 0, *values("lr"))], from_zero=True),
             chart("Gradient norm", [Series("before clipping", 0, *values("grad_norm")),
                                     Series("clipped to", 2, last, [found.job.clip_norm] * len(last), dashed=True)], log=True),
             chart("Speed", [Series("samples per second of steps", 0, *values("samples_per_s"))], from_zero=True)]
    return [one for one in shown if one is not None]


def _survey(found: Training, name: str) -> dict[str, Any]:
    """One labelled set: how many images and cells, how large, which were left out."""
    table = found.surveys[name]
    used = table.filter(pa.array([reason is None for reason in table["reason"].to_pylist()], pa.bool_()))
    cells = np.array(used["objects"].to_pylist(), dtype=float)
    lists = used["diameters_px"].combine_chunks()
    diameters = (lists.flatten() if len(lists) else pa.array([], pa.float32())).to_numpy(zero_copy_only=False).astype(float)
    sizes = sorted({(height, width) for height, width in zip(used["height"].to_pylist(), used["width"].to_pylist(), strict=True)},
                   key=lambda size: (size[0] * size[1], size))
    pixel_sizes = sorted({round(size, 6) for size in used["pixel_size_um"].to_pylist() if size is not None})
    reasons: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for image_id, reason, message in zip(*(table[c].to_pylist() for c in ("image_id", "reason", "message")), strict=True):
        if reason is not None:
            reasons[reason].append((image_id, one_line(message or "")))
    return {"name": name, "images": table.num_rows, "used": used.num_rows, "cells": int(cells.sum()),
            "empty": int((cells == 0).sum()), "sizes": _ends([f"{w:,} × {h:,}" for h, w in sizes]),
            "num_sizes": len(sizes), "pixel_sizes": _ends([f"{number(size)} µm" for size in pixel_sizes]) or "not known",
            "median": number(float(np.median(diameters))) if len(diameters) else "–",
            "plots": [("cell diameter, px", histogram(diameters)), ("cells in an image", histogram(cells))],
            "reasons": [{"name": reason, "count": len(rows), "examples": rows[:BAD_LISTED]}
                        for reason, rows in sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair[0]))]}


def _ends(texts: list[str]) -> str:
    """The one text, or the first and the last."""
    return "" if not texts else texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def _scale(found: Training) -> str:
    job = found.job
    if job.pixel_size_um is not None:
        return f"resampled to {job.pixel_size_um:g} µm/px"
    if job.diameter_px is not None:
        return f"resampled so that each image's median diameter is {job.diameter_px:g} px"
    return "trained on as they are"


def _figures(found: Training) -> list[tuple[str, str]]:
    """The checkpoint's validation figures for people."""
    if found.checkpoint is None:
        return []
    return [(_FIGURES.get(name, name.replace("_", " ")), f"{value:.4f}" if isinstance(value, float) else _text(value))
            for name, value in found.checkpoint.metrics.items()]


def _picture(one: Example) -> dict[str, Any]:
    """An example as data URIs: image, true map, predicted map, outlines to lie over the image."""
    height, width = one.labels.shape
    shown = outlines.display_size(height, width, SIDE)
    true_cells, found_cells = (len(np.unique(labels[labels > 0])) for labels in (one.labels, one.cells))
    part = "" if one.image_shape == (height, width) else \
        f"part at x {one.origin[1]:,}, y {one.origin[0]:,} of {one.image_shape[1]:,} × {one.image_shape[0]:,} px"
    return {"image_id": one.image_id, "why": one.why, "ap": f"{one.ap50:.3f}", "truth": true_cells, "pred": found_cells,
            "size": f"{width:,} × {height:,} px", "part": part, "aspect": f"{width} / {height}",
            "image": _enlarged(np.moveaxis(one.pixels, 0, -1), shown),
            "target": _map(one.target, shown), "predicted": _map(one.predicted, shown),
            "outlines": outlines.compared_outlines(one.cells, one.labels, *shown)}


def _map(distance: np.ndarray, shown: tuple[int, int]) -> Any:
    gray = (np.clip(np.nan_to_num(distance.astype(np.float32)), 0, 1) * 255 + 0.5).astype(np.uint8)
    return _enlarged(np.repeat(gray[..., None], 3, axis=-1), shown)


def _enlarged(pixels: np.ndarray, shown: tuple[int, int]) -> Any:
    """Pixels uint8 [h, w, 3] at another size as a data URI."""
    if pixels.shape[:2] != shown:
        how = Image.Resampling.BOX if shown[0] <= pixels.shape[0] else Image.Resampling.BICUBIC
        pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((shown[1], shown[0]), how))
    return data_uri(pixels, quality=84)


def _colours() -> dict[str, str]:
    return {name: "#" + bytes(colour).hex() for name, colour in
            (("truth", outlines.TRUTH), ("pred", outlines.PRED), ("both", outlines.BOTH))}
