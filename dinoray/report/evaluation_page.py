"""The page of an evaluation: what was scored, the metrics with their intervals, curves over IoU, and the worst images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinoray.io.label_pairs import LabelPair
from dinoray.report import mask_pictures, outlines
from dinoray.report.curves import POINTS, Series, counts_scatter, curves
from dinoray.report.mask_pictures import draw_masks
from dinoray.report.page import environment
from dinoray.report.plots import histogram
from dinoray.vision.bootstrap import POOLINGS, Estimate, Summary
from dinoray.vision.instance_metrics import THRESHOLDS, ImageScore
from dinoray.vision.score_summary import Counts, evaluate, image_mean

WORST = 6
"""Images shown."""
GROUPS = 24
"""Groups with a table of their own."""


def render_evaluation(scores: Sequence[ImageScore], summary: Summary, groups: Mapping[str, Summary], settings: Mapping[str, Any],
                      notes: Sequence[str], pairs: Mapping[str, LabelPair]) -> str:
    """The page's text. Labels and images of the worst images are read again; what cannot be read is said in its place."""
    counts = Counts.of(scores)
    ap50 = evaluate(counts, "AP@0.5")
    return environment().get_template("evaluation.html.j2").render(
        summary=summary, rows=_rows(summary), groups=[(name, one, _rows(one)) for name, one in list(groups.items())[:GROUPS]],
        num_groups=len(groups), settings=settings, notes=notes, curves=_curves(counts), histogram=histogram(ap50),
        perfect=int((ap50 == 1).sum()), zero=int((ap50 == 0).sum()),
        scatter=counts_scatter([s.truth for s in scores], [s.pred for s in scores], [s.image_id for s in scores],
                               x_label="true objects", y_label="predicted objects"),
        points=min(len(scores), POINTS), worst=_worst(scores, ap50, pairs), tile=_tile(summary), colours=_colours())


def _rows(summary: Summary) -> list[dict[str, str]]:
    """One row per metric, as text."""
    return [{"name": name, **{pooling: _value(found[pooling]) for pooling in POOLINGS},
             **{f"{pooling}_ends": _ends(found[pooling]) for pooling in POOLINGS},
             "images": f"{found['image_mean'].images:,}"} for name, found in summary.metrics.items()]


def _value(estimate: Estimate) -> str:
    return "–" if math.isnan(estimate.value) else f"{estimate.value:.3f}"


def _ends(estimate: Estimate) -> str:
    return "" if math.isnan(estimate.low) else f"{estimate.low:.3f} to {estimate.high:.3f}"


def _tile(summary: Summary) -> list[tuple[str, str]]:
    """The first numbers of the page: (value, what it is)."""
    shown = [("AP@0.5", "image_mean", "AP at IoU 0.5, image-mean"), ("AP@0.5", "pooled", "AP at IoU 0.5, pooled"),
             ("SEG", "pooled", "SEG, pooled"), ("DET", "pooled", "DET, pooled")]
    return [(_value(summary.metrics[name][pooling]), what) for name, pooling, what in shown if name in summary.metrics]  # type: ignore[index]


def _curves(counts: Counts) -> list[tuple[str, Any, list[tuple[int, bool, str]]]]:
    """(title, drawing, legend as (colour, dashed, label))."""
    total = counts.total()

    def both(name: str, colour: int) -> list[Series]:
        means = [image_mean(evaluate(counts, f"{name}@{t:g}")) for t in THRESHOLDS]
        pooled = [float(evaluate(total, f"{name}@{t:g}")) for t in THRESHOLDS]
        return [Series(f"{name}, image-mean", colour, THRESHOLDS, means),
                Series(f"{name}, pooled", colour, THRESHOLDS, pooled, dashed=True)]

    found = []
    for title, series in (("AP over IoU threshold", both("AP", 0)),
                          ("Precision and recall over IoU threshold", both("precision", 1) + both("recall", 2))):
        drawing = curves(series, x_label="IoU threshold", y_label="share")
        found.append((title, drawing, [(one.colour, one.dashed, one.label) for one in series]))
    return found


def _worst(scores: Sequence[ImageScore], ap50: np.ndarray, pairs: Mapping[str, LabelPair]) -> list[dict[str, Any]]:
    """The images of lowest AP at IoU 0.5 (ties: most objects, then name), drawn."""
    order = sorted(range(len(scores)), key=lambda i: (ap50[i], -scores[i].truth - scores[i].pred, scores[i].image_id))
    found = []
    for i in [i for i in order if ap50[i] < 1][:WORST]:
        score, pair = scores[i], pairs.get(scores[i].image_id)
        tp = score.tp[score.thresholds.index(0.5)]
        found.append({"name": score.image_id, "ap": f"{ap50[i]:.3f}", "truth": score.truth, "pred": score.pred, "tp": tp,
                      "fp": score.pred - tp, "fn": score.truth - tp, "missing": pair is not None and pair.pred is None,
                      "picture": draw_masks(pair) if pair else mask_pictures.MaskPicture(problem="its labels are not at hand")})
    return found


def _colours() -> dict[str, str]:
    """CSS colours of the pictures' legend."""
    names = {"truth": outlines.TRUTH, "pred": outlines.PRED, "both": outlines.BOTH, "found": mask_pictures.FOUND,
             "invented": mask_pictures.INVENTED, "missed": mask_pictures.MISSED, "mixed": mask_pictures.MIXED}
    return {name: "#" + bytes(colour).hex() for name, colour in names.items()}
