"""A running mean of the weights: less noise than the last step's, at no cost in samples (Polyak & Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class RunningMean:
    """Exponential mean of a model's trained parameters. Early on the decay is smaller, so that the start is forgotten."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @property
    def tensors(self) -> dict:
        """For a saved state."""
        return {"updates": self.updates, "values": self.values}

    def load(self, tensors: dict) -> None:
        """Take a saved state's."""
        self.updates = tensors["updates"]
        for name, value in tensors["values"].items():
            self.values[name].copy_(value)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After a step."""
        self.updates += 1
        weight = 1 - min(self.decay, self.updates / (self.updates + 9))
        mine = list(self.values.values())
        theirs = [p for _, p in model.named_parameters() if p.requires_grad]
        torch._foreach_lerp_(mine, [p.detach() for p in theirs], weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the mean inside, and its own weights again afterwards, exactly."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            if name in self.values:
                p.data, self.values[name] = self.values[name], p.data
