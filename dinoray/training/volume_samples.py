"""Samples of volumes: a crop at a place that is drawn by the sample's number, its labels, and the wider context around its centre.

Grids are kept about the crop's centre in nm, so that turning a sample turns all that belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dinoray.config.fusion import TrainContextFusionJob
from dinoray.errors import BadRequest, ItemError, SystemicError
from dinoray.io.volume_grid import Shape, Triple
from dinoray.training.sampling import generator, pick
from dinoray.training.volume_augmentation import spoil
from dinoray.training.volume_regions import Region
from dinoray.training.volume_turns import Turn, turns
from dinoray.vision.fusion_model import Planes, VolumeCrop
from dinoray.vision.stored_tokens import StoredTokens
from dinoray.vision.voxel_grids import VoxelGrid


@dataclass(frozen=True)
class CropSample:
    """A crop with its labels: `labels`, `known` [z, y, x] on the crop's target grid."""

    crop: VolumeCrop
    labels: np.ndarray
    known: np.ndarray

    def turned(self, turn: Turn) -> CropSample:
        """The sample turned as a whole."""
        crop = self.crop
        return CropSample(replace(
            crop, target_grid=turn.grid(crop.target_grid), raw=turn.array(crop.raw), raw_grid=turn.grid(crop.raw_grid),
            context=None if crop.context is None else turn.array(crop.context),
            context_grid=None if crop.context_grid is None else turn.grid(crop.context_grid),
            context_inside=None if crop.context_inside is None else turn.axes(crop.context_inside),
            tokens=None if crop.tokens is None else turn.tokens(crop.tokens),
            context_tokens=None if crop.context_tokens is None else turn.tokens(crop.context_tokens)),
            turn.array(self.labels), turn.array(self.known))


class CropSampler:
    """Draws crops of regions: f(seed, index), for any number of workers."""

    def __init__(self, job: TrainContextFusionJob, regions: Sequence[Region]):
        """Raises BadRequest for regions that no crop fits."""
        self.job, self.regions, self.shape = job, regions, job.crop_shape
        for region in regions:
            short = [a for a in range(3) if 2 * region.label_grid.shape[a] < self.shape[a]]
            if short:
                raise BadRequest(f"a labelled region of {'x'.join(map(str, region.label_grid.shape))} voxels is not half as wide "
                                 f"as a crop of {'x'.join(map(str, self.shape))}", where=region.source.labels,
                                 todo="choose smaller crop_voxels or larger regions")
        weights = np.array([region.source.weight for region in regions])
        self._shares = np.cumsum(weights) / weights.sum()
        sizes = [size for r in regions for size in (r.raw_grid.pitch_nm, r.label_grid.pitch_nm)]
        self.turns = turns(job.augmentation.turns, self.shape, sizes)

    def draw(self, index: int) -> CropSample:
        """Sample number `index`, augmented. Raises SystemicError, also when no place satisfies the filters."""
        rng = generator(self.job.seed, index)
        region, start, turn = self._drawn(rng)
        sample = self.at(region, start)
        crop = sample.crop
        raw, context = spoil(crop.raw, crop.raw_grid, crop.context, crop.context_grid, self.job.augmentation, rng)
        return replace(sample, crop=replace(crop, raw=raw, context=context)).turned(turn)

    def place(self, index: int) -> tuple[Region, Shape]:
        """Where sample number `index` lies. Raises SystemicError when no place satisfies the filters."""
        return self._drawn(generator(self.job.seed, index))[:2]

    def _drawn(self, rng: np.random.Generator) -> tuple[Region, Shape, Turn]:
        region = self.regions[pick(rng, self._shares)]
        turn = self.turns[int(rng.random() * len(self.turns))]
        return region, self._place(region, rng), turn

    def at(self, region: Region, start: Shape) -> CropSample:
        """The crop whose first label voxel is `start`, as it is. Raises SystemicError."""
        job = self.job
        labels, known = region.labels(start, self.shape)
        crop = region.label_grid.part(start, self.shape)
        centre = crop.centre_nm
        raw = region.raw(start, self.shape).values
        fine: Triple = tuple(g / f for g, f in zip(crop.pitch_nm, region.factor, strict=True))  # type: ignore[assignment]
        found = VolumeCrop(centred(self.shape, crop.pitch_nm), raw, centred(raw.shape, fine))  # type: ignore[arg-type]
        if region.tokens is not None:
            found = replace(found, tokens=_stored(region.tokens, centre, found.target_grid))
        if job.fusion == "none":
            return CropSample(found, labels, known)
        pixels = tuple(n * f for n, f in zip(self.shape, region.factor, strict=True))
        values, inside, grid = region.context(centre, pixels, read=region.context_tokens is None)  # type: ignore[arg-type]
        found = replace(found, context=values, context_grid=about(grid, centre), context_inside=inside)  # type: ignore[arg-type]
        if region.context_tokens is not None:
            found = replace(found, context_tokens=_stored(region.context_tokens, centre, about(grid, centre)))
        return CropSample(found, labels, known)

    def _place(self, region: Region, rng: np.random.Generator) -> Shape:
        """A place whose labels satisfy the filters. Raises SystemicError after max_attempts."""
        job, why = self.job, ""
        places = rng.random((job.max_attempts, 3))
        for drawn in places:
            start = tuple(self._start(n, c, float(u)) for n, c, u in zip(region.label_grid.shape, self.shape, drawn, strict=True))
            labels, known = region.labels(start, self.shape)  # type: ignore[arg-type]
            why = self._refused(labels, known)
            if not why:
                return start  # type: ignore[return-value]
        raise SystemicError(f"none of {job.max_attempts} places is fit for training; the last one has {why}",
                            where=region.source.labels,
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


def _stored(tokens: StoredTokens, centre: Triple, target: VoxelGrid) -> Planes:
    try:
        return tokens.around(centre, target)
    except ItemError as error:
        raise SystemicError(f"stored tokens cannot be used: {error.what}", where=error.where, todo=error.todo) from error


def centred(shape: Shape, pitch_nm: Triple) -> VoxelGrid:
    """A grid whose middle is the origin."""
    return VoxelGrid(shape, tuple(-(n - 1) / 2 * p for n, p in zip(shape, pitch_nm, strict=True)), pitch_nm)  # type: ignore[arg-type]


def about(grid: VoxelGrid, centre_nm: Triple) -> VoxelGrid:
    """The same grid with its positions counted from a place."""
    return VoxelGrid(grid.shape, tuple(f - c for f, c in zip(grid.first_nm, centre_nm, strict=True)), grid.pitch_nm)  # type: ignore[arg-type]
