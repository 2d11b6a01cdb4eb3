"""Mean and median over runs of rows equal numpy's, run by run."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dinoray.export import pooling
from dinoray.export.pooling import pool


@st.composite
def runs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=9))
    dtype = draw(st.sampled_from(["float16", "float32"]))
    bits = int(dtype[5:])
    numbers = st.floats(width=bits, allow_nan=True, allow_infinity=True, allow_subnormal=False) | st.just(float("nan")) \
        | st.floats(-8, 8, width=bits)
    values = draw(hnp.arrays(dtype, (sum(lengths), draw(st.integers(1, 4))), elements=numbers, fill=st.nothing()))
    return values, np.cumsum([0, *lengths[:-1]])


@pytest.mark.parametrize("how", ["mean", "median"])
@settings(deadline=None, max_examples=150)
@given(given_runs=runs(), step=st.sampled_from([1, 64, 10**9]))
def test_pooling_is_numpys(how: str, given_runs: tuple[np.ndarray, np.ndarray], step: int) -> None:
    values, starts = given_runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "STEP_BYTES", step)
        pooled = pool(values, starts, how)
    naive = {"mean": np.nanmean, "median": np.nanmedian}[how]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        expected = np.stack([naive(run.astype(np.float64), axis=0) for run in np.split(values, starts[1:])])
        assert pooled.dtype == np.float64
        # sums in another order: equal to rounding of the largest term
        scale = np.nanmax(np.abs(np.where(np.isfinite(values), values, 0)).astype(np.float64), initial=1)
        np.testing.assert_allclose(pooled, expected, rtol=1e-12, atol=min(1e-13 * scale, 1e300))


def test_a_run_of_nothing_but_nan_is_nan() -> None:
    values = np.array([[np.nan, 1], [np.nan, np.nan], [2, 4]], np.float16)
    for how in ("mean", "median"):
        np.testing.assert_array_equal(pool(values, np.array([0, 2]), how), [[np.nan, 1], [2, 4]])
