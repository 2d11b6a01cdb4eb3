"""3D UNet on voxels: pooled encoder, bottleneck, decoder with skips (Ronneberger et al. 2015; Çiçek et al. 2016).

    input   1x1x1: in_channels -> b                                      n^3
    enc l   two 3x3x3 convolutions, 2^l b channels, then max-pool 2      n^3 .. (n / 2^(levels-1))^3
    bottom  two convolutions, 2^levels b channels                        (n / 2^levels)^3
    dec l   upsampled by 2, the skip of enc l beside it, two convolutions to 2^l b channels
    head    1x1x1 -> outputs, float32

Shapes: B batch, Z, Y, X any (padded at their far ends to multiples of 2^levels, and cut again). With the default norm a voxel
depends on what lies within `receptive_radius` voxels of it and on nothing else, so blocks whose origins are multiples of
2^levels and whose halo is that wide give what the whole volume gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dinoray.errors import BadRequest

NORMS = {
    "layer": "",
    "none": "",
    "group": "a block of a volume differs from the whole (statistics over the crop)",
    "instance": "a block of a volume differs from the whole (statistics over the crop)",
    "batch": "workers and micro-batches change the training (statistics over the micro-batch)",
}
"""Kinds of norm, and which guarantee each loses."""
UPSAMPLING = ("trilinear", "learned")


class VoxelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each voxel of [B, C, Z, Y, X]: depends on neither the batch nor the crop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def norm_layer(kind: str, channels: int) -> nn.Module:
    """One of NORMS over `channels`. Raises BadRequest for another name."""
    if kind == "layer":
        return VoxelNorm(channels)
    if kind == "group":
        return nn.GroupNorm(8 if channels % 8 == 0 else 1, channels)
    if kind == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if kind == "batch":
        return nn.BatchNorm3d(channels)
    if kind == "none":
        return nn.Identity()
    raise BadRequest(f"no norm is called {kind!r}", where="norm", todo=f"choose one of {', '.join(NORMS)}")


def conv_block(channels_in: int, channels: int, norm: str, dropout: float) -> nn.Sequential:
    """Twice conv 3x3x3, norm, ReLU; then whole channels are dropped with probability `dropout` in training."""
    layers: list[nn.Module] = []
    for i in range(2):
        layers += [nn.Conv3d(channels if i else channels_in, channels, 3, padding=1, bias=norm == "none"),
                   norm_layer(norm, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.Dropout3d(dropout)] if dropout else []))


class UNet3D(nn.Module):
    """in_channels per voxel -> `outputs` logits per voxel."""

    def __init__(self, in_channels: int, outputs: int, *, base: int = 32, levels: int = 4, norm: str = "layer",
                 upsampling: str = "trilinear", dropout: float = 0.0, checkpointing: bool = False):
        """`base`: channels b at full resolution. `dropout`: of the blocks; the bottom's is twice as much. `checkpointing`:
        blocks are computed again in the backward instead of kept: less memory, a third more time.

        Raises BadRequest for unknown names and for sizes below one."""
        super().__init__()
        if min(in_channels, outputs, base, levels) < 1:
            raise BadRequest(f"a UNet of {levels} levels with {in_channels} -> {base} -> {outputs} channels", todo="use 1 or more")
        if upsampling not in UPSAMPLING:
            raise BadRequest(f"no upsampling is called {upsampling!r}", where="upsampling", todo=f"one of {', '.join(UPSAMPLING)}")
        self.levels, self.base, self.checkpointing = levels, base, checkpointing
        self.widths = [base * 2**level for level in range(levels + 1)]
        self.first = nn.Conv3d(in_channels, base, 1)
        self.encoder = nn.ModuleList(conv_block(self.widths[max(0, level - 1)], self.widths[level], norm, dropout)
                                     for level in range(levels))
        self.bottom = conv_block(self.widths[-2], self.widths[-1], norm, min(0.9, 2 * dropout))
        self.ups = nn.ModuleList(nn.ConvTranspose3d(w, w, 2, stride=2) if upsampling == "learned" else nn.Identity()
                                 for w in self.widths[1:])
        self.learned = upsampling == "learned"
        self.decoder = nn.ModuleList(conv_block(self.widths[level + 1] + self.widths[level], self.widths[level], norm, dropout)
                                     for level in range(levels))
        self.head = nn.Conv3d(base, outputs, 1)
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, in_channels, Z, Y, X] -> logits [B, outputs, Z, Y, X] float32."""
        shape = x.shape[2:]
        skips, bottom = self.encode(self.first(self.padded(x)))
        return self.decode(bottom, skips)[(..., *(slice(n) for n in shape))]

    @property
    def multiple(self) -> int:
        """What sides are padded to multiples of, and origins of blocks must be multiples of."""
        return 2**self.levels

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """x with the far ends of its three last axes repeated up to multiples of `multiple`; channels last in memory."""
        pads = [-n % self.multiple for n in x.shape[2:]]
        if any(pads):
            x = F.pad(x, (0, pads[2], 0, pads[1], 0, pads[0]), mode="replicate")
        return x.contiguous(memory_format=torch.channels_last_3d)

    def encode(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """x [B, b, Z, Y, X], sides multiples of `multiple` -> (skips from fine to coarse, the bottom)."""
        skips = []
        for block in self.encoder:
            x = self._run(block, x)
            skips.append(x)
            x = F.max_pool3d(x, 2)
        return skips, self._run(self.bottom, x)

    def decode(self, x: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        """The bottom and the skips -> logits float32."""
        for level in range(self.levels - 1, -1, -1):
            # what was joined is let go before the block runs
            x = self._run(self.decoder[level], torch.cat([self._up(level, x), skips[level]], dim=1))
        # in float32 whatever autocast says: a logit in bfloat16 has 8 bits
        with torch.autocast(x.device.type, enabled=False):
            return F.conv3d(x.float(), self.head.weight.float(), self.head.bias.float())

    def _up(self, level: int, x: torch.Tensor) -> torch.Tensor:
        if self.learned:
            return self.ups[level](x)
        return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)

    def _run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    @cached_property
    def receptive_radius(self) -> int:
        """Farthest voxel along an axis that an output depends on: the halo with which blocks equal the whole. Exact for the
        architecture: intervals are followed from each place in a pooling cell to the input."""
        return max(max(x - low, high - x)
                   for x in range(self.multiple, 2 * self.multiple) for low, high in [self._decoded(0, x, x)])

    def _decoded(self, level: int, low: int, high: int) -> tuple[int, int]:
        """Input voxels (of level 0) that the decoder's outputs [low, high] of a level depend on."""
        if level == self.levels:
            return self._encoded(level, low, high)
        low, high = low - 2, high + 2
        coarse = (low // 2, high // 2) if self.learned else ((low - 1) // 2, (high - 1) // 2 + 1)
        ranges = [self._encoded(level, low, high), self._decoded(level + 1, *coarse)]
        return min(a for a, _ in ranges), max(b for _, b in ranges)

    def _encoded(self, level: int, low: int, high: int) -> tuple[int, int]:
        low, high = low - 2, high + 2
        return (low, high) if level == 0 else self._encoded(level - 1, 2 * low, 2 * high + 1)
