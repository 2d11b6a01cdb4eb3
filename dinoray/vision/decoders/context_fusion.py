"""The context-fusion UNet: raw voxels and three-plane tokens of a crop, guided by tokens of a wider crop around its centre.

Every input can be switched off: without raw the UNet sees tokens only, without tokens raw only, without a context it is the
plain UNet. `fusion` says how the context acts:

- `full`: gates on the skips by the part of the context that covers the crop, brought to its grid in nanometres, and attention
  of the bottom to the whole context;
- `gate`, `attention`: one of the two;
- `index_gate`: the original's gate, which takes voxel (i, j, k) of the context for voxel (i, j, k) of the crop. It is wrong
  wherever the two have other voxel sizes, and is kept for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dinoray.errors import BadRequest
from dinoray.vision.decoders.context import ContextAttention, ContextGate, PlaneTokens, TokenProjection, offsets_to
from dinoray.vision.decoders.unet3d import UNet3D

FUSIONS = ("full", "gate", "attention", "index_gate", "none")
CROP, CELLS = "crop", "cells"
"""Names of the grids that tokens are wanted on: the crop's own (level l of the skips: `crop/l`), the context's cells."""


def skip_grid(level: int) -> str:
    """The name of the grid of a skip."""
    return f"{CROP}/{level}"


@dataclass
class FusionInput:
    """A batch of crops of one size.

    `raw` [B, r, Z, Y, X]: r raw voxels per label voxel (space-to-depth where raw is finer); `tokens` of the crop, with the grid
    `crop`; `context` tokens with the grids `crop/0`.. (of the crop padded to the UNet's multiple) and `cells`.
    `context_valid` [B, K]: cells that hold some of the volume.
    `crop_nm`, `cells_nm`: for z, y, x the centres [B, n] of label voxels and of cells, float64; `half_side_nm` [3] of the context.
    """

    raw: torch.Tensor | None = None
    tokens: PlaneTokens | None = None
    context: PlaneTokens | None = None
    context_valid: torch.Tensor | None = None
    crop_nm: tuple[torch.Tensor, ...] = ()
    cells_nm: tuple[torch.Tensor, ...] = ()
    half_side_nm: torch.Tensor | None = None

    def to(self, device: torch.device) -> FusionInput:
        """The same on a device."""
        def moved(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return FusionInput(moved(self.raw), self.tokens and self.tokens.to(device), self.context and self.context.to(device),
                           moved(self.context_valid), tuple(x.to(device) for x in self.crop_nm),
                           tuple(x.to(device) for x in self.cells_nm), moved(self.half_side_nm))


class ContextFusionUNet(nn.Module):
    """FusionInput -> logits [B, outputs, Z, Y, X] float32."""

    def __init__(self, outputs: int, *, raw_channels: int = 1, token_dim: int | None = None, own_tokens: bool = True,
                 fusion: str = "full", base: int = 32, levels: int = 4, norm: str = "layer", upsampling: str = "trilinear",
                 dropout: float = 0.0, checkpointing: bool = False, heads: int = 4):
        """`raw_channels`: r, 0 for none. `token_dim`: C of the backbone, None without one; `own_tokens`: whether the crop's own
        tokens are looked at (a context always is tokens). Raises BadRequest for nothing to look at."""
        super().__init__()
        if fusion not in FUSIONS:
            raise BadRequest(f"no fusion is called {fusion!r}", where="fusion", todo=f"one of {', '.join(FUSIONS)}")
        own_tokens = own_tokens and token_dim is not None
        if not raw_channels and not own_tokens:
            raise BadRequest("neither raw voxels nor tokens are given to the UNet", where="inputs", todo="use raw, tokens or both")
        if fusion != "none" and token_dim is None:
            raise BadRequest("a context is made of tokens", where="fusion", todo="use fusion=none without a backbone")
        self.fusion, self.raw_channels = fusion, raw_channels
        self.unet = UNet3D(base, outputs, base=base, levels=levels, norm=norm, upsampling=upsampling, dropout=dropout,
                           checkpointing=checkpointing)
        self.raw_in = nn.Conv3d(raw_channels, base, 1) if raw_channels else None
        self.token_in = TokenProjection(token_dim, base) if own_tokens else None  # type: ignore[arg-type]
        self.gates, self.attention, self.gate_in, self.cell_in = None, None, None, None
        if self.gated:
            self.gate_in = TokenProjection(token_dim, base)  # type: ignore[arg-type]
            self.gates = nn.ModuleList(ContextGate(base, width) for width in self.unet.widths[:-1])
        if self.attends:
            width = max(64, 2 * base)
            self.cell_in = TokenProjection(token_dim, width)  # type: ignore[arg-type]
            self.attention = ContextAttention(self.unet.widths[-1], width, heads)

    @property
    def gated(self) -> bool:
        """Whether the skips are gated."""
        return self.fusion in ("full", "gate", "index_gate")

    @property
    def attends(self) -> bool:
        """Whether the bottom attends to the context."""
        return self.fusion in ("full", "attention")

    def forward(self, given: FusionInput) -> torch.Tensor:
        """Raises ValueError when an input that the model has weights for is missing."""
        parts = []
        if self.raw_in is not None:
            parts.append(self.raw_in(_needed(given.raw, "raw").to(self.raw_in.weight.dtype)))
        if self.token_in is not None:
            tokens = _needed(given.tokens, "tokens")
            parts.append(tokens.on(CROP, self.token_in(tokens.tokens)))
        x = sum(parts[1:], start=parts[0])
        shape = x.shape[2:]
        skips, bottom = self.unet.encode(self.unet.first(self.unet.padded(x)))
        if self.gated:
            context = _needed(given.context, "context")
            projected = self.gate_in(context.tokens)  # type: ignore[misc]
            for level, gate in enumerate(self.gates):  # type: ignore[arg-type]
                skips[level] = gate(skips[level], context.on(skip_grid(level), projected))
        if self.attends:
            bottom = self._attend(bottom, given)
        return self.unet.decode(bottom, skips)[(..., *(slice(n) for n in shape))]

    def _attend(self, bottom: torch.Tensor, given: FusionInput) -> torch.Tensor:
        context = _needed(given.context, "context")
        cells = context.on(CELLS, self.cell_in(context.tokens))  # type: ignore[misc]
        # centres of the bottom's voxels, those of the padding included
        multiple, at = self.unet.multiple, []
        for axis, centres in enumerate(given.crop_nm):
            pitch = (centres[:, -1:] - centres[:, :1]) / max(1, centres.shape[1] - 1)
            steps = torch.arange(bottom.shape[2 + axis], device=centres.device, dtype=centres.dtype)
            at.append(centres[:, :1] + pitch * ((steps + 0.5) * multiple - 0.5))
        offsets = offsets_to(at, given.cells_nm, _needed(given.half_side_nm, "half_side_nm"))
        return self.attention(bottom, cells, _needed(given.context_valid, "context_valid"), offsets)  # type: ignore[misc]


def _needed(value, name: str):  # noqa: ANN001, ANN202 - as given
    if value is None:
        raise ValueError(f"the model needs `{name}`, which the input has not")
    return value
