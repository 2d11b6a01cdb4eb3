"""Resampling keeps coordinates, ids, and (where nothing changes) bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest
from dinoray.vision.resampling2d import blur_sigma, resample, resample_labels, scaled_shape


@pytest.mark.parametrize("scale", [0.21, 0.5, 0.73, 1.3, 2.0, 3.7])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_ramp_stays_a_ramp(scale: float, axis: int) -> None:
    ramp = np.mgrid[:180, :210][axis].astype(np.float32)[None] / 210
    out = resample(ramp, scale)
    assert out.dtype == np.float32
    assert out.shape[1:] == scaled_shape((180, 210), scale)
    side, source = out.shape[1 + axis], ramp.shape[1 + axis]
    expected = ((np.arange(side) + 0.5) * source / side - 0.5) / 210
    got = np.moveaxis(out[0], axis, 0)
    edge = max(2, int(np.ceil((4 * blur_sigma(scale) + 1) * scale)))  # the mirror image bends the ramp at the border
    np.testing.assert_allclose(got[edge:-edge], np.repeat(expected[edge:-edge, None], got.shape[1], 1), atol=1e-4)


def test_the_same_size_is_the_same_bytes() -> None:
    image = np.random.default_rng(0).random((3, 17, 23), np.float32)
    labels = np.arange(17 * 23).reshape(17, 23)
    for out in (resample(image, 1.0), resample(image, (17, 23))):
        assert out.tobytes() == image.tobytes()
        out[:] = 0
        assert image.any()  # a copy
    assert resample_labels(labels, (17, 23)).tobytes() == labels.tobytes()


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), y=st.integers(1, 90), x=st.integers(1, 90),
       dtype=st.sampled_from(["uint8", "uint16", "int32", "uint64"]))
def test_labels_come_from_the_pixel_under_the_centre(height, width, y, x, dtype) -> None:
    labels = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (height, width), dtype=dtype, endpoint=True)
    out = resample_labels(labels, (y, x))
    assert (out.dtype, out.shape) == (labels.dtype, (y, x))
    for j in range(y):
        for i in range(0, x, 7):
            assert out[j, i] == labels[int((j + 0.5) * height / y + 1e-9), int((i + 0.5) * width / x + 1e-9)]
    out = resample(np.full((2, height, width), 0.25, np.float32), (y, x))
    np.testing.assert_allclose(out, 0.25, atol=1e-6)


def test_enlarged_labels_come_back_whole() -> None:
    labels = np.random.default_rng(2).integers(0, 100_000, (31, 37))
    for factor in (2, 3, 5):
        assert np.array_equal(resample_labels(resample_labels(labels, (31 * factor, 37 * factor)), (31, 37)), labels)


def test_fine_detail_does_not_alias() -> None:
    stripes = np.zeros((1, 128, 128), np.float32)
    stripes[..., ::2] = 1
    assert np.abs(resample(stripes, 0.23)[..., 3:-3] - 0.5).max() < 0.05


def test_sizes_round_and_never_vanish() -> None:
    assert scaled_shape((100, 3), 0.25) == (25, 1)
    assert scaled_shape((3, 1), 0.5) == (2, 1)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(BadRequest, match="factor"):
            resample(np.zeros((1, 4, 4), np.float32), wrong)
    with pytest.raises(BadRequest, match="size"):
        resample(np.zeros((1, 4, 4), np.float32), (0, 4))
    with pytest.raises(BadRequest, match="size"):
        resample_labels(np.zeros((4, 4), int), (4, 0))
