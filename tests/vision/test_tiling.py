"""Tiling: every pixel is covered, nothing is dropped at the end, windows lie inside and hold whole patches."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.errors import BadRequest, ItemError
from dinoray.vision.tiling import Window, centred, tile_spans, windows

SIDES = st.integers(1, 3000)
PATCHES = st.sampled_from([8, 14, 16])


@settings(deadline=None, max_examples=200)
@given(side=SIDES, patch=PATCHES, times=st.integers(1, 20))
def test_an_axis_of_tiles(side: int, patch: int, times: int) -> None:
    tile = patch * times
    spans = tile_spans(side, tile, patch)
    if side <= tile:
        assert spans == [centred(side, patch)]
        return
    n = math.ceil(side / tile)
    assert [start for start, _ in spans] == [round(i * (side - tile) / (n - 1)) for i in range(n)]
    assert {stop - start for start, stop in spans} == {tile}
    assert spans[0][0] == 0
    assert spans[-1][1] == side, "nothing is dropped at the end"
    for (_, stop), (start, _) in zip(spans, spans[1:], strict=False):
        assert start <= stop, "no gap"
    assert len(set(spans)) == n, "no tile twice"


@settings(deadline=None, max_examples=200)
@given(side=st.integers(0, 3000), multiple=st.integers(1, 64))
def test_centred(side: int, multiple: int) -> None:
    start, stop = centred(side, multiple)
    assert (stop - start) % multiple == 0
    assert 0 <= start <= stop <= side
    assert side - (stop - start) < multiple
    assert abs(start - (side - stop)) <= 1, "what is left over is shared by both ends"


def covered(boxes: list[Window], height: int, width: int) -> np.ndarray:
    seen = np.zeros((height, width), dtype=int)
    for box in boxes:
        seen[box.y0:box.y1, box.x0:box.x1] += 1
    return seen


@settings(deadline=None, max_examples=120)
@given(height=st.integers(1, 700), width=st.integers(1, 700), size=st.sampled_from(["auto", "tiles", "native"]),
       patch=st.sampled_from([8, 16]), tile=st.sampled_from([32, 64, 256]))
def test_windows(height: int, width: int, size: str, patch: int, tile: int) -> None:
    if min(height, width) < patch:
        with pytest.raises(ItemError) as caught:
            windows(height, width, size=size, tile_px=tile, patch=patch)
        assert caught.value.reason == "too_small"
        assert f"{height} x {width}" in caught.value.what
        return
    boxes = windows(height, width, size=size, tile_px=tile, patch=patch)
    assert [box.tile for box in boxes] == list(range(len(boxes)))
    assert [(b.y0, b.x0) for b in boxes] == sorted((b.y0, b.x0) for b in boxes), "row by row"
    for box in boxes:
        assert 0 <= box.y0 < box.y1 <= height
        assert 0 <= box.x0 < box.x1 <= width
        assert (box.height, box.width) == (box.y1 - box.y0, box.x1 - box.x0)
        assert box.height % patch == box.width % patch == 0
    tiled = size == "tiles" or (size == "auto" and max(height, width) > 2 * tile)
    if not tiled:
        assert len(boxes) == 1
    seen = covered(boxes, height, width)
    for axis, side in ((1, height), (0, width)):
        profile = seen.max(axis=axis) > 0
        if tiled and side > tile:
            assert profile.all(), "every pixel of an axis that is cut into tiles is in one"
        else:
            assert side - profile.sum() < patch, "less than a patch is cut off"
    ys, xs = seen.max(axis=1) > 0, seen.max(axis=0) > 0
    assert ((seen > 0) == (ys[:, None] & xs[None, :])).all()


def test_the_rule_of_the_contract_by_example() -> None:
    def at(height: int, width: int, size: str = "auto") -> list[tuple[int, int, int, int]]:
        return [(b.y0, b.x0, b.y1, b.x1) for b in windows(height, width, size=size, tile_px=256, patch=16)]

    assert at(512, 512) == [(0, 0, 512, 512)], "auto: native up to twice the tile"
    assert at(513, 100) == [(0, 2, 256, 98), (128, 2, 384, 98), (257, 2, 513, 98)]
    assert at(257, 256, "tiles") == [(0, 0, 256, 256), (1, 0, 257, 256)]
    assert at(256, 250, "tiles") == [(0, 5, 256, 245)]
    assert at(1080, 1080)[-1] == (824, 824, 1080, 1080)
    assert len(at(1080, 1080)) == 25
    assert at(2000, 2000, "native") == [(0, 0, 2000, 2000)]
    assert at(1001, 37, "resize") == [(0, 0, 1001, 37)]
    assert at(1, 1, "resize") == [(0, 0, 1, 1)], "resize takes any size"


@pytest.mark.parametrize(("tile", "patch", "better"), [(250, 16, 240), (256, 14, 252), (8, 16, 16)])
def test_a_tile_is_a_multiple_of_the_patch(tile: int, patch: int, better: int) -> None:
    with pytest.raises(BadRequest, match=f"tile_px={tile}") as caught:
        windows(300, 300, size="auto", tile_px=tile, patch=patch)
    assert str(better) in caught.value.todo
    assert better % patch == 0
