"""Affinities and back: identity on labels whose objects are connected, order, boundaries, mutex watershed against components."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import watershed

from dinoray.errors import BadRequest
from dinoray.vision.affinities import FACES, affinities, boundary_weights, components, in_order, mutex_watershed

FAR = (*FACES, (3, 0, 0), (0, 3, 0), (0, 0, 3))


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


def cells(shape: tuple[int, int, int], count: int, seed: int) -> np.ndarray:
    """Touching objects that fill most of a volume; each is connected and larger than a voxel."""
    rng = np.random.default_rng(seed)
    height = ndimage.gaussian_filter(rng.random(shape), 1)
    markers = np.zeros(shape, np.int32)
    markers.flat[rng.choice(markers.size, count, replace=False)] = np.arange(1, count + 1)
    labels = watershed(height, markers, mask=height > np.quantile(height, 0.2))
    sizes = np.bincount(labels.ravel())
    return np.where(sizes[labels] > 1, labels, 0)


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.integers(2, 9)] * 3), st.integers(0, 1000))
def test_components_of_true_affinities_are_the_objects(shape, seed) -> None:
    labels = cells(shape, min(5, int(np.prod(shape)) // 4), seed)
    split = sum(ndimage.label(labels == i)[0] * (i + 1) * 100 for i in np.unique(labels[labels > 0]))  # whatever fell apart
    sizes = np.bincount(np.unique(split, return_inverse=True)[1].ravel())[np.unique(split, return_inverse=True)[1]].reshape(shape)
    values, valid = affinities(labels, FACES)
    found = components(values.astype(np.float32), 0.5)
    alone = (sizes == 1) & (labels > 0)
    assert same_partition(np.where(alone, 0, split), found)
    assert valid[0].sum() == (shape[0] - 1) * shape[1] * shape[2]


def test_touching_objects_have_no_affinity_and_background_has_none() -> None:
    labels = np.array([[[1, 1, 2, 2, 0, 0]]])
    values, valid = affinities(labels, (*FACES, (0, 0, -2)))
    assert values[2].tolist() == [[[1, 0, 1, 0, 0, 0]]]
    assert valid[2].tolist() == [[[True] * 5 + [False]]]
    assert not valid[0].any() and not valid[1].any(), "no neighbours along z and y"
    assert values[3].tolist() == [[[0, 0, 0, 0, 0, 0]]] and valid[3].tolist() == [[[False, False, True, True, True, True]]]
    known = np.array([[[True, True, True, False, True, True]]])
    assert affinities(labels, FACES, known)[1][2].tolist() == [[[True, True, False, False, True, False]]]


def test_ids_are_numbered_in_order_and_small_objects_left_out() -> None:
    labels = np.array([[[7, 7, 7, 0, 3, 3, 9]]])
    assert in_order(labels).tolist() == [[[1, 1, 1, 0, 2, 2, 3]]]
    assert in_order(labels, 2).tolist() == [[[1, 1, 1, 0, 2, 2, 0]]]
    assert in_order(np.full((1, 1, 1), 2**40)).tolist() == [[[1]]]


def test_weights_are_highest_at_borders_and_know_anisotropy() -> None:
    labels = np.zeros((9, 9, 9), int)
    labels[:4], labels[4:] = 1, 2
    weights = boundary_weights(labels, weight=5, sigma_nm=20, voxel_nm=(10, 5, 5))
    assert weights[4, 0, 0] == weights[3, 8, 8] == 5
    assert weights[5, 0, 0] == pytest.approx(1 + 4 * np.exp(-(10**2) / (2 * 20**2)))
    assert boundary_weights(np.ones((3, 3, 3), int), weight=5, sigma_nm=1,
                            voxel_nm=(1, 1, 1)).tolist() == np.ones((3, 3, 3)).tolist()
    known = np.ones((9, 9, 9), bool)
    known[4:] = False
    assert (boundary_weights(labels, weight=5, sigma_nm=20, voxel_nm=(10, 5, 5), known=known) == 1).all(), \
        "unknown labels bound nothing"


def test_mutex_watershed_of_true_affinities_and_where_a_leak_joins_two() -> None:
    pytest.importorskip("mwatershed")
    labels = cells((10, 12, 14), 6, 3)
    values, _ = affinities(labels, FAR)
    found = mutex_watershed(values.astype(np.float32), FAR)
    pieces = sum(ndimage.label(labels == i)[0] * (i + 1) * 100 for i in np.unique(labels[labels > 0]))
    assert len(np.unique(found)) <= len(np.unique(pieces))
    pairs = np.unique(np.stack([labels.ravel(), found.ravel()]), axis=1)
    assert len(np.unique(pairs[1][pairs[1] > 0])) == pairs[:, pairs[1] > 0].shape[1], "no object holds two true ones"
    two = np.zeros((4, 8, 16), int)
    two[:, :, :8], two[:, :, 8:] = 1, 2
    leak, _ = affinities(two, FAR)
    leak = leak.astype(np.float32)
    leak[2, 1, 3, 7] = 0.7  # one wrong pair, less sure than the long ones that say otherwise
    assert components(leak, 0.5).max() == 1
    assert same_partition(mutex_watershed(leak, FAR), two)


def test_too_few_affinities_are_refused() -> None:
    with pytest.raises(BadRequest, match="three faces"):
        components(np.zeros((2, 3, 3, 3), np.float32), 0.5)
