"""The operations that take nearly all of a forward's time, each by the fastest route that keeps accuracy.

Measured on 2 cores of an AMD EPYC with AVX512-BF16, ViT-S/16, 16 images of 224 px (benchmarks/backbone.py
prints the ratios that follow from them):

* linear layers: oneDNN with bias and GELU fused. MKL's float32 product, which `F.linear` calls, reaches
  180 GFLOP/s on AMD where oneDNN reaches 380; in bfloat16 `F.linear` spends 25 % on adding the bias.
* attention in bfloat16: two batched products and a softmax take half the time of the fused CPU kernel,
  which computes bfloat16 at float32's speed, as long as the scores of a few heads stay in cache. Scores are
  rounded to bfloat16 on the way, which the float32 residual stream more than makes up for.
* padding 201 tokens to 208 with a mask gains nothing here (8.4 ms against 8.5), so tokens are not padded.

oneDNN's operator has no gradient: where one is needed, and on other devices, plain torch is used. Which
route is taken depends on the device, dtype, token count and torch build only, never on load or timing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Scores computed at once, bytes: fits the second-level cache beside q, k and v.
SCORES_BYTES = 1 << 20


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def onednn_ready(dtype: torch.dtype) -> bool:
    """Whether this torch build and processor run oneDNN's linear in `dtype` (off: torch.backends.mkldnn)."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False):
    """x [..., in] times weight [out, in] plus bias, then the exact GELU if asked: [..., out]."""
    # of two dtypes (under autocast) only plain torch makes one
    one_dtype = x.dtype == weight.dtype
    if x.device.type == "cpu" and one_dtype and not needs_grad(x, weight, bias) and onednn_ready(x.dtype):
        attr, algorithm = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, N, d]; returns [B, N, heads * d]."""
    b, heads, n, d = q.shape
    on_cpu = q.device.type == "cpu" and not needs_grad(q, k, v)
    if on_cpu and q.dtype == torch.bfloat16 and onednn_ready(q.dtype):
        return _split_attention(*(t.reshape(b * heads, n, d) for t in (q, k, v)), b)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, heads * d)


def _split_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: int) -> torch.Tensor:
    """Attention over q, k, v [B * heads, N, d] in chunks of whole heads, or of queries where N is large."""
    many, n, d = q.shape
    row_bytes = n * q.element_size()
    heads_step = max(1, SCORES_BYTES // (n * row_bytes))
    rows_step = n if heads_step > 1 else max(1, min(n, SCORES_BYTES // row_bytes))
    out = torch.empty_like(q)
    for i in range(0, many, heads_step):
        k_t, values = k[i : i + heads_step].transpose(1, 2), v[i : i + heads_step]
        for j in range(0, n, rows_step):
            queries = q[i : i + heads_step, j : j + rows_step]
            # beta=0: the first argument is not read
            scores = torch.baddbmm(q.new_empty(1), queries, k_t, beta=0, alpha=d**-0.5)
            # a slice of whole heads, or of rows of one head, is contiguous: written in place
            torch.bmm(torch.softmax(scores, -1), values, out=out[i : i + heads_step, j : j + rows_step])
    return out.view(b, many // b, n, d).transpose(1, 2).reshape(b, n, -1)


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> torch.Tensor:
    """`norm` of the float32 residual stream x, computed in float32 and returned in `dtype`."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps).to(dtype)


def add_scaled(x: torch.Tensor, branch: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x + scale * branch on the float32 residual stream, in place where no gradient needs the old x.

    This is why LayerScale is not folded into the projections before it: one fused pass costs what the bare
    addition would, and the parameters stay the published ones.
    """
    add = torch.addcmul if needs_grad(x, branch, scale) else torch.Tensor.addcmul_
    return add(x, branch.float(), scale.float())


def rotate(qk: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate q and k by RoPE in float32: qk [B, N, 2, heads, d], turns complex64 [N, d/2].

    The two channels of a pair are neighbours (see `backbone.Attention`), so a rotation is one complex
    product: a third of the passes over memory that rotating halves takes. Returns qk's dtype,
    [2, B, heads, N, d], contiguous where that helps the products that follow.
    """
    pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * turns[:, None, None]).flatten(-2).permute(2, 0, 3, 1, 4)
    if qk.dtype == torch.float32:
        return rotated
    return rotated.to(qk.dtype, memory_format=torch.contiguous_format)
