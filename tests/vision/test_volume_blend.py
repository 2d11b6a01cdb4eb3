"""Blending of windows into boxes: an identity comes back, and any cut into boxes gives equal bytes."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.vision.volume_blend import BlendedBox
from tests.io.test_prediction_grid import grid_of


def predicted(grid, values: np.ndarray, place, noise: bool) -> np.ndarray:
    """What an identity predicts for a window, with something that depends on the window where `noise`."""
    low = [max(0, grid.lattice(a).start(w)) for a, w in enumerate(place)]
    high = [min(grid.lattice(a).tokens, grid.lattice(a).start(w) + grid.lattice(a).window) for a, w in enumerate(place)]
    part = values[(slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))]
    if noise:
        part = part + np.random.default_rng(list(place)).random(part.shape, np.float32)
    return part


def box_of(grid, values, start, stop, noise=False, lost=None):
    blended = BlendedBox(grid, start, stop)
    found = np.full((grid.outputs, *(b - a for a, b in zip(start, stop, strict=True))), np.nan, np.float32)
    missing = np.zeros(found.shape[1:], bool)
    for z in blended.places(0):
        for y, x in product(blended.places(1), blended.places(2)):
            blended.add((z, y, x), None if (z, y, x) == lost else predicted(grid, values, (z, y, x), noise))
        done = blended.complete_until(z)
        while blended.first < done:
            until = min(done, (blended.first // grid.shards[0] + 1) * grid.shards[0])
            if until % grid.shards[0] and until != stop[0]:
                break
            first = blended.first
            part, gone = blended.take(until)
            found[:, first - start[0]:until - start[0]] = part
            missing[first - start[0]:until - start[0]] = gone
    assert blended.first == stop[0]
    return found, missing


@settings(deadline=None, max_examples=25)
@given(st.tuples(st.integers(1, 90), st.integers(1, 70), st.integers(1, 50)), st.booleans(), st.integers(0, 99))
def test_an_identity_comes_back_whatever_the_sizes(shape, blend, seed) -> None:
    grid = grid_of(shape, window=16, halo=4, blend=blend, outputs=2, shard=16)
    values = np.random.default_rng(seed).random((2, *shape), np.float32)
    found, missing = box_of(grid, values, (0, 0, 0), shape)
    np.testing.assert_allclose(found, values, atol=1e-6)
    assert not missing.any()


@settings(deadline=None, max_examples=10)
@given(st.tuples(st.integers(100, 300), st.integers(20, 150), st.integers(20, 60)), st.integers(1, 3))
def test_any_cut_into_units_gives_equal_bytes(shape, windows) -> None:
    grid = grid_of(shape, window=16, halo=4, outputs=1, shard=16)
    values = np.random.default_rng(1).random((1, *shape), np.float32)
    whole, _ = box_of(grid, values, (0, 0, 0), shape, noise=True)
    for start, stop in grid.units(windows):
        part, _ = box_of(grid, values, start, stop, noise=True)
        assert part.tobytes() == np.ascontiguousarray(whole[(slice(None),
                                                             *(slice(a, b) for a, b in zip(start, stop, strict=True)))]).tobytes()


def test_what_a_lost_window_took_part_in_is_lost_and_nothing_else() -> None:
    grid = grid_of((40, 40, 40), window=16, halo=4, outputs=1)
    values = np.ones((1, 40, 40, 40), np.float32)
    lost = (1, 2, 0)
    _, missing = box_of(grid, values, (0, 0, 0), (40, 40, 40), lost=lost)
    expected = np.zeros((40, 40, 40), bool)
    expected[tuple(slice(max(0, grid.lattice(a).start(w)), grid.lattice(a).start(w) + 16) for a, w in enumerate(lost))] = True
    assert (missing == expected).all() and missing.any() and not missing.all()


def test_the_memory_of_a_box_does_not_grow_with_its_depth() -> None:
    grid = grid_of((4000, 20, 20), window=16, halo=4, outputs=1)
    assert BlendedBox(grid, (0, 0, 0), (4000, 20, 20))._values.shape[1] <= grid.shards[0] + 16


