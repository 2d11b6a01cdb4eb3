"""UNet decoder: maps of a ViT at four depths, and the pixels themselves, to one value per pixel.

The deepest map is the start. Each stage doubles the resolution and joins the next shallower map, resampled; from the
resolutions where tokens cannot place a border, it joins a small convolutional stem on the pixels as well (a token of
8 or 16 px cannot say where a gap of one pixel lies). After log2(patch) stages the output has the input's H x W, for
every patch size that is a power of two and every H, W that are multiples of it.

Shapes: B batch, D token width, h = H/p, w = W/p, C_k channels of stage k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dinoray.errors import BadRequest
from dinoray.vision import kernels

NORMS = ("layer", "group", "batch", "none")


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of [B, C, H, W]: depends on neither the batch nor the crop, so a tile
    gives what the whole image gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm_layer(kind: str, channels: int) -> nn.Module:
    """`layer` (PixelNorm), `group` (8 groups: depends on the crop), `batch` (depends on the batch too) or `none`."""
    if kind == "layer":
        return PixelNorm(channels)
    if kind == "group":
        return nn.GroupNorm(8 if channels % 8 == 0 else 1, channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    raise BadRequest(f"no norm is called {kind!r}", where="norm", todo=f"choose one of {', '.join(NORMS)}")


def pointwise(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """`conv`, of kernel 1, as what it is: a linear layer on each pixel's channels. [B, C, H, W] -> [B, C', H, W]."""
    return kernels.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def conv_block(channels_in: int, channels: int, norm: str, depth: int = 2) -> nn.Sequential:
    """`depth` times conv 3x3, norm, ReLU."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(channels if i else channels_in, channels, 3, padding=1, bias=norm == "none"),
                   norm_layer(norm, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def tap_layers(depth: int) -> tuple[int, int, int, int]:
    """0-based layers whose maps the decoder takes: 2, 5, 8, 11 of 12; 4, 11, 17, 23 of 24 (DINOv2's linear-4 choice);
    evenly spaced, ending with the last, otherwise."""
    if depth == 24:
        return 4, 11, 17, 23
    if depth < 4:
        raise BadRequest(f"a backbone of {depth} layers has no four depths to tap")
    return tuple(round(depth * (i + 1) / 4) - 1 for i in range(4))  # type: ignore[return-value]


class UNet2D(nn.Module):
    """Tokens at several depths and pixels -> one logit per pixel."""

    def __init__(self, dim: int, patch_size: int, *, num_taps: int = 4, channels: Sequence[int] = (256, 128, 64, 32),
                 norm: str = "layer", stem_levels: int = 3, outputs: int = 1):
        """`channels`: of stage 0 (the token grid), 1, ...; the last holds for all later stages. `stem_levels`: pixel
        resolutions 1, 1/2, 1/4, ... at which the stem joins; 0 for none. Raises BadRequest for a patch size that is
        no power of two."""
        super().__init__()
        stages = patch_size.bit_length() - 1
        if patch_size < 2 or 2**stages != patch_size:
            raise BadRequest(f"a decoder that doubles the resolution cannot undo patches of {patch_size} px",
                             todo="use a backbone with patch 4, 8, 16 or 32")
        if stem_levels > stages:
            raise BadRequest(f"stem_levels={stem_levels}: the token grid of patch {patch_size} is {stages} halvings away",
                             todo=f"use at most {stages}")
        widths = [channels[min(k, len(channels) - 1)] for k in range(stages + 1)]
        self.patch_size, self.stages, self.num_taps = patch_size, stages, num_taps
        self.lateral = nn.ModuleList(nn.Conv2d(dim, widths[min(k, stages)], 1) for k in range(num_taps))
        self.first = conv_block(widths[0], widths[0], norm)
        self.stem = nn.ModuleList(conv_block(3 if level == 0 else widths[stages - level + 1], widths[stages - level], norm)
                                  for level in range(stem_levels))
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for k in range(1, stages + 1):
            joined = widths[k] * (1 + (k < num_taps) + (stages - k < stem_levels))
            self.ups.append(nn.ConvTranspose2d(widths[k - 1], widths[k], 2, stride=2))
            self.blocks.append(conv_block(joined, widths[k], norm))
        self.head = nn.Conv2d(widths[-1], outputs, 1)
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.constant_(self.head.bias, -2.0)  # most pixels are background: sigmoid(-2) = 0.12

    def forward(self, pixels: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """pixels [B, 3, H, W] normalised, maps `num_taps` times [B, D, h, w] from shallow to deep -> logits
        [B, outputs, H, W] float32."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        by_image = pixels.device.type == "cpu" and not self.training and not kernels.needs_grad(pixels, *maps, *self.parameters())
        if len(pixels) > 1 and by_image:
            # the activations of one image just fit a CPU's cache: four at once take a fifth more time than one by one
            return torch.cat([self._decode(pixels[i:i + 1], [m[i:i + 1] for m in maps]) for i in range(len(pixels))])
        return self._decode(pixels, maps)

    @property
    def pixel_values(self) -> int:
        """Values alive at once per pixel of the input at the forward's peak: at some stage its input, the levels of the stem
        that still wait, and either what it joins twice (apart and together), or that, a convolution's output and its norm's."""
        widths, most = [conv.out_channels for conv in self.ups], 0.0
        for k, (block, width) in enumerate(zip(self.blocks, widths, strict=True), start=1):
            waiting = sum(self.stem[level][0].out_channels / 4**level for level in range(min(len(self.stem), self.stages - k)))
            joined = block[0].in_channels
            most = max(most, waiting + (self.ups[k - 1].in_channels / 4 + joined + max(joined, 2 * width)) / 4 ** (self.stages - k))
        return math.ceil(most)

    def _decode(self, pixels: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        stem, level = [], pixels  # full resolution first
        for i, block in enumerate(self.stem):
            level = block(level if i == 0 else F.max_pool2d(level, 2))
            stem.append(level)
        deep_first = list(maps)[::-1]
        x = self.first(pointwise(self.lateral[0], deep_first[0]))
        for k in range(1, self.stages + 1):
            # what was joined is let go before the block runs: at full resolution that is a third of the memory
            x = self.blocks[k - 1](torch.cat(self._parts(k, x, deep_first, stem), dim=1))
        # float32 whatever the weights' dtype: a logit in bfloat16 has 8 bits, so maps would be staircases
        head = self.head.weight.float().flatten(1), self.head.bias.float()
        return kernels.linear(x.permute(0, 2, 3, 1).float(), *head).permute(0, 3, 1, 2).float()

    def _parts(self, k: int, x: torch.Tensor, deep_first: list[torch.Tensor], stem: list[torch.Tensor]) -> list[torch.Tensor]:
        """What stage k joins: the stage before at twice its resolution, a map, and the stem's level, taken from its end."""
        parts = [self.ups[k - 1](x)]
        if k < self.num_taps:
            # projected at the token grid, then resampled: a linear map commutes with the interpolation
            parts.append(F.interpolate(pointwise(self.lateral[k], deep_first[k]), size=parts[0].shape[2:], mode="bilinear",
                                       align_corners=False))
        if self.stages - k < len(stem):
            parts.append(stem.pop())
        return parts
