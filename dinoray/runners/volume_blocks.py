"""From stored affinities to instances of a whole volume, block by block.

What a block holds by itself (fragments), which fragments of neighbouring blocks are one (edges), which instance each fragment
belongs to (merge).

With connected components the result is that of the whole volume up to the ids: a pair of voxels is looked at in one place only,
inside a block or at the face between two.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinoray.errors import OutputDamaged
from dinoray.io.prediction_grid import EDGES, PredictionGrid
from dinoray.io.stores import Store
from dinoray.io.volume_grid import Shape
from dinoray.label_units import COUNTS, table_key
from dinoray.vision.affinities import Offset, components, mutex_watershed

Read = Callable[[int, int, int, int, int, int], np.ndarray]


def encoded(array: np.ndarray) -> bytes:
    """As .npy."""
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def table(store: Store, key: str) -> np.ndarray:
    """A stored table. Raises OutputDamaged when it is missing or broken."""
    try:
        return np.load(io.BytesIO(store.get(key)))
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise OutputDamaged(f"a table of instances cannot be read: {error!r}", where=f"{store.url}/{key}",
                            todo="delete the receipt of its unit and run the same command again: it is made anew") from error


def fragments_of(values: np.ndarray, before: Sequence[int], after: Sequence[bool], threshold: float,
                 offsets: Sequence[Offset], kind: str) -> np.ndarray:
    """Fragments uint32 [z, y, x], 1.., of a block from affinities [A, z, y, x] in 0..1, which also hold `before` (0 or 1) planes
    of the blocks before it along each axis; `after`: whether there is a block behind it.

    Those planes say which voxels are joined to a neighbour across the face: such a voxel is a fragment even when nothing else holds
    it. They are no part of the result.
    """
    own = tuple(slice(b, None) for b in before)
    block = values[(slice(None), *own)]
    if kind == "mutex":
        return mutex_watershed(block, offsets).astype(np.uint32)
    found = components(block, threshold)
    # a voxel whose only links lead out of the block: to the next one by its own affinity, to the one before by the plane there
    alone = np.zeros(found.shape, bool)
    for axis in range(3):
        last = [slice(None)] * 3
        last[axis] = slice(-1, None)
        if after[axis]:
            alone[tuple(last)] |= block[(axis, *last)] > threshold
        if before[axis]:
            plane = list(own)
            plane[axis] = slice(0, 1)
            first = [slice(None)] * 3
            first[axis] = slice(0, 1)
            alone[tuple(first)] |= values[(axis, *plane)] > threshold
    alone &= found == 0
    found[alone] = found.max(initial=0) + 1 + np.arange(np.count_nonzero(alone))
    return found.astype(np.uint32)


def edges_between(low: np.ndarray, high: np.ndarray, values: np.ndarray, threshold: float, kind: str) -> np.ndarray:
    """Pairs int64 [n, 2] of fragments that are one, of the two planes at a face: `low` the last of a block, `high` the first of the
    next, `values` the affinities between them, all of one shape.

    Connected components: any pair of voxels above the threshold joins. Mutex: the mean over the face that two fragments share.
    """
    both = (low != 0) & (high != 0)
    pairs = np.stack([low[both], high[both]], axis=1).astype(np.int64)
    given = values[both]
    if kind == "components":
        return np.unique(pairs[given > threshold], axis=0)
    unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    sums = np.bincount(inverse, given, minlength=len(unique))
    means = sums / np.maximum(1, np.bincount(inverse, minlength=len(unique)))
    return unique[means > threshold]


def block_edges(grid: PredictionGrid, start: Shape, stop: Shape, fragments: Read, affinities: Read, threshold: float, kind: str
                ) -> np.ndarray:
    """Edges int64 [n, 3] of a block with the blocks after it: axis, own fragment, the neighbour's.

    Raises what the readers raise.
    """
    found = [np.zeros((0, 3), np.int64)]
    for axis in range(3):
        if stop[axis] == grid.shape[axis]:
            continue
        box = list(zip(start, stop, strict=True))
        box[axis] = (stop[axis] - 1, stop[axis] + 1)
        both = fragments(*(n for pair in box for n in pair))[0]
        box[axis] = (stop[axis] - 1, stop[axis])
        given = affinities(*(n for pair in box for n in pair))[axis]
        pairs = edges_between(np.take(both, [0], axis), np.take(both, [1], axis), given, threshold, kind)
        found.append(np.concatenate([np.full((len(pairs), 1), axis, np.int64), pairs], axis=1))
    return np.concatenate(found)


def merge_blocks(grid: PredictionGrid, store: Store, min_voxels: int, beat: Callable[[], None] = lambda: None
                 ) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64 [blocks + 1], instance uint64 of each fragment) of a volume: fragment f >= 1 of block b is entry
    offsets[b] + f - 1. Instances are 1.. in the order of their first fragments; those of fewer than `min_voxels` are 0.

    Raises OutputDamaged.
    """
    blocks = grid.blocks()
    number = {start: k for k, (start, _) in enumerate(blocks)}
    sizes = []
    for start, _ in blocks:
        sizes.append(table(store, table_key(COUNTS, start)))
        beat()
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sizes])]).astype(np.int64)
    voxels = np.concatenate([np.zeros(0, np.int64), *sizes])
    ends: list[np.ndarray] = []
    for k, (start, stop) in enumerate(blocks):
        edges = table(store, table_key(EDGES, start))
        beat()
        for axis in range(3):
            of_axis = edges[edges[:, 0] == axis]
            if len(of_axis):
                after = tuple(stop[a] if a == axis else start[a] for a in range(3))
                ends.append(np.stack([offsets[k] + of_axis[:, 1] - 1, offsets[number[after]] + of_axis[:, 2] - 1]))
    a, b = np.concatenate([np.zeros((2, 0), np.int64), *ends], axis=1)
    total = int(offsets[-1])
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(total, total))
    _, group = connected_components(graph, directed=False)
    kept = np.bincount(group, voxels, minlength=1) >= max(1, min_voxels)
    _, first = np.unique(group, return_index=True)
    ids = np.zeros(len(kept), np.uint64)
    order = np.argsort(first, kind="stable")
    order = order[kept[order]] if total else order[:0]
    ids[order] = np.arange(1, len(order) + 1, dtype=np.uint64)
    return offsets, ids[group] if total else np.zeros(0, np.uint64)


def relabelled(fragments: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Fragments [z, y, x] of a block as instances uint64; `ids`: of its fragments 1.."""
    return np.concatenate([np.zeros(1, np.uint64), ids])[fragments]


def voxel_counts(fragments: np.ndarray) -> np.ndarray:
    """Voxels int64 of the fragments 1.. of a block."""
    return np.bincount(fragments.ravel())[1:].astype(np.int64)

