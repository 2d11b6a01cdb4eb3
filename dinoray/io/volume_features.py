"""Features of a volume read back by boxes: `open_features(OUT)[z0:z1, y0:y1, x0:x1]`, in voxels or in nm.

They come from `dense/fused.zarr` where it was written, else they are fused from the planes while they are read; both give
the same numbers up to the rounding of the stored dtype.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from math import ceil
from typing import Any, NoReturn

import numpy as np

from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.fusion import fuse_box
from dinoray.io.stores import Store, open_store
from dinoray.io.volume_arrays import group_key
from dinoray.io.volume_grid import NORMAL, Shape, Triple, VolumeGrid
from dinoray.io.zarr_reading import ArrayReader, box_of, open_array

NAMES = ("fused", *NORMAL)
"""Arrays that an output of a volume can have."""
UNITS = ("voxel", "nm", "raw")


def is_volume(store: Store) -> bool:
    """Whether an output holds features of a volume. Raises TransientError, SystemicError."""
    return any(store.exists(f"{group_key(name)}/zarr.json") for name in NAMES)


class VolumeFeatures:
    """Features of one volume on its target grid: `open_features(OUT)`.

    `features[z0:z1, y0:y1, x0:x1]` -> float32 [dim, z, y, x]. Whole numbers count target voxels as in numpy (negative from
    the end, open ends, an integer drops its axis); floats are nm in the coordinates of the raw image (its translation
    included) and take the voxels whose centres lie in the box. NaN: not computed. Safe to use from several threads.
    """

    def __init__(self, url: str):
        self.url, self._store = url, open_store(url)
        self._arrays: dict[str, ArrayReader] = {}
        self._stored = [name for name in NAMES if self._store.exists(f"{group_key(name)}/zarr.json")]
        if not self._stored:
            raise BadRequest("there are no features of a volume here", where=f"{url}/dense",
                             todo="give the --out of a `dinoray extract volume`")
        where = f"{url}/{group_key(self._stored[0])}/zarr.json"
        try:
            document = json.loads(self._store.get(f"{group_key(self._stored[0])}/zarr.json"))
            self.facts: dict[str, Any] = document["attributes"]["dinoray"]
            self.grid = VolumeGrid.read(self.facts["grid"])
        except (ValueError, KeyError, TypeError, BadRequest) as error:
            raise OutputDamaged(f"the grid of the volume cannot be read: {error!r}", where=where,
                                todo="put the file zarr.json back") from error

    @property
    def planes(self) -> tuple[str, ...]:
        """The planes that the features were computed in."""
        return self.grid.planes

    @property
    def stored(self) -> tuple[str, ...]:
        """The arrays that were written: `fused`, or the planes."""
        return tuple(self._stored)

    @property
    def shape(self) -> Shape:
        """Target voxels along z, y, x."""
        return self.grid.target_shape

    @property
    def dim(self) -> int:
        """Numbers per voxel."""
        return self.grid.dim

    @property
    def voxel_size_nm(self) -> Triple:
        """Size of a target voxel along z, y, x."""
        return self.grid.target_nm

    @cached_property
    def translation_nm(self) -> Triple:
        """Centre of the first target voxel, in the coordinates of the raw image."""
        return self.grid.fused.translation_nm

    def tokens(self, name: str) -> ArrayReader:
        """The stored array of a plane (`xy`) at its own pitch, or `fused`: index it for [dim, z, y, x].

        Raises BadRequest when it was not written.
        """
        if name not in self._stored:
            raise BadRequest(f"there is no array {name!r} here", where=self.url, todo=f"one of {', '.join(self._stored)}")
        if name not in self._arrays:
            array = open_array(self._store, name)  # its shards may be those of another version of dinoray
            expected = self.grid.target_shape if name == "fused" else self.grid.plane(name).shape
            if (array.dim, array.shape) != (self.dim, expected):
                raise OutputDamaged(f"the array has dim {array.dim} and shape {array.shape}, its grid says {self.dim} and "
                                    f"{expected}", where=array.where, todo="put the files zarr.json back")
            self._arrays[name] = array
        return self._arrays[name]

    def __getitem__(self, index: Any) -> np.ndarray:
        """A box (see the class). Raises IndexError for an empty box or one outside, BadRequest for steps and other things,
        OutputDamaged, TransientError, SystemicError."""
        parts = index if isinstance(index, tuple) else (index,)
        axis, whole = 0, []
        for part in parts:
            if isinstance(part, slice) and any(isinstance(n, float | np.floating) for n in (part.start, part.stop)):
                if part.step is not None:
                    raise BadRequest(f"steps are not read: {part}", todo="read the box, then take every n-th of it")
                if axis < 3:
                    part = self._by_nm(axis, part.start, part.stop)
            elif isinstance(part, float | np.floating):
                raise BadRequest(f"a single position of {part} nm", todo="give a slice: the voxels whose centres lie in it")
            axis += 1 if part is not Ellipsis else 4 - len(parts)
            whole.append(part)
        start, stop, dropped = box_of(tuple(whole), self.shape)
        return self._box(start, stop)[(slice(None), *dropped)]

    def read(self, start: Sequence[float], stop: Sequence[float], unit: str = "voxel") -> np.ndarray:
        """The box [start, stop) of z, y, x as float32 [dim, z, y, x].

        `unit`: `voxel` of the target grid; `nm` in the coordinates of the raw image; `raw`, voxels of the level and crop of
        the raw image that was read. Of nm and raw, the target voxels whose centres lie in the box. Raises as indexing does.
        """
        if unit not in UNITS:
            raise BadRequest(f"no unit {unit!r}", todo=f"one of {', '.join(UNITS)}")
        if len(start) != 3 or len(stop) != 3:
            raise BadRequest(f"a box has a start and a stop of z, y, x, not {start} and {stop}")
        if unit == "voxel":
            if not all(float(n).is_integer() for n in (*start, *stop)):
                raise BadRequest(f"voxels are whole numbers, not {start} and {stop}", todo='for nm give unit="nm"')
            low, high = tuple(int(n) for n in start), tuple(int(n) for n in stop)
            if any(not 0 <= a < b <= n for a, b, n in zip(low, high, self.shape, strict=True)):
                raise IndexError(f"the box {low}..{high} is empty or outside of {self.shape}")
            return self._box(low, high)  # type: ignore[arg-type]
        slices = []
        for axis, (a, b) in enumerate(zip(start, stop, strict=True)):
            if unit == "raw":
                corner = self.grid.translation_nm[axis] - self.grid.voxel_nm[axis] / 2
                a, b = (corner + n * self.grid.voxel_nm[axis] for n in (a, b))
            slices.append(self._by_nm(axis, a, b))
        return self._box(tuple(s.start for s in slices), tuple(s.stop for s in slices))  # type: ignore[arg-type]

    def table(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Of images and cells only. Raises BadRequest."""
        raise self._no_rows("table")

    def batches(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Of images and cells only. Raises BadRequest."""
        raise self._no_rows("batches")

    def matrix(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Of images and cells only. Raises BadRequest."""
        raise self._no_rows("matrix")

    def _no_rows(self, name: str) -> BadRequest:
        return BadRequest(f"these are features of a volume, which has no rows for .{name}()", where=self.url,
                          todo="read a box: features[z0:z1, y0:y1, x0:x1] is an array [dim, z, y, x]")

    def _by_nm(self, axis: int, low: float | None, high: float | None) -> slice:
        """The target voxels of an axis whose centres lie in [low, high) nm."""
        first, size, count = self.translation_nm[axis], self.voxel_size_nm[axis], self.shape[axis]
        a = 0 if low is None else max(0, _from(low, first, size))
        b = count if high is None else min(count, _from(high, first, size))
        if a >= b:
            raise IndexError(f"no voxel of the axis {'zyx'[axis]} has its centre in {low}..{high} nm: the {count} centres lie "
                             f"from {first:g} to {first + (count - 1) * size:g} nm, {size:g} nm apart")
        return slice(a, b)

    def _box(self, start: Shape, stop: Shape) -> np.ndarray:
        if "fused" in self._stored:
            read = self.tokens("fused").read
            return read(*(n for pair in zip(start, stop, strict=True) for n in pair)).astype(np.float32, copy=False)
        return fuse_box({name: self.tokens(name).read for name in self.planes}, self.grid, start, stop)


def _from(position: float, first: float, size: float) -> int:
    """The first voxel whose centre is not below a position; a billionth of a voxel is rounding."""
    voxel = (position - first) / size
    if not np.isfinite(voxel):
        raise BadRequest(f"not a position: {position} nm")
    return ceil(voxel - 1e-9)
