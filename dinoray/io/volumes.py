"""Volumes in: OME-Zarr, Zarr, N5, HDF5, TIFF stacks and folders of slices -> lazy [z, y, x] with voxel sizes in nm.

`open_volume` reads metadata only. `Volume.read` decodes the chunks (pages, slices) that a box or a set of planes needs,
each once per call, into the answer: memory holds the answer and a few chunks. What is asked for and which readers there
are: docs/volumes-in.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass

import numpy as np

from dinoray.errors import BadRequest
from dinoray.io import volume_kinds
from dinoray.io.items import FileRef
from dinoray.io.volume_grid import Shape, Triple
from dinoray.io.volume_levels import show
from dinoray.io.volume_source import Source, VolumeRequest

__all__ = ["Volume", "VolumeRequest", "open_volume"]

THREADS = 8
"""Chunks that are fetched and decoded at once, at most, over all calls of a Volume."""
CHUNKS_BYTES = 2**28
"""Decoded bytes of the chunks that are decoded at once: of large ones fewer are, one at least."""
SMALLEST_NM, LARGEST_NM = 1e-3, 1e9
"""Voxel sizes that are believed: a picometre to a metre."""
Index = slice | np.ndarray


def open_volume(request: VolumeRequest) -> Volume:
    """The volume that is asked for; no voxel is read (of a folder of slices: one slice).

    Raises BadRequest for what is not there, is no volume of intensities, or leaves a choice open (the message names the
    flag), TransientError and SystemicError for storage.
    """
    request.check()
    return Volume(volume_kinds.open_source(request), request.crop)


def chunk_readers(chunk_bytes: int) -> int:
    """How many chunks of so many decoded bytes a Volume has in work at once, at most."""
    return min(THREADS, max(1, CHUNKS_BYTES // chunk_bytes))


@dataclass(frozen=True)
class _Part:
    """What of one chunk goes where along one axis: out[target] = chunk[local]."""

    chunk: int
    target: slice
    local: slice | np.ndarray


class Volume:
    """A volume [z, y, x] that is read on demand; made by `open_volume`. `read` may be called from several threads."""

    def __init__(self, source: Source, crop: tuple[tuple[int, int], ...] | None = None):
        about = source.about
        self._source = source
        if crop is None:
            crop = tuple((0, n) for n in about.shape)
        if any(not 0 <= start < stop <= n for (start, stop), n in zip(crop, about.shape, strict=True)):
            source.close()
            raise BadRequest(f"a crop of {', '.join(f'{a}:{b}' for a, b in crop)} (z, y, x) of a volume of "
                             f"{' x '.join(map(str, about.shape))} voxels", where="crop", todo="choose a box inside the volume")
        if any(not SMALLEST_NM <= s <= LARGEST_NM for s in about.voxel_size_nm) or any(
                not abs(t) <= LARGEST_NM**2 for t in about.translation_nm):
            source.close()
            raise BadRequest(f"voxels of {show(about.voxel_size_nm)} at {', '.join(f'{t:g}' for t in about.translation_nm)} nm",
                             where=about.ref.uri, todo="mend the scale, translation and units in the metadata")
        self._start = tuple(start for start, _ in crop)
        self.shape: Shape = tuple(stop - start for start, stop in crop)  # type: ignore[assignment]
        self.dtype: np.dtype = about.dtype.newbyteorder("=")
        self.voxel_size_nm: Triple = about.voxel_size_nm
        self.translation_nm: Triple = tuple(  # type: ignore[assignment]
            t + start * r for t, start, r in zip(about.translation_nm, self._start, about.voxel_size_nm, strict=True))
        """World position of the centre of the crop's first voxel."""
        self.chunks: Shape = about.chunks
        """What a read decodes at least; their grid begins at the first voxel of the uncropped volume."""
        self.num_chunks: Shape = tuple(  # type: ignore[assignment]
            -(-stop // n) - start // n for (start, stop), n in zip(crop, about.chunks, strict=True))
        """Chunks that the crop lies in, along each axis."""
        self.ref: FileRef = about.ref
        """Identity: uri, bytes, and a version that changes with the content."""
        self.notes: tuple[str, ...] = about.notes
        """Lines for the log: which level was chosen, what was assumed."""
        self.level: str = about.level
        self._pool = ThreadPoolExecutor(chunk_readers(math.prod(self.chunks) * self.dtype.itemsize),
                                        thread_name_prefix="volume")

    def read(self, z: Index, y: Index, x: Index) -> np.ndarray:
        """The voxels [len z, len y, len x] in `dtype`, C order. Each index is a slice with start and stop, or a sorted
        one-dimensional array of integers (repeats are fine).

        Raises ItemError (`decode`, `truncated`, `missing`, `changed`, `shape`, `too_large`), TransientError, SystemicError;
        IndexError for indices outside of the volume.
        """
        indices = [_index(i, n, a) for i, n, a in zip((z, y, x), self.shape, "zyx", strict=True)]
        parts = [list(_parts(i, start, chunk)) for i, start, chunk
                 in zip(indices, self._start, self._source.about.chunks, strict=True)]
        out = np.empty([_length(i) for i in indices], self.dtype)
        if not out.size:
            return out
        self._source.check()

        def fill(box: tuple[_Part, ...]) -> None:
            piece = self._source.piece(tuple(part.chunk for part in box))  # type: ignore[arg-type]
            for axis, part in enumerate(box):
                piece = piece[(slice(None),) * axis + (part.local,)]
            out[tuple(part.target for part in box)] = piece

        # a single chunk too: what is in work over all calls is bounded. With this thread's context: retries count for its unit
        tasks = [self._pool.submit(copy_context().run, fill, box) for box in itertools.product(*parts)]
        try:
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
        return out

    def lie_on(self, other: Volume) -> bool:
        """Take the voxel size and the place of another volume, as it is before its crop or with it, whichever has the same
        number of voxels along each axis; False where neither has."""
        if self.shape == other._source.about.shape:
            start = other._start
        elif self.shape == other.shape:
            start = (0, 0, 0)
        else:
            return False
        self.voxel_size_nm = other.voxel_size_nm
        self.translation_nm = tuple(  # type: ignore[assignment]
            t - n * r for t, n, r in zip(other.translation_nm, start, other.voxel_size_nm, strict=True))
        return True

    def close(self) -> None:
        """Give back open files and threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._source.close()

    def __enter__(self) -> Volume:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _index(index: Index, size: int, axis: str) -> slice | np.ndarray:
    """The index with plain bounds. Raises IndexError."""
    if isinstance(index, slice):
        start, stop = 0 if index.start is None else index.start, size if index.stop is None else index.stop
        if index.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise IndexError(f"{axis}: {index} of {size} voxels")
        return slice(int(start), int(stop))
    array = np.asarray(index)
    if array.ndim != 1 or array.size and (array.dtype.kind not in "iu" or np.any(np.diff(array) < 0)
                                          or array[0] < 0 or array[-1] >= size):
        raise IndexError(f"{axis}: not a sorted array of indices below {size}")
    return array.astype(np.int64)


def _length(index: slice | np.ndarray) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


def _parts(index: slice | np.ndarray, origin: int, chunk: int) -> Iterator[_Part]:
    """The chunks that an index (counted from `origin`) touches, in order."""
    if isinstance(index, slice):
        start, stop = index.start + origin, index.stop + origin
        for number in range(start // chunk, -(-stop // chunk) if stop > start else start // chunk):
            low, high = max(start, number * chunk), min(stop, (number + 1) * chunk)
            yield _Part(number, slice(low - start, high - start), slice(low - number * chunk, high - number * chunk))
        return
    absolute = index + origin
    numbers = absolute // chunk
    borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for low, high in itertools.pairwise(borders):
        if low < high:
            number = int(numbers[low])
            yield _Part(number, slice(low, high), absolute[low:high] - number * chunk)
