"""Distance maps: each instance by itself, as the naive loop over instances says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dinoray.errors import BadRequest
from dinoray.vision.targets import distance_map, median_diameter
from tests.vision.labels import disc, four_cells, label_images


def naive(labels: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """The definition, one instance after the other."""
    out = np.zeros(labels.shape)
    for i in np.unique(labels[labels > 0]):
        if (labels == i).all():
            return np.ones(labels.shape)
        distance = ndimage.distance_transform_edt(labels == i, sampling=spacing)
        out += distance / distance.max()
    return out


@settings(deadline=None, max_examples=150)
@given(labels=label_images(), spacing=st.sampled_from([(1.0, 1.0), (2.5, 0.7), (0.1, 0.325), (40, 1)]),
       dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.int64, np.uint64, ">u2"]),
       scale=st.sampled_from([1, 50, 12_000, 2 ** 31 // 5]))
def test_equals_the_loop_over_instances(labels, spacing, dtype, scale) -> None:
    fits = int(labels.max(initial=0)) * scale <= np.iinfo(dtype).max
    ids = (labels.astype(np.int64) * (scale if fits else 1)).astype(dtype)
    found = distance_map(ids, spacing)
    assert found.dtype == np.float32
    assert found.shape == labels.shape
    np.testing.assert_allclose(found, naive(ids, spacing), atol=1e-6)
    assert ((found > 0) == (labels > 0)).all()


def test_hand_values() -> None:
    labels = np.zeros((5, 9), np.uint16)
    labels[1:4, 1:4] = 1  # 3 x 3: ring at 1, centre at 2
    labels[1:4, 4:7] = 2  # touches the first: each keeps its own valley
    labels[2, 8] = 3
    square = [[0.5, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 0.5]]
    found = distance_map(labels)
    np.testing.assert_allclose(found[1:4, 1:4], square)
    np.testing.assert_allclose(found[1:4, 4:7], square)
    assert found[2, 8] == 1.0, "an object of one pixel"
    assert (found[labels == 0] == 0).all()


def test_the_border_is_not_background() -> None:
    labels = np.zeros((4, 8), np.int32)
    labels[:, :4] = 7
    np.testing.assert_allclose(distance_map(labels)[0], [1, 0.75, 0.5, 0.25, 0, 0, 0, 0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (33, 20)])
def test_one_object_fills_the_image(shape) -> None:
    assert (distance_map(np.full(shape, 9, np.int32)) == 1).all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 4)])
def test_no_object(shape) -> None:
    found = distance_map(np.zeros(shape, np.int32))
    assert found.shape == shape
    assert not found.any()


def test_parts_of_one_instance_share_a_maximum() -> None:
    labels = np.zeros((11, 30), np.int32)
    labels[1:10, 1:10] = 4  # half-width 5
    labels[4:7, 20:23] = 4  # half-width 2
    found = distance_map(labels)
    assert found[5, 5] == 1
    assert found[5, 21] == pytest.approx(0.4)


def test_seventy_thousand_objects() -> None:
    side = 265  # 265 ** 2 = 70,225 objects of 3 x 3 px, far beyond 8 and 16 bits
    labels = np.kron(np.arange(1, side ** 2 + 1, dtype=np.int32).reshape(side, side), np.ones((5, 5), np.int32))
    labels[(np.arange(labels.shape[0]) % 5 > 2)] = 0
    labels[:, (np.arange(labels.shape[1]) % 5 > 2)] = 0
    found = distance_map(labels)
    block = np.zeros((5, 5))
    block[:3, :3] = [[0.5] * 3, [0.5, 1, 0.5], [0.5] * 3]
    expected = np.tile(block, (side, side))
    np.testing.assert_allclose(found[5:-5, 5:-5], expected[5:-5, 5:-5])
    assert np.count_nonzero(found == 1) >= side ** 2


@pytest.mark.parametrize("labels", [np.zeros((3, 3), np.float32), np.zeros((3, 3, 3), np.uint8), np.full((2, 2), -1),
                                    np.zeros(4, np.int32)])
def test_what_is_no_label_image(labels) -> None:
    with pytest.raises(BadRequest):
        distance_map(labels)
    with pytest.raises(BadRequest):
        median_diameter(labels)


@pytest.mark.parametrize("spacing", [(0, 1), (1, -1), (1, math.nan), (1, 1, 1)])
def test_a_pixel_without_size(spacing) -> None:
    with pytest.raises(BadRequest, match="no size"):
        distance_map(np.ones((3, 3), np.int32), spacing)


def test_median_diameter() -> None:
    labels = np.zeros((100, 100), np.int64)
    labels[10:20, 10:20] = 2 ** 40
    labels[30:34, 30:34] = 5
    labels[50:70, 50:70] = 6
    labels[90:, 90:] = 7  # touches the border: left out
    assert median_diameter(labels) == pytest.approx(2 * math.sqrt(100 / math.pi))
    assert median_diameter((labels == 7).astype(np.uint8)) == pytest.approx(2 * math.sqrt(100 / math.pi)), "unless all do"
    assert median_diameter(np.zeros((5, 5), np.int32)) is None
    assert median_diameter(disc((101, 101), 50, 50, 30).astype(np.uint8)) == pytest.approx(60, rel=0.02)
    assert median_diameter(four_cells()) == pytest.approx(32, rel=0.03)
