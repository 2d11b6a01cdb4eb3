"""From a job that segments a volume to what it reads and where everything lies: the volume, its context, the grid, the forecast."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from dinoray.config.volume_segmentation import SegmentVolumeJob
from dinoray.errors import BadRequest
from dinoray.io.prediction_grid import PredictionGrid, make_windows
from dinoray.io.volume_grid import Shape, Triple
from dinoray.io.volume_pieces import context_level, whole_ratio
from dinoray.io.volumes import Volume, VolumeRequest, open_volume
from dinoray.label_units import arrays
from dinoray.wording import count_bytes, plural

HALO = 32
LIKE = 0.1
"""Share by which voxels may differ from those that a model was trained on."""
COMPONENT_BYTES = 200
"""Of memory for each voxel of a block while its connected components are found: pairs of voxels, and a sparse graph of them."""
MUTEX_BYTES = 20
"""Of mutex watershed, for each voxel and affinity, beside that: as read, and twice in float64."""
LIBRARY_BYTES = 192 * 2**20
"""What libraries take at the first forward (scratch, code), and what the allocator keeps of freed memory (up to 64
MiB in each of two arenas)."""
WINDOW = 128
"""Side of windows of a model without context: larger ones cost less at their margins."""


class Checkpoint(Protocol):
    """What of a checkpoint's config decides here (vision.fusion_checkpoint.FusionConfig, which knows torch)."""

    target: str
    classes: tuple[str, ...]
    offsets: tuple[Shape, ...]
    voxel_nm: Triple
    raw_voxel_nm: Triple
    context_factor: int
    crop_voxels: Shape


def volume_request(job: SegmentVolumeJob, voxel_nm: Triple) -> VolumeRequest:
    """How the job's volume is opened, in any process. `voxel_nm`: of the level, where the job does not say it."""
    given = job.raw_voxel_size
    size = voxel_nm if given is None else given[0] if len(given) == 1 else given
    return VolumeRequest(job.sources[0], raw_voxel_nm=size, dataset=job.dataset, time=job.time, crop=job.crop_box(),  # type: ignore[arg-type]
                         channel=int(job.channel) if (job.channel or "").isdigit() else job.channel)


def open_source(job: SegmentVolumeJob, voxel_nm: Triple) -> Volume:
    """The volume of a job, at the level that the checkpoint was trained on: the exact one, else the nearest within LIKE.

    Raises BadRequest where there is none, and where the source states no voxel size and the job neither; TransientError,
    SystemicError.
    """
    if job.raw_voxel_size is None:  # a voxel size that is asked for is taken for that of a source that states none
        open_volume(replace(volume_request(job, voxel_nm), raw_voxel_nm=None)).close()
    problem: BadRequest | None = None
    for size in (voxel_nm, tuple(v * (1 + LIKE) for v in voxel_nm)):
        try:
            volume = open_volume(volume_request(job, size))  # type: ignore[arg-type]
        except BadRequest as error:
            problem = problem or error
            continue
        if all(abs(a - b) <= LIKE * b for a, b in zip(volume.voxel_size_nm, voxel_nm, strict=True)):
            return volume
        problem = BadRequest(f"the volume has voxels of {_nm(volume.voxel_size_nm)}, the model was trained on {_nm(voxel_nm)}",
                             where=job.sources[0], todo="choose the level by --raw-voxel-size, or resample the volume")
        volume.close()
        if job.raw_voxel_size is not None:
            break
    assert problem is not None
    raise problem


def context_source(job: SegmentVolumeJob, config: Checkpoint, volume: Volume) -> tuple[Volume, Shape]:
    """(the level that serves the context, its voxels per pixel): a coarser one if the whole volume is segmented and there is one.

    Raises BadRequest where pixels of the context are no multiples of voxels.
    """
    pixel: Triple = tuple(r * config.context_factor for r in volume.voxel_size_nm)  # type: ignore[assignment]
    coarser = None
    if job.crop is None:
        with contextlib.suppress(BadRequest):
            coarser = open_volume(VolumeRequest(job.sources[0], raw_voxel_nm=pixel, dataset=job.dataset, time=job.time,
                                                channel=volume_request(job, pixel).channel))
    found = context_level(volume, coarser, pixel)
    if coarser is not None and found[0] is not coarser:
        coarser.close()
    return found


def make_grid(job: SegmentVolumeJob, config: Checkpoint, volume: Volume, *, multiple: int, has_context: bool) -> PredictionGrid:
    """The geometry of a job. `multiple`: what the UNet pools by. Raises BadRequest."""
    factor = whole_ratio(config.voxel_nm, config.raw_voxel_nm)
    assert factor is not None, "a checkpoint is of whole factors"
    shape: Shape = tuple(n // f for n, f in zip(volume.shape, factor, strict=True))  # type: ignore[assignment]
    if min(shape) < 1:
        raise BadRequest(f"a volume of {'x'.join(map(str, volume.shape))} voxels is smaller than a predicted voxel of "
                         f"{'x'.join(map(str, factor))}", where=job.sources[0], todo="give a larger volume, or --crop")
    size: Triple = tuple(r * f for r, f in zip(volume.voxel_size_nm, factor, strict=True))  # type: ignore[assignment]
    first: Triple = tuple(t + (f - 1) / 2 * r for t, f, r  # type: ignore[assignment]
                          in zip(volume.translation_nm, factor, volume.voxel_size_nm, strict=True))
    if job.window_voxels is not None:
        window: Shape = job.window_voxels * 3 if len(job.window_voxels) == 1 else job.window_voxels  # type: ignore[assignment]
    else:
        # a context is as wide as the crops say: windows of another size would see another one
        window = config.crop_voxels if has_context else \
            tuple(-(-max(c, WINDOW, 4 * multiple) // multiple) * multiple for c in config.crop_voxels)  # type: ignore[assignment]
    step = 1 if has_context else multiple
    halo: Shape = tuple(min(-(-HALO // step) * step, w // 4 // step * step) if job.halo_voxels is None else job.halo_voxels  # type: ignore[assignment]
                        for w in window)
    window, halo = make_windows(shape, window, halo, multiple, shrink=not has_context)
    if config.target == "affinities":
        dtype, outputs = "uint64", len(config.offsets)
    else:
        dtype, outputs = ("uint8" if len(config.classes) <= 256 else "uint16"), len(config.classes)
    return PredictionGrid(shape, size, first, volume.voxel_size_nm, factor, window, halo, multiple, job.blend, not has_context,
                          outputs, job.probability_dtype, dtype, job.block_voxels, job.shard_voxels)


@dataclass(frozen=True)
class Forecast:
    """What a plan will compute and write, before anything is."""

    grid: PredictionGrid
    unit_windows: int
    instances: bool
    probabilities: bool
    window_bytes: int = 0
    """Of the model's forward on one window, and of the voxels that its context is made of."""
    raw_itemsize: int = 2
    """Bytes of a raw voxel."""
    component_bytes: int = COMPONENT_BYTES
    """Of a voxel of a block while its instances are found."""

    @property
    def amplification(self) -> float:
        """Windows of all units over those of a run in one unit."""
        return self.grid.windows_in_all(self.unit_windows) / self.grid.windows_once

    @property
    def output_bytes(self) -> int:
        """Bytes of the arrays before compression."""
        return sum(spec.nbytes for spec in arrays(self.grid, instances=self.instances, probabilities=self.probabilities))

    @property
    def unit_bytes(self) -> int:
        """What a unit takes beside the model: the blended layers, two layers of raw voxels, and shards on their way."""
        grid = self.grid
        sides = [min(n, grid.unit_voxels(a, self.unit_windows)) for a, n in enumerate(grid.shape)]
        depth = min(sides[0], grid.shards[0] + grid.lattice(0).window)
        layer = prod(s + 2 * h for s, h in zip(sides[1:], grid.halo[1:], strict=True)) * (grid.window[0] + 2 * grid.halo[0])
        shard = prod(grid.shards) * grid.outputs
        raw = layer * prod(grid.factor) * self.raw_itemsize
        predicting = depth * sides[1] * sides[2] * (4 * grid.outputs + 1) * 2 + 2 * raw + 5 * shard * 4
        return LIBRARY_BYTES + max(predicting + self.window_bytes, self.component_bytes * prod(grid.block) if self.instances else 0)

    def lines(self) -> list[str]:
        """For the log."""
        grid = self.grid
        what = "affinities, then instances" if self.instances else "classes"
        margins = "blended over" if grid.blend else "without"
        return [f"{what} of {'x'.join(map(str, grid.shape))} voxels of {_nm(grid.voxel_nm)} (z, y, x), "
                f"{prod(grid.factor)} raw voxel{'' if prod(grid.factor) == 1 else 's'} each",
                f"{plural(grid.windows_in_all(self.unit_windows), 'window')} of {'x'.join(map(str, grid.window))} voxels, "
                f"{margins} margins of {'x'.join(map(str, grid.halo))}; {self.amplification:.2f} times those of one unit; "
                f"output at most {count_bytes(self.output_bytes)}; "
                f"{count_bytes(self.unit_bytes)} of memory for a unit beside the model"]


def make_forecast(job: SegmentVolumeJob, grid: PredictionGrid, *, instances: bool, values_per_voxel: int,
                  raw_itemsize: int = 2, context_voxels: int = 0) -> Forecast:
    """The forecast of a job.

    `values_per_voxel`: values alive at once, per voxel of a window, in the model's forward; `raw_itemsize`: bytes of a raw voxel;
    `context_voxels`: voxels that a pixel of the context is the mean of, 0 where no context is read. Raises BadRequest for output
    above max_output_bytes and units above memory_bytes.
    """
    window = prod(w if grid.blend else w + 2 * h for w, h in zip(grid.window, grid.halo, strict=True))
    context = 2 * window * prod(grid.factor) * context_voxels * raw_itemsize  # as read, and mirrored at the volume's border
    component = COMPONENT_BYTES + (MUTEX_BYTES * grid.outputs if job.instances == "mutex" else 0)
    forecast = Forecast(grid, grid.unit_windows(job.unit_windows), instances, job.probabilities,
                        4 * window * values_per_voxel + context, raw_itemsize, component)
    if job.unit_windows is None:
        while forecast.unit_bytes > job.memory_bytes and forecast.unit_windows > 1:
            forecast = replace(forecast, unit_windows=forecast.unit_windows - 1)
    if forecast.output_bytes > job.max_output_bytes:
        raise BadRequest(f"the output would have {count_bytes(forecast.output_bytes)} before compression; the limit is "
                         f"{count_bytes(job.max_output_bytes)}", where="--max-output-bytes",
                         todo="raise the limit, or take a --crop")
    if forecast.unit_bytes > job.memory_bytes:
        raise BadRequest(f"a unit needs about {count_bytes(forecast.unit_bytes)} of memory; an actor may take "
                         f"{count_bytes(job.memory_bytes)} beyond the model", where="--memory-bytes",
                         todo="raise it, or take smaller --unit-windows, --window-voxels or --block-voxels")
    return forecast


def _nm(sizes: Sequence[float]) -> str:
    return (f"{sizes[0]:g}" if len(set(sizes)) == 1 else " x ".join(f"{s:g}" for s in sizes)) + " nm"
