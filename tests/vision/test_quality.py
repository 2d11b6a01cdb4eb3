"""Quality figures against numpy and scipy, for every dtype an image can have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import laplace

from dinoray.errors import ItemError
from dinoray.vision.quality import QC_COLUMNS, check_pixels, focus, histogram_percentiles, percentiles, quality

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "float16", "float32", "float64"]


def pixels_of(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.issubdtype(np.dtype(dtype), np.integer):
        info = np.iinfo(dtype)
        low = max(info.min, -(2**40))
        return rng.integers(low, min(info.max, 2**40), size=shape, endpoint=True).astype(dtype)
    return (rng.normal(size=shape) * 100).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (63, 65), (80, 81)])
def test_percentiles_are_numpys(dtype: str, shape: tuple[int, int]) -> None:
    values = pixels_of(dtype, shape, 1)
    percents = (0.0, 0.1, 1.0, 33.3, 50.0, 99.9, 100.0)
    expected = np.percentile(values.astype(np.float64), percents)
    assert np.allclose(percentiles(values, percents), expected, rtol=1e-12, atol=1e-9)


@settings(deadline=None, max_examples=100)
@given(values=st.lists(st.integers(0, 50), min_size=1, max_size=80), percent=st.floats(0, 100))
def test_percentiles_of_a_histogram_are_those_of_its_values(values: list[int], percent: float) -> None:
    distinct, counts = np.unique(values, return_counts=True)
    got = histogram_percentiles(distinct.astype(np.float64), counts, (percent,))[0]
    assert got == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


def test_empty_bins_of_a_histogram_do_not_matter() -> None:
    counts = np.array([0, 3, 0, 0, 1, 0])
    assert histogram_percentiles(np.arange(6.0), counts, (0, 50, 100)) == [1.0, 1.0, 4.0]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_both_ways_to_a_percentile_agree(dtype: str) -> None:
    """4096 values are sorted, 4097 are counted: no step between them."""
    top = np.iinfo(dtype).max
    values = np.concatenate([[0, top], np.full(4094, 7), [3]]).astype(dtype)
    for n in (4096, 4097):
        assert np.allclose(percentiles(values[:n], (0.1, 50, 99.9)), np.percentile(values[:n], (0.1, 50, 99.9)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_quality_against_numpy_and_scipy(dtype: str, channels: int) -> None:
    pixels = pixels_of(dtype, (channels, 40, 52), 2)
    if np.issubdtype(pixels.dtype, np.integer):
        pixels[0, 3, 3:7] = np.iinfo(dtype).max
    found = quality(pixels)
    assert tuple(found) == QC_COLUMNS
    expected = np.percentile(pixels.astype(np.float64), (1, 50, 99.9))
    assert np.allclose([found["p01"], found["p50"], found["p999"]], expected, rtol=1e-12)
    if np.issubdtype(pixels.dtype, np.integer):
        assert found["frac_saturated"] == np.mean(pixels == np.iinfo(dtype).max) > 0
    else:
        assert found["frac_saturated"] is None
    plane = pixels.astype(np.float64).mean(axis=0)
    reference = laplace(plane)[1:-1, 1:-1].var() / plane.mean() ** 2
    assert found["focus"] == pytest.approx(reference, rel=2e-3)


def test_saturation_is_at_the_dtypes_maximum_only() -> None:
    assert quality(np.full((1, 4, 4), 255, np.uint8))["frac_saturated"] == 1
    assert quality(np.full((1, 4, 4), 255, np.uint16))["frac_saturated"] == 0
    assert quality(np.full((1, 4, 4), 1.0, np.float32))["frac_saturated"] is None


def test_focus_of_flat_blurred_and_sharp() -> None:
    rng = np.random.default_rng(0)
    sharp = rng.random((64, 64)).astype(np.float32)
    blurred = (sharp + np.roll(sharp, 1, 0) + np.roll(sharp, 1, 1) + np.roll(sharp, (1, 1), (0, 1))) / 4
    assert focus(np.full((8, 8), 3.0, np.float32)) == 0
    assert focus(sharp) > 3 * focus(blurred) > 0
    assert focus(sharp) == pytest.approx(focus(sharp * 50), rel=1e-4)  # does not depend on the exposure


@pytest.mark.parametrize("shape", [(2, 9), (9, 2), (1, 1)])
def test_no_focus_where_there_is_none(shape: tuple[int, int]) -> None:
    assert focus(np.ones(shape, np.float32)) is None
    assert focus(np.zeros((9, 9), np.float32)) is None
    assert quality(np.ones((1, *shape), np.uint16))["focus"] is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_value_that_is_no_number_is_refused(bad: float, dtype: str) -> None:
    pixels = pixels_of(dtype, (2, 30, 30), 3)
    check_pixels(pixels)
    pixels[1, 29, 0] = bad
    with pytest.raises(ItemError) as caught:
        check_pixels(pixels)
    assert caught.value.reason == "nan"
    assert "1 of 1800" in caught.value.what


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_images_are_refused_but_not_one_constant_channel(dtype: str) -> None:
    pixels = np.stack([np.full((9, 9), 7), np.full((9, 9), 5)]).astype(dtype)
    with pytest.raises(ItemError) as caught:
        check_pixels(pixels)
    assert caught.value.reason == "constant"
    pixels[1, 0, 0] = 6
    check_pixels(pixels)
