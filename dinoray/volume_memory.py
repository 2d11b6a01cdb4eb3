"""What a slab takes in an actor's memory, from the geometry alone: what a plan is refused by, what a runner reads ahead by."""

from __future__ import annotations

from dataclasses import dataclass

from dinoray.io.slab_pixels import slab_taps
from dinoray.io.volume_grid import PlaneGrid, VolumeGrid
from dinoray.io.windows import SlabWindows
from dinoray.memory.budget import slab_compute_bytes, slab_read_bytes
from dinoray.slabs import UnitSizes, cuts, unit_tokens


@dataclass(frozen=True)
class SlabBytes:
    """`read`: while a slab is read and waits; `compute`: what its computation adds; both at most, over all slabs."""

    read: int
    compute: int

    @property
    def smallest(self) -> int:
        """Bytes of one slab alone: less than this cannot work."""
        return self.read + self.compute

    def predicted(self, budget: int, most_ahead: int) -> int:
        """Peak bytes of a runner that may take `budget` and reads at most `most_ahead` slabs ahead."""
        slabs = 1 + min(most_ahead - 1, max(0, budget - self.smallest) // self.read)
        return self.compute + slabs * self.read


def slab_bytes(grid: VolumeGrid, sizes: UnitSizes, rule: str, itemsize: int, *, threads: int) -> SlabBytes:
    """Of the largest slab of any plane. `itemsize`: bytes of a raw voxel; `threads`: micro-batches computed at once."""
    found = [_plane_bytes(grid.plane(name), sizes, rule, itemsize, threads) for name in grid.planes]
    return SlabBytes(max(f.read for f in found), max(f.compute for f in found))


def _plane_bytes(plane: PlaneGrid, sizes: UnitSizes, rule: str, itemsize: int, threads: int) -> SlabBytes:
    grid = plane.grid
    depth = min(plane.planes_per_shard, plane.shape[plane.normal])
    rows, cols = (max(cuts(plane.shape[a], unit_tokens(plane, a, sizes.windows)), key=lambda cut, a=a: _reach(plane, a, cut))
                  for a in plane.axes)
    windows = SlabWindows(plane, rows, cols)
    pixel_rows, pixel_cols = windows.pixel_box()
    taps = slab_taps(plane, (0, depth), pixel_rows, pixel_cols, rule)
    along, read_rows, read_cols = (len(i) for i in taps.indices())
    height, width = pixel_rows[1] - pixel_rows[0], pixel_cols[1] - pixel_cols[0]
    read = slab_read_bytes(raw_bytes=along * read_rows * read_cols * itemsize, read_pixels=depth * read_rows * read_cols,
                           pixels=depth * height * width)
    lattices = windows.lattices
    compute = slab_compute_bytes(tokens=depth * (rows[1] - rows[0]) * (cols[1] - cols[0]), dim=grid.dim,
                                 itemsize=2 if grid.dtype == "float16" else 4, threads=threads,
                                 batch_tokens=grid.micro_batch * lattices[0].window * lattices[1].window)
    return SlabBytes(read, compute)


def _reach(plane: PlaneGrid, axis: int, cut: tuple[int, int]) -> int:
    return len(plane.lattice(axis).touching(*cut))
