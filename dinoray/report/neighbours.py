"""Nearest neighbours inside the sample: do pictures that look alike have like features?

The vector of an item is the mean over its tiles, per channel, minus the mean of the items compared, of
length 1. Items with several channels are compared with items of the same channels; their similarity is the
mean of the channels' cosines. The search is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinoray.report.sample import Sample, evenly

MAX_VALUES = 2**26
"""float32 values of the matrix that is compared (256 MB)."""
MIN_ITEMS = 3
"""With two items the centred vectors are opposite, whatever they show."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """One query and its nearest other items: (position in the sample's items, similarity), best first."""

    query: int
    found: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ItemVectors:
    """Items with the same channels: positions in the sample's items, and their vectors [n, channels, D]."""

    positions: np.ndarray
    vectors: np.ndarray


def item_vectors(sample: Sample) -> list[ItemVectors]:
    """Mean vectors over tiles or objects, grouped by channels; items with one channel form one group, whatever its name.

    Groups come in order of their first item. A group above `MAX_VALUES` is thinned evenly.
    """
    if sample.vectors is None:
        return []
    channels = sample.table["channel"].to_pylist()
    groups: dict[tuple[str, ...], list[tuple[int, list[list[int]]]]] = {}
    for position, item in enumerate(sample.items):
        rows: dict[str, list[int]] = {}
        for row in range(item.start, item.stop):
            rows.setdefault(channels[row], []).append(row)
        groups.setdefault(tuple(rows) if len(rows) > 1 else (), []).append((position, list(rows.values())))
    found = []
    for key, members in groups.items():
        width = max(1, len(key)) * sample.vectors.shape[1]
        members = [members[i] for i in evenly(len(members), max(1, MAX_VALUES // width))]
        vectors = np.stack([[sample.vectors[mine].mean(axis=0) for mine in rows] for _, rows in members])
        found.append(ItemVectors(np.array([position for position, _ in members]), vectors))
    return found


def nearest(groups: list[ItemVectors], *, queries: int, count: int) -> list[Neighbours]:
    """For `queries` items spread evenly over all groups, the `count` nearest others of their group."""
    usable = [group for group in groups if len(group.positions) >= MIN_ITEMS]
    places = [(g, i) for g, group in enumerate(usable) for i in range(len(group.positions))]
    wanted: dict[int, list[int]] = {}
    for place in evenly(len(places), queries):
        wanted.setdefault(places[place][0], []).append(places[place][1])
    results = []
    for g, rows in wanted.items():
        positions, matrix = usable[g].positions, unit_vectors(usable[g].vectors)
        similarity = matrix[rows] @ matrix.T
        for row, values in zip(rows, similarity, strict=True):
            values[row] = -np.inf
            best = np.argsort(-values, kind="stable")[:min(count, len(values) - 1)]
            results.append(Neighbours(int(positions[row]), tuple((int(positions[i]), float(values[i])) for i in best)))
    return sorted(results, key=lambda one: one.query)


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """[n, C, D] -> [n, C*D], centred per channel; a product of two rows is the mean over C of their cosines."""
    centred = vectors - vectors.mean(axis=0)
    lengths = np.linalg.norm(centred, axis=-1, keepdims=True)
    scaled = centred / np.maximum(lengths, 1e-12) / np.float32(np.sqrt(vectors.shape[1]))
    return scaled.reshape(len(vectors), -1)
