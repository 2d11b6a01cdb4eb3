"""Tokens of all planes of a volume: the colours' basis is fitted on them, and they tell where there are features.

Chunks are spread evenly over the stored shards of each plane and over the shards' insides, so the same output gives the
same sample; nothing grows with the volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from dinoray.io.volume_grid import ArraySpec, Shape, VolumeGrid
from dinoray.io.zarr_reading import ArrayReader
from dinoray.report.pca import MAX_TOKENS, Basis, basis_of
from dinoray.report.sample import evenly
from dinoray.report.volume_totals import ArrayTotals

MOST_CHUNKS = 48
"""Chunks of a plane that are read."""
CELLS = 24
"""Cells along each axis that places are compared in, at most."""


@dataclass
class TokenSample:
    """What was read: `basis` of the tokens' colours (None without any), `centres` [n, 3] of tokens with values by plane, in nm
    from the volume's corner."""

    basis: Basis | None = None
    centres: dict[str, np.ndarray] = field(default_factory=dict)

    def common_centre(self, grid: VolumeGrid) -> np.ndarray | None:
        """A place [3] in nm with values in all the planes that have any, in the middle of such places; None without tokens."""
        if not self.centres:
            return None
        size = np.array(grid.extent_nm)
        # a cell is no smaller than a token, so that it holds the centre of one of each plane
        coarsest = np.max([grid.plane(plane).pitch_nm for plane in grid.planes], axis=0)
        counts = np.clip(size // coarsest, 1, CELLS).astype(np.int64)
        cells = {plane: np.minimum(at * counts // size, counts - 1).astype(np.int64) for plane, at in self.centres.items()}
        numbers = {plane: np.unique(np.ravel_multi_index(tuple(c.T), tuple(counts))) for plane, c in cells.items()}
        common = next(iter(numbers.values()))
        for other in numbers.values():
            common = np.intersect1d(common, other)
        if not len(common):  # of a large volume the sampled chunks of two planes need not meet
            common = max(numbers.values(), key=len)
        places = np.stack(np.unravel_index(common, tuple(counts)), axis=1)
        chosen = common[np.abs(places - places.mean(axis=0)).sum(axis=1).argmin()]
        for plane, at in self.centres.items():
            inside = np.ravel_multi_index(tuple(cells[plane].T), tuple(counts)) == chosen
            if inside.any():
                return at[inside][int(inside.sum()) // 2]
        raise AssertionError("the chosen cell is one of a plane's")


def sample_tokens(readers: Mapping[str, ArrayReader], grid: VolumeGrid, arrays: Mapping[str, ArrayTotals]) -> TokenSample:
    """Read the sample. `readers` of the planes. Raises OutputDamaged, TransientError, SystemicError."""
    sample, tokens, num_chunks = TokenSample(), [], 0
    for plane in grid.planes:
        spec, share, found = grid.plane(plane).array, [], []
        boxes = list(_boxes(spec, readers[plane].shards, arrays[plane].places if plane in arrays else []))
        for start, stop in boxes:
            values = readers[plane].read(*(n for pair in zip(start, stop, strict=True) for n in pair))
            known = ~np.isnan(values[0])
            share.append(values[:, known].T.astype(np.float32))
            found.append((np.argwhere(known) + start + 0.5) * spec.pitch_nm)
        if not sum(map(len, share)):
            continue
        sample.centres[plane] = np.minimum(np.concatenate(found), grid.extent_nm)
        num_chunks += len(boxes)
        each = max(1, MAX_TOKENS // len(grid.planes) // len(boxes))
        tokens += [part[evenly(len(part), each)] for part in share]
    if tokens:
        sample.basis = basis_of(np.concatenate(tokens), num_grids=num_chunks)
    return sample


def _boxes(spec: ArraySpec, shards: Shape, places: list[Shape]) -> Iterator[tuple[Shape, Shape]]:
    """[start, stop) of boxes like chunks in these shards (`shards`: their shape), at most about MOST_CHUNKS."""
    places = [places[i] for i in evenly(len(places), MOST_CHUNKS)]
    for place in places:
        low = [i * s for i, s in zip(place, shards, strict=True)]
        high = [min(a + s, n) for a, s, n in zip(low, shards, spec.shape, strict=True)]
        starts = list(product(*(range(a, b, c) for a, b, c in zip(low, high, spec.chunks, strict=True))))
        for i in evenly(len(starts), max(1, MOST_CHUNKS // len(places))):
            yield starts[i], tuple(min(a + c, b) for a, c, b in zip(starts[i], spec.chunks, high, strict=True))  # type: ignore[misc]
