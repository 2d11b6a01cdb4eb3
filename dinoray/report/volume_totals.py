"""What the receipts of a run over a volume say of each stored array: tokens, bytes, shards, memory. A few numbers per array
and a thinned list of stored shards: nothing grows with the volume."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from dinoray.io.volume_arrays import array_key
from dinoray.io.volume_grid import Shape, VolumeGrid
from dinoray.ledger import Receipt
from dinoray.slabs import Slab, array_of
from dinoray.units import Unit

MOST_PLACES = 4096
"""Stored shards of an array whose places are kept; of more, evenly thinned ones."""


@dataclass
class ArrayTotals:
    """One stored array. `covered` counts the tokens (target voxels of `fused`) of finished slabs, whatever became of them."""

    covered: int = 0
    computed: int = 0
    """Tokens of slabs that are not quarantined; of those that are, some may be stored."""
    windows: int = 0
    """Windows of finished slabs, those of the background included."""
    shards: int = 0
    empty_shards: int = 0
    num_bytes: int = 0
    """Stored, compressed."""
    places: list[Shape] = field(default_factory=list)
    """Of stored shards, in plan order, thinned to MOST_PLACES."""
    _step: int = 1
    _partial: dict[str, int] = field(default_factory=dict)
    """Bytes of shards, of units with quarantined slabs, that a retry may replace."""

    def store(self, place: Shape, num_bytes: int) -> None:
        """Count a stored shard."""
        if self.shards % self._step == 0:
            self.places.append(place)
            if len(self.places) > MOST_PLACES:
                self._step *= 2
                self.places = self.places[::2]
        self.shards += 1
        self.num_bytes += num_bytes


@dataclass
class VolumeTotals:
    """`add` each receipt once, in plan order."""

    grid: VolumeGrid
    arrays: dict[str, ArrayTotals] = field(default_factory=dict)
    predicted_bytes: int = 0
    """Peak bytes beyond the model that runners foresaw, at most."""
    measured_bytes: int = 0
    """And those that were measured."""

    def add(self, receipt: Receipt, unit: Unit, *, again: bool) -> None:
        """Count one receipt. `again`: of a retry, whose slabs were counted before."""
        slabs = [Slab.read(item.item_id) for item in unit.items]
        totals = self.arrays.setdefault(slabs[0].array, ArrayTotals())  # a unit has slabs of one array
        totals.computed += receipt.rows
        if not again:
            totals.covered += sum(prod(slab.shape) for slab in slabs)
            totals.windows += sum(windows_of(self.grid, slab) for slab in slabs)
        folder = array_key(slabs[0].array) + "/c/0/"
        for stored in receipt.objects:
            if not stored.key.startswith(folder):
                continue
            if receipt.quarantined and not again:
                totals._partial[stored.key] = stored.bytes
            if again and stored.key in totals._partial:
                totals.num_bytes += stored.bytes - totals._partial[stored.key]
                totals._partial[stored.key] = stored.bytes
            else:
                totals.store(tuple(map(int, stored.key.removeprefix(folder).split("/"))), stored.bytes)  # type: ignore[arg-type]
        totals.empty_shards += len(receipt.empty)
        self.predicted_bytes = max(self.predicted_bytes, receipt.memory.get("predicted", 0))
        self.measured_bytes = max(self.measured_bytes, receipt.memory.get("above_model", 0))


def windows_of(grid: VolumeGrid, slab: Slab) -> int:
    """Windows that a slab of a plane computes; 0 for one of the fused array."""
    if slab.array == "fused":
        return 0
    plane = grid.plane(slab.array)
    return slab.shape[plane.normal] * prod(len(plane.lattice(a).touching(slab.start[a], slab.stop[a])) for a in plane.axes)


def place_nm(grid: VolumeGrid, slab: Slab) -> list[tuple[float, float]]:
    """Where a slab lies along z, y, x, in nm of the world: the outer faces of its tokens, cut at the volume's end."""
    found, pitch = [], array_of(grid, slab.array).pitch_nm
    for a in range(3):
        corner = grid.translation_nm[a] - grid.voxel_nm[a] / 2
        found.append((corner + slab.start[a] * pitch[a], corner + min(slab.stop[a] * pitch[a], grid.extent_nm[a])))
    return found
