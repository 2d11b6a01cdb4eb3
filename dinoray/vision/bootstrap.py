"""How sure is a score? Percentile intervals over images (Efron and Tibshirani 1993, chapter 13).

Images are drawn with replacement, as many as there are, and the metric is computed of each draw; the interval holds the
middle 95 % of the results. Images are taken as independent: frames of one film or tiles of one field are not, and their
intervals come out too narrow. Of fewer than two images nothing can be told: the ends are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dinoray.errors import BadRequest
from dinoray.vision.instance_metrics import ImageScore
from dinoray.vision.score_summary import Counts, default_metrics, evaluate, image_mean

Pooling = Literal["image_mean", "pooled"]
POOLINGS: tuple[Pooling, ...] = ("image_mean", "pooled")
RESAMPLES = 10_000
_TAILS = (2.5, 97.5)
_DRAWS_AT_ONCE = 2**22
"""Numbers drawn at once: bounds the memory (about 64 MB) whatever the number of images."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN where undefined. `images`: how many have the metric defined."""

    value: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class Summary:
    """All metrics of a set of images: `metrics[name][pooling]`, pooling `image_mean` or `pooled`."""

    images: int
    truth: int
    pred: int
    metrics: dict[str, dict[Pooling, Estimate]]


def summarise(scores: Sequence[ImageScore], metrics: Sequence[str] | None = None, *, resamples: int = 0, seed: int = 0) -> Summary:
    """Image-mean and pooled value of each metric (default: all, at IoU 0.5 and 0.75), with intervals if `resamples` > 0.

    All metrics see the same draws. Conventions for empty images: dinoray.vision.score_summary. Raises BadRequest
    without images, and for metrics that are unknown or were not scored.
    """
    counts = Counts.of(scores)
    metrics = list(dict.fromkeys(default_metrics((0.5, 0.75)) if metrics is None else metrics))
    each = np.stack([evaluate(counts, metric) for metric in metrics], axis=-1)  # [images, metrics]
    drawn = _resample(counts, each, metrics, resamples, seed)
    total = counts.total()
    found: dict[str, dict[Pooling, Estimate]] = {}
    for i, metric in enumerate(metrics):
        defined = int((~np.isnan(each[:, i])).sum())
        values = {"image_mean": image_mean(each[:, i]), "pooled": float(evaluate(total, metric))}
        found[metric] = {pooling: Estimate(values[pooling], *_ends(drawn[pooling][:, i], len(scores)), defined)
                         for pooling in POOLINGS}
    return Summary(len(scores), int(total.named("truth")), int(total.named("pred")), found)


def bootstrap(scores: Sequence[ImageScore], metric: str, pooling: Pooling = "image_mean", *, n: int = RESAMPLES,
              seed: int = 0) -> Estimate:
    """A metric of images with its 95 % interval from `n` draws of images. Raises BadRequest as `summarise`."""
    return summarise(scores, [metric], resamples=n, seed=seed).metrics[metric][_known(pooling)]


def paired_bootstrap(a: Sequence[ImageScore], b: Sequence[ImageScore], metric: str, pooling: Pooling = "image_mean", *,
                     n: int = RESAMPLES, seed: int = 0) -> Estimate:
    """metric(a) - metric(b) of two models on the same images, with its 95 % interval: both see the same draws.

    For the image-mean only images where the metric is defined for both take part. Raises BadRequest when the images are
    not the same, named once each.
    """
    _known(pooling)
    names_a, names_b = [s.image_id for s in a], [s.image_id for s in b]
    other = sorted(set(names_a) ^ set(names_b))
    if other or len(set(names_a)) < len(names_a) or len(names_a) != len(names_b):
        what = f"only one of them scored {', '.join(map(repr, other[:5]))}" if other else "an image is scored twice"
        raise BadRequest(f"the two models were not scored on the same images: {what}", todo="score both on the same images")
    by_name = {s.image_id: s for s in b}
    both = [Counts.of(a), Counts.of([by_name[name] for name in names_a])]
    each = [evaluate(counts, metric) for counts in both]
    undefined = np.isnan(each[0]) | np.isnan(each[1])
    each = [np.where(undefined, np.nan, values)[:, None] for values in each]
    drawn = [_resample(counts, values, [metric], n, seed)[pooling][:, 0] for counts, values in zip(both, each, strict=True)]
    if pooling == "pooled":
        first, second = (float(evaluate(counts.total(), metric)) for counts in both)
    else:
        first, second = (image_mean(values[:, 0]) for values in each)
    return Estimate(first - second, *_ends(drawn[0] - drawn[1], len(a)), int((~undefined).sum()))


def _resample(counts: Counts, each: np.ndarray, metrics: Sequence[str], n: int, seed: int) -> dict[Pooling, np.ndarray]:
    """The metrics of `n` draws of images: [n, metrics] for each pooling. `each` [images, metrics]: those of the images."""
    defined = ~np.isnan(each)
    values, found = np.where(defined, each, 0.0), {pooling: np.full((n, len(metrics)), np.nan) for pooling in POOLINGS}
    start = 0
    for weights in _draws(len(each), n, seed):
        stop = start + len(weights)
        summed = Counts(counts.thresholds, weights @ counts.sums)
        found["pooled"][start:stop] = np.stack([evaluate(summed, metric) for metric in metrics], axis=-1)
        number = weights @ defined.astype(np.float64)
        np.divide(weights @ values, number, out=found["image_mean"][start:stop], where=number > 0)
        start = stop
    return found


def _draws(images: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """float64 [k, images]: how often each image is in each of the next k draws; n draws in all. Depends on nothing else."""
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // images)
    for start in range(0, n, step):
        k = min(step, n - start)
        places = rng.integers(images, size=(k, images)) + images * np.arange(k)[:, None]
        yield np.bincount(places.ravel(), minlength=k * images).reshape(k, images).astype(np.float64)


def _ends(values: np.ndarray, images: int) -> tuple[float, float]:
    """The middle 95 % of the draws where the metric is defined."""
    values = values[~np.isnan(values)]
    if images < 2 or not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, _TAILS)
    return float(low), float(high)


def _known(pooling: str) -> Pooling:
    if pooling not in POOLINGS:
        raise BadRequest(f"pooling {pooling!r}", where="pooling", todo=f"one of {', '.join(POOLINGS)}")
    return pooling  # type: ignore[return-value]
