"""What a step of a context-fusion training takes: forecast from shapes before it begins, and measured in the first one.

Two phases: the extraction (slices through the backbone, or stored tokens, and where they go), and the UNet's step (forward,
backward, optimizer). Both are counted above what the process holds with the model loaded and the samples read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dinoray.memory.meter import reset_rss_peak, rss, rss_peak
from dinoray.vision.tracing import Peak, traced

if TYPE_CHECKING:
    from dinoray.training.context_fusion import ContextFusionTask

PHASES = ("extraction", "step")
HOLES = 0.2
"""How much larger the heap grows than what it holds."""
LIBRARIES = 32 * 2**20
"""Bytes that the CPU's libraries take beside the tensors. Both are fitted to the settings marked in benchmarks/volumes_steps.py."""


def forecast(task: ContextFusionTask, samples: list[Any], autocast: torch.dtype | None) -> dict[str, int]:
    """Bytes of each phase for a micro-batch of `samples`, as `Stepper` computes it. Takes seconds, and next to no memory."""
    model = task.model
    found: list[Peak] = []

    def run(phase: Callable[[], Peak]) -> None:
        hook = model.unet.register_forward_pre_hook(lambda module, args: found.append(phase()))
        try:
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss, _ = task.loss(samples)
            loss.backward()
            torch.optim.AdamW(task.parameter_groups()).step()
            found.append(phase())
        finally:
            hook.remove()
            for parameter in model.parameters():
                parameter.grad = None

    model.train()
    traced(run, [*model.parameters(), *model.buffers()])
    return {name: peak.mapped + round((1 + HOLES) * peak.heap) + LIBRARIES for name, peak in zip(PHASES, found, strict=True)}


class FirstStep:
    """Measures the phases of one step: `began`, `extracted`, `ended`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.peaks: dict[str, int] = {}
        """Bytes of each phase."""
        self._base = 0

    def began(self) -> None:
        """The first phase begins."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
        else:
            reset_rss_peak()
            self._base = rss()

    def extracted(self) -> None:
        """The first phase is over."""
        self._take("extraction")

    def ended(self) -> None:
        """The step is over."""
        self._take("step")

    def _take(self, name: str) -> None:
        if self.device.type == "cuda":
            self.peaks[name] = torch.cuda.max_memory_allocated(self.device) - self._base
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.peaks[name] = max(0, rss_peak() - self._base)
            reset_rss_peak()

