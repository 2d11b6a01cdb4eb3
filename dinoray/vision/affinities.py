"""Affinities: for each voxel and each offset, whether it and its neighbour there belong to one object; and back to instances.

The value at voxel v for offset o is of the pair (v, v + o). Offsets default to the three faces; longer ones give training more
to learn from, and mutex watershed what keeps objects apart (Lee et al. 2017; Wolf et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import edt
import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinoray.errors import BadRequest

Offset = tuple[int, int, int]
FACES: tuple[Offset, ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))


def pair_slices(offset: Offset, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the voxels v that have a neighbour v + offset, and of those neighbours."""
    here = tuple(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, shape, strict=True))
    there = tuple(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, shape, strict=True))
    return here, there


def affinities(labels: np.ndarray, offsets: Sequence[Offset], known: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(affinities uint8, their validity bool), both [offsets, Z, Y, X], of labels [Z, Y, X] with 0 for background.

    An affinity is 1 where both voxels have one id above 0. A pair is valid where both voxels lie inside and are `known`.
    """
    values = np.zeros((len(offsets), *labels.shape), np.uint8)
    valid = np.zeros((len(offsets), *labels.shape), bool)
    for k, offset in enumerate(offsets):
        if any(abs(o) >= n for o, n in zip(offset, labels.shape, strict=True)):
            continue
        here, there = pair_slices(offset, labels.shape)
        values[(k, *here)] = (labels[here] == labels[there]) & (labels[here] != 0)
        valid[(k, *here)] = True if known is None else known[here] & known[there]
    return values, valid


def boundary_weights(labels: np.ndarray, *, weight: float, sigma_nm: float, voxel_nm: Sequence[float],
                     known: np.ndarray | None = None) -> np.ndarray:
    """[Z, Y, X] float32: 1 + (weight - 1) exp(-d^2 / 2 sigma^2), d the distance in nm to the nearest voxel of a boundary.

    A boundary voxel has a face neighbour with another id, both of them known. 1 everywhere where there is none.
    """
    boundary = np.zeros(labels.shape, bool)
    for offset in FACES:
        here, there = pair_slices(offset, labels.shape)
        differ = labels[here] != labels[there]
        if known is not None:
            differ &= known[here] & known[there]
        boundary[here] |= differ
        boundary[there] |= differ
    if not boundary.any():
        return np.ones(labels.shape, np.float32)
    distance = edt.edt(np.ascontiguousarray(~boundary), anisotropy=tuple(float(v) for v in voxel_nm))
    return (1 + (weight - 1) * np.exp(-(distance**2) / (2 * sigma_nm**2))).astype(np.float32)


def components(values: np.ndarray, threshold: float, *, min_voxels: int = 1) -> np.ndarray:
    """Instances [Z, Y, X] int64, 1.. in the order of their first voxels, from affinities of FACES [3, Z, Y, X].

    Voxels whose affinity is above the threshold are joined; a voxel without any such pair, and objects of fewer than
    `min_voxels`, are background. Raises BadRequest for another number of affinities.
    """
    if values.shape[0] < 3:
        raise BadRequest(f"{values.shape[0]} affinities: connected components need those of the three faces")
    shape = values.shape[1:]
    joined = values[:3] > threshold
    number = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    ends_a, ends_b, touched = [], [], np.zeros(shape, bool)
    for k, offset in enumerate(FACES):
        here, there = pair_slices(offset, shape)
        link = joined[(k, *here)]
        ends_a.append(number[here][link])
        ends_b.append(number[there][link])
        touched[here] |= link
        touched[there] |= link
    a, b = np.concatenate(ends_a), np.concatenate(ends_b)
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(number.size, number.size))
    labels = connected_components(graph, directed=False)[1].reshape(shape)
    return in_order(np.where(touched, labels.astype(np.int64) + 1, 0), min_voxels)


def in_order(labels: np.ndarray, min_voxels: int = 1) -> np.ndarray:
    """Ids 1.. in the order of the first voxels, int64; objects of fewer than `min_voxels` become 0."""
    ids, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    keep = (ids != 0) & (counts >= min_voxels)
    new = np.zeros(len(ids), np.int64)
    new[np.flatnonzero(keep)[np.argsort(first[keep], kind="stable")]] = np.arange(1, keep.sum() + 1)
    return new[inverse].reshape(labels.shape)


def mutex_watershed(values: np.ndarray, offsets: Sequence[Offset], *, adjacent_bias: float = -0.4, far_bias: float = -0.5,
                    min_voxels: int = 1) -> np.ndarray:
    """Instances [Z, Y, X] int64 by mutex watershed (Wolf et al. 2018; the library `mwatershed`) from affinities
    [offsets, Z, Y, X] in 0..1. Biases are added first: what is then above 0 attracts, what is below repels.

    Raises BadRequest where the library is not installed.
    """
    try:
        from mwatershed import agglom
    except ImportError as error:
        raise BadRequest("mutex watershed needs a library that is not here", where="mwatershed",
                         todo="pip install mwatershed, or use instances: components") from error
    near = np.array([sum(abs(o) for o in offset) == 1 for offset in offsets])
    biased = values.astype(np.float64) + np.where(near, adjacent_bias, far_bias)[:, None, None, None]
    found = agglom(biased, offsets=[list(o) for o in offsets])
    # a voxel that nothing holds is an object of its own: background, unless single voxels are asked for
    labels = in_order(found.astype(np.int64), max(2, min_voxels))
    foreground = ndimage.maximum(values[near].max(axis=0), labels, np.arange(labels.max() + 1)) > -adjacent_bias
    foreground[0] = False
    return in_order(np.where(foreground[labels], labels, 0), min_voxels)
