"""The published DINOv3 ViT shapes, as data.

Source: the facts sheet of the project , read from the published reference
implementation. All variants share 4 register tokens, LayerNorm eps 1e-5, LayerScale and RoPE base 100.
The name's number is the patch size: `vits16` is published, `vits8` has the same shape with patch 8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dinoray.errors import BadRequest

LVD_MEAN, LVD_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAT_MEAN, SAT_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)

LAYER_NORM_EPS = 1e-5
ROPE_BASE = 100.0


@dataclass(frozen=True)
class BackboneConfig:
    """Everything that shapes the network, and the normalisation its weights expect.

    `ffn` is "mlp" (exact GELU) or "swiglu". `qkv_bias` means biases on q and v; k never has one.
    `mean` and `std` apply to pixels scaled to [0, 1].
    """

    name: str
    patch_size: int
    dim: int
    depth: int
    heads: int
    ffn: str
    ffn_hidden: int
    num_registers: int = 4
    qkv_bias: bool = True
    mean: tuple[float, float, float] = LVD_MEAN
    std: tuple[float, float, float] = LVD_STD

    def __post_init__(self):
        if self.ffn not in ("mlp", "swiglu"):
            raise BadRequest(f"ffn is {self.ffn!r}", where=self.name, todo="use 'mlp' or 'swiglu'")
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise BadRequest(
                f"dim {self.dim} over {self.heads} heads gives no head dimension that RoPE can use",
                where=self.name,
                todo="choose dim / heads as a multiple of 4",
            )
        if min(self.patch_size, self.depth, self.ffn_hidden) < 1 or self.num_registers < 0:
            raise BadRequest("patch_size, depth and ffn_hidden must be at least 1", where=self.name)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: CLS and the registers."""
        return 1 + self.num_registers

    def with_normalisation(self, mean, std) -> BackboneConfig:
        return replace(self, mean=tuple(float(x) for x in mean), std=tuple(float(x) for x in std))


# family: (dim, depth, heads, ffn, ffn_hidden, qkv_bias)
_FAMILIES = {
    "vitt": (192, 12, 3, "mlp", 768, True),
    "vits": (384, 12, 6, "mlp", 1536, True),
    "vits+": (384, 12, 6, "swiglu", 1536, True),
    "vitb": (768, 12, 12, "mlp", 3072, True),
    "vitl": (1024, 24, 16, "mlp", 4096, True),
    "vitl+": (1024, 24, 16, "swiglu", 4096, True),
    "vith+": (1280, 32, 20, "swiglu", 5120, True),
    "vit7b": (4096, 40, 32, "swiglu", 8192, False),
}


def _config(family: str, patch_size: int) -> BackboneConfig:
    dim, depth, heads, ffn, hidden, qkv_bias = _FAMILIES[family]
    name = f"{family.rstrip('+')}{patch_size}{'plus' if family.endswith('+') else ''}"
    return BackboneConfig(name, patch_size, dim, depth, heads, ffn, hidden, qkv_bias=qkv_bias)


VARIANTS: dict[str, BackboneConfig] = {
    config.name: config for patch in (16, 8) for config in (_config(f, patch) for f in _FAMILIES)
}


def variant(name: str) -> BackboneConfig:
    """The config of a variant by name: `vits16`, `vith16plus`, `vitt8`, or any other patch size (`vits14`).

    Raises BadRequest with the list of names.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    match = re.fullmatch(r"(vit[a-z0-9]*?[a-z])(\d{1,2})(plus)?", name)
    if match and int(match[2]) >= 1 and match[1] + ("+" if match[3] else "") in _FAMILIES:
        return _config(match[1] + ("+" if match[3] else ""), int(match[2]))
    raise BadRequest(
        f"no backbone is called {name!r}", where="--model", todo=f"choose one of {', '.join(VARIANTS)}"
    )


def closest_variant(dim: int, ffn: str, patch_size: int) -> BackboneConfig | None:
    """The variant with this width and kind of FFN at this patch size, or None. Depth is not looked at."""
    for family, (family_dim, _, _, family_ffn, _, _) in _FAMILIES.items():
        if (family_dim, family_ffn) == (dim, ffn):
            return _config(family, patch_size)
    return None
