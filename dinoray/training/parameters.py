"""Parameter groups of AdamW: what is decayed, and what is not."""

from __future__ import annotations

from typing import Any

from torch import nn

NEVER_DECAYED = ("cls_token", "register_tokens", "mask_token", "ls1", "ls2")


def parameter_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of a module's trained parameters: matrices and kernels with decay; vectors (norms, biases), tokens and
    LayerScale without. Empty groups are left out."""
    decayed, free = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NEVER_DECAYED else decayed).append(parameter)
    groups = [{"params": decayed, "lr": lr, "weight_decay": weight_decay}, {"params": free, "lr": lr, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
