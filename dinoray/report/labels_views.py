"""Three planes through a segmented volume: raw voxels, labels as colours, and affinities or how sure the model is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from dinoray.config import SegmentVolumeJob
from dinoray.errors import DinorayError
from dinoray.io.prediction_grid import PredictionGrid
from dinoray.io.stores import Store
from dinoray.io.volume_grid import NORMAL, ArraySpec, Shape
from dinoray.io.volumes import Volume
from dinoray.io.zarr_reading import ArrayReader, open_array
from dinoray.label_planning import open_source
from dinoray.report.outlines import boundaries, hues, palette
from dinoray.report.pictures import as_uint8, one_line
from dinoray.report.volume_raw import add_raw
from dinoray.report.volume_svg import define, panel
from dinoray.report.volume_views import MOST_SIDE, Placed, View


@dataclass(frozen=True)
class DrawnPlane:
    """One plane on the page: `panels` are (title, SVG), `defs` holds their pictures."""

    view: View
    defs: Any
    panels: list[tuple[str, Any]]
    normal: str
    at_nm: float


@contextmanager
def opened_raw(job: SegmentVolumeJob, grid: PredictionGrid, version: str | None) -> Iterator[Volume | str]:
    """The raw volume, or why it cannot be shown."""
    try:
        volume = open_source(job, grid.raw_voxel_nm)
    except DinorayError as error:
        yield one_line(f"{error.what} [{error.where}]" if error.where else error.what)
        return
    with volume:
        if volume.ref.version != version or tuple(n // f for n, f in zip(volume.shape, grid.factor, strict=True)) != grid.shape:
            yield "the volume has changed since it was segmented"
        else:
            yield volume


def draw_planes(store: Store, grid: PredictionGrid, job: SegmentVolumeJob, version: str | None, limits: tuple[float, float], *,
                with_probabilities: bool, classes: bool) -> list[DrawnPlane]:
    """The planes through the middle. Raises OutputDamaged, TransientError, SystemicError."""
    labels = open_array(store, grid.labels)
    probabilities = open_array(store, grid.probabilities) if with_probabilities else None
    corner = [t - p / 2 for t, p in zip(grid.translation_nm, grid.voxel_nm, strict=True)]
    middle = [n // 2 for n in grid.shape]
    found = []
    with opened_raw(job, grid, version) as source:
        raw_grid = SimpleNamespace(voxel_nm=grid.raw_voxel_nm, shape=source.shape if isinstance(source, Volume) else grid.shape)
        for name, normal in NORMAL.items():
            axes: tuple[int, int] = tuple(a for a in range(3) if a != normal)  # type: ignore[assignment]
            start, stop = _field(grid.shape, middle, normal)
            plane = labels.read(*(n for pair in zip(start, stop, strict=True) for n in pair))[0].squeeze(axis=normal)
            spans = [(start[a] * grid.voxel_nm[a], stop[a] * grid.voxel_nm[a]) for a in axes]
            sure = _placed(_gray(probabilities, start, stop, normal, classes), grid.labels, start, axes)
            view = View(name, axes, (middle[normal] + 0.5) * grid.voxel_nm[normal], spans[0], spans[1],
                        all(stop[a] - start[a] == grid.shape[a] for a in axes),
                        _placed(colours(plane, classes), grid.labels, start, axes), sure, known=1.0)
            add_raw(view, source, raw_grid, limits)  # type: ignore[arg-type]
            place = (corner[axes[0]], corner[axes[1]])
            cuts = tuple((middle[a] + 0.5) * grid.voxel_nm[a] for a in axes)
            has_raw = view.raw is not None
            panels = [("raw", panel(view, ("raw",), place, cuts))] if has_raw else []  # type: ignore[arg-type]
            panels.append(("labels", panel(view, ("fused",), place, None if has_raw else cuts)))  # type: ignore[arg-type]
            panels += [("both", panel(view, ("raw", "fused"), place))] if has_raw else []
            if probabilities is not None:
                panels.append(("probability of the label" if classes else "affinity, mean of the directions",
                               panel(view, ("tokens",), place)))
            found.append(DrawnPlane(view, define(view), panels, "zyx"[normal], corner[normal] + view.at_nm))
    return found


def colours(labels: np.ndarray, classes: bool) -> np.ndarray:
    """RGBA uint8 [rows, cols, 4] of labels; 0 is clear. Instances that touch differ, their outlines are white."""
    out = np.zeros((*labels.shape, 4), np.uint8)
    table = palette()
    if classes:
        number = (labels.astype(np.int64) - 1) * 5 % len(table)
        out[..., :3] = table[number]
    else:
        numbered = np.unique(labels, return_inverse=True)
        small = (numbered[1].reshape(labels.shape) + (numbered[0][0] != 0)).astype(np.int64)
        out[..., :3] = table[np.maximum(hues(small), 0)]
        out[boundaries(small), :3] = 255
    out[..., 3] = np.where(labels > 0, 255, 0)
    return out


def _gray(array: ArrayReader | None, start: Shape, stop: Shape, normal: int, classes: bool) -> np.ndarray:
    if array is None:
        return np.zeros((1, 1, 4), np.uint8)
    values = array.read(*(n for pair in zip(start, stop, strict=True) for n in pair))
    share = values.astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
    shown = share.max(axis=0) if classes else share[:3].mean(axis=0)
    gray = as_uint8(shown.squeeze(axis=normal))
    return np.stack([gray, gray, gray, np.full_like(gray, 255)], axis=-1)


def _field(shape: Shape, middle: list[int], normal: int) -> tuple[Shape, Shape]:
    start, stop = [], []
    for axis, n in enumerate(shape):
        side = 1 if axis == normal else min(n, MOST_SIDE)
        low = min(max(middle[axis] - side // 2, 0), n - side)
        start.append(low)
        stop.append(low + side)
    return tuple(start), tuple(stop)  # type: ignore[return-value]


def _placed(pixels: np.ndarray, spec: ArraySpec, start: Shape, axes: tuple[int, int]) -> Placed:
    spans = [(start[a] * spec.pitch_nm[a], (start[a] + pixels.shape[i]) * spec.pitch_nm[a]) for i, a in enumerate(axes)]
    return Placed(pixels, spans[0], spans[1])
