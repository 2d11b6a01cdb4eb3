"""Samples of volumes: a crop at a place that is drawn by the sample's number, its labels, and the wider context around its centre.

Grids are kept about the crop's centre in nm, so that turning a sample turns all that belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dinoray.config.fusion import TrainContextFusionJob
from dinoray.errors import BadRequest
from dinoray.io.volume_grid import Shape, Triple
from dinoray.training.sampling import generator, pick
from dinoray.training.volume_augmentation import spoil
from dinoray.training.volume_regions import Region
from dinoray.training.volume_turns import Turn, turns
from dinoray.vision.voxel_grids import VoxelGrid

Planes = dict[str, tuple[np.ndarray, VoxelGrid]]
"""plane -> (tokens [C, z, y, x], their grid about the crop's centre)."""


@dataclass(frozen=True)
class CropSample:
    """Lengths in nm from the crop's centre. `labels`, `known` [z, y, x] on `label_grid`; `raw` float32 about 0..1 on `raw_grid`;
    `context` the same around it, `context_inside` per axis; stored tokens where there are any."""

    labels: np.ndarray
    known: np.ndarray
    label_grid: VoxelGrid
    raw: np.ndarray
    raw_grid: VoxelGrid
    context: np.ndarray | None = None
    context_grid: VoxelGrid | None = None
    context_inside: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    tokens: Planes | None = None
    context_tokens: Planes | None = None

    def turned(self, turn: Turn) -> CropSample:
        """The sample turned as a whole."""
        return replace(
            self, labels=turn.array(self.labels), known=turn.array(self.known), label_grid=turn.grid(self.label_grid),
            raw=turn.array(self.raw), raw_grid=turn.grid(self.raw_grid),
            context=None if self.context is None else turn.array(self.context),
            context_grid=None if self.context_grid is None else turn.grid(self.context_grid),
            context_inside=None if self.context_inside is None else turn.axes(self.context_inside),
            tokens=None if self.tokens is None else turn.tokens(self.tokens),
            context_tokens=None if self.context_tokens is None else turn.tokens(self.context_tokens))


class CropSampler:
    """Draws crops of regions: f(seed, index), for any number of workers."""

    def __init__(self, job: TrainContextFusionJob, regions: Sequence[Region]):
        """Raises BadRequest for regions that no crop fits."""
        self.job, self.regions, self.shape = job, regions, job.crop_shape
        for region in regions:
            short = [a for a in range(3) if 2 * region.label_grid.shape[a] < self.shape[a]]
            if short:
                raise BadRequest(f"a labelled region of {'x'.join(map(str, region.label_grid.shape))} voxels is not half as wide as a "
                                 f"crop of {'x'.join(map(str, self.shape))}", where=region.source.labels,
                                 todo="choose smaller crop_voxels or larger regions")
        weights = np.array([region.source.weight for region in regions])
        self._shares = np.cumsum(weights) / weights.sum()
        sizes = [size for r in regions for size in (r.raw_grid.pitch_nm, r.label_grid.pitch_nm)]
        self.turns = turns(job.augmentation.turns, self.shape, sizes)

    def draw(self, index: int) -> CropSample:
        """Sample number `index`, augmented. Raises BadRequest when no place satisfies the filters, SystemicError."""
        rng = generator(self.job.seed, index)
        region = self.regions[pick(rng, self._shares)]
        turn = self.turns[int(rng.random() * len(self.turns))]
        sample = self.at(region, self._place(region, rng))
        raw, context = spoil(sample.raw, sample.raw_grid, sample.context, sample.context_grid, self.job.augmentation, rng)
        return replace(sample, raw=raw, context=context).turned(turn)

    def at(self, region: Region, start: Shape) -> CropSample:
        """The crop whose first label voxel is `start`, as it is. Raises SystemicError."""
        job = self.job
        labels, known = region.labels(start, self.shape)
        crop = region.label_grid.part(start, self.shape)
        centre = crop.centre_nm
        raw = region.raw(start, self.shape).values
        fine: Triple = tuple(g / f for g, f in zip(crop.pitch_nm, region.factor, strict=True))  # type: ignore[assignment]
        raw_grid = centred(raw.shape, fine)  # type: ignore[arg-type]
        sample = CropSample(labels, known, centred(self.shape, crop.pitch_nm), raw, raw_grid)
        if job.fusion == "none":
            return sample
        pixels = tuple(n * f for n, f in zip(self.shape, region.factor, strict=True))
        piece, grid = region.context(centre, pixels)  # type: ignore[arg-type]
        return replace(sample, context=piece.values, context_grid=about(grid, centre), context_inside=piece.inside)

    def _place(self, region: Region, rng: np.random.Generator) -> Shape:
        """A place whose labels satisfy the filters. Raises BadRequest after max_attempts."""
        job, why = self.job, ""
        places = rng.random((job.max_attempts, 3))
        for drawn in places:
            start = tuple(self._start(n, c, float(u)) for n, c, u in zip(region.label_grid.shape, self.shape, drawn, strict=True))
            labels, known = region.labels(start, self.shape)  # type: ignore[arg-type]
            why = self._refused(labels, known)
            if not why:
                return start  # type: ignore[return-value]
        raise BadRequest(f"none of {job.max_attempts} places is fit for training; the last one has {why}", where=region.source.labels,
                         todo="lower min_known, min_foreground or min_ids, or choose a region with more in it")

    @staticmethod
    def _start(available: int, wanted: int, drawn: float) -> int:
        spare = available - wanted
        return spare // 2 if spare < 0 else min(int(drawn * (spare + 1)), spare)

    def _refused(self, labels: np.ndarray, known: np.ndarray) -> str:
        job, count = self.job, int(known.sum())
        if count < job.min_known * known.size or not count:
            return f"{count / known.size:.1%} known voxels (min_known {job.min_known:.1%})"
        if job.min_foreground:
            share = float(((labels != 0) & known).sum() / count)
            if share < job.min_foreground:
                return f"{share:.1%} foreground (min_foreground {job.min_foreground:.1%})"
        if job.min_ids:
            ids = len(np.unique(labels[known]))
            if ids < job.min_ids:
                return f"{ids} different labels (min_ids {job.min_ids})"
        return ""


def centred(shape: Shape, pitch_nm: Triple) -> VoxelGrid:
    """A grid whose middle is the origin."""
    return VoxelGrid(shape, tuple(-(n - 1) / 2 * p for n, p in zip(shape, pitch_nm, strict=True)), pitch_nm)  # type: ignore[arg-type]


def about(grid: VoxelGrid, centre_nm: Triple) -> VoxelGrid:
    """The same grid with its positions counted from a place."""
    return VoxelGrid(grid.shape, tuple(f - c for f, c in zip(grid.first_nm, centre_nm, strict=True)), grid.pitch_nm)  # type: ignore[arg-type]
