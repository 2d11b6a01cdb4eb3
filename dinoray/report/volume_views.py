"""Three planes through a volume, each with its fused features, its own tokens, and the raw voxels below them.

Everything is placed in nm from the volume's corner by its own pitch, and nothing is stretched to fit: an error of half a
token shows. Reads are bounded: a view is the whole plane, or as much of it around the chosen place as READ_BYTES allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, floor, prod

import numpy as np

from dinoray.io.fusion import fuse_box
from dinoray.io.stores import Store
from dinoray.io.volume_grid import NORMAL, ArraySpec, Shape, VolumeGrid
from dinoray.io.zarr_reading import open_array
from dinoray.report.pca import Basis
from dinoray.report.pictures import as_uint8
from dinoray.report.volume_sample import TokenSample
from dinoray.slabs import Slab, tokens_needed

READ_BYTES = 2**30
"""Most bytes of chunks (before compression) that the features of one view may take to read."""
MOST_SIDE = 768
"""Most target voxels a side in a view."""
PIECE = 64
"""Target voxels a side that are fused at once; a multiple of the chunks."""
Span = tuple[float, float]


@dataclass(frozen=True)
class Placed:
    """Pixels uint8 [rows, cols, 3 or 4 (alpha 0: not computed)] and what they cover, in nm from the volume's corner."""

    pixels: np.ndarray
    rows: Span
    cols: Span


@dataclass
class View:
    """One plane: `axes` are its rows and columns among z, y, x; spans in nm from the volume's corner."""

    name: str
    axes: tuple[int, int]
    at_nm: float
    """Where the plane lies along its normal: the centre of a target voxel."""
    rows: Span
    cols: Span
    is_whole: bool
    fused: Placed
    tokens: Placed
    """Those of this plane alone."""
    known: float
    """Share of the shown target voxels that have features."""
    raw: Placed | None = None
    problem: str = ""
    """Why there are no raw voxels."""
    note: str = ""


@dataclass
class FusedReader:
    """Features of boxes of the target grid: as stored where that is finished, else fused from the planes."""

    store: Store
    grid: VolumeGrid
    is_stored: bool
    planes: dict[str, Callable[..., np.ndarray]] = field(init=False)
    _fused: Callable[..., np.ndarray] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.planes = {name: open_array(self.store, name).read for name in self.grid.planes}
        if self.is_stored:
            self._fused = open_array(self.store, "fused").read

    def read(self, start: Shape, stop: Shape) -> np.ndarray:
        """[dim, z, y, x] float32. Raises OutputDamaged, TransientError, SystemicError."""
        if self._fused is not None:
            return self._fused(*(n for pair in zip(start, stop, strict=True) for n in pair)).astype(np.float32, copy=False)
        return fuse_box(self.planes, self.grid, start, stop)

    def cost(self, start: Shape, stop: Shape) -> int:
        """Bytes of the chunks that a box takes to read, before compression."""
        if self.is_stored:
            return chunk_bytes(self.grid.fused, start, stop)
        slab = Slab("fused", start, stop)
        return sum(chunk_bytes(plane.array, *tokens_needed(plane, slab)) for plane in map(self.grid.plane, self.grid.planes))


def chunk_bytes(spec: ArraySpec, start: Shape, stop: Shape) -> int:
    """Bytes of the chunks that a box touches."""
    chunks = prod(-(-b // c) - a // c for a, b, c in zip(start, stop, spec.chunks, strict=True))
    return chunks * prod(spec.chunks) * spec.dim * np.dtype(spec.dtype).itemsize


def choose_point(reader: FusedReader, sample: TokenSample) -> tuple[Shape, bool]:
    """The target voxel that the views go through, and whether it is the middle: it is, unless nothing was computed there and
    something was elsewhere."""
    grid = reader.grid
    middle: Shape = tuple(n // 2 for n in grid.target_shape)  # type: ignore[assignment]
    if not np.isnan(reader.read(middle, tuple(n + 1 for n in middle))).any():  # type: ignore[arg-type]
        return middle, True
    centre = sample.common_centre(grid)
    if centre is None:
        return middle, True
    return tuple(min(int(c / g), n - 1) for c, g, n in zip(centre, grid.target_nm, grid.target_shape, strict=True)), False  # type: ignore[return-value]


def make_view(reader: FusedReader, name: str, point: Shape, basis: Basis) -> View:
    """The view of one plane through a target voxel, without raw voxels. Raises OutputDamaged, TransientError, SystemicError."""
    grid, normal = reader.grid, NORMAL[name]
    axes: tuple[int, int] = tuple(a for a in range(3) if a != normal)  # type: ignore[assignment]
    start, stop = choose_field(reader, normal, point)
    fused = _colours(reader.read, basis, start, stop, axes)
    spans = [(start[a] * grid.target_nm[a], min(stop[a] * grid.target_nm[a], grid.extent_nm[a])) for a in axes]
    is_whole = all(stop[a] - start[a] == grid.target_shape[a] for a in axes)
    return View(name, axes, (point[normal] + 0.5) * grid.target_nm[normal], spans[0], spans[1], is_whole,
                _placed(fused, grid.fused, start, axes), _tokens(reader, name, point, basis, spans),
                known=float((fused[..., 3] > 0).mean()))


def choose_field(reader: FusedReader, normal: int, point: Shape) -> tuple[Shape, Shape]:
    """[start, stop) of the target voxels of a view: one thick along the normal, around the point, within the limits."""
    shape = reader.grid.target_shape
    sides = [1 if a == normal else min(n, MOST_SIDE) for a, n in enumerate(shape)]
    while True:
        start = [min(max(p - s // 2, 0), n - s) for p, s, n in zip(point, sides, shape, strict=True)]
        stop = [a + s for a, s in zip(start, sides, strict=True)]
        longest = max((a for a in range(3) if a != normal), key=lambda a: sides[a])
        if sides[longest] <= 8 or reader.cost(tuple(start), tuple(stop)) <= READ_BYTES:  # type: ignore[arg-type]
            return tuple(start), tuple(stop)  # type: ignore[return-value]
        sides[longest] = ceil(0.8 * sides[longest])


def _colours(read: Callable[[Shape, Shape], np.ndarray], basis: Basis, start: Shape, stop: Shape,
             axes: tuple[int, int]) -> np.ndarray:
    """RGBA uint8 [rows, cols, 4] of a box that is one thick along the third axis; read in pieces."""
    rows, cols = axes
    out = np.zeros((stop[rows] - start[rows], stop[cols] - start[cols], 4), np.uint8)
    for top, bottom in _pieces(start[rows], stop[rows]):
        for left, right in _pieces(start[cols], stop[cols]):
            low, high = list(start), list(stop)
            low[rows], high[rows], low[cols], high[cols] = top, bottom, left, right
            values = read(tuple(low), tuple(high)).astype(np.float32, copy=False)  # type: ignore[arg-type]
            flat = np.moveaxis(values.reshape(len(values), bottom - top, right - left), 0, -1)
            known = ~np.isnan(flat).any(axis=-1)
            target = out[top - start[rows]:bottom - start[rows], left - start[cols]:right - start[cols]]
            target[known, :3] = as_uint8(basis.colour(basis.project(flat[known])))
            target[known, 3] = 255
    return out


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """[start, stop) cut at multiples of PIECE."""
    return [(max(a, start), min(a + PIECE, stop)) for a in range(start // PIECE * PIECE, stop, PIECE)]


def _tokens(reader: FusedReader, name: str, point: Shape, basis: Basis, spans: list[Span]) -> Placed:
    """The tokens of a plane itself on the target plane of the point, where the view is."""
    if name not in reader.planes:
        return Placed(np.zeros((1, 1, 4), np.uint8), *spans)
    plane = reader.grid.plane(name)
    start, stop = list(point), [n + 1 for n in point]
    for axis, (low, high) in zip(plane.axes, spans, strict=True):
        start[axis] = min(floor(low / plane.pitch_nm[axis] + 1e-9), plane.shape[axis] - 1)
        stop[axis] = min(max(ceil(high / plane.pitch_nm[axis] - 1e-9), start[axis] + 1), plane.shape[axis])
    colours = _colours(lambda a, b: reader.planes[name](*(n for pair in zip(a, b, strict=True) for n in pair)), basis,
                       tuple(start), tuple(stop), plane.axes)  # type: ignore[arg-type]
    return _placed(colours, plane.array, tuple(start), plane.axes)  # type: ignore[arg-type]


def _placed(pixels: np.ndarray, spec: ArraySpec, start: Shape, axes: tuple[int, int]) -> Placed:
    """Pixels that are elements of an array from `start` on, where these lie."""
    (rows, cols), (height, width) = axes, pixels.shape[:2]
    return Placed(pixels, (start[rows] * spec.pitch_nm[rows], (start[rows] + height) * spec.pitch_nm[rows]),
                  (start[cols] * spec.pitch_nm[cols], (start[cols] + width) * spec.pitch_nm[cols]))
