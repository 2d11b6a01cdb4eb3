"""A slab of a plane, read: its pixels, and which of its windows have foreground."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil, floor

import numpy as np

from dinoray.errors import ItemError
from dinoray.io.slab_pixels import SlabTaps, slab_taps
from dinoray.io.volume_grid import PlaneGrid, VolumeGrid
from dinoray.io.volumes import Volume
from dinoray.io.windows import SlabWindows, Window
from dinoray.slabs import Slab

Batch = tuple[Window, int]
"""A window, and the first of the target planes (counted in the slab) that it is computed on at once."""


@dataclass
class PreparedSlab:
    """`pixels` float32 [planes, rows, cols]; `batches` are computed, `skipped` are background, `lost` cannot be read
    (`error` says why)."""

    windows: SlabWindows
    pixels: np.ndarray
    num_planes: int
    batches: list[Batch] = field(default_factory=list)
    skipped: list[Batch] = field(default_factory=list)
    lost: list[Batch] = field(default_factory=list)
    error: ItemError | None = None
    read_s: float = 0.0
    prepare_s: float = 0.0
    num_bytes: int = 0


def slab_geometry(grid: VolumeGrid, slab: Slab, rule: str, *, margin_px: int = 0) -> tuple[SlabWindows, SlabTaps]:
    """The windows of a slab of a plane, and what its pixels are made of."""
    plane = grid.plane(slab.array)
    (rows, cols), normal = plane.axes, plane.normal
    windows = SlabWindows(plane, (slab.start[rows], slab.stop[rows]), (slab.start[cols], slab.stop[cols]), margin_px)
    return windows, slab_taps(plane, (slab.start[normal], slab.stop[normal]), *windows.pixel_box(), rule)


def read_slab(volume: Volume, grid: VolumeGrid, slab: Slab, rule: str, *, per_slice: bool = False,
              foreground: Callable[[PreparedSlab, PlaneGrid], Callable[[Batch], bool]] | None = None) -> PreparedSlab:
    """Read a slab of a plane. `per_slice`: each target plane is stretched to 0..255 and rounded down, as the original
    does; `foreground` makes, of a slab, the test whether a batch has any.

    Raises ItemError `nan`, and what `Volume.read` raises, when no window of the slab can be read.
    """
    margin = grid.patch if foreground is not None else 0
    windows, taps = slab_geometry(grid, slab, rule, margin_px=margin)
    began = time.monotonic()
    prepared = PreparedSlab(windows, np.empty(0, np.float32), slab.shape[windows.plane.normal])
    try:
        prepared.pixels = _pixels(volume, taps, prepared)
    except ItemError as error:
        if per_slice:  # the range of a slice needs all of it
            raise
        _read_windows(volume, grid, slab, rule, prepared, error)
    if per_slice:
        pixels = prepared.pixels
        low, high = pixels.min(axis=(1, 2), keepdims=True), pixels.max(axis=(1, 2), keepdims=True)
        span = np.where(high > low, high - low, np.float32(1))
        prepared.pixels = np.floor((pixels - low) / span * np.float32(255))
    has_foreground = (lambda batch: True) if foreground is None else foreground(prepared, windows.plane)
    for batch in batches(prepared, grid.micro_batch):
        if batch not in prepared.lost:
            (prepared.batches if has_foreground(batch) else prepared.skipped).append(batch)
    prepared.prepare_s = time.monotonic() - began - prepared.read_s
    return prepared


def _pixels(volume: Volume, taps: SlabTaps, prepared: PreparedSlab) -> np.ndarray:
    """The pixels of a box. Raises ItemError `nan`, and what `Volume.read` raises."""
    began = time.monotonic()
    raw = taps.read_raw(volume.read)
    prepared.read_s += time.monotonic() - began
    prepared.num_bytes += raw.nbytes
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        bad = raw.size - int(np.count_nonzero(np.isfinite(raw)))
        raise ItemError("nan", f"{bad} of {raw.size} voxels are NaN or infinite", where=volume.ref.uri,
                        todo="fill or mask them, or leave them out with --crop")
    return taps.pixels(raw)


def _read_windows(volume: Volume, grid: VolumeGrid, slab: Slab, rule: str, prepared: PreparedSlab, error: ItemError) -> None:
    """Read each window of a slab by itself, after `error` came up in all of it: only those that it lies in are lost.

    Raises `error` when all are.
    """
    windows = prepared.windows
    boxes = windows.pixel_box()
    (top, bottom), (left, right) = boxes
    first_plane = slab.start[windows.plane.normal]
    prepared.pixels = np.zeros((prepared.num_planes, bottom - top, right - left), np.float32)
    found = list(batches(prepared, grid.micro_batch))
    for batch in found:
        planes, rows, cols = _extent(prepared, batch, grid.micro_batch)
        taps = slab_taps(windows.plane, (first_plane + planes.start, first_plane + planes.stop),
                         (top + rows.start, top + rows.stop), (left + cols.start, left + cols.stop), rule)
        try:
            prepared.pixels[planes, rows, cols] = _pixels(volume, taps, prepared)
        except ItemError:
            prepared.lost.append(batch)
    if len(prepared.lost) == len(found):
        raise error
    if prepared.lost:
        prepared.error = ItemError(error.reason, f"{len(prepared.lost)} of {len(found)} batches of windows cannot be read: "
                                   f"{error.what}", where=error.where, todo=error.todo)


def batches(slab: PreparedSlab, micro_batch: int) -> Iterator[Batch]:
    """Window after window, `micro_batch` planes at a time: they begin at multiples of it, in every slab of the volume."""
    for window in slab.windows:
        for first in range(0, slab.num_planes, micro_batch):
            yield window, first


def _extent(slab: PreparedSlab, batch: Batch, micro_batch: int) -> tuple[slice, slice, slice]:
    """The pixels of a batch's windows and the margin around them."""
    window, first = batch
    (height, width), margin = slab.windows.size_px, slab.windows.margin_px
    return (slice(first, min(first + micro_batch, slab.num_planes)),
            slice(window.y - margin, window.y + height + margin), slice(window.x - margin, window.x + width + margin))


def above(threshold: float, micro_batch: int) -> Callable[[PreparedSlab, PlaneGrid], Callable[[Batch], bool]]:
    """Foreground are pixels above `threshold`."""
    return lambda slab, plane: lambda batch: bool((slab.pixels[_extent(slab, batch, micro_batch)] > threshold).any())


def inside(mask: Volume, grid: VolumeGrid, slab: Slab) -> Callable[[PreparedSlab, PlaneGrid], Callable[[Batch], bool]]:
    """Foreground are the voxels of `mask` that are not 0, wherever they lie in the batch's box in nm."""

    def make(prepared: PreparedSlab, plane: PlaneGrid) -> Callable[[Batch], bool]:
        (top, bottom), (left, right) = prepared.windows.pixel_box()
        first, stop = slab.start[plane.normal], slab.stop[plane.normal]
        boxes = {plane.normal: (first * grid.target_nm[plane.normal], stop * grid.target_nm[plane.normal]),
                 plane.axes[0]: (top * plane.pixel_nm, bottom * plane.pixel_nm),
                 plane.axes[1]: (left * plane.pixel_nm, right * plane.pixel_nm)}

        def voxels(axis: int, low: float, high: float) -> tuple[int, int]:
            """The mask's voxels that [low, high) nm from the volume's corner touches, at least one."""
            corner = grid.translation_nm[axis] - grid.voxel_nm[axis] / 2
            origin, size = mask.translation_nm[axis] - mask.voxel_size_nm[axis] / 2, mask.voxel_size_nm[axis]
            a = floor((corner + low - origin) / size + 1e-6)
            b = ceil((corner + high - origin) / size - 1e-6)
            a = min(max(a, 0), mask.shape[axis] - 1)
            return a, min(max(b, a + 1), mask.shape[axis])

        whole = [voxels(axis, *boxes[axis]) for axis in range(3)]
        found = mask.read(*(slice(a, b) for a, b in whole)) != 0

        def test(batch: Batch) -> bool:
            planes, rows, cols = _extent(prepared, batch, grid.micro_batch)
            nm = {plane.normal: ((first + planes.start) * grid.target_nm[plane.normal],
                                 (first + planes.stop) * grid.target_nm[plane.normal]),
                  plane.axes[0]: ((top + rows.start) * plane.pixel_nm, (top + rows.stop) * plane.pixel_nm),
                  plane.axes[1]: ((left + cols.start) * plane.pixel_nm, (left + cols.stop) * plane.pixel_nm)}
            part = []
            for axis in range(3):
                a, b = voxels(axis, *nm[axis])
                part.append(slice(a - whole[axis][0], b - whole[axis][0]))
            return bool(found[tuple(part)].any())

        return test

    return make
