"""Where everything of a segmented volume lies: predicted voxels, windows, shards, units, blocks of instances. Pure geometry.

Predicted voxels are `factor` raw voxels each, from the volume's first voxel on; raw voxels that fill no predicted one at the far
faces are not predicted. Windows lie on one lattice that depends on the volume alone, and begin at multiples of what the UNet pools
by, so a voxel is predicted from the same input whatever unit asks for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from dinoray.errors import BadRequest
from dinoray.io.volume_grid import ArraySpec, Lattice, Shape, Triple

SHARD_VOXELS = 128
"""Voxels a side that a shard aims at."""
CHUNK_VOXELS = 64
SHIFT_AFTER = 5
"""A side of more than so many strides has its lattice begin half a stride before the origin (see Lattice)."""
MOST_TWICE = 0.5
"""Windows that may be computed again in a neighbouring unit, as a share of those of a run in one unit."""
PROBABILITIES, FRAGMENTS, EDGES, MERGE, LABELS = "probabilities", "fragments", "edges", "merge", "labels"
"""What units make, in this order."""


@dataclass(frozen=True)
class PredictionGrid:
    """A volume and how it is predicted.

    `shape`, `voxel_nm`, `translation_nm` (centre of the first voxel) are of the predicted voxels, `raw_voxel_nm`, `factor` of the
    raw ones; `window`, `halo` in predicted voxels, multiples of `multiple`.
    """

    shape: Shape
    voxel_nm: Triple
    translation_nm: Triple
    raw_voxel_nm: Triple
    factor: Shape
    window: Shape
    halo: Shape
    multiple: int
    blend: bool
    clip: bool
    """Windows end at the volume's faces; otherwise they keep their size, and what lies outside is mirrored."""
    outputs: int
    dtype: str
    """Of stored probabilities."""
    labels_dtype: str
    block_voxels: int
    shard_voxels: int = SHARD_VOXELS
    """Voxels a side that a shard aims at."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for the plan."""
        return asdict(self)

    @classmethod
    def read(cls, values: dict[str, Any]) -> PredictionGrid:
        """From the plan."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def lattice(self, axis: int) -> Lattice:
        """The windows of an axis: with blending they share their margins, otherwise a window predicts its core alone."""
        n, window, halo = self.shape[axis], self.window[axis], self.halo[axis]
        stride = window - 2 * halo
        if not self.blend:
            return Lattice(n, stride, 0, 0)
        step = self.multiple if self.clip else 1  # a window that keeps its size is a volume of its own to the UNet
        shift = stride // 2 // step * step if n > SHIFT_AFTER * stride else 0
        return Lattice(n, window, halo, shift)

    def seen(self, place: Shape) -> tuple[Shape, Shape]:
        """[start, stop) of the voxels that the model sees for a window of the lattice; with `clip` all inside."""
        start, stop = [], []
        for axis, w in enumerate(place):
            lattice, margin = self.lattice(axis), 0 if self.blend else self.halo[axis]
            low = lattice.start(w) - margin
            high = lattice.start(w) + lattice.window + margin
            start.append(max(0, low) if self.clip else low)
            stop.append(min(self.shape[axis], high) if self.clip else high)
        return tuple(start), tuple(stop)  # type: ignore[return-value]

    # ---------------------------------------------------------------- arrays

    @cached_property
    def shards(self) -> Shape:
        """Voxels of a shard: whole strides, so that units end where shards and windows do."""
        return tuple(self._shard(axis) for axis in range(3))  # type: ignore[return-value]

    def _shard(self, axis: int) -> int:
        stride = self.lattice(axis).stride
        return stride * min(max(1, round(self.shard_voxels / stride)), -(-self.shape[axis] // stride))

    @property
    def chunks(self) -> Shape:
        """Voxels of a chunk: a part of a shard."""
        return tuple(next(c for c in range(min(s, CHUNK_VOXELS), 0, -1) if s % c == 0) for s in self.shards)  # type: ignore[return-value]

    def _spec(self, name: str, dim: int, dtype: str) -> ArraySpec:
        return ArraySpec(name, self.shape, dim, dtype, self.voxel_nm, self.translation_nm, self.chunks, self.shards)

    @property
    def probabilities(self) -> ArraySpec:
        """Affinities or probabilities of classes [outputs, z, y, x]."""
        return self._spec(PROBABILITIES, self.outputs, self.dtype)

    @property
    def fragments(self) -> ArraySpec:
        """Instances of each block by themselves, [1, z, y, x], 1.. in every block."""
        return self._spec(FRAGMENTS, 1, "uint32")

    @property
    def labels(self) -> ArraySpec:
        """Classes or instances [z, y, x]."""
        return self._spec(LABELS, 1, self.labels_dtype)

    # ---------------------------------------------------------------- units and blocks

    def unit_voxels(self, axis: int, windows: int) -> int:
        """Voxels of a unit of about `windows` strides along an axis: whole shards."""
        shard, stride = self.shards[axis], self.lattice(axis).stride
        return -(-windows * stride // shard) * shard

    def units(self, windows: int) -> list[tuple[Shape, Shape]]:
        """The boxes [start, stop) of units of about `windows` windows a side."""
        return boxes(self.shape, tuple(self.unit_voxels(a, windows) for a in range(3)))  # type: ignore[arg-type]

    @property
    def block(self) -> Shape:
        """Voxels of a block of instances: whole shards, as many as fit into `block_voxels`, and one at least."""
        return tuple(max(1, self.block_voxels // s) * s for s in self.shards)  # type: ignore[return-value]

    def blocks(self) -> list[tuple[Shape, Shape]]:
        """The boxes [start, stop) of all blocks, in C order."""
        return boxes(self.shape, self.block)

    @property
    def windows_once(self) -> int:
        """Windows of a run in one unit."""
        return prod(self.lattice(a).count for a in range(3))

    def windows_in_all(self, windows: int) -> int:
        """Windows that the units compute, those at their borders counted in each of them."""
        return prod(sum(len(self.lattice(a).touching(i, min(i + size, self.shape[a]))) for i in range(0, self.shape[a], size))
                    for a, size in enumerate(self.unit_voxels(a, windows) for a in range(3)))

    def unit_windows(self, wanted: int | None) -> int:
        """The side that was asked for, else the smallest whose units compute at most MOST_TWICE again."""
        if wanted is not None:
            return wanted
        windows, most = 1, (1 + MOST_TWICE) * self.windows_once
        while self.windows_in_all(windows) > most:
            windows += 1
        return windows


def boxes(shape: Shape, size: Shape) -> list[tuple[Shape, Shape]]:
    """The boxes [start, stop) of `size` that cover `shape`, the last ones smaller, in C order."""
    starts = product(*(range(0, n, s) for n, s in zip(shape, size, strict=True)))
    return [(start, tuple(min(a + s, n) for a, s, n in zip(start, size, shape, strict=True))) for start in starts]  # type: ignore[misc]


def make_windows(shape: Shape, window: Shape, halo: Shape, multiple: int, *, shrink: bool) -> tuple[Shape, Shape]:
    """(window, halo) that fit together. Raises BadRequest.

    With `shrink`, multiples of `multiple`, and no wider than one window over the whole axis needs to be.
    """
    windows, halos = [], []
    for n, w, h in zip(shape, window, halo, strict=True):
        if shrink and (w % multiple or h % multiple):
            raise BadRequest(f"windows of {w} voxels with margins of {h}: both must be multiples of {multiple}, "
                             "which the UNet pools by", where="--window-voxels", todo=f"use multiples of {multiple}")
        if w < max(2, 4 * h):
            raise BadRequest(f"windows of {w} voxels with margins of {h} on each side", where="--halo-voxels",
                             todo="a window is at least 4 times its margin")
        whole = -(-n // multiple) * multiple
        if shrink and whole + 2 * h < w:
            w = whole + 2 * h
            if w < 4 * h:
                w, h = whole, 0
        windows.append(w)
        halos.append(h)
    return tuple(windows), tuple(halos)  # type: ignore[return-value]

