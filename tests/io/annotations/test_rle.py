"""Run lengths against pycocotools, and damaged ones that it would write beyond its buffer for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as pycoco

from dinoray.io.annotations.rle import object_runs, parse_counts

masks = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 1))


def drawn(counts: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    flat = np.zeros(shape[0] * shape[1], np.uint8)
    for start, end in object_runs(counts, flat.size):
        flat[start:end] = 1
    return flat.reshape(shape[::-1]).T


@given(masks)
def test_what_pycocotools_writes(mask: np.ndarray) -> None:
    counts = parse_counts(pycoco.encode(np.asfortranarray(mask))["counts"])
    np.testing.assert_array_equal(drawn(counts, mask.shape), mask)
    assert (object_runs(counts, mask.size)[:, 1] > object_runs(counts, mask.size)[:, 0]).all()


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=30))
def test_long_runs(lengths: list[int]) -> None:
    compressed = pycoco.frPyObjects({"size": [1, sum(lengths) or 1], "counts": lengths}, 1, sum(lengths) or 1)
    assert parse_counts(compressed["counts"]).tolist() == lengths


@given(st.binary(max_size=40))
def test_any_bytes_are_counts_or_refused(text: bytes) -> None:
    try:
        runs = object_runs(parse_counts(text), 600)
    except ValueError:
        return
    assert runs.size == 0 or runs.min() >= 0 and runs.max() <= 600


@pytest.mark.parametrize("counts", [[5], [5, 6], [-1, 11], [2**62, 2**62, 2**62, 2**62], [20, -10], []])
def test_counts_that_do_not_add_up(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        object_runs(counts, 10)


@pytest.mark.parametrize("text", [b"P", b"0 0", b"\xff", b"oooooooooooooooo", "ä".encode()])
def test_text_that_is_none(text: bytes) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        parse_counts(text)
