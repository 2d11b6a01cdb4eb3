"""From a job and an opened volume to what will be computed: the grid, the units, and what they will cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from dinoray.config import ExtractVolumeJob
from dinoray.errors import BadRequest
from dinoray.io.volume_grid import NORMAL, Triple, VolumeGrid
from dinoray.io.volumes import Volume
from dinoray.memory.budget import micro_batch
from dinoray.slabs import UnitSizes, choose_sizes, fused_units, windows_in_all, windows_once
from dinoray.volume_memory import Mask, Stages, stage_bytes
from dinoray.wording import count_bytes, plural

MOST_ANISOTROPIC = 3.0
"""Voxels that differ by more than this give planes that are mostly interpolation."""
MOST_BATCH = 16
"""Target planes of one micro-batch, at most: a shard holds whole micro-batches."""
MANY_VOXELS = 8
"""Above, a target voxel as long as the volume is noticed: the voxel size may have been given in another unit."""
SMALL_TARGET = 1.0 - 1e-6


@dataclass(frozen=True)
class Forecast:
    """What a plan will compute and write, before anything is."""

    grid: VolumeGrid
    sizes: UnitSizes
    fused: bool
    windows: int
    """Windows of all units."""
    windows_once: int
    """Windows of a run in one unit."""
    slabs: Stages

    @property
    def amplification(self) -> float:
        """Windows of all units over those of a run in one unit."""
        return self.windows / self.windows_once

    @property
    def output_bytes(self) -> int:
        """Bytes of the arrays before compression."""
        return sum(spec.nbytes for spec in self.grid.arrays(fused=self.fused))

    def lines(self) -> list[str]:
        """For the log."""
        grid = self.grid
        arrays = ", ".join(f"{spec.name} {'x'.join(map(str, spec.shape))}" for spec in grid.arrays(fused=self.fused))
        sides = {plane: [grid.plane(plane).lattice(a).window * grid.patch for a in grid.plane(plane).axes] for plane in grid.planes}
        window = ", ".join(f"{plane} {'x'.join(map(str, side))}" for plane, side in sides.items())
        return [f"volume of {'x'.join(map(str, grid.shape))} voxels of {nm(grid.voxel_nm)} (z, y, x); "
                f"target voxel {nm(grid.target_nm)}; arrays of {grid.dim} features: {arrays}",
                f"{plural(self.windows, 'window')} ({window} px), {self.amplification:.2f} times those of one unit; output at most "
                f"{count_bytes(self.output_bytes)}; {count_bytes(self.slabs.smallest)} of memory for a slab"]


def nm(sizes: Triple) -> str:
    """`40 x 4 x 4 nm`, or `8 nm` for equal ones."""
    return (f"{sizes[0]:g}" if len(set(sizes)) == 1 else " x ".join(f"{s:g}" for s in sizes)) + " nm"


def make_grid(job: ExtractVolumeJob, volume: Volume, *, patch: int, dim: int, token_budget: int,
              say: Callable[[str], None] = lambda line: None) -> VolumeGrid:
    """The geometry of a job on a volume. `say` gets what was decided for the user. Raises BadRequest."""
    voxel = volume.voxel_size_nm
    for name in ("window_px", "halo_px"):
        if getattr(job, name) % patch:
            value = getattr(job, name)
            raise BadRequest(f"{name}={value} is not a multiple of the patch size {patch}", where="--" + name.replace("_", "-"),
                             todo=f"use {max(patch, value // patch * patch)} or {(value // patch + 1) * patch}")
    target = _target(job, voxel)
    for axis, name in enumerate("zyx"):
        if volume.shape[axis] > MANY_VOXELS and target[axis] >= volume.shape[axis] * voxel[axis] * SMALL_TARGET:
            say(f"a target voxel is {target[axis]:g} nm along {name}, all {volume.shape[axis]} voxels are "
                f"{volume.shape[axis] * voxel[axis]:g} nm: is --voxel-size in nm?")
    planes = _planes(job, voxel, say)
    grid = VolumeGrid(volume.shape, voxel, volume.translation_nm, target, patch, planes, job.window_px, job.halo_px, 1, dim,
                      job.dense_dtype, "clamp" if job.slice_sampling == "linspace" else "extrapolate")
    # windows may be smaller than asked for, and then more of them fit; 5: CLS and registers
    tokens = max(prod(grid.plane(p).lattice(a).window for a in grid.plane(p).axes) for p in planes)
    most, batch = min(MOST_BATCH, micro_batch(token_budget, tokens + 5)), 1
    deepest = max(grid.plane(p).shape[NORMAL[p]] for p in planes)
    while batch * 2 <= most and batch < deepest:
        batch *= 2
    grid = replace(grid, micro_batch=batch)
    if job.scaling == "slice":
        for plane in map(grid.plane, planes):
            if any(plane.lattice(a).count > 1 for a in plane.axes):
                raise BadRequest(f"scaling=slice needs each slice in one window; a {plane.name} slice takes "
                                 f"{' x '.join(str(plane.lattice(a).count) for a in plane.axes)} of {job.window_px} px",
                                 where="--scaling", todo="use the default, scaling=volume, or a larger --window-px")
    return grid


def _target(job: ExtractVolumeJob, voxel: Triple) -> Triple:
    """The target voxel: as asked for, else 4 times the finest voxel size, and no finer than the coarsest."""
    given = job.voxel_size
    if given is None:
        return (max(4 * min(voxel), max(voxel)),) * 3
    target: Triple = given * 3 if len(given) == 1 else given  # type: ignore[assignment]
    if any(t < SMALL_TARGET * min(voxel) for t in target):
        raise BadRequest(f"a target voxel of {nm(target)} is finer than the raw one of {nm(voxel)}", where="--voxel-size",
                         todo="give a target of at least the raw voxel size (default: 4 times)")
    return target


def _planes(job: ExtractVolumeJob, voxel: Triple, say: Callable[[str], None]) -> tuple[str, ...]:
    if job.planes != "auto":
        return job.plane_names()
    if max(voxel) <= MOST_ANISOTROPIC * min(voxel) * (1 + 1e-9):
        return ("xy", "xz", "yz")
    coarsest = max(range(3), key=lambda axis: voxel[axis])
    plane = next(name for name, normal in NORMAL.items() if normal == coarsest)
    say(f"voxels of {nm(voxel)} differ by more than {MOST_ANISOTROPIC:g}x: only the {plane} plane is used "
        "(--planes xy,xz,yz for all three)")
    return (plane,)


def stages_of(job: ExtractVolumeJob, grid: VolumeGrid, sizes: UnitSizes, volume: Volume, mask: Volume | None, *,
              threads: int) -> Stages:
    """What the slabs of a job take in memory."""
    itemsize = volume.dtype.itemsize
    return stage_bytes(grid, sizes, job.slice_sampling, voxel_bytes=itemsize,
                       chunks=volume.chunks, num_chunks=volume.num_chunks, threads=max(1, threads),
                       margin_px=0 if job.foreground is None else grid.patch,
                       mask=None if mask is None else Mask(mask.voxel_size_nm, mask.shape, mask.dtype.itemsize),
                       fused=job.output == "fused")


def make_forecast(job: ExtractVolumeJob, grid: VolumeGrid, volume: Volume, mask: Volume | None = None, *, threads: int) -> Forecast:
    """What the job will compute and write. Raises BadRequest above `max_output_bytes` and `memory_bytes`."""
    sizes = choose_sizes(grid, job.unit_windows, job.unit_planes)
    forecast = Forecast(grid, sizes, job.output == "fused", windows_in_all(grid, sizes), windows_once(grid),
                        stages_of(job, grid, sizes, volume, mask, threads=threads))
    if forecast.output_bytes > job.max_output_bytes:
        raise BadRequest(f"the output would have {count_bytes(forecast.output_bytes)} before compression; the limit is "
                         f"{count_bytes(job.max_output_bytes)}", where="--max-output-bytes",
                         todo="raise the limit, or take a coarser --voxel-size, --output planes, fewer --planes or a --crop")
    if forecast.slabs.smallest > job.memory_bytes:
        raise _too_much_memory(job, forecast)
    return forecast


def _too_much_memory(job: ExtractVolumeJob, forecast: Forecast) -> BadRequest:
    """The refusal of slabs above `memory_bytes`: what of them is large, and what makes that smaller."""
    slabs, remedies = forecast.slabs, ["raise it"]
    what = f"one slab needs about {count_bytes(slabs.smallest)} of memory; an actor may take {count_bytes(job.memory_bytes)} " \
        "beyond the model"
    chunks_dominate = slabs.bytes_of_chunks > slabs.smallest / 2
    if chunks_dominate:
        what += f": a chunk of the source has {count_bytes(slabs.chunk_bytes)}, {slabs.planes.chunks} " \
            f"{'is' if slabs.planes.chunks == 1 else 'are'} in work at once"
        remedies.append("write the volume again with smaller chunks (64 voxels a side, say)")
    if not chunks_dominate or slabs.bytes_of_chunks <= job.memory_bytes:
        smaller = f"smaller units (--unit-windows; now {forecast.sizes.windows}), " if forecast.sizes.windows > 1 else ""
        remedies.append(f"take {smaller}a smaller --window-px or a coarser --voxel-size")
    return BadRequest(what, where="--memory-bytes", todo=", or ".join(remedies))


def count_units(forecast: Forecast) -> tuple[int, int]:
    """(units of planes, units of the fused array)."""
    return sum(1 for _ in forecast.sizes.units(forecast.grid)), sum(1 for _ in fused_units(forecast.grid)) if forecast.fused else 0
