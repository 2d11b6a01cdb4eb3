"""The plan of a segmented volume: which boxes its units make, stage by stage, and which objects a box owns.

`probabilities` (or at once the `labels` of classes) come from the model. Of affinities, `fragments` are the instances of a block by
itself, `edges` say which fragments of neighbouring blocks are one, `merge` is the table of all, and `labels` is made with it.
"""

from __future__ import annotations

from collections.abc import Iterator

from dinoray.io.prediction_grid import EDGES, FRAGMENTS, LABELS, MERGE, PROBABILITIES, PredictionGrid
from dinoray.io.volume_arrays import shard_key, shards_of
from dinoray.io.volume_grid import ArraySpec, Shape
from dinoray.slabs import Slab

FOLDER = "instances"
"""Counts, edges and the merge table of an output."""
COUNTS = "counts"
MERGE_KEY, OFFSETS_KEY = f"{FOLDER}/{MERGE}.npy", f"{FOLDER}/offsets.npy"
UNIT_BLOCKS = {FRAGMENTS: 4, EDGES: 32, LABELS: 4}
"""Blocks in a unit."""


def table_key(kind: str, start: Shape) -> str:
    """The object of a block: `instances/counts/0-0-256.npy`."""
    return f"{FOLDER}/{kind}/{'-'.join(map(str, start))}.npy"


def stages(grid: PredictionGrid, unit_windows: int, *, instances: bool) -> Iterator[list[list[Slab]]]:
    """Stage after stage its units, each as its boxes; a stage reads what those before it wrote."""
    yield [[Slab(PROBABILITIES, start, stop)] for start, stop in grid.units(unit_windows)]
    if not instances:
        return
    for name in (FRAGMENTS, EDGES, MERGE, LABELS):
        if name == MERGE:
            yield [[Slab(MERGE, (0, 0, 0), grid.shape)]]
        else:
            boxes = [Slab(name, start, stop) for start, stop in grid.blocks()]
            yield [list(some) for some in _batched(boxes, UNIT_BLOCKS[name])]


def arrays(grid: PredictionGrid, *, instances: bool, probabilities: bool) -> list[ArraySpec]:
    """The stored arrays."""
    found = [grid.probabilities] if instances or probabilities else []
    return [*found, *([grid.fragments] if instances else []), grid.labels]


def object_keys(grid: PredictionGrid, box: Slab, *, instances: bool, probabilities: bool) -> set[str]:
    """The objects that a box owns."""
    if box.array == MERGE:
        return {MERGE_KEY, OFFSETS_KEY}
    if box.array == EDGES:
        return {table_key(EDGES, box.start)}
    if box.array == PROBABILITIES:
        specs = [spec for spec in arrays(grid, instances=instances, probabilities=probabilities)
                 if spec.name in ((PROBABILITIES,) if instances else (PROBABILITIES, LABELS))]
    else:
        specs = [grid.fragments if box.array == FRAGMENTS else grid.labels]
    found = {shard_key(spec, place) for spec in specs for place, _, _ in shards_of(spec, box.start, box.stop)}
    return found | ({table_key(COUNTS, box.start)} if box.array == FRAGMENTS else set())


def _batched(items: list[Slab], size: int) -> Iterator[tuple[Slab, ...]]:
    return (tuple(items[i:i + size]) for i in range(0, len(items), size))
