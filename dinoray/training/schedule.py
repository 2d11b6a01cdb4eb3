"""Learning rate over steps: a pure function, so nothing of it needs saving."""

from __future__ import annotations

import math


def lr_factor(step: int, *, steps: int, warmup_steps: int, final: float) -> float:
    """Share of the peak learning rate at 0-based `step`: linear warm-up to 1, then a cosine to `final` at the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    span = max(1, steps - 1 - warmup_steps)
    done = min(1.0, (step - warmup_steps) / span)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
