"""Slabs: the items of a plan over a volume. A slab is a box of one array (tokens of a plane, or fused voxels) that is
computed at once: whole shards of the array, so that no two slabs touch one object.

A unit is a run of neighbouring slabs of one array. Slabs of planes come first in a plan, those of the fused array after
them: they read what the former wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil, floor, prod

from dinoray.errors import BadRequest
from dinoray.io.items import FileRef, Item
from dinoray.io.volume_arrays import shard_key, shards_of
from dinoray.io.volume_grid import ArraySpec, PlaneGrid, Shape, VolumeGrid

UNIT_WINDOWS = 2_000
"""Windows that a unit aims at."""
UNIT_FUSED_SLABS = 64
"""Most shards of the fused array in a unit."""
MOST_TWICE = 0.5
"""Windows that may be computed again in a neighbouring unit, as a share of those of a run in one unit."""
_ID = re.compile(r"([a-z]+)/(\d+)-(\d+)/(\d+)-(\d+)/(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Slab:
    """The box [start, stop) along z, y, x of the array called `array`."""

    array: str
    start: Shape
    stop: Shape

    @property
    def id(self) -> str:
        """`xy/0-8/0-28/28-56`: the array, then z, y, x."""
        return "/".join([self.array, *(f"{a}-{b}" for a, b in zip(self.start, self.stop, strict=True))])

    @classmethod
    def read(cls, item_id: str) -> Slab:
        """From an id. Raises ValueError for other text."""
        match = _ID.fullmatch(item_id)
        if not match:
            raise ValueError(f"{item_id!r} names no slab")
        numbers = [int(n) for n in match.groups()[1:]]
        return cls(match[1], tuple(numbers[::2]), tuple(numbers[1::2]))  # type: ignore[arg-type]

    @property
    def shape(self) -> Shape:
        """Tokens or voxels along z, y, x."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))  # type: ignore[return-value]

    def item(self, volume: FileRef, num_bytes: int) -> Item:
        """The plan's item: the volume as it was when planned; `num_bytes` of it are read."""
        return Item(self.id, (FileRef(volume.uri, num_bytes, volume.version),))


def array_of(grid: VolumeGrid, name: str) -> ArraySpec:
    """The stored array of a slab."""
    return grid.fused if name == "fused" else grid.plane(name).array


def unit_tokens(plane: PlaneGrid, axis: int, unit_windows: int) -> int:
    """Tokens of a unit along an axis of the plane: `unit_windows` strides, rounded up to whole shards."""
    stride, shard = plane.lattice(axis).stride, plane.shard_tokens(axis)
    step = max(1, shard // stride)  # strides in a shard; a shard that divides the stride fits any number of them
    return -(-unit_windows // step) * step * stride


def cuts(size: int, step: int) -> list[tuple[int, int]]:
    """[first, stop) of consecutive pieces of `step`, the last one shorter."""
    return [(a, min(a + step, size)) for a in range(0, size, step)]


def _box(axes: tuple[int, int], normal: int, rows: tuple[int, int], cols: tuple[int, int],
         planes: tuple[int, int]) -> tuple[Shape, Shape]:
    ranges = [(0, 0)] * 3
    ranges[axes[0]], ranges[axes[1]], ranges[normal] = rows, cols, planes
    return tuple(r[0] for r in ranges), tuple(r[1] for r in ranges)  # type: ignore[return-value]


@dataclass(frozen=True)
class UnitSizes:
    """How a plan cuts the planes: `windows` a side and `planes` deep (None: about UNIT_WINDOWS windows)."""

    windows: int
    planes: int | None = None

    def depth(self, plane: PlaneGrid) -> int:
        """Target planes of a unit: whole shards."""
        shard = plane.planes_per_shard
        wanted = self.planes
        if wanted is None:
            rows, cols = (len(plane.lattice(a).touching(0, unit_tokens(plane, a, self.windows))) for a in plane.axes)
            wanted = max(1, UNIT_WINDOWS // (rows * cols))
            return max(1, wanted // shard) * shard
        return ceil(wanted / shard) * shard

    def units(self, grid: VolumeGrid) -> Iterator[list[Slab]]:
        """The units of all planes, each as its slabs in order."""
        for name in grid.planes:
            plane = grid.plane(name)
            (row_axis, col_axis), depth = plane.axes, self.depth(plane)
            for first, last in cuts(plane.shape[plane.normal], depth):
                for rows in cuts(plane.shape[row_axis], unit_tokens(plane, row_axis, self.windows)):
                    for cols in cuts(plane.shape[col_axis], unit_tokens(plane, col_axis, self.windows)):
                        yield [Slab(name, *_box(plane.axes, plane.normal, rows, cols, (k, min(k + plane.planes_per_shard, last))))
                               for k in range(first, last, plane.planes_per_shard)]

    def computed(self, plane: PlaneGrid) -> int:
        """Windows that all units of a plane compute for one target plane."""
        return prod(sum(len(plane.lattice(a).touching(*cut)) for cut in cuts(plane.shape[a], unit_tokens(plane, a, self.windows)))
                    for a in plane.axes)


def windows_once(grid: VolumeGrid) -> int:
    """Windows of a run in one unit."""
    return sum(plane.shape[plane.normal] * prod(plane.lattice(a).count for a in plane.axes)
               for plane in map(grid.plane, grid.planes))


def windows_in_all(grid: VolumeGrid, sizes: UnitSizes) -> int:
    """Windows that the units compute, those at their borders counted in each of them."""
    return sum(plane.shape[plane.normal] * sizes.computed(plane) for plane in map(grid.plane, grid.planes))


def choose_sizes(grid: VolumeGrid, unit_windows: int | None, unit_planes: int | None) -> UnitSizes:
    """The sizes that were asked for, else the smallest side that computes at most MOST_TWICE again."""
    if unit_windows is not None:
        return UnitSizes(unit_windows, unit_planes)
    most = (1 + MOST_TWICE) * windows_once(grid)
    windows = 1
    while windows_in_all(grid, UnitSizes(windows, unit_planes)) > most:
        windows += 1
    # smaller units than a few windows a side are no use where they are free: on a volume of one window there is one
    longest = max(plane.lattice(a).count for plane in map(grid.plane, grid.planes) for a in plane.axes)
    return UnitSizes(max(windows, min(longest, 5)), unit_planes)


def fused_units(grid: VolumeGrid) -> Iterator[list[Slab]]:
    """The units of the fused array: blocks of whole shards, each shard a slab."""
    spec = grid.fused
    side = round(UNIT_FUSED_SLABS ** (1 / 3))
    blocks = [cuts(n, s * side) for n, s in zip(spec.shape, spec.shards, strict=True)]
    for block in product(*blocks):
        shards = [[(a + x, min(a + x + s, b)) for x in range(0, b - a, s)] for (a, b), s in zip(block, spec.shards, strict=True)]
        yield [Slab("fused", tuple(r[0] for r in ranges), tuple(r[1] for r in ranges)) for ranges in product(*shards)]  # type: ignore[arg-type]


def all_units(grid: VolumeGrid, sizes: UnitSizes, *, fused: bool) -> Iterator[list[Slab]]:
    """Every unit of a plan: those of the planes, then those of the fused array."""
    yield from sizes.units(grid)
    if fused:
        yield from fused_units(grid)


def tokens_needed(plane: PlaneGrid, slab: Slab) -> tuple[Shape, Shape]:
    """[start, stop) of the tokens of a plane that a slab of the fused array is made of."""
    start, stop = [], []
    for axis in range(3):
        if axis == plane.normal:
            low, high = slab.start[axis], slab.stop[axis]
        else:
            ratio, last = plane.grid.target_nm[axis] / plane.pitch_nm[axis], plane.shape[axis] - 1
            low = floor((slab.start[axis] + 0.5) * ratio - 0.5)
            high = floor((slab.stop[axis] - 0.5) * ratio - 0.5) + 2
            low, high = min(max(low, 0), max(last - 1, 0)), max(min(high, last + 1), 1)  # outside, from the outermost two
            if high - low < 2 <= last + 1:
                low, high = (low, low + 2) if low == 0 else (high - 2, high)
        start.append(low)
        stop.append(high)
    return tuple(start), tuple(stop)  # type: ignore[return-value]


def shard_keys(grid: VolumeGrid, slab: Slab) -> list[str]:
    """The keys of the objects that a slab owns."""
    spec = array_of(grid, slab.array)
    return [shard_key(spec, place) for place, _, _ in shards_of(spec, slab.start, slab.stop)]


def check_alone(grid: VolumeGrid, slabs: list[Slab]) -> None:
    """A slab covers whole shards of its array, or the array's end: no other slab can touch its objects.

    Raises BadRequest when it does not (a mistake of ours: the plan is not sealed).
    """
    for slab in slabs:
        check_alone_on(array_of(grid, slab.array), slab.start, slab.stop)


def check_alone_on(spec: ArraySpec, start: Shape, stop: Shape) -> None:
    """The same for the box [start, stop) of an array."""
    for a, b, shard, size in zip(start, stop, spec.shards, spec.shape, strict=True):
        if a % shard or (b % shard and b != size) or not 0 <= a < b <= size:
            raise BadRequest(f"the box {start}..{stop} cuts shards of {'x'.join(map(str, spec.shards))}", where=spec.name,
                             todo="this is a bug of dinoray; try another --unit-windows, and report it")
