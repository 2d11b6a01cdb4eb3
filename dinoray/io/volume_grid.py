"""Where everything of a volume lies: voxels, target planes, tokens, windows, units, shards. Pure geometry.

Axes are z, y, x throughout. Lengths in nm are measured from the volume's corner, the outer face of its first voxel:
voxel i of size R covers [i R, (i+1) R) and has its centre at (i + 1/2) R; the same holds for tokens (pitch p r: patch
size times the plane's square pixel r) and for target planes and voxels (pitch G). Nothing is aligned by corners.

A plane (`xy`, `xz`, `yz`) has tokens on two axes and target planes on the third, its normal. Its windows lie on one
lattice that depends on the volume alone, so that a token is computed from the same pixels whatever unit asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil, prod
from typing import Any

import numpy as np

from dinoray.errors import BadRequest

NORMAL = {"xy": 0, "xz": 1, "yz": 2}
"""Plane -> the axis (of z, y, x) that it is normal to."""
SHIFT_AFTER = 5
"""A side of more than so many strides has its lattice begin half a stride before the origin (see Lattice)."""
SHARD_TOKENS = 32
"""Tokens a side that a shard aims at in the plane."""
SHARD_PLANES = 8
"""Target planes in a shard, at least; a multiple of the micro-batch."""
CHUNK_BYTES = 4 * 2**20
"""Most bytes of a chunk, before compression, where its shape allows."""
SHARD_BYTES = 256 * 2**20
"""Most bytes of a shard of a plane, before compression, where the micro-batch and the stride allow."""
FUSED_SHARD_BYTES = 128 * 2**20
"""Most bytes of a shard of the fused array, before compression."""

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]


def parts(length_nm: float, pitch_nm: float) -> int:
    """Voxels (tokens, planes) of a pitch that cover a length; a billionth too much is rounding."""
    return max(1, ceil(length_nm / pitch_nm * (1 - 1e-12) - 1e-9))


def reflect(index: np.ndarray, size: int) -> np.ndarray:
    """Indices of any size folded into [0, size) as `numpy.pad(mode="reflect")` does (the border voxel is not repeated)."""
    if size == 1:
        return np.zeros_like(index)
    period = 2 * (size - 1)
    folded = np.mod(index, period)
    return np.where(folded >= size, period - folded, folded)


@dataclass(frozen=True)
class Lattice:
    """Windows along one axis of a plane, in tokens: window w has its core at [w stride - offset, (w+1) stride - offset)
    and reaches `halo` tokens beyond it on both sides, where it is blended with its neighbours.

    The lattice is anchored at the volume's origin. On long sides it starts half a stride before it: the borders of units
    are multiples of the stride, fall into the middle of windows then, and a unit of m strides computes m + 1 windows
    a side instead of m + 2.
    """

    tokens: int
    window: int
    halo: int
    offset: int

    @property
    def stride(self) -> int:
        """Tokens between the starts of neighbouring windows."""
        return self.window - 2 * self.halo

    @property
    def count(self) -> int:
        """Windows that the axis needs."""
        return -(-(self.tokens + self.offset) // self.stride)

    def start(self, w: int) -> int:
        """First token of window w; before 0 in the padding."""
        return w * self.stride - self.offset - self.halo

    def touching(self, first: int, stop: int) -> range:
        """The windows that contribute to tokens [first, stop)."""
        low = (first + self.offset - self.halo) // self.stride
        high = -(-(stop + self.offset + self.halo) // self.stride)
        return range(max(0, low), min(self.count, high))

    def weights(self, w: int) -> np.ndarray:
        """Blending weights [window] float32 of window w: ramps over the overlaps, 1 elsewhere; at every token of the axis
        the weights of all windows add up to 1."""
        weight = np.ones(self.window, np.float32)
        ramp = (np.arange(2 * self.halo, dtype=np.float32) + np.float32(0.5)) / np.float32(max(1, 2 * self.halo))
        if self.halo and w > 0:
            weight[:2 * self.halo] = ramp
        if self.halo and w < self.count - 1:
            weight[self.window - 2 * self.halo:] = ramp[::-1]
        return weight


@dataclass(frozen=True)
class ArraySpec:
    """One stored array [dim, z, y, x]: its name (`xy`, `fused`), its place in nm (`translation_nm`: centre of the first
    voxel), and what an object (`shards`) and a compressed piece of it (`chunks`) cover along z, y, x."""

    name: str
    shape: Shape
    dim: int
    dtype: str
    pitch_nm: Triple
    translation_nm: Triple
    chunks: Shape
    shards: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the array before compression."""
        return prod(self.shape) * self.dim * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class VolumeGrid:
    """A volume and how its features are computed. `shape`, `voxel_nm`, `translation_nm` (centre of the first voxel) are
    those of the level and crop that is read; `window_px`, `halo_px` are square pixels of a plane."""

    shape: Shape
    voxel_nm: Triple
    translation_nm: Triple
    target_nm: Triple
    patch: int
    planes: tuple[str, ...]
    window_px: int
    halo_px: int
    micro_batch: int
    """Windows of one forward: `micro_batch` neighbouring target planes at one place, always."""
    dim: int
    dtype: str
    edges: str = "extrapolate"
    """How tokens are read beyond the centres of the outermost ones: `extrapolate` (linearly) or `clamp`."""

    def __post_init__(self) -> None:
        """Raises BadRequest for windows that do not fit together: a token lies in two windows of an axis at most."""
        window, halo, patch = self.window_px, self.halo_px, self.patch
        if halo < 0 or halo % patch or window < patch or window % patch:
            raise BadRequest(f"windows of {window} px with a halo of {halo} px are not made of patches of {patch} px",
                             todo=f"choose multiples of {patch}")
        if window < 4 * halo:
            raise BadRequest(f"a halo of {halo} px is too wide for windows of {window} px: three of them would overlap",
                             todo=f"choose a halo of at most {window // 4 // patch * patch} px, or larger windows")
        if not self.planes or set(self.planes) - set(NORMAL) or len(set(self.planes)) < len(self.planes):
            raise BadRequest(f"not a choice of planes: {', '.join(self.planes) or 'none'}", todo=f"some of {', '.join(NORMAL)}")
        if min(self.shape) < 1 or min(*self.voxel_nm, *self.target_nm) <= 0:
            raise BadRequest(f"no volume has the shape {self.shape}, voxels of {self.voxel_nm} nm and target voxels of "
                             f"{self.target_nm} nm", todo="all must be above 0")

    @property
    def extent_nm(self) -> Triple:
        """Size of the volume in nm."""
        return tuple(n * r for n, r in zip(self.shape, self.voxel_nm, strict=True))  # type: ignore[return-value]

    def plane(self, name: str) -> PlaneGrid:
        """The grid of one plane."""
        return PlaneGrid(self, name)

    @property
    def target_shape(self) -> Shape:
        """Target voxels along z, y, x."""
        return tuple(parts(e, g) for e, g in zip(self.extent_nm, self.target_nm, strict=True))  # type: ignore[return-value]

    @property
    def fused(self) -> ArraySpec:
        """The array of the average over the planes."""
        itemsize, shape = np.dtype(self.dtype).itemsize, self.target_shape
        shard, chunk = 32, 32
        while self.dim * itemsize * shard**3 > FUSED_SHARD_BYTES and shard > 8:
            shard //= 2
        while self.dim * itemsize * chunk**3 > CHUNK_BYTES and chunk > 4 or chunk > shard:
            chunk //= 2
        return ArraySpec("fused", shape, self.dim, self.dtype, self.target_nm, self._translation(self.target_nm),
                         *_fitted((shard,) * 3, (chunk,) * 3, shape))

    def arrays(self, *, fused: bool) -> list[ArraySpec]:
        """All arrays that an output has."""
        return [*(self.plane(name).array for name in self.planes), *([self.fused] if fused else [])]

    def _translation(self, pitch_nm: Iterable[float]) -> Triple:
        return tuple(t + (p - r) / 2 for t, p, r in zip(self.translation_nm, pitch_nm, self.voxel_nm, strict=True))  # type: ignore[return-value]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `VolumeGrid.read` takes them back."""
        return asdict(self)

    @classmethod
    def read(cls, values: dict[str, Any]) -> VolumeGrid:
        """From `as_dict` (or its JSON)."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class PlaneGrid:
    """One plane of a VolumeGrid: tokens on `axes`, target planes along `normal`."""

    grid: VolumeGrid
    name: str

    @property
    def normal(self) -> int:
        """The axis that the plane is normal to."""
        return NORMAL[self.name]

    @property
    def axes(self) -> tuple[int, int]:
        """The axes in the plane, in the order z, y, x: rows and columns of its windows."""
        return tuple(a for a in range(3) if a != self.normal)  # type: ignore[return-value]

    @property
    def pixel_nm(self) -> float:
        """The side of a square pixel: the finer of the two voxel sizes in the plane."""
        return min(self.grid.voxel_nm[a] for a in self.axes)

    @cached_property
    def pitch_nm(self) -> Triple:
        """Distance of neighbouring tokens, and of target planes along the normal."""
        token = self.grid.patch * self.pixel_nm
        return tuple(self.grid.target_nm[a] if a == self.normal else token for a in range(3))  # type: ignore[return-value]

    @cached_property
    def shape(self) -> Shape:
        """Tokens (target planes along the normal) along z, y, x."""
        return tuple(parts(e, p) for e, p in zip(self.grid.extent_nm, self.pitch_nm, strict=True))  # type: ignore[return-value]

    def lattice(self, axis: int) -> Lattice:
        """The windows along one of `axes`: as many as `window_px` asks for, and none larger than the side needs.

        Windows of the full size would often lie in the padding for half of their length (two of 512 px for a side of
        512); so the side is shared out evenly among them.
        """
        patch, tokens = self.grid.patch, self.shape[axis]
        halo = self.grid.halo_px // patch
        largest = self.grid.window_px // patch - 2 * halo
        if tokens <= largest:
            return Lattice(tokens, tokens + 2 * halo, halo, 0)
        shifted = tokens > SHIFT_AFTER * largest
        count = -(-(tokens + largest // 2 if shifted else tokens) // largest)
        needed = -(-2 * tokens // (2 * count - 1)) if shifted else -(-tokens // count)
        divisor = 8 if needed > SHARD_TOKENS else 2  # a stride without divisors makes shards and chunks as wide as it is
        stride = min(largest, max(-(-needed // divisor) * divisor, 2 * halo))
        return Lattice(tokens, stride + 2 * halo, halo, stride // 2 if shifted else 0)

    @property
    def planes_per_shard(self) -> int:
        """Target planes in a shard: what a slab computes at a time."""
        batch = self.grid.micro_batch
        return -(-SHARD_PLANES // batch) * batch

    def shard_tokens(self, axis: int) -> int:
        """Tokens of a shard along one of `axes`: a divisor or a multiple of the stride, near SHARD_TOKENS or, where a shard
        would be above SHARD_BYTES, near less."""
        stride, aim = self.lattice(axis).stride, SHARD_TOKENS
        token = self.planes_per_shard * self.grid.dim * np.dtype(self.grid.dtype).itemsize
        while token * aim**2 > SHARD_BYTES and aim > 8:
            aim //= 2
        if stride <= aim:
            return stride * (aim // stride)
        divisors = [d for d in range(1, stride + 1) if stride % d == 0]
        below = max(d for d in divisors if d <= aim)
        return below if below >= 8 else min(d for d in divisors if d > aim)

    @cached_property
    def array(self) -> ArraySpec:
        """The stored array of the plane's tokens."""
        shards = tuple(self.planes_per_shard if a == self.normal else self.shard_tokens(a) for a in range(3))
        chunks = [n if a == self.normal else max([d for d in range(8, 17) if n % d == 0], default=n) for a, n in enumerate(shards)]
        itemsize = np.dtype(self.grid.dtype).itemsize
        while self.grid.dim * itemsize * prod(chunks) > CHUNK_BYTES and chunks[self.normal] > 1:
            depth = chunks[self.normal]
            chunks[self.normal] = max(d for d in range(1, depth) if shards[self.normal] % d == 0)
        return ArraySpec(self.name, self.shape, self.grid.dim, self.grid.dtype, self.pitch_nm,
                         self.grid._translation(self.pitch_nm), *_fitted(shards, tuple(chunks), self.shape))


def _fitted(shards: Shape, chunks: Shape, shape: Shape) -> tuple[Shape, Shape]:
    """(chunks, shards) no larger than a small array needs."""
    chunks = tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))  # type: ignore[assignment]
    shards = tuple(min(s // c * c if s >= c else c, -(-n // c) * c) for s, c, n in zip(shards, chunks, shape, strict=True))  # type: ignore[assignment]
    return chunks, shards
