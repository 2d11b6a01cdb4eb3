"""The raw voxels below a view: read again from the source, coarsely where there are many, between the two slices that the
target plane lies between."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from math import ceil, floor, prod

import numpy as np

from dinoray.config import ExtractVolumeJob
from dinoray.errors import DinorayError
from dinoray.io.volume_grid import VolumeGrid
from dinoray.io.volumes import Volume
from dinoray.report.pictures import as_uint8, one_line, shrink, thumbnail_size
from dinoray.report.plots import size
from dinoray.report.volume_views import Placed, Span, View
from dinoray.volume_inputs import open_source

MOST_READ_PX = 2048
"""Voxels a side that are read; of more, every n-th."""
MOST_SHOWN_PX = 768
"""Longest side of a picture."""
READ_BYTES = 2**31
"""Most bytes of chunks that the raw voxels of one view may take to read."""
FEWEST_PX = 16
Limits = tuple[float, float]


@contextmanager
def opened(job: ExtractVolumeJob, grid: VolumeGrid, versions: Collection[str | None]) -> Iterator[Volume | str]:
    """The raw volume of a run, or why it cannot be shown: it is gone, or is none of the `versions` that features were made of."""
    try:
        volume = open_source(job)
    except DinorayError as error:
        yield one_line(f"{error.what} [{error.where}]" if error.where else error.what)
        return
    with volume:
        if (volume.shape, volume.voxel_size_nm, volume.translation_nm) != (grid.shape, grid.voxel_nm, grid.translation_nm) or \
                volume.ref.version not in versions:
            yield "the volume has changed since its features were computed"
        else:
            yield volume


def add_raw(view: View, source: Volume | str, grid: VolumeGrid, limits: Limits | None) -> None:
    """Give a view its raw voxels, or its `problem`. `limits`: the values that become black and white; without, the smallest
    and the largest that are seen."""
    if isinstance(source, str):
        view.problem = source
        return
    try:
        view.raw, view.note = read_raw(view, source, grid, limits)
        if view.raw is None:
            view.problem = f"more than {size(READ_BYTES)} of its chunks would have to be read for this plane"
    except DinorayError as error:
        view.problem = one_line(error.what)


def read_raw(view: View, volume: Volume, grid: VolumeGrid, limits: Limits | None) -> tuple[Placed | None, str]:
    """(raw voxels of a view as gray, what to say of them). Raises ItemError, TransientError, SystemicError."""
    normal = 3 - sum(view.axes)
    spans: dict[int, Span] = dict(zip(view.axes, (view.rows, view.cols), strict=True))
    boxes = {a: (floor(low / grid.voxel_nm[a] + 1e-9), min(ceil(high / grid.voxel_nm[a] - 1e-9), grid.shape[a]))
             for a, (low, high) in spans.items()}
    position = min(max(view.at_nm / grid.voxel_nm[normal] - 0.5, 0.0), grid.shape[normal] - 1.0)
    below = floor(position)
    slices = np.unique([below, min(below + 1, grid.shape[normal] - 1)])
    steps = _steps(volume, boxes, slices, normal)
    if steps is None:
        return None, ""
    index = [slices if a == normal else _every(*boxes[a], steps[a]) for a in range(3)]
    pixels = np.moveaxis(volume.read(*index).astype(np.float32), normal, 0)
    weight = np.float32(position - below) if len(slices) > 1 else np.float32(0)
    gray = pixels[0] * (1 - weight) + pixels[-1] * weight if weight else pixels[0]
    gray = np.nan_to_num(gray, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = limits or (float(gray.min()), float(gray.max()))
    gray = shrink(gray, *thumbnail_size(*gray.shape, MOST_SHOWN_PX))
    shown = as_uint8((gray - np.float32(low)) / np.float32(max(high - low, 1e-30)))
    covered = [(boxes[a][0] * grid.voxel_nm[a], (boxes[a][0] + len(index[a]) * steps[a]) * grid.voxel_nm[a]) for a in view.axes]
    coarse = [f"{'zyx'[a]}: every {steps[a]}" for a in view.axes if steps[a] > 1]
    return Placed(np.repeat(shown[..., None], 3, axis=-1), covered[0], covered[1]), ", ".join(coarse)


def _every(start: int, stop: int, step: int) -> np.ndarray:
    """The voxel in the middle of each group of `step`; of the last, shorter group the one nearest to that."""
    return np.minimum(np.arange(start, stop, step) + (step - 1) // 2, stop - 1)


def _steps(volume: Volume, boxes: dict[int, tuple[int, int]], slices: np.ndarray, normal: int) -> dict[int, int] | None:
    """Every how many voxels are read along the axes of a view, so that it stays within the limits; None when nothing does."""
    chunks, itemsize = volume.chunks or (1, 1, 1), volume.dtype.itemsize
    steps = {a: max(1, ceil((b - a0) / MOST_READ_PX)) for a, (a0, b) in boxes.items()}

    def cost(at: dict[int, int]) -> int:
        counts = [len(np.unique((slices if a == normal else _every(*boxes[a], at[a])) // chunks[a])) for a in range(3)]
        return prod(counts) * prod(chunks) * itemsize

    while cost(steps) > READ_BYTES:
        coarser = [{**steps, a: steps[a] * 2} for a, (a0, b) in boxes.items() if (b - a0) // (steps[a] * 2) >= FEWEST_PX]
        if not coarser:
            return None
        steps = min(coarser, key=cost)
    return steps
