"""How good are masks? Pairs of label images -> scores, intervals, a table, files, a page. Definitions: docs/evaluation.md."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.errors import BadRequest, ItemError
from dinoray.generations import generations, quarantined_now
from dinoray.io.decoded import Limits
from dinoray.io.label_images import BINARY_PIECES, pieces_of_one_value
from dinoray.io.label_pairs import LabelPair, masks_of_output
from dinoray.io.stores import open_store, read_bytes
from dinoray.io.text_tables import text_rows
from dinoray.memory.meter import available_cores
from dinoray.report.evaluation_page import render_evaluation
from dinoray.report.html import write_page
from dinoray.units import Plan
from dinoray.vision.bootstrap import POOLINGS, RESAMPLES, Estimate, Summary, summarise
from dinoray.vision.instance_metrics import THRESHOLDS, ImageScore, check_iou_thresholds, score_image
from dinoray.vision.score_summary import MEAN_AP, Counts, default_metrics, evaluate, threshold_name
from dinoray.wording import plural

SHOWN = ("SEG", "DET", "OP_CSB", MEAN_AP)
"""Metrics of every table, before those of the chosen thresholds."""
UNGROUPED = "(no group)"
_NAMED = 5


@dataclass(frozen=True)
class Evaluation:
    """The scores of a set of images, with everything they were made with."""

    scores: list[ImageScore]
    summary: Summary
    groups: dict[str, Summary]
    """By name of the group; empty without groups."""
    group_of: dict[str, str]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What a reader must know: predictions that were missing, or not asked for."""
    pairs: list[LabelPair] = field(default_factory=list)


def evaluate_cells(pairs: Sequence[LabelPair], *, thresholds: Sequence[float] = (0.5, 0.75), resamples: int = RESAMPLES,
                   seed: int = 0, groups: Mapping[str, str] | None = None, threads: int | None = None, limits: Limits | None = None,
                   settings: Mapping[str, Any] | None = None, done: Callable[[int], None] = lambda number: None) -> Evaluation:
    """Score pairs of label images. Memory: one pair per thread (default: as many as cores, at most 4).

    thresholds: IoU thresholds of the tables; counts are kept at 0.5, 0.55, ..., 0.95 besides. resamples: draws of the
    intervals, 0 for none. groups: image id -> group (others are UNGROUPED). limits: what label images may declare.
    settings: recorded with the result. done: called with the number of images scored so far.
    Raises BadRequest for no pair, wrong thresholds, predictions that are binary masks, and files that are no label images, cannot
    be read or differ in size (up to five are named); TransientError, SystemicError for storage trouble.
    """
    if not pairs:
        raise BadRequest("there is nothing to score", todo="give at least one pair of label images")
    if resamples < 0 or seed < 0:
        raise BadRequest(f"{resamples} draws with seed {seed}", where="--bootstrap", todo="give numbers of 0 or above")
    wanted = sorted({float(t) for t in thresholds})
    kept = tuple(sorted({*THRESHOLDS, *wanted}))
    check_iou_thresholds(kept)
    scored, problems = [], []
    with ThreadPoolExecutor(threads or min(4, available_cores())) as pool:
        for number, result in enumerate(pool.map(lambda pair: _score(pair, kept, limits), pairs), 1):
            (problems if isinstance(result, str) else scored).append(result)
            done(number)
    if problems:
        more = f"\n  and {len(problems) - _NAMED:,} more" if len(problems) > _NAMED else ""
        raise BadRequest(f"{len(problems):,} of {len(pairs):,} pairs cannot be scored:\n  " + "\n  ".join(problems[:_NAMED]) + more,
                         todo="mend these files, or choose others with --ids")
    notes, scores = _binary_notes(scored), [score for score, _ in scored]
    metrics = [*SHOWN, *(metric for metric in default_metrics(wanted) if "@" in metric and metric != MEAN_AP)]
    group_of = {score.image_id: groups.get(score.image_id, UNGROUPED) for score in scores} if groups is not None else {}
    by_group: dict[str, list[ImageScore]] = {}
    for score in scores if group_of else []:
        by_group.setdefault(group_of[score.image_id], []).append(score)
    missing = sorted(pair.image_id for pair in pairs if pair.pred is None)
    if missing:
        notes.append(f"{plural(len(missing), 'image')} without a prediction, scored as empty: {_some(missing)}")
    if group_of and UNGROUPED in by_group and len(by_group) == 1:
        raise BadRequest("none of the images has a group", where="--groups",
                         todo=f"the groups are by image id, such as {scores[0].image_id!r}")
    return Evaluation(
        scores, summarise(scores, metrics, resamples=resamples, seed=seed),
        {name: summarise(by_group[name], metrics, resamples=resamples, seed=seed) for name in sorted(by_group)}, group_of,
        {"thresholds": wanted, "bootstrap": resamples, "seed": seed, **(settings or {})}, notes, list(pairs))


def _score(pair: LabelPair, thresholds: tuple[float, ...], limits: Limits | None) -> tuple[ImageScore, int] | str:
    """(the score, the pieces of a prediction of one value), or one line that says what is wrong with the pair."""
    try:
        pred, truth = pair.read(limits)
    except (ItemError, BadRequest) as error:
        return f"{pair.image_id}: {error.what} [{error.where}]"
    return score_image(pred, truth, image_id=pair.image_id, thresholds=thresholds), pieces_of_one_value(pred)


def _binary_notes(scored: Sequence[tuple[ImageScore, int]]) -> list[str]:
    """A note of predictions that look like binary masks, and are scored as one object each.

    Raises BadRequest where all predictions have one value, and most of them have it in many pieces.
    """
    pieces = {score.image_id: count for score, count in scored if score.pred}
    binary = sorted(name for name, count in pieces.items() if count >= BINARY_PIECES)
    if 2 * len(binary) > len(pieces) and all(pieces.values()):
        raise BadRequest(f"the predictions are binary masks, not labels: each has one value besides 0, {len(binary):,} of "
                         f"{len(pieces):,} in {BINARY_PIECES} or more separate pieces: {_some(binary)}", where="--pred",
                         todo="give each cell its own number (skimage.measure.label)")
    return [f"{plural(len(binary), 'prediction')} of one value in {BINARY_PIECES} or more separate pieces, scored as one object "
            f"each: {_some(binary)}"] if binary else []


def output_notes(pred: str) -> list[str]:
    """What a reader must know of the run that made the predictions: units not done, images in quarantine. Nothing for
    plain folders. Raises OutputDamaged when its records cannot be read."""
    store = open_store(pred)
    if masks_of_output(pred) is None or not Plan.exists(store):
        return []
    parts = generations(store)
    planned = sum(len(part.plan) for part in parts)
    waiting = sum(len(set(part.plan.unit_ids) - part.ledger.done()) for part in parts)
    notes = [f"the run is unfinished: {waiting:,} of {plural(planned, 'unit')} are not done"] if waiting else []
    reasons = Counter(quarantined_now(parts)["reason"].to_pylist())
    if reasons:
        named = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
        notes.append(f"{plural(reasons.total(), 'image')} of the run in quarantine: {named}")
    return notes


def read_groups(source: str, by: str | None = None) -> dict[str, str]:
    """image id -> group, of a JSON object (`FILE.json`, or `FILE.json#key/key` for one inside), or of the column `by` of a
    CSV or Parquet table with a column `item_id` or `image_id`. Raises BadRequest."""
    path, _, keys = source.partition("#")
    if path.lower().endswith(".json"):
        return _json_groups(path, keys, by)
    found: dict[str, str] = {}
    for names, rows in text_rows(source):
        key = next((name for name in ("item_id", "image_id") if name in names), None)
        if key is None or by not in names:
            raise BadRequest(f"a table of groups has the columns {', '.join(names)}", where=source,
                             todo="it needs item_id or image_id, and the one that --by names")
        a, b = names.index(key), names.index(by)
        found |= {row[a]: row[b] for row in rows if row[a] and row[b]}
    return found


def _json_groups(path: str, keys: str, by: str | None) -> dict[str, str]:
    try:
        value = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise BadRequest("no such file", where=path, todo="check --groups") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not a JSON file: {error}", where=path, todo="check --groups") from error
    for key in [key for key in [*keys.split("/"), by or ""] if key]:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not value or not all(isinstance(v, str) for v in value.values()):
        raise BadRequest("not an object of image id: group", where=f"{path}#{keys}", todo="FILE.json#key/key names one inside")
    return value


def table_lines(summary: Summary, title: str = "all images") -> list[str]:
    """A summary as lines of text: a row per metric, image-mean and pooled with their intervals."""
    head = f"{title}: {plural(summary.images, 'image')}, {plural(summary.truth, 'true object')}, {summary.pred:,} predicted"
    rows = [("metric", "image-mean [95 %]", "pooled [95 %]")]
    rows += [(name, *(_shown(found[pooling]) for pooling in POOLINGS)) for name, found in summary.metrics.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [head, *("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)]


def _shown(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    ends = "" if math.isnan(estimate.low) else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{ends}"


def write_evaluation(evaluation: Evaluation, out: str) -> list[str]:
    """Write `evaluation.json`, `.parquet` and `.html` into the folder or URL `out`, replacing older ones; their places.

    Label images of the worst images are read again for the page. Raises BadRequest when they cannot be written.
    """
    written = {
        "evaluation.json": json.dumps(as_json(evaluation), indent=1, allow_nan=False).encode(),
        "evaluation.parquet": _parquet(evaluation),
        "evaluation.html": render_evaluation(
            evaluation.scores, evaluation.summary, evaluation.groups, evaluation.settings, evaluation.notes,
            {pair.image_id: pair for pair in evaluation.pairs}).encode("utf-8", "replace"),
    }
    return [write_page(f"{out.rstrip('/')}/{name}", data) for name, data in written.items()]


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything but the pixels; what is undefined is null."""
    images = [{"image_id": s.image_id, **({"group": evaluation.group_of[s.image_id]} if evaluation.group_of else {}),
               "truth": s.truth, "pred": s.pred, "jaccard": s.jaccard, "splits": s.splits, "missed": s.missed,
               "spurious": s.spurious, "tp": list(s.tp), "iou": list(s.iou)} for s in evaluation.scores]
    return {"settings": evaluation.settings, "notes": evaluation.notes, "summary": _summary_json(evaluation.summary),
            "groups": {name: _summary_json(summary) for name, summary in evaluation.groups.items()},
            "thresholds": list(evaluation.scores[0].thresholds), "images": images}


def _summary_json(summary: Summary) -> dict[str, Any]:
    def plain(value: float) -> float | None:
        return None if math.isnan(value) else value

    metrics = {name: {pooling: {"value": plain(e.value), "low": plain(e.low), "high": plain(e.high)} | (
        {"images": e.images} if pooling == "image_mean" else {}) for pooling, e in found.items()}
        for name, found in summary.metrics.items()}
    return {"images": summary.images, "truth": summary.truth, "pred": summary.pred, "metrics": metrics}


def _parquet(evaluation: Evaluation) -> bytes:
    """A row per image: its counts, and its metrics (null where undefined)."""
    scores, counts = evaluation.scores, Counts.of(evaluation.scores)
    columns: dict[str, pa.Array] = {"image_id": pa.array([s.image_id for s in scores])}
    if evaluation.group_of:
        columns["group"] = pa.array([evaluation.group_of[s.image_id] for s in scores])
    for name in ("truth", "pred", "splits", "missed", "spurious"):
        columns[name] = pa.array([getattr(s, name) for s in scores], pa.int64())
    for place, threshold in enumerate(scores[0].thresholds):
        columns[f"tp@{threshold_name(threshold)}"] = pa.array([s.tp[place] for s in scores], pa.int64())
    for metric in evaluation.summary.metrics:
        columns[metric] = pa.array(np.asarray(evaluate(counts, metric), np.float64), from_pandas=True)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
