"""Blocks joined into one labelling: equal to the whole image for objects that the overlap holds, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import label

from dinoray.errors import BadRequest
from dinoray.vision.instances import instances
from dinoray.vision.stitching import Box, Stitcher, blocks, matches
from dinoray.vision.targets import distance_map
from tests.vision.labels import blobs, same_partition

SEEDS = st.integers(0, 2 ** 32 - 1)


def extent(labels: np.ndarray) -> int:
    """Largest height or width of an object."""
    return max((max(s.stop - s.start for s in box) for box in ndimage.find_objects(labels) if box), default=0)


def stitched(shape: tuple[int, int], block_px: int, overlap_px: int, segment) -> np.ndarray:
    """The image's labels, with `segment(outer box)` for each block; both passes."""
    store = np.full(shape, -1, np.int32)

    def write(box: Box, ids: np.ndarray) -> None:
        assert (store[box.y0:box.y1, box.x0:box.x1] == -1).all(), "every pixel is written once"
        store[box.y0:box.y1, box.x0:box.x1] = ids

    stitcher = Stitcher(*shape, block_px, overlap_px, write)
    for block in stitcher.blocks:
        stitcher.add(block, segment(block.outer))
    table = stitcher.finish()
    assert store.min() >= 0, "every pixel is written"
    final = table[store]
    assert final.dtype == np.int32
    assert set(np.unique(final)) - {0} == set(range(1, final.max() + 1)), "ids without a gap"
    return final


def renamed(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same objects by other, arbitrary ids."""
    ids, at = np.unique(labels, return_inverse=True)
    names = rng.choice(10 ** 6, len(ids), replace=False) + 1
    return np.where(labels > 0, names[at.reshape(labels.shape)], 0)


@settings(deadline=None, max_examples=200)
@given(height=st.integers(1, 90), width=st.integers(1, 90), block_px=st.integers(1, 50), overlap_px=st.integers(0, 40))
def test_blocks_tile_the_image(height: int, width: int, block_px: int, overlap_px: int) -> None:
    seen = np.zeros((height, width), int)
    found = blocks(height, width, block_px, overlap_px)
    for block in found:
        core, outer, margin = block.core, block.outer, overlap_px // 2
        seen[core.y0:core.y1, core.x0:core.x1] += 1
        assert (core.y0, core.x0) == (block.row * block_px, block.column * block_px), "anchored at the origin"
        assert outer == (max(0, core.y0 - margin), max(0, core.x0 - margin), min(height, core.y1 + margin),
                         min(width, core.x1 + margin))
    assert (seen == 1).all()
    assert [(b.row, b.column) for b in found] == sorted((b.row, b.column) for b in found)


@settings(deadline=None, max_examples=120)
@given(seed=SEEDS, shape=st.tuples(st.integers(1, 60), st.integers(1, 60)), block_px=st.integers(2, 45), more=st.integers(0, 5))
def test_true_labels_come_back(seed: int, shape: tuple[int, int], block_px: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    whole = label(blobs(seed, shape, 40, (1, 4)), connectivity=2)
    overlap_px = 2 * extent(whole) + more
    found = stitched(shape, block_px, overlap_px, lambda box: renamed(whole[box.y0:box.y1, box.x0:box.x1], rng))
    assert same_partition(found, whole)


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, shape=st.tuples(st.integers(1, 60), st.integers(1, 60)), block_px=st.integers(0, 30))
def test_scattered_objects_come_back_from_blocks_no_smaller_than_they(seed: int, shape: tuple[int, int], block_px: int) -> None:
    rng, whole = np.random.default_rng(seed), blobs(seed, shape, 40, (1, 4))
    size = max(extent(whole), 1)
    found = stitched(shape, size + block_px, 2 * size, lambda box: renamed(whole[box.y0:box.y1, box.x0:box.x1], rng))
    assert same_partition(found, whole)


def maps(seed: int, shape: tuple[int, int], kind: str, levels: int) -> np.ndarray:
    """Distance maps of crowded cells: perfect, noisy, or of noise alone; with few levels they are full of ties."""
    rng, labels = np.random.default_rng(seed), blobs(seed, shape, 80, (1, 4))
    distance = distance_map(labels)
    if kind != "perfect":
        distance = (0 if kind == "noise" else distance) + rng.normal(0.3, 0.3, shape)
    distance = np.clip(distance, 0, 1)
    return (np.round(distance * levels) / levels if levels else distance).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, shape=st.tuples(st.integers(1, 70), st.integers(1, 70)), block_px=st.integers(2, 40),
       kind=st.sampled_from(["perfect", "noisy", "noise"]), levels=st.sampled_from([0, 3, 12]), fill=st.sampled_from([0.09, 0.3]))
def test_watershed_by_blocks_equals_the_whole(seed, shape, block_px, kind, levels, fill) -> None:
    distance = maps(seed, shape, kind, levels)
    whole = instances(distance, fill=fill)
    found = stitched(shape, block_px, 2 * extent(whole),
                     lambda box: instances(distance[box.y0:box.y1, box.x0:box.x1], fill=fill))
    assert same_partition(found, whole)


@pytest.mark.parametrize("block_px", [7, 20, 33])
def test_large_objects_come_back_when_both_blocks_see_them_alike(block_px: int) -> None:
    whole = np.zeros((60, 80), np.int32)
    whole[5:55, 5:40] = 1
    whole[10:50, 42:78] = 2
    found = stitched(whole.shape, block_px, 8, lambda box: whole[box.y0:box.y1, box.x0:box.x1])
    assert same_partition(found, whole)


def test_pieces_that_disagree_are_cut_at_the_seam() -> None:
    """The left block sees a tall object, the right one a short one: IoU 3/10 within the overlap."""
    left, right = np.zeros((12, 24), np.int32), np.zeros((12, 24), np.int32)
    left[1:11, 8:16] = 1
    right[1:4, 8:16] = 1
    found = stitched((12, 24), 12, 8, lambda box: (left if box.x0 == 0 else right)[box.y0:box.y1, box.x0:box.x1])
    expected = np.zeros((12, 24), np.int32)
    expected[1:11, 8:12], expected[1:4, 12:16] = 1, 2
    np.testing.assert_array_equal(found, expected)


def test_what_touches_only_a_corner_is_joined() -> None:
    whole = np.zeros((8, 8), np.int32)
    whole[3, 3] = whole[4, 4] = 5
    whole[3, 4] = whole[4, 3] = 6
    assert same_partition(stitched((8, 8), 4, 4, lambda box: whole[box.y0:box.y1, box.x0:box.x1]), whole)


def test_a_cut_object_beside_a_seam_joins_nothing() -> None:
    """The last block's outer box cuts two cells that it does not own, and their remains run together there. That one
    object matches a cell of two neighbours each (30 of 42 px, 40 of 70 px): the two cells stay two."""
    whole = np.zeros((40, 40), np.int32)
    whole[14:20, 14:19], whole[20:40, 14:16] = 1, 2

    def segment(box: Box) -> np.ndarray:
        cut = whole[box.y0:box.y1, box.x0:box.x1]
        return (cut > 0).astype(np.int32) if (box.y0, box.x0) == (14, 14) else cut

    assert same_partition(stitched((40, 40), 20, 12, segment), whole)


def test_memory_does_not_grow_with_the_height() -> None:
    """What is kept are the overlaps: bounded by the width, however tall the image."""
    held = {}
    for height in (256, 1024):
        stitcher = Stitcher(height, 512, 64, 16, lambda box, ids: None)
        peak = 0
        for block in stitcher.blocks:
            stitcher.add(block, np.ones(block.outer.shape, np.int32))
            peak = max(peak, stitcher.held_bytes)
        held[height] = peak
        assert stitcher.finish().max() == 1
    assert held[256] == held[1024]
    assert held[256] <= 4 * 16 * (512 + 8 * 16 + 4 * (64 + 16)), "overlap x (width + what outer boxes share + four blocks)"


def test_many_objects_and_the_end_of_the_ids() -> None:
    whole = np.zeros((530, 530), np.int32)
    whole[::2, ::2] = np.arange(1, 265 ** 2 + 1).reshape(265, 265)
    assert same_partition(stitched(whole.shape, 200, 4, lambda box: whole[box.y0:box.y1, box.x0:box.x1]), whole)
    stitcher = Stitcher(8, 16, 8, 2, lambda box, ids: None, largest_id=3)
    labels = np.zeros((8, 9), np.int32)
    labels[0, :3] = [1, 2, 3]
    stitcher.add(stitcher.blocks[0], labels)
    with pytest.raises(BadRequest, match="more than 3 objects"):
        stitcher.add(stitcher.blocks[1], labels)


def test_matches_by_hand() -> None:
    a = np.array([[1, 1, 1, 1, 0, 2, 2, 3]])
    b = np.array([[9, 9, 9, 0, 0, 7, 8, 3]])
    assert matches(a, b).tolist() == [[1, 9], [3, 3]], "3/4, 1/2 (not above a half) twice, 1/1"


def test_refusals() -> None:
    with pytest.raises(BadRequest, match="blocks of 0"):
        blocks(5, 5, 0, 0)
    with pytest.raises(BadRequest, match="overlap of -1"):
        blocks(5, 5, 2, -1)
    stitcher = Stitcher(10, 10, 5, 2, lambda box, ids: None)
    with pytest.raises(BadRequest, match="not the next"):
        stitcher.add(stitcher.blocks[1], np.zeros((6, 6), np.int32))
    with pytest.raises(BadRequest, match="outer box"):
        stitcher.add(stitcher.blocks[0], np.zeros((5, 5), np.int32))
    with pytest.raises(BadRequest, match="4 of 4"):
        stitcher.finish()
