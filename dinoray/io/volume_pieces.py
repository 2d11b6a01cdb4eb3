"""Boxes of a volume that may reach beyond it: what lies outside is mirrored, and said to be outside.

Also coarser pixels around a place, for a context: from the level that serves them, or as means of finer voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dinoray.errors import BadRequest
from dinoray.io.volume_grid import Shape, Triple, reflect
from dinoray.io.volumes import Volume


@dataclass(frozen=True)
class Piece:
    """A box: `values` [z, y, x] with what lies outside of the volume mirrored, `inside` along each axis (bool)."""

    values: np.ndarray
    inside: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def known(self) -> np.ndarray:
        """[z, y, x] bool: voxels of the volume."""
        z, y, x = self.inside
        return z[:, None, None] & y[None, :, None] & x[None, None, :]


class Readable(Protocol):
    """What boxes are read from."""

    def read(self, start: Sequence[int], shape: Sequence[int]) -> Piece: ...


class Pieces:
    """Boxes of an opened volume."""

    def __init__(self, volume: Volume):
        self.volume = volume

    def read(self, start: Sequence[int], shape: Sequence[int]) -> Piece:
        """The box [start, start + shape). Raises what `Volume.read` raises."""
        folded, inside = folds(start, shape, self.volume.shape)
        low = [int(f.min()) for f in folded]
        box = self.volume.read(*(slice(a, int(f.max()) + 1) for a, f in zip(low, folded, strict=True)))
        if all(i.all() for i in inside):
            return Piece(box, inside)
        return Piece(box[np.ix_(*(f - a for f, a in zip(folded, low, strict=True)))], inside)


def folds(start: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> tuple[list[np.ndarray], tuple[np.ndarray, ...]]:
    """Per axis the voxels that a box is read from, mirrored at the volume's faces, and which of them lie inside."""
    at = [np.arange(s, s + n) for s, n in zip(start, shape, strict=True)]
    inside = tuple((i >= 0) & (i < n) for i, n in zip(at, size, strict=True))
    return [reflect(i, n) for i, n in zip(at, size, strict=True)], inside


def whole_ratio(coarse: Triple, fine: Triple) -> Shape | None:
    """Voxels of `fine` per voxel of `coarse` along each axis; None where that is no whole number of at least 1."""
    ratio = [c / f for c, f in zip(coarse, fine, strict=True)]
    if any(abs(r - round(r)) > 1e-3 or round(r) < 1 for r in ratio):
        return None
    return tuple(round(r) for r in ratio)  # type: ignore[return-value]


@dataclass(frozen=True)
class ContextBox:
    """Where the pixels of a context lie.

    `first` voxel of the level and how many `counts` of them along each axis; `corner_nm` is the centre of the first pixel, `inside`
    which pixels hold some of the volume.
    """

    first: Shape
    counts: Shape
    corner_nm: Triple
    inside: tuple[np.ndarray, np.ndarray, np.ndarray]


def context_box(level: Volume, factor: Shape, centre_nm: Triple, shape: Shape) -> ContextBox:
    """`shape` pixels around a place, each of `factor` voxels of `level`. Nothing is read.

    The middle of the box is within half a voxel of the level of the place.
    """
    counts = tuple(n * f for n, f in zip(shape, factor, strict=True))
    first = tuple(round((c - t) / r - (n - 1) / 2) for c, t, r, n
                  in zip(centre_nm, level.translation_nm, level.voxel_size_nm, counts, strict=True))
    corner = tuple(t + s * r + (f - 1) / 2 * r for t, s, r, f
                   in zip(level.translation_nm, first, level.voxel_size_nm, factor, strict=True))
    _, inside = folds(first, counts, level.shape)
    pixels = tuple(i.reshape(n, f).any(axis=1) for i, n, f in zip(inside, shape, factor, strict=True))
    return ContextBox(first, counts, corner, pixels)  # type: ignore[arg-type]


def context_values(source: Readable, box: ContextBox, factor: Shape) -> np.ndarray:
    """The pixels of a context: means of voxels (float32), or the voxels themselves where a pixel is one.

    Raises what `source` raises.
    """
    values = source.read(box.first, box.counts).values
    if max(factor) == 1:
        return values
    fa, fb, fc = factor
    a, b, c = (n // f for n, f in zip(box.counts, factor, strict=True))
    return values.reshape(a, fa, b, fb, c, fc).mean(axis=(1, 3, 5), dtype=np.float32)


def context_level(volume: Volume, coarser: Volume | None, pixel_nm: Triple) -> tuple[Volume, Shape]:
    """(the volume that pixels of `pixel_nm` are read from, its voxels per pixel): `coarser` where it serves, else `volume`.

    Raises BadRequest where pixels are no multiples of voxels.
    """
    for level in (coarser, volume):
        if level is not None and (level is volume or _same_place(level, volume, pixel_nm)):
            ratio = whole_ratio(pixel_nm, level.voxel_size_nm)
            if ratio is not None:
                return level, ratio
    raise BadRequest(f"pixels of the context of {pixel_nm} nm are no multiples of raw voxels of {volume.voxel_size_nm} nm",
                     where="context_factor", todo="choose another context_factor")


def _same_place(level: Volume, volume: Volume, slack_nm: Triple) -> bool:
    """Whether a level covers what the volume covers, to a pixel: an array without a scale takes any voxel size that it is told."""
    for axis in range(3):
        ends = [(v.translation_nm[axis] - v.voxel_size_nm[axis] / 2,
                 v.translation_nm[axis] + (v.shape[axis] - 0.5) * v.voxel_size_nm[axis]) for v in (level, volume)]
        if any(abs(a - b) > slack_nm[axis] for a, b in zip(*ends, strict=True)):
            return False
    return True
