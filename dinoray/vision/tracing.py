"""Peak memory of a computation from the shapes of its tensors, before anything is allocated.

The computation runs on fake tensors (shapes and dtypes without values): what it would allocate and let go is added up storage by
storage. What libraries take beside (scratch of convolutions, thread stacks) is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations make or are given, from when it is entered, but for those of `held`."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

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
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, name, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.live -= size


def traced(run: Callable[[Callable[[], int]], None], held: Iterable[torch.Tensor]) -> None:
    """Run `run(phase)` on fake tensors. `phase()` gives the peak in bytes since it was last called (or since the beginning),
    what was made before and is still alive included. `held`: tensors that were there before (weights); they cost nothing, and
    their values do not change, though they may be given fake gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(held) as bytes_:
        def phase() -> int:
            found, bytes_.peak = bytes_.peak, bytes_.live
            return found

        run(phase)
