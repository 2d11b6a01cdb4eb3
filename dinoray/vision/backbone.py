"""The DINOv3 vision transformer: pixels in, CLS, register and patch tokens out.

One plain torch module for every published variant and patch size, any H and W that are multiples of the
patch size, and any set of layers in one pass. Written from the facts of the architecture; output equals
`transformers` to 1e-4 relative in float32 at every layer (tests/vision/test_backbone_parity.py).

Parameters are the published ones in the published values, with q, k, v and the two inputs of SwiGLU fused
into one matrix each. The forward keeps no state, so several threads may share one module.

In bfloat16 the residual stream is kept in float32: 24 roundings of it are a third of the error of a bfloat16
ViT-S, and not making them costs 2 % of the time. RoPE is float32 as in the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dinoray.errors import BadRequest
from dinoray.vision import kernels, rope
from dinoray.vision.tokens import LayerTokens, Tokens
from dinoray.vision.variants import LAYER_NORM_EPS, BackboneConfig

# On a CPU a batch goes through the blocks in equal groups of images of at most this many tokens: activations
# then stay in cache (16 images of 224 px in bfloat16 take a sixth less time than at once), memory is bounded.
CPU_TOKENS = 2048


class Attention(nn.Module):
    """Self-attention with RoPE on the q and k of patch tokens; biases on q and v only.

    `qkv` is [3D, D]: q, k, v. Inside each head the rows of q and k (and q's bias) are stored with the two
    channels of a RoPE pair, published as c and c + d/2, side by side (`pair_rows`). Scores do not depend on
    the order of channels, and a rotation becomes one complex product.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Parameter(torch.empty(3 * config.dim, config.dim))
        if config.qkv_bias:
            self.q_bias = nn.Parameter(torch.empty(config.dim))
            self.v_bias = nn.Parameter(torch.empty(config.dim))
        else:
            self.q_bias = self.v_bias = None
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        bias = None
        if self.q_bias is not None:
            # k has no bias by design; a literal zero third keeps training from growing one
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = kernels.linear(x, self.qkv, bias).view(b, n, 3, self.heads, d // self.heads)
        q, k = kernels.rotate(qkv[:, :, :2], turns)
        out = kernels.attention(q, k, qkv[:, :, 2].transpose(1, 2))
        return kernels.linear(out, self.proj.weight, self.proj.bias)


def pair_rows(published: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a published q or k weight [D, D] or bias [D] as `Attention` stores them."""
    return published.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def unpair_rows(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `pair_rows`."""
    return stored.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


class Mlp(nn.Module):
    """fc2(gelu(fc1 x)), exact GELU."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.ffn_hidden)
        self.fc2 = nn.Linear(config.ffn_hidden, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = kernels.linear(x, self.fc1.weight, self.fc1.bias, gelu=True)
        return kernels.linear(x, self.fc2.weight, self.fc2.bias)


class SwiGlu(nn.Module):
    """down(silu(gate x) * (up x)); gate and up are one matrix, gate first."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_hidden)
        self.down = nn.Linear(config.ffn_hidden, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = kernels.linear(x, self.gate_up.weight, self.gate_up.bias).chunk(2, dim=-1)
        return kernels.linear(F.silu(gate) * up, self.down.weight, self.down.bias)


class Block(nn.Module):
    """x + ls1 * attn(norm1 x), then x + ls2 * ffn(norm2 x); x stays float32 whatever the weights' dtype."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.ls1 = nn.Parameter(torch.empty(config.dim))
        self.norm2 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.ffn = SwiGlu(config) if config.ffn == "swiglu" else Mlp(config)
        self.ls2 = nn.Parameter(torch.empty(config.dim))

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        dtype = self.ls1.dtype
        x = kernels.add_scaled(x, self.attn(kernels.layer_norm(x, self.norm1, dtype), turns), self.ls1)
        return kernels.add_scaled(x, self.ffn(kernels.layer_norm(x, self.norm2, dtype)), self.ls2)


class Backbone(nn.Module):
    """A DINOv3 ViT. Build it with `dinoray.load_backbone`; the constructor leaves weights unset.

    Attributes: `config`; `digest`, the digest of the weights as loaded (see dinoray.vision.weights);
    `source`, where they came from; `normalisation_rule`, how config.mean and config.std were chosen.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.digest = self.source = self.normalisation_rule = ""
        d = config.dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_registers, d))
        self.mask_token = nn.Parameter(torch.empty(1, 1, d))
        self.patch_embed = nn.Conv2d(3, d, kernel_size=config.patch_size, stride=config.patch_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)

    def forward(
        self, pixels: torch.Tensor, layers: Sequence[int] | None = None, mask: torch.Tensor | None = None
    ) -> Tokens | LayerTokens:
        """Tokens of normalised pixels [B, 3, H, W] (any float dtype), in the weights' dtype.

        Without `layers`: `Tokens` of the last layer. With `layers` (0-based): `LayerTokens`, the final norm
        applied to each. `mask` (bool [B, H/p, W/p], for self-supervised training) replaces the embeddings of
        the patches where it is True by the mask token. Raises BadRequest for other shapes, or H or W that
        are not multiples of the patch size.
        """
        grid = self._check(pixels, layers, mask)
        wanted = [self.config.depth - 1] if layers is None else list(dict.fromkeys(layers))
        step = self._images_at_once(pixels, grid)
        if len(pixels) <= step:
            kept = self._run(pixels, grid, wanted, mask)
        else:
            masks = [None] * len(pixels) if mask is None else mask.split(step)
            parts = [
                self._run(part, grid, wanted, m) for part, m in zip(pixels.split(step), masks, strict=False)
            ]
            kept = {k: Tokens.cat([part[k] for part in parts]) for k in wanted}
        return kept[wanted[0]] if layers is None else LayerTokens(kept)

    def _images_at_once(self, pixels: torch.Tensor, grid: tuple[int, int]) -> int:
        """How many images go through the blocks together: a function of the shapes only."""
        if pixels.device.type != "cpu" or kernels.needs_grad(pixels, *self.parameters()):
            return len(pixels)
        most = max(1, CPU_TOKENS // (self.config.num_prefix + grid[0] * grid[1]))
        groups = -(-len(pixels) // most)
        return -(-len(pixels) // groups)

    def _run(self, pixels, grid, wanted: list[int], mask: torch.Tensor | None) -> dict[int, Tokens]:
        x = self._embed(pixels, mask)
        turns = rope.turns(*grid, self.config.num_prefix, self.config.head_dim, x.device)
        kept = {}
        for index, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x, turns)
            if index in wanted:
                kept[index] = self._tokens(x, grid)
        return {k: kept[k] for k in wanted}

    def _embed(self, pixels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        b, c, height, width = pixels.shape
        p = self.config.patch_size
        # a convolution whose stride is its kernel is a linear layer on cut patches, and faster as one
        cut = pixels.to(self.cls_token.dtype).reshape(b, c, height // p, p, width // p, p)
        cut = cut.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)
        patches = kernels.linear(cut, self.patch_embed.weight.flatten(1), self.patch_embed.bias)
        if mask is not None:
            patches = torch.where(mask.flatten(1)[:, :, None], self.mask_token, patches)
        prefix = (self.cls_token.expand(b, -1, -1), self.register_tokens.expand(b, -1, -1))
        return torch.cat((*prefix, patches), dim=1).float()

    def _tokens(self, x: torch.Tensor, grid: tuple[int, int]) -> Tokens:
        x = kernels.layer_norm(x, self.norm, self.cls_token.dtype)
        p = self.config.num_prefix
        return Tokens(x[:, 0], x[:, 1:p], x[:, p:].unflatten(1, grid))

    def _check(self, pixels, layers, mask) -> tuple[int, int]:
        where, p = f"backbone {self.config.name}", self.config.patch_size
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
            raise BadRequest(
                f"pixels have shape {tuple(pixels.shape)}",
                where=where,
                todo="give pixels as [B, 3, H, W], B at least 1",
            )
        if not pixels.is_floating_point():
            raise BadRequest(
                f"pixels are {pixels.dtype}", where=where, todo="scale to [0, 1] and normalise them first"
            )
        h, w = pixels.shape[2:]
        if h < p or w < p or h % p or w % p:
            raise BadRequest(
                f"an image of {h} x {w} px is not a multiple of the patch size {p}",
                where=where,
                todo=f"crop or pad it to {max(h // p, 1) * p} x {max(w // p, 1) * p} px",
            )
        grid = (h // p, w // p)
        if layers is not None:
            bad = [k for k in layers if not 0 <= k < self.config.depth]
            if bad or not len(layers):
                raise BadRequest(
                    f"layers {list(layers)} asked for",
                    where=where,
                    todo=f"name at least one layer from 0 to {self.config.depth - 1}",
                )
        if mask is not None and (mask.shape != (len(pixels), *grid) or mask.dtype != torch.bool):
            raise BadRequest(
                f"mask is {mask.dtype} {tuple(mask.shape)}",
                where=where,
                todo=f"give a bool mask of shape {(len(pixels), *grid)}",
            )
        return grid
