"""How a wide, coarse context guides a UNet on a crop in its middle: tokens to channels, a gate on skips, attention below.

Tokens of three planes stay at their own resolution until they are projected to few channels; a linear map commutes with the
interpolation and the mean of the planes, so this equals projecting fused features of every voxel, which are never made.

Shapes: B batch, C token width, b channels, D channels of the bottom, Q its voxels, K cells of the context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dinoray.vision.decoders.unet3d import VoxelNorm
from dinoray.vision.voxel_grids import Matrices, resample


@dataclass
class PlaneTokens:
    """Tokens of the planes of one kind of crop, and where they go.

    `tokens`: plane -> [B, C, z, y, x] at its own pitch; `matrices`: grid -> plane -> one [B, out, in] per axis (None where
    nothing changes), for each grid that the tokens are wanted on.
    """

    tokens: dict[str, torch.Tensor]
    matrices: dict[str, dict[str, Matrices]]

    def to(self, device: torch.device) -> PlaneTokens:
        """The same on a device."""
        return PlaneTokens({k: v.to(device, non_blocking=True) for k, v in self.tokens.items()},
                           {grid: {k: tuple(m if m is None else m.to(device, non_blocking=True) for m in v)  # type: ignore[misc]
                                   for k, v in planes.items()} for grid, planes in self.matrices.items()})

    def on(self, grid: str, projected: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean over the planes of `projected` (tokens, of any width) on a grid: [B, b, z', y', x']."""
        total: torch.Tensor | None = None
        for name, values in projected.items():
            part = resample(values, self.matrices[grid][name])
            total = part if total is None else total + part
        assert total is not None
        return total / len(projected)


class TokenProjection(nn.Module):
    """C -> b channels for the tokens of each plane, by one linear map."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(dim, channels)

    def forward(self, tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """plane -> [B, C, z, y, x] to plane -> [B, b, z, y, x]."""
        dtype = self.linear.weight.dtype
        return {name: self.linear(x.movedim(1, -1).to(dtype)).movedim(-1, 1) for name, x in tokens.items()}


class ContextGate(nn.Module):
    """Per voxel and channel, how much of a projection of the skip is added to it, decided by the context there:
    g = sigmoid(W2 ReLU(norm(W1 ctx))), out = skip + (W skip) * g."""

    def __init__(self, context_channels: int, channels: int):
        super().__init__()
        hidden = max(4, channels // 4)
        self.squeeze = nn.Conv3d(context_channels, hidden, 1)
        self.norm = VoxelNorm(hidden)
        self.expand = nn.Conv3d(hidden, channels, 1)
        self.project = nn.Conv3d(channels, channels, 1)

    def forward(self, skip: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """skip [B, c, z, y, x], context [B, b, z, y, x] on the same grid -> as skip."""
        gate = torch.sigmoid(self.expand(F.relu(self.norm(self.squeeze(context)))))
        return skip + self.project(skip) * gate


class RelativeBias(nn.Module):
    """Attention bias of each head from where a cell lies relative to a voxel: offsets in units of the context's half side,
    with sines and cosines of `FREQUENCIES` octaves, through a small network."""

    FREQUENCIES = 5

    def __init__(self, heads: int, hidden: int = 64):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 * (1 + 2 * self.FREQUENCIES), hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, heads))

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        """offsets [B, Q, K, 3] -> [B, heads, Q, K]."""
        offsets = offsets.to(self.net[0].weight.dtype)
        angles = torch.cat([offsets * (math.pi * 2**k) for k in range(self.FREQUENCIES)], dim=-1)
        return self.net(torch.cat([offsets, angles.sin(), angles.cos()], dim=-1)).permute(0, 3, 1, 2)


class ContextAttention(nn.Module):
    """Voxels of the bottom look at the cells of the whole context, which may lie far outside of the crop."""

    def __init__(self, channels: int, context_channels: int, heads: int = 4):
        super().__init__()
        width = max(heads * 16, channels // heads * heads)
        self.heads = heads
        self.norm, self.context_norm = nn.LayerNorm(channels), nn.LayerNorm(context_channels)
        self.query = nn.Linear(channels, width)
        self.key_value = nn.Linear(context_channels, 2 * width)
        self.out = nn.Linear(width, channels)
        self.bias = RelativeBias(heads)
        # where all of the context lies outside of the volume, there is still something to look at, and it says nothing
        self.nothing = nn.Parameter(torch.zeros(2, width))

    def forward(self, x: torch.Tensor, context: torch.Tensor, valid: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [B, D, z, y, x]; context [B, b, k, k, k]; valid [B, K] bool; offsets [B, Q, K, 3], from voxel to cell in units of
        the context's half side -> as x."""
        batch, channels = x.shape[:2]
        queries = self.query(self.norm(x.flatten(2).transpose(1, 2)))
        keys, values = self.key_value(self.context_norm(context.flatten(2).transpose(1, 2))).chunk(2, dim=-1)
        keys, values = (torch.cat([t, empty.to(t.dtype).expand(batch, 1, -1)], dim=1)
                        for t, empty in ((keys, self.nothing[0]), (values, self.nothing[1])))
        bias = self.bias(offsets).masked_fill(~valid[:, None, None, :], float("-inf"))
        bias = F.pad(bias, (0, 1))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (queries, keys, values))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        added = self.out(found.transpose(1, 2).flatten(2)).transpose(1, 2)
        return x + added.reshape(batch, channels, *x.shape[2:])


def offsets_to(queries: Sequence[torch.Tensor], cells: Sequence[torch.Tensor], half_side_nm: torch.Tensor) -> torch.Tensor:
    """[B, Q, K, 3]: from each voxel of a grid to each cell of another, along z, y, x, divided by `half_side_nm` [3].

    `queries`, `cells`: for z, y, x the centres [B, n] in nm (float64; the differences are small and become float32).
    """
    def points(axes: Sequence[torch.Tensor]) -> torch.Tensor:
        z, y, x = axes
        grid = (len(z), z.shape[1], y.shape[1], x.shape[1])
        return torch.stack([z[:, :, None, None].expand(grid), y[:, None, :, None].expand(grid),
                            x[:, None, None, :].expand(grid)], dim=-1).flatten(1, 3)

    return ((points(cells)[:, None] - points(queries)[:, :, None]) / half_side_nm).float()
