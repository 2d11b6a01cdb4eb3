"""Peak memory of a computation from the shapes of its tensors, before anything is allocated.

The computation runs on fake tensors (shapes and dtypes without values): what it would allocate and let go is added up storage by
storage. What libraries take beside (scratch of convolutions, thread stacks) is not in it.

A process holds more than what is alive: glibc maps blocks of 32 MiB and more one by one and returns them at once; smaller ones
lie in its heap, which stays as large as it once was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEAP_BLOCK = 32 * 2**20
"""Bytes from which a block is mapped by itself: the highest that glibc's threshold goes (mallopt(3), M_MMAP_THRESHOLD)."""


@dataclass(frozen=True)
class Peak:
    """Bytes of a phase at its highest."""

    live: int
    """Tensors that are alive at once."""
    mapped: int
    heap: int
    """Blocks of at least `HEAP_BLOCK` that are alive, and the heap (the most that smaller ones have taken up to then), where their
    sum is highest."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations make or are given, from when it is entered, but for those of `held`."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._mapped = self._small = self._heap = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}
        self._live_peak, self._held_peak = 0, (0, 0)

    def phase(self) -> Peak:
        """Of what was since the last call."""
        found = Peak(self._live_peak, *self._held_peak)
        self._live_peak, self._held_peak = self._mapped + self._small, (self._mapped, self._heap)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see(tree_leaves((args, kwargs)))
        found = func(*args, **(kwargs or {}))
        self._see(tree_leaves(found))
        return found

    def _see(self, leaves: list[Any]) -> None:
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            name = storage._cdata
            if name not in self._known:
                self._known.add(name)
                self._count(storage.nbytes(), 1)
                weakref.finalize(storage, self._gone, name, storage.nbytes())
        self._heap = max(self._heap, self._small)
        self._live_peak = max(self._live_peak, self._mapped + self._small)
        self._held_peak = max(self._held_peak, (self._mapped, self._heap), key=sum)

    def _count(self, size: int, sign: int) -> None:
        if size >= HEAP_BLOCK:
            self._mapped += sign * size
        else:
            self._small += sign * size

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self._count(size, -1)


def traced(run: Callable[[Callable[[], Peak]], None], held: Iterable[torch.Tensor]) -> None:
    """Run `run(phase)` on fake tensors. `phase()` gives the peak since it was last called (or since the beginning), what was made
    before and is still alive included. `held`: tensors that were there before (weights); they cost nothing, and
    their values do not change, though they may be given fake gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(held) as bytes_:
        run(bytes_.phase)
