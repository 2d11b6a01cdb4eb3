"""One optimiser step over all workers, with accumulation, and with memory running out as control flow.

Every worker adds up the gradients of its micro-batches without exchanging anything; then all agree whether every forward
and backward fitted its device. If one did not, all drop their gradients, restore their random state, halve the micro-batch
and compute the step again: the number of collectives is the same on every worker, so none is left waiting. Else the loss
sums, the counts they are normalised by, and the gradients are summed once. torch's DistributedDataParallel starts to
exchange gradients inside the last backward, where an out-of-memory error on one worker would hang the others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinoray.errors import SystemicError
from dinoray.training.workers import Workers

logger = logging.getLogger(__name__)

Loss = Callable[[list[Any]], tuple[torch.Tensor, torch.Tensor]]
"""Samples -> (sum of the losses, what the sum over all samples of a step is divided by)."""


@dataclass(frozen=True)
class StepResult:
    """Of one step, over all workers."""

    loss: float
    grad_norm: float
    """L2 norm before clipping."""


class Stepper:
    """Computes steps of one model; `micro_batch` may shrink over its life and never grows."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, workers: Workers, *, micro_batch: int,
                 clip_norm: float, autocast: torch.dtype | None = None):
        self.model, self.optimizer, self.loss, self.workers = model, optimizer, loss, workers
        self.micro_batch, self.clip_norm, self.autocast = micro_batch, clip_norm, autocast
        self.oom_events = 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, parts: Sequence[list[Any]], seed: int) -> StepResult:
        """One step on this worker's micro-batches of samples. `seed` fixes what the network itself draws (dropout).

        Raises SystemicError when even single samples do not fit, or when the loss is not finite.
        """
        while True:
            done = self._accumulate(parts, seed)
            if self.workers.agree(done is not None):
                break
            # outside of any except frame: the failed micro-batch's tensors are gone by now
            self._halve()
        loss, count = self.workers.total(*done)
        if not (count > 0 and abs(loss) < float("inf")):
            raise SystemicError(f"the loss of a step is {loss} over a count of {count}", todo="lower learning_rate, or use "
                                "precision=float32; the last checkpoint is from before this step")
        for p in self.parameters:
            if p.grad is None:  # on every worker alike: a parameter that this step's graph does not reach
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in self.parameters]
        self.workers.sum_(grads)
        torch._foreach_div_(grads, count)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip_norm, error_if_nonfinite=False))
        if norm != norm or norm == float("inf"):
            raise SystemicError(f"the gradient's norm is {norm}", todo="lower learning_rate, or use precision=float32")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss / count, norm)

    def _accumulate(self, parts: Sequence[list[Any]], seed: int) -> tuple[float, float] | None:
        """(sum of losses, count) of this worker, gradients added up; None when the device ran out of memory."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        total = count = 0.0
        try:
            for part in parts:
                for i in range(0, len(part), self.micro_batch):
                    with self._mixed():
                        loss, n = self.loss(part[i:i + self.micro_batch])
                    loss.backward()
                    total, count = total + float(loss.detach()), count + float(n)
        except torch.OutOfMemoryError:
            return None
        return total, count

    def _halve(self) -> None:
        self.oom_events += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.workers.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.micro_batch == 1:
            raise SystemicError("a single sample does not fit the device's memory",
                                todo="use a smaller crop, a smaller backbone, or a device with more memory")
        self.micro_batch //= 2
        logger.warning("out of memory on a device: micro-batches of %d from here on", self.micro_batch)

    def _mixed(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.workers.device.type, dtype=self.autocast)
