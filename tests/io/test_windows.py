"""Windows of slabs and their blending: every token once, from the same windows in the same order, whatever the slab."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.io.volume_grid import VolumeGrid
from dinoray.io.windows import SlabWindows, TokenGrid

DIM = 3


def grid(shape=(300, 200, 450), window=128, halo=32) -> VolumeGrid:
    return VolumeGrid(shape, (8.0,) * 3, (0.0,) * 3, (32.0,) * 3, 16, ("xy",), window, halo, 1, DIM, "float32")


def computed(lattices, number: tuple[int, int]) -> np.ndarray:
    """Tokens [1, h, w, D] of a window, different in every window: what a real backbone gives at the same place."""
    rng = np.random.default_rng(abs(hash(number)) % 2**32)
    return rng.normal(size=(1, lattices[0].window, lattices[1].window, DIM)).astype(np.float32)


def tokens_of(windows: SlabWindows) -> np.ndarray:
    found = TokenGrid(windows, 1, DIM)
    for window in windows:
        found.add(window, 0, computed(windows.lattices, (window.row, window.col)))
    return found.finished(lambda tokens, missing: tokens)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_tokens_are_bit_equal_whatever_slab_asks_for_them(data: st.DataObject) -> None:
    window, halo = data.draw(st.sampled_from([(128, 32), (128, 16), (96, 0), (512, 32)]))
    plane = grid((8, data.draw(st.integers(1, 900)), data.draw(st.integers(1, 900))), window, halo).plane("xy")
    _, rows, cols = plane.shape
    whole = tokens_of(SlabWindows(plane, (0, rows), (0, cols)))
    a = data.draw(st.integers(0, rows - 1))
    b = data.draw(st.integers(a + 1, rows))
    c = data.draw(st.integers(0, cols - 1))
    d = data.draw(st.integers(c + 1, cols))
    part = tokens_of(SlabWindows(plane, (a, b), (c, d)))
    assert part.shape == (DIM, 1, b - a, d - c)
    assert part.tobytes() == np.ascontiguousarray(whole[:, :, a:b, c:d]).tobytes()


def test_equal_tokens_of_all_windows_stay_what_they_are() -> None:
    windows = SlabWindows(grid().plane("xy"), (0, 13), (0, 29))
    found = TokenGrid(windows, 2, DIM)
    for window in windows:
        found.add(window, 0, np.ones((2, windows.lattices[0].window, windows.lattices[1].window, DIM), np.float32))
    np.testing.assert_allclose(found.finished(lambda tokens, missing: tokens), 1, atol=1e-6)


def test_pixels_of_a_window_begin_where_its_lattice_says() -> None:
    plane = grid().plane("xy")
    windows = SlabWindows(plane, (4, 8), (20, 29))
    (top, bottom), (left, right) = windows.pixel_box()
    rows, cols = windows.lattices
    for window in windows:
        assert top + window.y == rows.start(window.row) * 16 and left + window.x == cols.start(window.col) * 16
        assert window.y >= 0 and window.y + windows.size_px[0] <= bottom - top
        assert window.x >= 0 and window.x + windows.size_px[1] <= right - left
    margin = SlabWindows(plane, (4, 8), (20, 29), margin_px=16)
    assert margin.pixel_box() == ((top - 16, bottom + 16), (left - 16, right + 16))
    assert [(w.y, w.x) for w in margin] == [(w.y + 16, w.x + 16) for w in windows]


@pytest.mark.parametrize("plane", ["xy", "xz", "yz"])
def test_tokens_of_skipped_windows_are_unknown_in_every_slab(plane: str) -> None:
    lattice = VolumeGrid((300, 200, 450), (8.0,) * 3, (0.0,) * 3, (32.0,) * 3, 16, (plane,), 128, 32, 1, DIM, "float32").plane(plane)
    rows, cols = (lattice.shape[a] for a in lattice.axes)
    windows = SlabWindows(lattice, (0, rows), (0, cols))
    found = TokenGrid(windows, 1, DIM)
    for number, window in enumerate(windows):
        if number % 2:
            found.skip(window, 0, 1)
        else:
            found.add(window, 0, computed(windows.lattices, (window.row, window.col)))
    tokens = found.finished(lambda tokens, missing: np.where(missing[..., None], np.nan, tokens))
    moved = np.moveaxis(tokens, 1 + lattice.normal, 1)[0, 0]
    expected = np.zeros((rows, cols), bool)
    for number, window in enumerate(windows):
        if number % 2:
            first, left = windows.lattices[0].start(window.row), windows.lattices[1].start(window.col)
            expected[max(0, first):first + windows.lattices[0].window, max(0, left):left + windows.lattices[1].window] = True
    np.testing.assert_array_equal(np.isnan(moved), expected)
