"""Tokens that `dinoray extract volume` stored, read around a place: what a crop would otherwise send through the backbone.

They keep their own resolution, and their positions are those of the world in nm, so the volume may have been cropped for one and
not for the other.
"""

from __future__ import annotations

from math import ceil, floor

import numpy as np

from dinoray.errors import ItemError
from dinoray.io.stores import Store
from dinoray.io.volume_grid import Triple, VolumeGrid
from dinoray.io.zarr_reading import ArrayReader, open_array
from dinoray.vision.voxel_grids import VoxelGrid


class StoredTokens:
    """The token arrays of an output. Safe to use from several threads."""

    def __init__(self, store: Store, grid: VolumeGrid):
        self.url, self.grid = store.url, grid
        self._arrays: dict[str, ArrayReader] = {name: open_array(store, grid.plane(name).array) for name in grid.planes}

    def around(self, centre_nm: Triple, target: VoxelGrid) -> dict[str, tuple[np.ndarray, VoxelGrid]]:
        """plane -> (tokens float32 [C, z, y, x] that the voxels of `target` are interpolated from, their grid), positions counted
        from `centre_nm` as those of `target` are.

        As many tokens wherever the crop lies; beyond the array the outermost goes on. Raises ItemError `missing_tokens` where some
        were not computed, OutputDamaged.
        """
        found = {}
        for name, array in self._arrays.items():
            spec = self.grid.plane(name).array
            spans = [_span(spec.translation_nm[a], spec.pitch_nm[a], centre_nm[a] + target.first_nm[a],
                           target.pitch_nm[a], target.shape[a])
                     for a in range(3)]
            at = [np.clip(np.arange(low, low + count), 0, n - 1) for (low, count), n in zip(spans, spec.shape, strict=True)]
            start = [low for low, _ in spans]
            box = array.read(*(n for i in at for n in (int(i[0]), int(i[-1]) + 1)))
            values = box[(slice(None), *np.ix_(*(i - i[0] for i in at)))].astype(np.float32)  # the outermost token goes on
            if not np.isfinite(values).all():
                raise ItemError("missing_tokens", f"tokens of {name} are not there: background, or quarantined", where=self.url,
                                todo="extract the whole volume, without --foreground, and `dinoray retry` what was quarantined")
            first = tuple(t + a * p - c for t, a, p, c in zip(spec.translation_nm, start, spec.pitch_nm, centre_nm, strict=True))
            found[name] = values, VoxelGrid(values.shape[1:], first, spec.pitch_nm)  # type: ignore[arg-type]
        return found


def _span(origin: float, pitch: float, first: float, step: float, count: int) -> tuple[int, int]:
    """(first token, how many) for `count` positions from `first` on, `step` apart: all between, one more on each side. Both may lie
    beyond the array."""
    return floor((first - origin) / pitch + 1e-9), ceil((count - 1) * step / pitch - 1e-9) + 2
