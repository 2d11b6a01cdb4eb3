"""Where a segmented volume's windows, shards, units and blocks lie.

Every voxel is predicted, whatever the sizes; borders of units lie on borders of shards.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.errors import BadRequest
from dinoray.io.prediction_grid import PredictionGrid, make_windows
from dinoray.slabs import check_alone_on


def grid_of(shape, *, window=32, halo=4, multiple=4, blend=True, clip=True, block=48, outputs=3, shard=32) -> PredictionGrid:
    windows, halos = make_windows(shape, (window,) * 3, (halo,) * 3, multiple, shrink=clip)
    return PredictionGrid(shape, (8.0,) * 3, (4.0,) * 3, (8.0,) * 3, (1, 1, 1), windows, halos, multiple, blend, clip,
                          outputs, "uint8", "uint64", block, shard)


SIDES = st.integers(1, 200)


@given(SIDES, st.sampled_from([(16, 4), (32, 8), (32, 4), (48, 0)]), st.booleans(), st.booleans())
def test_weights_of_all_windows_add_up_to_one_at_every_voxel_and_windows_begin_on_multiples(side, sizes, blend, clip) -> None:
    window, halo = sizes
    grid = grid_of((side, 8, 8), window=window, halo=halo, blend=blend, clip=clip)
    lattice, total = grid.lattice(0), np.zeros(side)
    for w in range(lattice.count):
        begin = lattice.start(w)
        assert begin % grid.multiple == 0
        low, high = max(0, begin), min(side, begin + lattice.window)
        total[low:high] += lattice.weights(w)[low - begin:high - begin]
        seen = grid.seen((w, 0, 0))
        assert seen[0][0] % grid.multiple == 0
        assert seen[0][0] <= low and high <= seen[1][0]
        if clip:
            assert seen[0][0] >= 0 and seen[1][0] <= side
        else:
            assert seen[1][0] - seen[0][0] == grid.window[0]
    assert total == pytest.approx(np.ones(side), abs=1e-6)


@given(st.tuples(SIDES, SIDES, SIDES), st.integers(1, 4), st.booleans())
def test_units_and_blocks_cover_the_volume_once_and_own_whole_shards(shape, windows, blend) -> None:
    grid = grid_of(shape, blend=blend)
    for boxes in (grid.units(windows), grid.blocks()):
        assert sum(int(np.prod([b - a for a, b in zip(*box, strict=True)])) for box in boxes) == int(np.prod(shape))
        for start, stop in boxes:
            check_alone_on(grid.labels, start, stop)
    assert grid.windows_in_all(windows) >= grid.windows_once
    assert grid.windows_in_all(10**6) == grid.windows_once


@given(st.tuples(SIDES, SIDES, SIDES))
def test_units_of_the_default_size_compute_at_most_half_of_the_windows_twice(shape) -> None:
    grid = grid_of(shape)
    assert grid.windows_in_all(grid.unit_windows(None)) <= 1.5 * grid.windows_once


def test_without_blending_nothing_is_computed_twice() -> None:
    grid = grid_of((200, 100, 60), blend=False)
    assert grid.windows_in_all(1) == grid.windows_once
    places = list(product(*(range(grid.lattice(a).count) for a in range(3))))
    covered = np.zeros(grid.shape, int)
    for place in places:
        covered[tuple(slice(max(0, grid.lattice(a).start(w)), grid.lattice(a).start(w) + grid.lattice(a).window)
                      for a, w in enumerate(place))] += 1
    assert (covered == 1).all()


def test_a_grid_comes_back_from_the_plan() -> None:
    grid = grid_of((50, 60, 70))
    import json

    assert PredictionGrid.read(json.loads(json.dumps(grid.as_dict()))) == grid


@pytest.mark.parametrize(("window", "halo"), [(30, 4), (32, 6), (32, 12), (4, 4)])
def test_windows_that_do_not_fit_are_refused(window: int, halo: int) -> None:
    with pytest.raises(BadRequest, match="windows of"):
        make_windows((64, 64, 64), (window,) * 3, (halo,) * 3, 4, shrink=True)
