"""What a backbone returns: the tokens of one layer, or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """Tokens of one layer after the final norm: cls [B, D], registers [B, R, D], patches [B, H/p, W/p, D]."""

    cls: torch.Tensor
    registers: torch.Tensor
    patches: torch.Tensor

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """Tokens of several batches of one grid as one batch."""
        fields = ("cls", "registers", "patches")
        return Tokens(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))

    @property
    def map(self) -> torch.Tensor:
        """Patches as a feature map [B, D, H/p, W/p] (a view)."""
        return self.patches.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of the layers that were asked for, keyed by 0-based layer, in the order asked."""

    layers: dict[int, Tokens]

    @property
    def maps(self) -> dict[int, torch.Tensor]:
        """Each layer's patches as [B, D, H/p, W/p] (views)."""
        return {k: tokens.map for k, tokens in self.layers.items()}
