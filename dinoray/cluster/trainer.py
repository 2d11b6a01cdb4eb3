"""A training on Ray Train: a group of equal workers that is started again from the last saved state when one fails.

States live beside the output, not with Ray: a worker takes up what is there, so a group of another size, another cluster or
no Ray at all goes on from the same step. Ray Train gives the process group, the restarts and the elastic size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dinoray.cluster.pool import quiet_console
from dinoray.cluster.resources import connect
from dinoray.errors import BadRequest, SystemicError
from dinoray.training.spec import TrainingSpec, run_worker


def run_workers(spec: TrainingSpec, say: Callable[[str], None], *, check: Callable[[], None] = lambda: None) -> None:
    """Run a training on `workers` of the job, to its end or its saved stop.

    Raises BadRequest when the workers can never fit, SystemicError when they failed more often than `max_restarts`.
    """
    local = connect()
    try:
        low, high = worker_range(spec.job["workers"])
        on_cuda = spec.job["device"] == "cuda"
        cpus = cpus_per_worker(high, on_cuda)
        scaling = ScalingConfig(num_workers=high if low == high else (low, high), use_gpu=on_cuda,
                                resources_per_worker={"CPU": cpus} | ({"GPU": 1} if on_cuda else {}))
        trainer = TorchTrainer(
            _worker, train_loop_config=asdict(spec), scaling_config=scaling,
            torch_config=TorchConfig(backend="nccl" if on_cuda else "gloo"),
            run_config=RunConfig(name=f"dinoray-{spec.fingerprint}", storage_path=_ray_folder(spec),
                                 failure_config=FailureConfig(max_failures=spec.job["max_restarts"])))
        quiet_console()
        check()
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise SystemicError(f"the training failed: {_cause(error)}", where=spec.out,
                                todo="mend the cause, then run the same command again: it resumes from the last state") from error
    finally:
        if local:
            ray.shutdown()


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    import torch

    spec = TrainingSpec(**config)
    if spec.job["device"] == "cpu":
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    run_worker(spec, lambda metrics: ray.train.report(metrics))


def worker_range(workers: str) -> tuple[int, int]:
    """`2` -> (2, 2), `1,4` -> (1, 4)."""
    low, _, high = workers.partition(",")
    return int(low), int(high or low)


def cpus_per_worker(workers: int, on_cuda: bool) -> int:
    """CPUs that each worker reserves: what the cluster has, shared evenly; on CUDA a share of the GPU's node.

    Raises BadRequest when that is less than one and the cluster cannot grow.
    """
    from dinoray.cluster.resources import may_grow

    total = int(ray.cluster_resources().get("CPU", 0))
    if total < workers and not may_grow():
        raise BadRequest(f"{workers} workers do not fit {total} CPUs", where="workers", todo="ask for fewer workers")
    if on_cuda:
        return 1
    return max(1, total // workers) if total else 1


def _ray_folder(spec: TrainingSpec) -> str:
    """Where Ray Train keeps its own notes; shared by all nodes, as the output is."""
    return f"{spec.out}/_dinoray/ray"


def _cause(error: BaseException) -> str:
    """The last line of what a worker raised."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
