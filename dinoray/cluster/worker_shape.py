"""How many workers a training has, and the CPUs and GPUs of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.train import ScalingConfig

from dinoray.cluster.resources import may_grow
from dinoray.errors import BadRequest
from dinoray.wording import plural


@dataclass(frozen=True)
class WorkerShape:
    """`low`..`high` equal workers, each with `num_cpus` CPUs and `num_gpus` GPUs."""

    low: int
    high: int
    num_cpus: int
    num_gpus: int

    def scaling(self) -> ScalingConfig:
        """For Ray Train: a fixed number, or an elastic range."""
        return ScalingConfig(num_workers=self.high if self.low == self.high else (self.low, self.high),
                             use_gpu=bool(self.num_gpus),
                             resources_per_worker={"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {}))

    def __str__(self) -> str:
        each = plural(self.num_cpus, "CPU") + (f" and {plural(self.num_gpus, 'GPU')}" if self.num_gpus else "")
        return f"{plural(self.low, 'worker')} of {each} each"


def worker_shape(workers: str, *, device: str, data_threads: int) -> WorkerShape:
    """Resolve `N` or `MIN,MAX` against the cluster that is connected.

    On CUDA a worker has one GPU, and a CPU per data thread and one more. On CPU the workers share all CPUs evenly, a worker
    on one node; where nodes may still join, MIN of them do. Raises BadRequest when MIN workers can never fit.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    low, _, high = workers.partition(",")
    return fitted(int(low), int(high or low), nodes, on_cuda=device == "cuda", data_threads=data_threads, grows=may_grow())


def fitted(low: int, high: int, nodes: Sequence[dict[str, float]], *, on_cuda: bool, data_threads: int,
           grows: bool) -> WorkerShape:
    """As `worker_shape`, for nodes with these resources."""
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    there, kind = (sum(gpus), "GPU") if on_cuda else (sum(cpus), "CPU")
    if low > there and not grows:
        raise BadRequest(f"{plural(low, 'worker')} of one {kind} each do not fit {plural(there, kind)}", where="workers",
                         todo=f"ask for at most {there} workers" if there else "use device=cpu, or a cluster with GPUs")
    if on_cuda:
        # a node's CPUs per GPU are all that a worker can have
        share = [c // g for c, g in zip(cpus, gpus, strict=True) if g]
        return WorkerShape(low, high, max(1, min([data_threads + 1, *share])), 1)
    wanted = low if grows else min(high, there)
    each = next((n for n in range(max(cpus, default=0), 0, -1) if sum(c // n for c in cpus) >= wanted), 1)
    return WorkerShape(low, high, each, 0)
