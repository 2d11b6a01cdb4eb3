"""Outlines: one shown pixel wide, touching cells in different colours, nothing that depends on anything but the labels."""

from __future__ import annotations

import base64
import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinoray.report.outlines import (
    BOTH,
    HUES,
    PRED,
    TRUTH,
    boundaries,
    cell_outlines,
    compared_outlines,
    display_size,
    filled_cells,
    hues,
    palette,
    resized_labels,
)


def pixels(uri: str) -> np.ndarray:
    """RGBA [h, w, 4] of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGBA"))


def grid(rows: int, columns: int, side: int) -> np.ndarray:
    """Touching squares, ids in raster order."""
    return np.kron(np.arange(1, rows * columns + 1).reshape(rows, columns), np.ones((side, side), int)).astype(np.int32)


def test_an_outline_is_one_pixel_wide_whatever_the_size_shown() -> None:
    labels = np.zeros((400, 400), np.int32)
    labels[100:300, 100:300] = 7
    for side in (40, 400, 800):
        seen = pixels(cell_outlines(labels, side, side))[..., 3] > 0
        inner = side // 2  # the square's side as shown
        assert seen.sum() == 4 * inner - 4
        assert seen[side // 2].sum() == 2


def test_small_cells_survive_shrinking_as_outlines() -> None:
    labels = grid(20, 20, 10)
    labels[::10] = labels[:, ::10] = 0
    shown = pixels(cell_outlines(labels, 67, 67))
    assert len(np.unique(resized_labels(labels, 67, 67))) == 401
    assert (shown[..., 3] > 0).mean() > 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12))
def test_touching_cells_differ_in_colour(seed: int, height: int, width: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 9, (height, width))
    found = hues(labels)
    assert ((found == -1) == (labels == 0)).all() and found.max(initial=-1) < HUES
    if len(np.unique(labels)) <= HUES:
        for one, other in (np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1]):
            touching = (labels[one] != labels[other]) & (labels[one] > 0) & (labels[other] > 0)
            assert (found[one] != found[other])[touching].all()
    for number in np.unique(labels[labels > 0]):
        assert len(np.unique(found[labels == number])) == 1


def test_cells_that_do_not_touch_keep_the_colour_of_their_id() -> None:
    labels = np.zeros((30, 30), np.int32)
    labels[2:8, 2:8], labels[20:26, 20:26] = 3, 3 + HUES
    both = hues(labels)
    alone = hues(np.where(labels == 3, labels, 0))
    assert (both[labels == 3] == alone[labels == 3]).all() and both[4, 4] == both[22, 22]
    labels[2:8, 8:14] = 3 + HUES  # now beside each other
    assert hues(labels)[4, 4] != hues(labels)[4, 10]


def test_large_ids_and_an_image_without_cells() -> None:
    labels = grid(3, 3, 8) + 70_000
    assert pixels(cell_outlines(labels, 24, 24))[..., 3].any()
    for draw in (cell_outlines, filled_cells):
        assert not pixels(draw(np.zeros((5, 9), np.int32), 10, 18))[..., 3].any()
    assert pixels(filled_cells(np.ones((1, 1), np.int32), 1, 1)).shape == (1, 1, 4)


def test_filled_cells_show_their_areas_and_outlines_their_colours() -> None:
    labels = grid(1, 2, 10)
    filled, lines = pixels(filled_cells(labels, 10, 20)), pixels(cell_outlines(labels, 10, 20))
    assert {tuple(v) for v in filled[filled[..., 3] > 0][:, :3]} == {tuple(palette()[i]) for i in np.unique(hues(labels))}
    assert ((filled[..., 3] > 0) == ~boundaries(labels)).all() and ((lines[..., 3] > 0) == boundaries(labels)).all()


def test_two_label_images_over_one_another() -> None:
    truth, pred = np.zeros((2, 20, 20), np.int32)
    truth[2:10, 2:10] = 1
    pred[2:10, 2:10], pred[12:18, 12:18] = 5, 6
    truth[12:18, 2:8] = 2
    seen = pixels(compared_outlines(pred, truth, 20, 20))[..., :3]
    assert tuple(seen[2, 5]) == BOTH and tuple(seen[12, 14]) == PRED and tuple(seen[12, 4]) == TRUTH


def test_sizes_shown() -> None:
    assert display_size(100, 50, 560) == (500, 250) and display_size(5600, 2800, 560) == (560, 280)
    assert display_size(1, 1, 300) == (300, 300) and display_size(1, 9000, 300) == (1, 300)
