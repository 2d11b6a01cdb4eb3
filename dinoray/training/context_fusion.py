"""Training of the context-fusion UNet: samples, loss and validation of volumes (dinoray.training.loop does the rest).

A sample is one crop with its labels and context, made by threads. On the device, slices of it go through the frozen backbone where
tokens are wanted and not stored (the extraction), and then through the UNet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dinoray.config.fusion import TrainContextFusionJob
from dinoray.io.volume_grid import Shape
from dinoray.training.parameters import parameter_groups
from dinoray.training.volume_regions import Region
from dinoray.training.volume_samples import CropSample, CropSampler, Planes
from dinoray.training.workers import Workers
from dinoray.vision.affinities import affinities, boundary_weights
from dinoray.vision.backbone import Backbone
from dinoray.vision.crop_features import context_target, crop_tokens, planes_for, space_to_depth
from dinoray.vision.decoders.context_fusion import ContextFusionUNet, FusionInput
from dinoray.vision.fusion_input import FusionShape, context_matrices, context_places, crop_matrices, plane_tokens
from dinoray.vision.volume_metrics import class_scores, confusion
from dinoray.vision.voxel_grids import VoxelGrid
from dinoray.vision.voxel_losses import Pair, affinity_loss, class_loss

SMOOTHING = 0.04
"""Targets of affinities are drawn to 0.5 by this."""


class FusionModel(nn.Module):
    """The backbone, frozen, if there is one, and the UNet."""

    def __init__(self, unet: ContextFusionUNet, backbone: Backbone | None):
        super().__init__()
        self.unet, self.backbone = unet, backbone
        if backbone is not None:
            backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> FusionModel:
        """As usual; the backbone stays as it is."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self


@dataclass(frozen=True)
class Sample:
    """A crop and what is to be learned from it."""

    crop: CropSample
    target: np.ndarray
    """Classes [z, y, x] int64, or affinities [A, z, y, x] uint8."""
    known: np.ndarray
    """Where the target is to be learned, of the same shape (bool)."""
    weights: np.ndarray | None = None
    """Of voxels, for affinities: [z, y, x] float32."""


@dataclass
class Seconds:
    """Where the time of steps went, in s, since it was last asked for."""

    extraction: float = 0.0
    unet: float = 0.0


def new_unet(job: TrainContextFusionJob, *, raw_channels: int, token_dim: int | None) -> ContextFusionUNet:
    """The UNet at its start, the same for the same seed."""
    outputs = len(job.offsets) if job.target == "affinities" else len(job.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = ContextFusionUNet(outputs, raw_channels=raw_channels if job.inputs != "tokens" else 0, token_dim=token_dim,
                                  own_tokens=job.inputs != "raw", fusion=job.fusion, base=job.base_channels, levels=job.levels,
                                  norm=job.norm, upsampling=job.upsampling, dropout=job.dropout,
                                  checkpointing=job.gradient_checkpointing)
    # convolutions on CPU and on tensor cores are faster on channels that lie together
    return model.to(memory_format=torch.channels_last_3d)


class ContextFusionTask:
    """`dinoray.training.loop.Task` of volumes."""

    def __init__(self, job: TrainContextFusionJob, fingerprint: str, model: FusionModel, train: Sequence[Region],
                 validation: Sequence[Region], class_weights: np.ndarray | None = None):
        self.job, self.fingerprint, self.model = job, fingerprint, model
        self.train, self.validation = CropSampler(job, train), CropSampler(job, validation)
        self.factor: Shape = train[0].factor
        self.class_weights = None if class_weights is None else torch.from_numpy(class_weights.astype(np.float32))
        self.shape = FusionShape(job.fusion, job.levels, job.context_cells, job.inputs != "raw")
        self.seconds = Seconds()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model.unet, self.job.learning_rate, self.job.weight_decay)

    # ---------------------------------------------------------------- samples

    def sample(self, index: int) -> Sample:
        return self._with_target(self.train.draw(index))

    def _with_target(self, crop: CropSample) -> Sample:
        job = self.job
        if job.target == "classes":
            return Sample(crop, np.where(crop.known, crop.labels, 0).astype(np.int64), np.ascontiguousarray(crop.known))
        labels, known = np.ascontiguousarray(crop.labels), np.ascontiguousarray(crop.known)
        values, valid = affinities(labels, job.offsets, known)
        weights = None
        if job.boundary_weight > 1:
            size = crop.label_grid.pitch_nm
            weights = boundary_weights(labels, weight=job.boundary_weight, sigma_nm=job.boundary_sigma_voxels * min(size), voxel_nm=size,
                                       known=known)
        return Sample(crop, values, valid, weights)

    # ---------------------------------------------------------------- steps

    def loss(self, samples: list[Sample]) -> Pair:
        logits = self.model.unet(self.prepared([s.crop for s in samples]))
        device = logits.device
        target, known = (torch.from_numpy(np.stack([getattr(s, name) for s in samples])).to(device) for name in ("target", "known"))
        job = self.job
        began = time.perf_counter()
        if job.target == "affinities":
            weights = None if samples[0].weights is None else torch.from_numpy(np.stack([s.weights for s in samples])).to(device)  # type: ignore[misc]
            pair = affinity_loss(logits, target, known, weights=weights, smoothing=SMOOTHING,
                                 gamma=0.0)
        else:
            kind = "focal_dice" if job.loss == "auto" else job.loss
            weights = None if self.class_weights is None else self.class_weights.to(device)
            pair = class_loss(kind, logits, target, known, weights=weights, gamma=job.focal_gamma, alpha=job.tversky[0], beta=job.tversky[1])
        self.seconds.unet += time.perf_counter() - began
        return pair

    def prepared(self, crops: Sequence[CropSample]) -> FusionInput:
        """What the UNet takes, on its device: the extraction."""
        began = time.perf_counter()
        device = next(self.model.unet.parameters()).device
        job, given, first = self.job, FusionInput(), crops[0]
        raw = torch.from_numpy(np.stack([np.ascontiguousarray(c.raw) for c in crops])).to(device)
        if job.inputs != "tokens":
            given.raw = space_to_depth(raw, self.factor)
        if job.inputs != "raw":
            tokens, grids = self._tokens(raw, first.raw_grid, first.label_grid, [c.tokens for c in crops])
            given.tokens = plane_tokens(tokens, [{plane: crop_matrices(grid[plane], c.label_grid) for plane in tokens}
                                            for c, grid in zip(crops, grids, strict=True)])
        if job.fusion != "none":
            assert first.context is not None and first.context_grid is not None
            pixels = torch.from_numpy(np.stack([np.ascontiguousarray(c.context) for c in crops])).to(device)
            targets = [context_target(c.label_grid, c.context_grid) for c in crops]  # type: ignore[arg-type]
            # the tokens' grids differ by where each context lies; one is computed about its own middle, then moved
            tokens, grids = self._tokens(pixels, first.context_grid, targets[0], [c.context_tokens for c in crops])
            moved = [{plane: _moved(g, first.context_grid, c.context_grid) if c.context_tokens is None else g  # type: ignore[arg-type]
                      for plane, g in grid.items()} for c, grid in zip(crops, grids, strict=True)]
            given.context = plane_tokens(tokens, [{plane: context_matrices(grid[plane], c.label_grid, target, self.shape) for plane in tokens}
                                             for c, grid, target in zip(crops, moved, targets, strict=True)])
            context_places([c.label_grid for c in crops], targets, [c.context_inside for c in crops], job.context_cells, given)  # type: ignore[misc]
        given = given.to(device)
        self.seconds.extraction += time.perf_counter() - began
        return given

    def _tokens(self, raw: torch.Tensor, raw_grid: VoxelGrid, target: VoxelGrid, stored: list[Planes | None]
                ) -> tuple[dict[str, torch.Tensor], list[dict[str, VoxelGrid]]]:
        """(plane -> tokens [B, C, z, y, x], per sample plane -> their grid): stored ones, or computed from raw."""
        if stored[0] is not None:
            planes = list(stored[0])
            tokens = {plane: torch.from_numpy(np.stack([np.ascontiguousarray(s[plane][0]) for s in stored])).to(raw.device)  # type: ignore[index]
                      for plane in planes}
            return tokens, [{plane: s[plane][1] for plane in planes} for s in stored]  # type: ignore[index]
        assert self.model.backbone is not None
        with torch.autocast(raw.device.type, enabled=False):
            tokens, grids = crop_tokens(self.model.backbone, raw, raw_grid, target, planes=planes_for(raw_grid),
                                        slice_batch=self.job.slice_batch)
        return tokens, [grids] * len(raw)

    # ---------------------------------------------------------------- validation

    def validate(self, workers: Workers) -> dict[str, float]:
        """Mean loss over fixed, un-augmented crops of the validation regions; of classes also the mean IoU of those that occur."""
        job, total, count = self.job, 0.0, 0.0
        table = np.zeros((len(job.classes),) * 2, np.int64)
        places = workers.share(self._validation_places())
        with ThreadPoolExecutor(job.data_threads, thread_name_prefix="validate") as threads:
            samples = threads.map(lambda place: self._with_target(self.validation.at(*place)), places)
            for sample in samples:
                loss, weight, logits = self._scored(sample)
                total, count = total + loss, count + weight
                if job.target == "classes":
                    table += confusion(logits.argmax(1)[0].cpu().numpy(), sample.target, len(job.classes), sample.known)
        total, count, *cells = workers.total(total, count, *table.ravel().tolist())
        figures = {"loss": total / count}
        if job.target == "classes":
            scores = class_scores(np.array(cells).reshape(table.shape), list(job.classes))
            figures["iou"] = float(np.nanmean([s.iou for s in scores[1:]] or [0.0]))
        return figures

    def _scored(self, sample: Sample) -> tuple[float, float, torch.Tensor]:
        found: list[torch.Tensor] = []
        keep = self.model.unet.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            with torch.autocast(next(self.model.unet.parameters()).device.type, dtype=torch.bfloat16,
                                enabled=self.job.precision == "bfloat16"):
                loss, weight = self.loss([sample])
        finally:
            keep.remove()
        return float(loss), float(weight), found[0]

    def _validation_places(self) -> list[tuple[Region, Shape]]:
        """Crops side by side over the validation regions, evenly thinned to validation_crops."""
        places = []
        for region in self.validation.regions:
            starts = []
            for available, wanted in zip(region.label_grid.shape, self.validation.shape, strict=True):
                spare = available - wanted
                count = -(-available // wanted)
                starts.append([spare // 2] if spare <= 0 else [round(i * spare / (count - 1)) for i in range(count)])
            places += [(region, (z, y, x)) for z in starts[0] for y in starts[1] for x in starts[2]]
        places = [p for p in places if p[0].labels(p[1], self.validation.shape)[1].any()]
        if len(places) > self.job.validation_crops:
            places = [places[i] for i in np.linspace(0, len(places) - 1, self.job.validation_crops).round().astype(int)]
        return places


def _moved(grid: VoxelGrid, have: VoxelGrid, want: VoxelGrid) -> VoxelGrid:
    """A grid that was made for one context, for another of the same shape."""
    return VoxelGrid(grid.shape, tuple(g + b - a for g, a, b in zip(grid.first_nm, have.first_nm, want.first_nm, strict=True)),  # type: ignore[arg-type]
                     grid.pitch_nm)
