"""What a reader of volumes is asked for and what it gives: VolumeRequest, About, Source; and the checks they share."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoray.errors import BadRequest, ItemError, MissingScale
from dinoray.io.items import FileRef
from dinoray.io.storage_errors import listing_errors
from dinoray.io.volume_grid import Shape, Triple

MAX_PIECE_BYTES = 2**31
"""Decoded bytes of a chunk (slice, page): several are in memory at a time."""


@dataclass(frozen=True)
class VolumeRequest:
    """Which volume is read. Plain values: `dataclasses.asdict` and JSON take them there and back."""

    uri: str
    """A local path or URL: OME-Zarr, Zarr, N5, HDF5, a TIFF stack, a folder or glob of slices."""
    raw_voxel_nm: Triple | float | None = None
    """Voxel size (z, y, x, or of the finest axis) of the level to read; where the source states none: its voxel size."""
    dataset: str | None = None
    """Path inside a Zarr, N5 or HDF5 container, such as `raw/s0`; no level is chosen then."""
    channel: str | int | None = None
    """Channel by name or number, of a source with channels."""
    time: int | None = None
    """Time point, of a source with time."""
    crop: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None
    """Voxels [start, stop) along z, y, x of the level that is read."""
    mask: bool = False
    """A mask is read: integers and booleans of any kind, label images too."""

    def __post_init__(self):
        if isinstance(self.raw_voxel_nm, list):  # from JSON
            object.__setattr__(self, "raw_voxel_nm", tuple(self.raw_voxel_nm))
        if isinstance(self.crop, list | tuple):
            object.__setattr__(self, "crop", tuple(tuple(pair) if isinstance(pair, list | tuple) else pair for pair in self.crop))

    def check(self) -> None:
        """Raises BadRequest for values that no volume can satisfy."""
        size = self.raw_voxel_nm
        if isinstance(size, tuple) and len(size) != 3 or not all(
                _is_size(n) for n in (size if isinstance(size, tuple) else () if size is None else (size,))):
            raise BadRequest(f"a voxel size of {size} nm", where="raw_voxel_size",
                             todo="give one number, or three for z, y, x, in nanometres")
        if self.crop is not None and (len(self.crop) != 3 or not all(
                isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(n, int) for n in pair) for pair in self.crop)):
            raise BadRequest(f"a crop of {self.crop}", where="crop", todo="give start and stop in voxels for z, y, x")


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


@dataclass(frozen=True)
class About:
    """The facts of one 3D array: axes z, y, x; lengths in nm; `chunks` is what is decoded at least."""

    shape: Shape
    dtype: np.dtype
    chunks: Shape
    voxel_size_nm: Triple
    translation_nm: Triple
    ref: FileRef
    notes: tuple[str, ...]
    level: str


class Source(ABC):
    """One 3D array that is read piece by piece, on a grid of `about.chunks`. Called from several threads at once."""

    about: About

    @abstractmethod
    def piece(self, place: Shape) -> np.ndarray:
        """The values [z, y, x] of the chunk at `place` of the grid; at the borders with or without what lies outside.

        Raises ItemError, TransientError, SystemicError.
        """

    def check(self) -> None:  # noqa: B027
        """Called before each read: raises ItemError `changed` where that is noticed for the whole source at once."""

    def close(self) -> None:  # noqa: B027
        """Give back what is open."""


@contextlib.contextmanager
def opening(uri: str) -> Iterator[None]:
    """While metadata are read: what is wrong with them is a BadRequest; TransientError, SystemicError as they are."""
    with listing_errors(uri):
        try:
            yield
        except ItemError as error:
            raise BadRequest(error.what, where=error.where or uri,
                             todo=error.todo or "check that the volume is whole and of a kind that is read") from error


def check_array(shape: Sequence[int], dtype: np.dtype, where: str, *, mask: bool = False) -> None:
    """Refuse what cannot be the intensities of a volume (or a `mask`): empty axes, labels, numbers that are none.

    Raises BadRequest.
    """
    if any(n < 1 for n in shape):
        raise BadRequest(f"an axis of size 0: {' x '.join(map(str, shape))}", where=where, todo="name a volume that holds voxels")
    if mask and dtype.kind in "biu":
        return
    if dtype.kind == "b" or dtype.kind in "iu" and dtype.itemsize >= 4:
        raise labels_error(f"voxels of type {dtype} look like labels", where)
    if dtype.kind not in "iuf" or dtype.itemsize > 8 or dtype.fields is not None:
        raise BadRequest(f"voxels of type {dtype} are not intensities", where=where,
                         todo="write the volume as uint8, uint16, int16 or float32")


def labels_error(what: str, where: str) -> BadRequest:
    """The refusal of label images."""
    return BadRequest(f"{what}, not intensities", where=where,
                      todo="name the raw volume (--dataset, where it is in the same container); "
                           "if these are intensities, write them as uint16 or float32")


def check_piece(chunks: Sequence[int], dtype: np.dtype, where: str) -> None:
    """Raises BadRequest for chunks that are too large to be decoded in passing."""
    nbytes = math.prod(chunks) * dtype.itemsize
    if nbytes > MAX_PIECE_BYTES:
        raise BadRequest(f"chunks of {' x '.join(map(str, chunks))} voxels, {nbytes:,} bytes each", where=where,
                         todo=f"write the volume with chunks below {MAX_PIECE_BYTES:,} bytes (a few MB are good)")


def pick(kind: str, size: int | None, names: Sequence[str] | None, wanted: str | int | None, where: str) -> int:
    """The number of the channel (or time point) that is read; `size` is None where the source has no such axis.

    Raises BadRequest: several and none asked for, unknown names, numbers out of range.
    """
    listed = ", ".join(f"{i} {name!r}" for i, name in enumerate(names[:64])) if names else f"0 to {(size or 1) - 1}"
    if wanted is None:
        if size in (None, 1):
            return 0
        raise BadRequest(f"{size} {kind}s; one volume is read at a time", where=where,
                         todo=f"choose one with --{kind}: {listed}")
    if names and isinstance(wanted, str) and wanted in names:
        return list(names).index(wanted)
    number = int(wanted) if isinstance(wanted, str) and wanted.isascii() and wanted.isdigit() else wanted
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < (size or 1):
        has = "the source has no such axis" if size is None else f"there are {listed}"
        raise BadRequest(f"no {kind} {wanted!r}: {has}", where=where, todo=f"choose another --{kind}, or leave it out")
    return number


def missing_scale(why: str, where: str) -> MissingScale:
    """The refusal of a source without a voxel size."""
    return MissingScale(why, where=where, todo="say it in nanometres: --raw-voxel-size N (or z,y,x)")
