"""Budgets: how many tokens one micro-batch may hold, by model, precision and device; and Ray's object store.

The token budget is a field of the job with a default from this table, never from the planning machine, its free
memory or the number of workers: the micro-batch is part of what makes bytes equal (design 2, 4.6).
"""

from __future__ import annotations

# Tokens per micro-batch in bfloat16 that keep the activations of an inference pass well inside an 8 GB
# card. On CPU small batches are as fast as large ones (they stay in cache), so the budget is small.
_CUDA_TOKENS = {"vitt": 131_072, "vits": 65_536, "vitb": 32_768, "vitl": 16_384, "vith": 8_192, "vit7": 2_048}
_CPU_TOKENS = 2_048
VALUES_PER_TOKEN = 16
"""Values alive at once for each token of a forward, in multiples of the model's width: residual stream, qkv, heads, the MLP's
4x before and after its activation."""
LOCAL_OBJECT_STORE_BYTES = 128 * 2**20
"""Ray's object store where dinoray starts Ray itself: only unit numbers and receipts travel, so next to nothing."""


def default_token_budget(variant: str, device: str, precision: str) -> int:
    """Tokens per micro-batch for a variant (`vits16`), device (`cpu`, `cuda`) and precision."""
    if device == "cpu":
        return _CPU_TOKENS
    tokens = _CUDA_TOKENS.get(variant[:4], 4_096)
    return tokens // 2 if precision == "float32" else tokens


def micro_batch(token_budget: int, tokens_per_image: int) -> int:
    """Images of `tokens_per_image` tokens in one micro-batch: at least one."""
    return max(1, token_budget // tokens_per_image)


def decoded_tokens(*, tokens: int, dim: int, taps: int, pixels: int, pixel_values: int) -> int:
    """Tokens of a backbone of width `dim` whose activations take the memory of one window with its decoder: its own
    `tokens`, or `taps` kept maps of them and `pixel_values` values per pixel, whichever is more."""
    return max(tokens, -(-(taps * tokens * dim + pixel_values * pixels) // (VALUES_PER_TOKEN * dim)))


def padded_batch(count: int, largest: int) -> int:
    """The batch size that `count` images are computed at: the next power of two, at most `largest`.

    Padding to a short ladder of sizes keeps the numerics of a group a function of the plan and costs at most
    half a batch; padding always to `largest` would cost a folder of odd shapes many times its work.
    """
    size = 1
    while size < count:
        size *= 2
    return min(size, largest)


def slab_read_bytes(*, raw_bytes: int, read_pixels: int, pixels: int) -> int:
    """Peak bytes of reading a slab: the raw voxels, and up to three float32 copies while they are interpolated and
    resampled. `read_pixels`: raw rows x columns on the target planes; `pixels`: square pixels that are kept."""
    return raw_bytes + 4 * (2 * max(read_pixels, pixels) + pixels)


def slab_compute_bytes(*, tokens: int, dim: int, itemsize: int, batch_tokens: int, patch: int, threads: int) -> int:
    """Peak bytes of computing a slab: its tokens in float32 and as they are stored, those of the slab before on their way
    to the store, and the activations and pixels of `threads` micro-batches of `batch_tokens`."""
    kept = tokens * dim * (4 + 2 * itemsize)
    activations = batch_tokens * dim * 4 * VALUES_PER_TOKEN
    pixels = batch_tokens * patch**2 * 3 * 4 * 3  # scaled, normalised, cut into patches
    return kept + threads * (activations + pixels)


def fused_read_bytes(*, voxels: int, voxels_at_once: int, tokens_at_once: int, dim: int, itemsize: int) -> int:
    """Peak bytes of making a box of fused features: the box in float32, and of the few target planes that are added at
    once the tokens (stored and float32) and three copies while they are resampled."""
    return dim * (4 * voxels + 3 * 4 * max(voxels_at_once, tokens_at_once) + (4 + itemsize) * tokens_at_once)


def shard_bytes_in_work(shard_bytes: int, writers: int) -> int:
    """Peak bytes of `writers` threads that encode and store a shard each: padded, as zarr's own copy, its compressed
    chunks, and all of them in one object."""
    return writers * 4 * shard_bytes


def chunk_bytes_in_work(chunk_bytes: int, readers: int) -> int:
    """Peak bytes of `readers` threads that decode a chunk of the input each: as stored, decoded, and copied once."""
    return readers * 3 * chunk_bytes
