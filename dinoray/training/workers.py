"""The equal workers of a training and what they exchange. One worker alone needs no process group.

Gradients, losses and counts are summed once per step; flags are agreed on; nothing else passes between workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

BUCKET_BYTES = 64 * 2**20
"""Gradients are summed in flat buffers of about this size: few collectives, little extra memory."""


class Workers:
    """This worker's `rank` among `world`; `device` is where its tensors live."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.joined else 0
        self.world = dist.get_world_size() if self.joined else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that writes."""
        return self.rank == 0

    def share(self, parts: Sequence) -> Sequence:
        """This worker's slice of what all share: consecutive, sizes differ by at most one."""
        return parts[self.rank * len(parts) // self.world:(self.rank + 1) * len(parts) // self.world]

    def agree(self, ok: bool) -> bool:
        """Whether it is true on every worker (all-reduce MIN)."""
        if not self.joined:
            return ok
        flag = torch.tensor([int(ok)], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def total(self, *values: float) -> list[float]:
        """The sum over workers of each value, in float64."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.joined:
            dist.all_reduce(sums)
        return sums.tolist()

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors of one dtype by their sums over the workers."""
        if not self.joined:
            return
        bucket: list[torch.Tensor] = []
        size = 0
        for tensor in tensors:
            bucket.append(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= BUCKET_BYTES:
                _sum_flat(bucket)
                bucket, size = [], 0
        _sum_flat(bucket)

    def mean_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors of one dtype by their means over the workers."""
        if self.joined:
            found = list(tensors)
            self.sum_(found)
            for tensor in found:
                tensor /= self.world

    def same_start_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every worker the first one's values."""
        if self.joined:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def barrier(self) -> None:
        """Wait for all."""
        if self.joined:
            self.agree(True)


def _sum_flat(bucket: list[torch.Tensor]) -> None:
    if not bucket:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))
