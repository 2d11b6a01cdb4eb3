"""Where units run: in this process, or on the actors of a Ray that is started or joined at the first use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from dinoray.config import UnitJob
from dinoray.ledger import Receipt
from dinoray.memory.meter import available_cores
from dinoray.resolved import Resolved
from dinoray.runners.build import RunnerSpec, build_runner
from dinoray.runners.local import run_units


class Pool(Protocol):
    """Runs all pending units of a plan; `check` is called between rounds and may raise."""

    def __call__(self, spec: RunnerSpec, recompute_pending: Callable[[], list[int]], on_receipt: Callable[[Receipt], None],
                 check: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


def make_pool(job: UnitJob, resolved: Resolved, say: Callable[[str], None]) -> Pool:
    """The pool that the job asks for; nothing is started yet."""
    return LocalPool(job, resolved) if job.no_ray else RayPool(job, resolved, say)


class LocalPool:
    """Runs units in this process."""

    def __init__(self, job: UnitJob, resolved: Resolved):
        self.job, self.resolved = job, resolved

    def close(self) -> None:
        """Nothing to stop: the runner was closed after its last unit."""

    def __call__(self, spec: RunnerSpec, recompute_pending: Callable[[], list[int]],
                 on_receipt: Callable[[Receipt], None], check: Callable[[], None]) -> None:
        cores = available_cores()
        spec = replace(spec, decode_threads=self.job.decode_threads or max(2, cores),
                       compute_threads=self.job.compute_threads or cores)
        loaded = self.resolved.loaded if spec.kind == self.job.runner else None
        run_units(lambda: build_runner(spec, loaded), recompute_pending, on_receipt, rounds=self.job.rounds,
                  where=self.job.out, check=check)


class RayPool:
    """Runs units on Ray actors. Ray is started or joined at the first use: not for planning, not for nothing."""

    def __init__(self, job: UnitJob, resolved: Resolved, say: Callable[[str], None]):
        self.job, self.resolved, self.say = job, resolved, say
        self._local: bool | None = None

    def _connect(self) -> None:
        from dinoray.cluster.resources import connect

        if self._local is None:
            began = time.monotonic()
            self._local = connect()
            self.say(f"Ray {'started on this machine' if self._local else 'cluster joined'} in {time.monotonic() - began:.1f} s")

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        if self._local is not None:
            from dinoray.cluster.resources import disconnect

            disconnect(self._local)

    def __call__(self, spec: RunnerSpec, recompute_pending: Callable[[], list[int]],
                 on_receipt: Callable[[Receipt], None], check: Callable[[], None]) -> None:
        from dinoray.cluster.pool import run_units as run_on_ray
        from dinoray.cluster.resources import actor_shape

        self._connect()
        device = self.resolved.device if spec.kind == self.job.runner else "cpu"
        shape = actor_shape(self.job.workers, device=device, decode_threads=self.job.decode_threads,
                            compute_threads=self.job.compute_threads)
        threads = max(2, shape.num_cpus - (device == "cuda"))
        spec = replace(spec, decode_threads=self.job.decode_threads or threads,
                       compute_threads=self.job.compute_threads or shape.num_cpus)
        if spec.kind == self.job.runner:
            self.resolved.release()  # its weights are staged by now; the actors hold the model, the driver need not
        run_on_ray(spec, recompute_pending, on_receipt, shape=shape, rounds=self.job.rounds,
                   stall_timeout_s=self.job.stall_timeout_s, check=check)
