"""The context-fusion model as a whole: crops of volumes in memory -> logits. Backbone, placement of tokens, UNet.

`prepare` is the extraction (slices through the frozen backbone, or stored tokens, and the matrices that place them), `unet` the
rest; they are apart so that each can be timed, and its memory forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from dinoray.vision.backbone import Backbone
from dinoray.vision.crop_features import context_target, crop_tokens, planes_for, space_to_depth
from dinoray.vision.decoders.context_fusion import ContextFusionUNet, FusionInput
from dinoray.vision.fusion_input import FusionShape, context_matrices, context_places, crop_matrices, plane_tokens
from dinoray.vision.voxel_grids import Shape, VoxelGrid

Planes = dict[str, tuple[np.ndarray, VoxelGrid]]
"""plane -> (tokens [C, z, y, x], their grid about the crop's centre)."""


@dataclass(frozen=True)
class VolumeCrop:
    """What a model gets of one place. Lengths in nm from the crop's centre; `raw` float32 [z, y, x], about 0..1, on `raw_grid`; the
    `context` likewise, `context_inside` per axis where it holds some of the volume; stored tokens where there are any."""

    target_grid: VoxelGrid
    """Voxels that are predicted."""
    raw: np.ndarray
    raw_grid: VoxelGrid
    context: np.ndarray | None = None
    context_grid: VoxelGrid | None = None
    context_inside: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    tokens: Planes | None = None
    context_tokens: Planes | None = None


class FusionRecord(BaseModel):
    """The architecture: what a checkpoint needs to build the same model again."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    outputs: int
    """Logits per voxel."""
    factor: tuple[int, int, int]
    """Raw voxels per predicted voxel (z, y, x)."""
    inputs: Literal["raw", "tokens", "both"] = "both"
    """What the UNet sees of the crop."""
    fusion: Literal["full", "gate", "attention", "index_gate", "none"] = "full"
    """How the context acts."""
    context_cells: int = 8
    """Cells a side that the bottom attends to."""
    base: int = 32
    """Channels at full resolution."""
    levels: int = 4
    """Halvings."""
    norm: Literal["layer", "group", "instance", "batch", "none"] = "layer"
    """Kind of its norms."""
    upsampling: Literal["trilinear", "learned"] = "trilinear"
    """Of the decoder."""
    dropout: float = 0.0
    """In training."""

    @property
    def uses_backbone(self) -> bool:
        """Whether anything goes through DINOv3."""
        return self.inputs != "raw" or self.fusion != "none"

    @property
    def shape(self) -> FusionShape:
        """What of it decides on inputs."""
        return FusionShape(self.fusion, self.levels, self.context_cells, self.inputs != "raw")


class FusionModel(nn.Module):
    """The backbone, frozen, if there is one, and the UNet."""

    def __init__(self, unet: ContextFusionUNet, backbone: Backbone | None, record: FusionRecord, *, slice_batch: int = 32):
        """`slice_batch`: slices that go through the backbone at once."""
        super().__init__()
        self.unet, self.backbone, self.record, self.slice_batch = unet, backbone, record, slice_batch
        if backbone is not None:
            backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FusionModel:
        """As usual; the backbone stays in eval mode."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    def forward(self, crops: Sequence[VolumeCrop]) -> torch.Tensor:
        """Crops of one size -> logits [B, outputs, z, y, x] float32."""
        return self.unet(self.prepare(crops))

    def prepare(self, crops: Sequence[VolumeCrop]) -> FusionInput:
        """What the UNet takes, on its device."""
        record, given, first = self.record, FusionInput(), crops[0]
        device = next(self.unet.parameters()).device
        raw = _stacked([c.raw for c in crops], device)
        if record.inputs != "tokens":
            given.raw = space_to_depth(raw, record.factor)
        if record.inputs != "raw":
            tokens, grids = self._tokens(raw, first.raw_grid, first.target_grid, [c.tokens for c in crops])
            given.tokens = plane_tokens(tokens, [{plane: crop_matrices(grid[plane], c.target_grid) for plane in tokens}
                                                 for c, grid in zip(crops, grids, strict=True)])
        if record.fusion != "none":
            self._add_context(crops, given, device)
        return given.to(device)

    def _add_context(self, crops: Sequence[VolumeCrop], given: FusionInput, device: torch.device) -> None:
        wide = [_needed(c.context_grid) for c in crops]
        targets = [context_target(c.target_grid, grid) for c, grid in zip(crops, wide, strict=True)]
        stored = [c.context_tokens for c in crops]
        pixels = None if all(s is not None for s in stored) else _stacked([_needed(c.context) for c in crops], device)
        # contexts lie differently about their crops' centres: tokens are computed in the frame of the first, their grids moved
        tokens, grids = self._tokens(pixels, wide[0], targets[0], stored)
        placed = [{plane: g if c.context_tokens is not None else _moved(g, wide[0], own) for plane, g in grid.items()}
                  for c, grid, own in zip(crops, grids, wide, strict=True)]
        given.context = plane_tokens(tokens, [
            {plane: context_matrices(grid[plane], c.target_grid, target, self.record.shape) for plane in tokens}
            for c, grid, target in zip(crops, placed, targets, strict=True)])
        context_places([c.target_grid for c in crops], targets, [_needed(c.context_inside) for c in crops],
                       self.record.context_cells, given)

    def _tokens(self, raw: torch.Tensor | None, raw_grid: VoxelGrid, target: VoxelGrid, stored: list[Planes | None]
                ) -> tuple[dict[str, torch.Tensor], list[dict[str, VoxelGrid]]]:
        """(plane -> tokens [B, C, z, y, x], per crop plane -> their grid): stored ones, or computed from raw."""
        held = [s for s in stored if s is not None]
        if held:
            planes = list(held[0])
            device = next(self.unet.parameters()).device
            return ({plane: _stacked([s[plane][0] for s in held], device) for plane in planes},
                    [{plane: s[plane][1] for plane in planes} for s in held])
        raw = _needed(raw)
        with torch.autocast(raw.device.type, enabled=False):
            tokens, grids = crop_tokens(_needed(self.backbone), raw, raw_grid, target, planes=planes_for(raw_grid),
                                        slice_batch=self.slice_batch)
        return tokens, [grids] * len(raw)


def new_model(record: FusionRecord, backbone: Backbone | None, *, seed: int = 0, checkpointing: bool = False,
              slice_batch: int = 32) -> FusionModel:
    """A model with a freshly initialised UNet, the same for the same seed. Raises BadRequest for records that see nothing."""
    raw_channels = int(np.prod(record.factor)) if record.inputs != "tokens" else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = ContextFusionUNet(record.outputs, raw_channels=raw_channels,
                                 token_dim=None if backbone is None else backbone.config.dim,
                                 own_tokens=record.inputs != "raw", fusion=record.fusion, base=record.base, levels=record.levels,
                                 norm=record.norm, upsampling=record.upsampling, dropout=record.dropout,
                                 checkpointing=checkpointing)
    # convolutions on CPU and on tensor cores are faster on channels that lie together
    return FusionModel(unet.to(memory_format=torch.channels_last_3d), backbone, record, slice_batch=slice_batch)


def _stacked(arrays: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.ascontiguousarray(a) for a in arrays])).to(device, non_blocking=True)


def _moved(grid: VoxelGrid, have: VoxelGrid, want: VoxelGrid) -> VoxelGrid:
    """A grid that was made for one context, for another of the same shape."""
    first = tuple(g + b - a for g, a, b in zip(grid.first_nm, have.first_nm, want.first_nm, strict=True))
    return VoxelGrid(grid.shape, first, grid.pitch_nm)  # type: ignore[arg-type]


def _needed(value):  # noqa: ANN001, ANN202 - as given
    if value is None:
        raise ValueError("the model looks at a context or at tokens, which the crop has not")
    return value


__all__ = ["FusionModel", "FusionRecord", "Planes", "Shape", "VolumeCrop", "new_model"]
