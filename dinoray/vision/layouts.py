"""Three published checkpoint layouts, mapped onto one canonical set of names.

The canonical names, shapes and channel order are those of the Hugging Face checkpoints: unfused q, k, v and
gate, up. Loading goes file layout -> canonical -> `Backbone` (where q, k, v and gate, up are fused), saving
the other way, and the digest is taken over the canonical tensors, so it depends on neither the file's
layout nor ours. Facts: reference/dinov3-facts.md, "Checkpoint layouts".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from dinoray.errors import WeightsError
from dinoray.vision.variants import BackboneConfig, closest_variant

MASK_TOKEN = "embeddings.mask_token"

# Canonical parts of a block -> (Meta, timm). {i} is the block.
_BLOCK = {
    "norm1": ("norm1", "norm1"),
    "attention.o_proj": ("attn.proj", "attn.proj"),
    "layer_scale1.lambda1": ("ls1.gamma", "gamma_1"),
    "norm2": ("norm2", "norm2"),
    "mlp.gate_proj": ("mlp.w1", "mlp.fc1_g"),
    "mlp.up_proj": ("mlp.w2", "mlp.fc1_x"),
    "mlp.down_proj": ("mlp.w3", "mlp.fc2"),
    "layer_scale2.lambda1": ("ls2.gamma", "gamma_2"),
}
_BLOCK_MLP = {"mlp.up_proj": ("mlp.fc1", "mlp.fc1"), "mlp.down_proj": ("mlp.fc2", "mlp.fc2")}
_TOP = {
    "embeddings.cls_token": ("cls_token", "cls_token"),
    MASK_TOKEN: ("mask_token", None),
    "embeddings.register_tokens": ("storage_tokens", "reg_token"),
    "embeddings.patch_embeddings.weight": ("patch_embed.proj.weight", "patch_embed.proj.weight"),
    "embeddings.patch_embeddings.bias": ("patch_embed.proj.bias", "patch_embed.proj.bias"),
    "norm.weight": ("norm.weight", "norm.weight"),
    "norm.bias": ("norm.bias", "norm.bias"),
}
# Buffers and training-only tensors that a file may hold and the model does not use.
_TRAINING_ONLY = re.compile(
    r"rope_embed\.periods|local_cls_norm\.(weight|bias)|blocks\.\d+\.attn\.qkv\.bias_mask"
)
_SIGNS = {
    "huggingface": re.compile(r"embeddings\.|(model\.)?layer\.\d+\."),
    "meta": re.compile(r"storage_tokens$|rope_embed\.|blocks\.\d+\.ls[12]\.gamma$"),
    "timm": re.compile(r"reg_token$|blocks\.\d+\.gamma_[12]$"),
}


@dataclass(frozen=True)
class Recipe:
    """How one canonical tensor is made: `build` of the file's tensors named in `sources`."""

    sources: tuple[str, ...]
    build: Callable[..., torch.Tensor]


def canonical_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of a model's tensors, in the order of the digest."""
    d, hidden, p = config.dim, config.ffn_hidden, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, d),
        MASK_TOKEN: (1, 1, d),
        "embeddings.register_tokens": (1, config.num_registers, d),
        "embeddings.patch_embeddings.weight": (d, 3, p, p),
        "embeddings.patch_embeddings.bias": (d,),
    }
    for i in range(config.depth):
        block: dict[str, tuple[int, ...]] = {"norm1.weight": (d,), "norm1.bias": (d,)}
        for part in "qkv":
            block[f"attention.{part}_proj.weight"] = (d, d)
            if config.qkv_bias and part != "k":
                block[f"attention.{part}_proj.bias"] = (d,)
        block |= {"attention.o_proj.weight": (d, d), "attention.o_proj.bias": (d,)}
        block |= {"layer_scale1.lambda1": (d,), "norm2.weight": (d,), "norm2.bias": (d,)}
        for part in ("gate_proj", "up_proj") if config.ffn == "swiglu" else ("up_proj",):
            block |= {f"mlp.{part}.weight": (hidden, d), f"mlp.{part}.bias": (hidden,)}
        block |= {"mlp.down_proj.weight": (d, hidden), "mlp.down_proj.bias": (d,)}
        block["layer_scale2.lambda1"] = (d,)
        shapes |= {f"layer.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}


def recognise(names: Iterable[str], where: str) -> str:
    """The layout of a file from its tensors' names: "huggingface", "meta" or "timm"; WeightsError if none."""
    names = list(names)
    for layout, sign in _SIGNS.items():
        if any(sign.match(name) for name in names):
            return layout
    first = ", ".join(names[:4]) or "nothing"
    raise WeightsError(
        f"not a DINOv3 ViT checkpoint: its {len(names)} tensors start with {first}",
        where=where,
        todo="give a DINOv3 ViT in Hugging Face, Meta or timm layout (ConvNeXt models are not supported)",
    )


def recipes(layout: str, config: BackboneConfig, names: Iterable[str]) -> dict[str, Recipe]:
    """How each canonical tensor of `config` is read from a file in `layout` that holds `names`."""
    names = set(names)
    made = {}
    for name, shape in canonical_shapes(config).items():
        if layout == "huggingface":
            # in memory transformers calls them model.layer.i, in files layer.i
            source = f"model.{name}" if f"model.{name}" in names else name
            recipe = Recipe((source,), _same)
        else:
            recipe = _fused_layout(layout, config, name, names, shape)
        if name == MASK_TOKEN and not set(recipe.sources) & names:
            recipe = _zeros(shape)  # inference-only files may lack it; the digest leaves it out
        made[name] = recipe
    return made


def _fused_layout(layout: str, config: BackboneConfig, name: str, names: set[str], shape) -> Recipe:
    column = ("meta", "timm").index(layout)
    if name in _TOP:
        source = _TOP[name][column]
        # Meta stores the mask token as [1, D]
        return Recipe((source,) if source else (), _mask_token if name == MASK_TOKEN else _same)
    _, i, part = name.split(".", 2)
    block = f"blocks.{i}."
    match = re.fullmatch(r"attention\.([qkv])_proj\.(weight|bias)", part)
    if match:
        return _from_fused_qkv(layout, block + "attn.", "qkv".index(match[1]), match[2], names, shape)
    stem, _, leaf = part.rpartition(".")
    if part in _BLOCK:  # LayerScale has no weight/bias leaf
        return Recipe((block + _BLOCK[part][column],), _same)
    table = _BLOCK if config.ffn == "swiglu" else _BLOCK | _BLOCK_MLP
    return Recipe((f"{block}{table[stem][column]}.{leaf}",), _same)


def _from_fused_qkv(layout, attn: str, third: int, leaf: str, names: set[str], shape) -> Recipe:
    if leaf == "weight":
        return Recipe((attn + "qkv.weight",), lambda qkv: qkv.chunk(3)[third])
    if layout == "timm":
        # timm's plain models were made from checkpoints whose q and v biases are zero, and have none
        any_bias = any(n.endswith((".attn.q_bias", ".attn.v_bias")) for n in names)
        return Recipe((f"{attn}{'qkv'[third]}_bias",), _same) if any_bias else _zeros(shape)
    mask = attn + "qkv.bias_mask"
    sources = (attn + "qkv.bias", mask) if mask in names else (attn + "qkv.bias",)
    return Recipe(sources, lambda bias, mask=None: masked_bias(bias, mask).chunk(3)[third])


def masked_bias(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Meta's fused bias [3D] under its mask, k's third zero; a NaN mask (never trained) is ones-zeros-ones.

    Raises ValueError when the mask leaves a k bias alive, which no DINOv3 has.
    """
    d = len(bias) // 3
    if mask is None or mask.isnan().any():
        mask = torch.ones_like(bias)
        mask[d : 2 * d] = 0
    bias = torch.where(mask == 0, torch.zeros_like(bias), bias * mask)
    if bias[d : 2 * d].any():
        raise ValueError("its mask leaves a bias on k, which must be zero")
    return bias


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _mask_token(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1, 1, -1)


def _zeros(shape: tuple[int, ...]) -> Recipe:
    return Recipe((), lambda: torch.zeros(shape))


def is_training_only(name: str) -> bool:
    """Whether a file may hold this tensor without the model using it."""
    return _TRAINING_ONLY.fullmatch(name) is not None


def facts(layout: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """What a file's shapes say about its model: the fields of BackboneConfig that could be told.

    Tolerates missing tensors, so that a damaged file is still reported by the names it lacks.
    """
    column = {"huggingface": None, "meta": 0, "timm": 1}[layout]

    def name(canonical: str) -> str:
        return canonical if column is None else _TOP[canonical][column]

    found: dict[str, object] = {}
    patch = shapes.get(name("embeddings.patch_embeddings.weight"))
    if patch is not None and len(patch) == 4:
        found |= {"dim": patch[0], "patch_size": patch[-1]}
    elif name("embeddings.cls_token") in shapes:
        found["dim"] = shapes[name("embeddings.cls_token")][-1]
    if name("embeddings.register_tokens") in shapes:
        found["num_registers"] = shapes[name("embeddings.register_tokens")][1]
    blocks = [m for m in (re.match(r"(?:model\.)?(?:layer|blocks)\.(\d+)\.(.+)", n) for n in shapes) if m]
    if blocks:
        found["depth"] = 1 + max(int(m[1]) for m in blocks)
    parts = {m[2]: shapes[m[0]] for m in blocks}
    gate, up = "mlp.gate_proj", "mlp.up_proj"
    if column is not None:
        gate, up = _BLOCK[gate][column], _BLOCK_MLP[up][column]
    gated = [shape for part, shape in parts.items() if part.startswith(gate + ".")]
    plain = [shape for part, shape in parts.items() if part.startswith(up + ".")]
    if gated or plain:
        found |= {"ffn": "swiglu" if gated else "mlp", "ffn_hidden": (gated or plain)[0][0]}
    biases = ("attention.q_proj.bias", "attention.v_proj.bias", "attn.qkv.bias", "attn.q_bias", "attn.v_bias")
    if any(part in parts for part in biases):
        found["qkv_bias"] = True
    elif layout != "timm" and blocks:
        found["qkv_bias"] = False
    return found


def config_from_facts(found: Mapping[str, object], where: str) -> BackboneConfig:
    """The config that a file's shapes describe, a variant or one of other depth; WeightsError if unknown."""
    needed = ("dim", "patch_size", "depth", "ffn", "ffn_hidden", "num_registers")
    missing = [field for field in needed if field not in found]
    near = None if missing else closest_variant(found["dim"], found["ffn"], found["patch_size"])
    if near is None:
        raise WeightsError(
            f"cannot tell the model from its tensors ({describe(found)})",
            where=where,
            todo="name it with --model, for example --model vits16",
        )
    config = replace(near, **{k: v for k, v in found.items() if k != "dim"})
    if config.depth != near.depth:
        config = replace(config, name=f"{near.name}-depth{config.depth}")
    return config


def describe(found: Mapping[str, object]) -> str:
    return ", ".join(f"{k} {v}" for k, v in found.items()) or "nothing recognisable"
