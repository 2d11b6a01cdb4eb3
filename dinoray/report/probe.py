"""A linear probe: how well do features tell a label, on wells it was not fitted on?

Logistic regression on standardised features, cross-validated in groups that never straddle a split. The
score is balanced accuracy over all held-out predictions: the mean over classes of the share found. Chance is
1 / classes whatever their sizes; how far chance alone may get depends on the number of independent groups per
class, because images of one group stand and fall together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

FOLDS = 5
MIN_GROUPS = 3
"""Groups that a class needs to take part."""
MAX_CLASSES = 48
C = 0.02
"""Strong regularisation: there are often more features than wells."""
_SIGMAS = 2.5
_GOLDEN = 0.618034
"""Multiples of it, modulo 1, are spread evenly."""


@dataclass(frozen=True, slots=True)
class Probe:
    """`score` and `chance`: balanced accuracy; `bound`: what chance alone seldom exceeds. `problem`: why there is none."""

    score: float = 0.0
    chance: float = 0.0
    bound: float = 0.0
    classes: int = 0
    groups: int = 0
    images: int = 0
    problem: str = ""

    @property
    def above_chance(self) -> bool:
        """Whether the label can be told at all."""
        return not self.problem and self.score > self.bound

    @property
    def strength(self) -> float:
        """0 at chance, 1 when every label is found."""
        return max(0.0, (self.score - self.chance) / (1 - self.chance)) if self.chance < 1 else 0.0


def probe(vectors: np.ndarray, labels: Sequence[str], groups: Sequence[str]) -> Probe:
    """Probe vectors [n, D] for `labels` [n]; images of one of `groups` [n] are never on both sides of a split.

    Classes with fewer than `MIN_GROUPS` groups take no part. Deterministic.
    """
    members: dict[str, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        members.setdefault(label, set()).add(group)
    kept = sorted(label for label, found in members.items() if len(found) >= MIN_GROUPS)
    if len(members) < 2:
        return Probe(problem="one only" if members else "none known")
    if len(kept) < 2:
        return Probe(problem=f"too few: each needs at least {MIN_GROUPS} independent groups")
    if len(kept) > MAX_CLASSES:
        return Probe(problem=f"more than {MAX_CLASSES}")
    chosen = [i for i, label in enumerate(labels) if label in set(kept)]
    x = np.asarray(vectors, dtype=np.float64)[chosen]
    y = np.array([kept.index(labels[i]) for i in chosen])
    names = sorted({groups[i] for i in chosen})
    places = {name: position for position, name in enumerate(names)}
    g = np.array([places[groups[i]] for i in chosen])
    chance = 1 / len(kept)
    # the variance of a class' share found, if its groups were guessed one by one, is p (1 - p) / groups
    deviation = math.sqrt(sum(chance * (1 - chance) / len(members[label]) for label in kept)) / len(kept)
    bound = chance + _SIGMAS * deviation
    if bound >= 1:
        return Probe(problem="too few to tell it from chance")
    folds = min(FOLDS, *(len(members[label]) for label in kept))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight="balanced", max_iter=500))
    with threadpool_limits(1):  # small products: threads that wait for each other took up to 50 times longer
        predicted = cross_val_predict(model, x, y, groups=g, cv=StratifiedGroupKFold(folds, shuffle=True, random_state=0))
    return Probe(float(balanced_accuracy_score(y, predicted)), chance, bound, len(kept), len(names), len(chosen))


def evenly_by_class(labels: Sequence[str], limit: int, turn: int = 0) -> list[int]:
    """At most `limit` positions, the classes as equally represented as they allow, each spread evenly. In order.

    Where a class begins differs from class to class (and with `turn`), so that two plates do not give the same
    few columns of wells.
    """
    if len(labels) <= limit:
        return list(range(len(labels)))
    members: dict[str, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(label, []).append(position)
    if len(members) > limit:  # not even one of each
        members = {"": list(range(len(labels)))}
    share = limit // len(members)
    kept = []
    for rank, label in enumerate(sorted(members)):
        mine = members[label]
        kept += [mine[i] for i in staggered(len(mine), share, rank + turn)]
    return sorted(kept)


def staggered(count: int, wanted: int, turn: int) -> list[int]:
    """At most `wanted` positions spread evenly over range(count), beginning elsewhere for each `turn`."""
    steps = min(wanted, count)
    return [int((i + turn * _GOLDEN % 1) * count / steps) for i in range(steps)]
