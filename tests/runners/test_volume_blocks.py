"""Instances found block by block are those of the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dinoray.errors import OutputDamaged
from dinoray.io.prediction_grid import EDGES
from dinoray.label_units import COUNTS, table_key
from dinoray.runners.volume_blocks import block_edges, encoded, fragments_of, merge_blocks, relabelled, voxel_counts
from dinoray.vision.affinities import FACES, affinities, components, mutex_watershed
from dinoray.vision.volume_metrics import Contingency, instance_score
from tests.io.test_prediction_grid import grid_of
from tests.runs import DictStore


def stitched(grid, values: np.ndarray, threshold: float, offsets=FACES, kind="components", min_voxels=0) -> np.ndarray:
    """Instances uint64 of affinities [A, z, y, x], by blocks."""
    store, fragments = DictStore(), np.zeros(values.shape[1:], np.uint32)
    for start, stop in grid.blocks():
        before = [min(1, a) for a in start]
        box = tuple(slice(a - b, c) for a, b, c in zip(start, before, stop, strict=True))
        after = [b < n for b, n in zip(stop, grid.shape, strict=True)]
        found = fragments_of(values[(slice(None), *box)], before, after, threshold, offsets, kind)
        fragments[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = found
        store.put(table_key(COUNTS, start), encoded(voxel_counts(found)))

    def read(array):
        return lambda z0, z1, y0, y1, x0, x1: array[:, z0:z1, y0:y1, x0:x1]

    for start, stop in grid.blocks():
        store.put(table_key(EDGES, start),
                  encoded(block_edges(grid, start, stop, read(fragments[None]), read(values), threshold, kind)))
    offsets_, ids = merge_blocks(grid, store, min_voxels)
    labels = np.zeros(fragments.shape, np.uint64)
    for k, (start, stop) in enumerate(grid.blocks()):
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        labels[box] = relabelled(fragments[box], ids[offsets_[k]:offsets_[k + 1]])
    return labels


def same_up_to_names(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a.ravel().astype(np.int64), b.ravel().astype(np.int64)]), axis=1)
    return len(np.unique(pairs[0])) == len(pairs[0]) == len(np.unique(pairs[1])) and ((pairs[0] == 0) == (pairs[1] == 0)).all()


@settings(deadline=None, max_examples=30)
@given(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)), st.integers(0, 99), st.floats(0.3, 0.95),
       st.sampled_from([0, 0, 5]))
def test_connected_components_of_blocks_are_those_of_the_whole(shape, seed, threshold, min_voxels) -> None:
    grid = grid_of(shape, window=16, halo=4, block=16, shard=16)
    values = np.random.default_rng(seed).random((3, *shape), np.float32)  # noise: objects are small and cross every face
    found = stitched(grid, values, threshold, min_voxels=min_voxels)
    assert same_up_to_names(found, components(values, threshold, min_voxels=max(1, min_voxels)))
    ids = np.unique(found)
    assert ids[ids > 0].tolist() == list(range(1, int((ids > 0).sum()) + 1))


def test_more_than_one_block_was_tested() -> None:
    assert len(grid_of((60, 60, 60), window=16, halo=4, block=16, shard=16).blocks()) > 1


def test_a_link_that_only_crosses_a_face_makes_an_object() -> None:
    grid = grid_of((40, 8, 8), window=16, halo=4, block=16, shard=16)
    face = grid.block[0]
    values = np.zeros((3, 40, 8, 8), np.float32)
    values[0, face - 1, 4, 4] = 1  # joins the last voxel of one block to the first of the next, and nothing else
    found = stitched(grid, values, 0.5)
    assert np.argwhere(found == 1).tolist() == [[face - 1, 4, 4], [face, 4, 4]] and found.max() == 1


def test_mutex_watershed_of_blocks_agrees_with_the_whole() -> None:
    pytest.importorskip("mwatershed")
    shape, offsets = (140, 60, 60), (*FACES, (5, 0, 0), (0, 5, 0), (0, 0, 5))
    rng = np.random.default_rng(0)
    seeds = np.zeros(shape, np.int32)
    places = [tuple(rng.integers(0, n) for n in shape) for _ in range(60)]
    for k, place in enumerate(places, 1):
        seeds[place] = k
    nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    truth = seeds[tuple(nearest)]
    given_, valid = affinities(truth, offsets)
    values = np.clip(np.where(valid, given_, 1) * 0.8 + 0.1 + 0.1 * rng.standard_normal(given_.shape), 0, 1).astype(np.float32)
    grid = grid_of(shape, window=16, halo=4, block=48, outputs=6, shard=16)
    assert len(grid.blocks()) > 1
    found = stitched(grid, values, 0.5, offsets, "mutex")
    whole = mutex_watershed(values, offsets)
    score = instance_score(Contingency().add(found.astype(np.int64), whole.astype(np.int64)))
    assert score.vi <= 0.05, score


def test_a_missing_table_is_named() -> None:
    grid = grid_of((20, 20, 20), window=16, halo=4, block=16, shard=16)
    with pytest.raises(OutputDamaged, match="instances/counts/0-0-0"):
        merge_blocks(grid, DictStore(), 0)


def test_nothing_anywhere_is_no_error() -> None:
    grid = grid_of((200, 20, 20), window=16, halo=4, block=16, shard=16)
    assert not stitched(grid, np.zeros((3, 200, 20, 20), np.float32), 0.5).any()
