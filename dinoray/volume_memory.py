"""What a slab takes in an actor's memory, from the geometry alone: what a plan is refused by, what a runner reads ahead by."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from dinoray.io.fusion import SLAB_PLANES
from dinoray.io.slab_pixels import slab_taps
from dinoray.io.volume_grid import NORMAL, PlaneGrid, Shape, Triple, VolumeGrid
from dinoray.io.volumes import chunk_readers
from dinoray.io.windows import SlabWindows
from dinoray.memory.budget import (
    chunk_bytes_in_work,
    fused_read_bytes,
    shard_bytes_in_work,
    slab_compute_bytes,
    slab_read_bytes,
)
from dinoray.slabs import Slab, UnitSizes, cuts, tokens_needed, unit_tokens

FIXED = 48 * 2**20
"""What a process grows by whatever the slab: libraries at their first forward and first shard, stacks and arenas of
threads, freed memory between blocks in use (30 to 45 MB measured)."""
WRITERS = 2
"""Threads that encode and store shards."""


@dataclass(frozen=True)
class SlabBytes:
    """`read`: while a slab is read; `held`: while it waits and is computed; `compute`: what all else adds; at most, over
    all slabs."""

    read: int
    held: int
    compute: int
    count: int
    """Slabs of the kind: no more are ever at work."""
    chunks: int = 0
    """Chunks of the source that are in work at once; `compute` holds them."""

    @property
    def smallest(self) -> int:
        """Bytes of one slab alone: less than this cannot work."""
        return self.read + self.compute

    def ahead(self, budget: int, most_ahead: int) -> int:
        """Slabs that are read while one is in work, of a runner that may take `budget` bytes."""
        return min(most_ahead - 1, self.count - 1, max(0, budget - self.smallest) // self.read)

    def predicted(self, budget: int, readers: int, most_ahead: int) -> int:
        """Peak bytes of a runner that may take `budget`, reads in `readers` threads and has at most `most_ahead` slabs
        at once."""
        ahead = self.ahead(budget, most_ahead)
        reading = min(ahead, readers)
        return self.compute + (self.held + reading * self.read + (ahead - reading) * self.held if ahead else self.read)


@dataclass(frozen=True)
class Mask:
    """A volume of foreground: size of its voxels and bytes of one."""

    voxel_nm: Triple
    shape: Shape
    voxel_bytes: int

    def box_bytes(self, *sides_nm: float, axes: tuple[int, int, int]) -> int:
        """Bytes of a box of the mask as read and as yes or no."""
        return prod(min(ceil(side / self.voxel_nm[a]) + 1, self.shape[a]) for side, a in zip(sides_nm, axes, strict=True)) \
            * (self.voxel_bytes + 1)


@dataclass(frozen=True)
class Stages:
    """The slabs of planes, and those of the fused array that are made of them; None without one."""

    planes: SlabBytes
    fused: SlabBytes | None = None
    chunk_bytes: int = 0
    """Of a chunk of the source, decoded."""

    @property
    def bytes_of_chunks(self) -> int:
        """What `planes` takes for chunks of the source."""
        return chunk_bytes_in_work(self.chunk_bytes, self.planes.chunks)

    @property
    def smallest(self) -> int:
        """Bytes of one slab of either kind."""
        return max(self.planes.smallest, self.fused.smallest if self.fused else 0)

    def of(self, array: str) -> SlabBytes:
        """By the array that a slab belongs to."""
        return self.fused if array == "fused" and self.fused else self.planes


def stage_bytes(grid: VolumeGrid, sizes: UnitSizes, rule: str, *, voxel_bytes: int, chunks: Shape, num_chunks: Shape,
                threads: int, margin_px: int = 0, mask: Mask | None = None, fused: bool = False) -> Stages:
    """Of the largest slabs. `voxel_bytes`: of a raw voxel; `chunks`, `num_chunks`: voxels of a chunk of the input, and how
    many there are, along each axis; `threads`: micro-batches computed at once; `margin_px`: around windows, where foreground
    is looked for."""
    found = [_plane_bytes(grid.plane(name), sizes, rule, voxel_bytes, (chunks, num_chunks), threads, margin_px, mask)
             for name in grid.planes]
    planes = SlabBytes(max(f.read for f in found), max(f.held for f in found), max(f.compute for f in found),
                        sum(f.count for f in found), max(f.chunks for f in found))
    return Stages(planes, _fused_bytes(grid) if fused else None, prod(chunks) * voxel_bytes)


def _plane_bytes(plane: PlaneGrid, sizes: UnitSizes, rule: str, voxel_bytes: int, chunks: tuple[Shape, Shape], threads: int,
                 margin_px: int, mask: Mask | None) -> SlabBytes:
    grid, itemsize = plane.grid, np.dtype(plane.grid.dtype).itemsize
    depth = min(plane.planes_per_shard, plane.shape[plane.normal])
    rows, cols = (max(cuts(plane.shape[a], unit_tokens(plane, a, sizes.windows)), key=lambda cut, a=a: _reach(plane, a, cut))
                  for a in plane.axes)
    windows = SlabWindows(plane, rows, cols, margin_px)
    pixel_rows, pixel_cols = windows.pixel_box()
    taps = slab_taps(plane, (0, depth), pixel_rows, pixel_cols, rule)
    indices = taps.indices()
    along, read_rows, read_cols = (len(i) for i in indices)
    pixels = depth * (pixel_rows[1] - pixel_rows[0]) * (pixel_cols[1] - pixel_cols[0])
    read = slab_read_bytes(raw_bytes=along * read_rows * read_cols * voxel_bytes, read_pixels=depth * read_rows * read_cols,
                           pixels=pixels)
    if mask is not None:
        read += mask.box_bytes(depth * plane.pitch_nm[plane.normal],
                               *((stop - first) * plane.pixel_nm for first, stop in (pixel_rows, pixel_cols)),
                               axes=(plane.normal, *plane.axes))
    lattices = windows.lattices
    compute = slab_compute_bytes(tokens=depth * (rows[1] - rows[0]) * (cols[1] - cols[0]), dim=grid.dim, itemsize=itemsize,
                                 threads=threads, patch=grid.patch,
                                 batch_tokens=grid.micro_batch * lattices[0].window * lattices[1].window)
    shard = prod(plane.array.shards) * grid.dim * itemsize
    shards = prod(-(-(b - a) // plane.shard_tokens(axis)) for axis, (a, b) in zip(plane.axes, (rows, cols), strict=True))
    count = -(-plane.shape[plane.normal] // plane.planes_per_shard) * prod(
        len(cuts(plane.shape[a], unit_tokens(plane, a, sizes.windows))) for a in plane.axes)
    touched = prod(chunks_touched(used, chunks[0][a], chunks[1][a])
                   for used, a in zip(indices, (plane.normal, *plane.axes), strict=True))
    chunk_bytes = prod(chunks[0]) * voxel_bytes
    in_work = min(chunk_readers(chunk_bytes), touched * count * len(grid.planes))  # slabs are read ahead, so of several
    return SlabBytes(read, 4 * pixels, FIXED + compute + shard_bytes_in_work(shard, min(WRITERS, shards))
                     + chunk_bytes_in_work(chunk_bytes, in_work), count, in_work)


def chunks_touched(indices: np.ndarray, chunk: int, most: int) -> int:
    """Chunks of `chunk` voxels, of which there are `most`, that sorted raw indices along an axis lie in at most, wherever
    the first chunk begins."""
    return min(most, len(indices), (int(indices[-1] - indices[0]) + chunk - 1) // chunk + 1)


def _fused_bytes(grid: VolumeGrid) -> SlabBytes:
    spec, itemsize = grid.fused, np.dtype(grid.dtype).itemsize
    box = tuple(min(s, n) for s, n in zip(spec.shards, spec.shape, strict=True))
    voxels, read = prod(box), 0
    for name in grid.planes:
        plane, normal = grid.plane(name), NORMAL[name]
        at_once = tuple(min(SLAB_PLANES, n) if a == normal else n for a, n in enumerate(box))
        start, stop = tokens_needed(plane, Slab("fused", (0, 0, 0), at_once))  # type: ignore[arg-type]
        read = max(read, fused_read_bytes(voxels=voxels, voxels_at_once=prod(at_once), dim=grid.dim, itemsize=itemsize,
                                          tokens_at_once=prod(b - a for a, b in zip(start, stop, strict=True))))
    shard = prod(spec.shards) * grid.dim * itemsize
    # a slab is one shard: cast while it is in float32 still, and those of the slabs before are encoded
    count = prod(-(-n // s) for n, s in zip(spec.shape, spec.shards, strict=True))
    return SlabBytes(read, 4 * grid.dim * voxels, FIXED + shard + shard_bytes_in_work(shard, min(WRITERS, count)), count)


def _reach(plane: PlaneGrid, axis: int, cut: tuple[int, int]) -> int:
    return len(plane.lattice(axis).touching(*cut))
