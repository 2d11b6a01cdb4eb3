"""Threads that compute micro-batches: several on CPU, each forward on one thread; one on CUDA."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from dinoray.memory.allocator import keep_freed


class ComputePool(ThreadPoolExecutor):
    """While it is open, torch computes on one thread wherever it is called from: parallel over batches instead (see
    dinoray.vision.extractor). `threads` is what it really uses."""

    def __init__(self, device: torch.device, threads: int):
        self.on_cuda = device.type == "cuda"
        self.threads = 1 if self.on_cuda else threads
        self._threads_before = torch.get_num_threads()
        if not self.on_cuda:
            keep_freed()
            torch.set_num_threads(1)
        super().__init__(self.threads, thread_name_prefix="compute", initializer=None if self.on_cuda else _one_thread)

    def close(self) -> None:
        """Drop what has not begun, wait for the rest, give torch its threads back."""
        self.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._threads_before)


def _one_thread() -> None:
    """OpenMP counts threads per calling thread: each compute thread must be told."""
    torch.set_num_threads(1)
