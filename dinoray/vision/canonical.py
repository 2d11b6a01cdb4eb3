"""Between canonical tensors (Hugging Face names and channel order, see layouts.py) and a Backbone's own.

Digest: sha256 over the canonical tensors without the mask token, in model order, each as a line
`name [shape]` and its float32 little-endian bytes. It names the published values: not the file's layout,
container or sharding, not how `Backbone` stores them, and not the dtype they are cast to when loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch

from dinoray.vision import layouts
from dinoray.vision.backbone import Backbone, pair_rows, unpair_rows
from dinoray.vision.variants import BackboneConfig


def places(config: BackboneConfig) -> Iterator[tuple[str, str, int | None, bool]]:
    """(canonical name, parameter of Backbone, its first row or None for all of it, rows are paired)."""
    top = {
        "embeddings.cls_token": "cls_token",
        layouts.MASK_TOKEN: "mask_token",
        "embeddings.register_tokens": "register_tokens",
        "embeddings.patch_embeddings.weight": "patch_embed.weight",
        "embeddings.patch_embeddings.bias": "patch_embed.bias",
    }
    swiglu = config.ffn == "swiglu"
    block = {
        "attention.q_proj.weight": ("attn.qkv", 0, True),
        "attention.k_proj.weight": ("attn.qkv", config.dim, True),
        "attention.v_proj.weight": ("attn.qkv", 2 * config.dim, False),
        "attention.q_proj.bias": ("attn.q_bias", None, True),
        "attention.v_proj.bias": ("attn.v_bias", None, False),
        "layer_scale1.lambda1": ("ls1", None, False),
        "layer_scale2.lambda1": ("ls2", None, False),
    }
    for leaf in ("weight", "bias"):
        block[f"attention.o_proj.{leaf}"] = (f"attn.proj.{leaf}", None, False)
        block[f"mlp.gate_proj.{leaf}"] = (f"ffn.gate_up.{leaf}", 0, False)
        up = (f"ffn.gate_up.{leaf}", config.ffn_hidden, False) if swiglu else (f"ffn.fc1.{leaf}", None, False)
        block[f"mlp.up_proj.{leaf}"] = up
        block[f"mlp.down_proj.{leaf}"] = (f"ffn.{'down' if swiglu else 'fc2'}.{leaf}", None, False)
    for name in layouts.canonical_shapes(config):
        if not name.startswith("layer."):
            yield name, top.get(name, name), None, False
            continue
        _, i, part = name.split(".", 2)
        param, row, paired = block.get(part, (part, None, False))
        yield name, f"blocks.{i}.{param}", row, paired


def build(
    config: BackboneConfig,
    fetch: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    device: str | torch.device,
) -> Backbone:
    """A Backbone in eval mode whose every parameter comes from `fetch(canonical name)`, float32 on the CPU.

    One canonical tensor is held at a time beside the model itself.
    """
    with torch.device("meta"):
        backbone = Backbone(config)
    backbone = backbone.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    params = dict(backbone.named_parameters())
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, param, row, paired in places(config):
            tensor = fetch(name)
            update_digest(digest, name, tensor)
            target = params[param] if row is None else params[param][row : row + len(tensor)]
            target.copy_(pair_rows(tensor, config.heads) if paired else tensor)
    backbone.digest = digest.hexdigest()
    return backbone


def update_digest(digest, name: str, tensor: torch.Tensor) -> None:
    """Add one canonical tensor, float32 on the CPU, to a sha256 digest; they come in the order of `places`."""
    if name != layouts.MASK_TOKEN:
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().astype("<f4", copy=False).tobytes())


def published_tensors(backbone: Backbone) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, tensor on the CPU in the backbone's dtype), in the order of the digest."""
    params = dict(backbone.named_parameters())
    shapes = layouts.canonical_shapes(backbone.config)
    for name, param, row, paired in places(backbone.config):
        tensor = params[param].detach()
        tensor = (tensor if row is None else tensor[row : row + shapes[name][0]]).cpu()
        yield name, unpair_rows(tensor, backbone.config.heads) if paired else tensor.contiguous()


def weights_digest(backbone: Backbone) -> str:
    """Digest of a backbone's present values; after training, or cast to bfloat16, not `backbone.digest`."""
    digest = hashlib.sha256()
    for name, tensor in published_tensors(backbone):
        update_digest(digest, name, tensor.float())
    return digest.hexdigest()
