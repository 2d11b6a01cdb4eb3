"""A device's out-of-memory error as control flow: halve the batch, replay the same items, keep the size that fits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from dinoray.errors import ItemError


class BackOff:
    """What computes batches of items on a device; several threads may share it. Subclasses say how (`_forward`)."""

    def __init__(self, device: torch.device):
        self._device = device
        self._lock = threading.Lock()
        self._safe: dict[tuple, int] = {}
        self.oom_events = 0
        self.split_batches = 0
        """Batches that were computed in smaller parts than the plan says: their low bits may differ."""

    def _forward(self, items: Sequence) -> Any:
        """The result of a batch; raises torch.OutOfMemoryError where it does not fit."""
        raise NotImplementedError(type(self).__name__)

    def _too_large(self, item: Any) -> ItemError:
        """The error of an item that does not fit by itself."""
        raise NotImplementedError(type(self).__name__)

    def in_parts(self, key: tuple, items: Sequence) -> list:
        """Results of `_forward` for `items` in order: one, or those of smaller parts after an out-of-memory error.

        The smaller size is kept for this `key` (the shape). Raises what `_too_large` returns when even one item does not
        fit.
        """
        start, parts = 0, []
        while start < len(items):
            size = min(self._safe.get(key, len(items)), len(items) - start)
            part = self._try(items[start:start + size])
            if part is None:  # outside of any except frame: the failed batch's tensors are gone by now
                self._back_off(key, size, items[start])
                continue
            parts.append(part)
            start += size
        if len(parts) > 1:
            with self._lock:
                self.split_batches += 1
        return parts

    def _try(self, items: Sequence) -> Any | None:
        try:
            return self._forward(items)
        except torch.OutOfMemoryError:
            return None

    def _back_off(self, key: tuple, size: int, item: Any) -> None:
        with self._lock:
            self.oom_events += 1
            self._safe[key] = min(self._safe.get(key, size), max(1, size // 2))  # another thread may know better
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise self._too_large(item)
