"""A training on Ray Train: a group of equal workers that is started again from the last saved state when one fails.

States live beside the output, not with Ray: a worker takes up what is there, so a group of another size, another cluster or
no Ray at all goes on from the same step. Ray Train gives the process group, the restarts and the elastic size.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.callback import UserCallback

from dinoray.cluster.pool import quiet_console
from dinoray.cluster.resources import connect, disconnect
from dinoray.cluster.worker_shape import WorkerShape, worker_shape
from dinoray.errors import DinorayError, SystemicError, TransientError
from dinoray.io.stores import filesystem, is_local, local_path, open_store
from dinoray.training.spec import TrainingSpec, run_worker
from dinoray.training.standing import note_failure

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the driver looks whether it still holds the output."""
PATIENCE_S = 60.0
"""Without workers for so long, the driver says what is waited for."""


def run_workers(spec: TrainingSpec, say: Callable[[str], None], *, check: Callable[[], None] = lambda: None,
                begun: Callable[[], bool] = lambda: True) -> None:
    """Run a training on `workers` of the job, to its end or its saved stop.

    `check` raises when the driver must end; `begun` tells whether this run's workers are at work. Raises BadRequest when the
    workers can never fit; what a worker raised, when trying again cannot help; SystemicError when workers failed more often
    than `max_restarts`.
    """
    local = connect()
    try:
        shape = worker_shape(spec.job["workers"], device=spec.job["device"], data_threads=spec.job["data_threads"])
        check()
        quiet_console()
        _wait(_trainer(spec, shape), spec, shape, say, check, begun)
    finally:
        disconnect(local)


def _trainer(spec: TrainingSpec, shape: WorkerShape) -> TorchTrainer:
    return TorchTrainer(
        _worker, train_loop_config={"spec": asdict(spec), "threads": shape.num_cpus}, scaling_config=shape.scaling(),
        torch_config=TorchConfig(backend="nccl" if shape.num_gpus else "gloo"),
        # the name is new for each run: Ray would else take up notes of its own from an earlier one
        run_config=RunConfig(name=f"dinoray-{spec.fingerprint}-{spec.token[:8]}",
                             callbacks=[OnFailure(spec.out, spec.token, spec.job["max_restarts"])],
                             failure_config=FailureConfig(max_failures=spec.job["max_restarts"]), **ray_storage(spec.out)))


def _wait(trainer: TorchTrainer, spec: TrainingSpec, shape: WorkerShape, say: Callable[[str], None], check: Callable[[], None],
          begun: Callable[[], bool]) -> None:
    """Fit, in a thread: on the main one Ray would put a handler of its own in place of ours for Ctrl-C."""
    ended: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: ended.append(_fit(trainer)), daemon=True, name="fit")
    thread.start()
    told, deadline = False, time.monotonic() + PATIENCE_S
    while thread.is_alive():
        thread.join(LOOK_S)
        check()
        if not told and time.monotonic() > deadline:
            told = True
            if not begun():
                say(f"no step yet: waiting for {shape} (dinoray doctor cluster shows the nodes), or for them to look at their "
                    "images and weights")
    error = ended[0]
    if error is None:
        return
    if not isinstance(error, ray.train.TrainingFailedError):
        raise error
    cause = _cause(error)
    if isinstance(cause, DinorayError) and _is_hopeless(cause):
        raise cause from error
    if not getattr(error, "worker_failures", None):
        raise SystemicError(f"Ray Train could not run the workers: {_in_short(cause)}", where=spec.out,
                            todo="dinoray doctor cluster looks for the cause; the same command again resumes") from error
    times = spec.job["max_restarts"] + 1
    raise SystemicError(f"the workers failed {'once' if times == 1 else f'{times} times'}, the last time with: {_in_short(cause)}",
                        where=getattr(cause, "where", "") or spec.out,
                        todo="mend the cause, then run the same command again: it resumes from the last state") from error


def _fit(trainer: TorchTrainer) -> BaseException | None:
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
        return error
    return None


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    import torch

    spec = TrainingSpec(**config["spec"])
    if spec.job["device"] == "cpu":
        torch.set_num_threads(config["threads"])
    run_worker(spec, lambda metrics: ray.train.report(metrics))


class OnFailure(UserCallback):
    """In Ray's controller: ends the training at once for an error that starting again cannot mend, and notes any other one
    beside the output, for who watches."""

    def __init__(self, out: str, run: str, limit: int):
        self.out, self.run, self.limit = out, run, limit

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise it again here: what a callback raises ends a run, what a worker raises starts it anew."""
        del run_context
        cause = first_cause(worker_exceptions)
        if _is_hopeless(cause):
            raise cause
        try:
            note_failure(open_store(self.out), self.run, _in_short(cause), self.limit)
        except (DinorayError, OSError) as error:  # it is for reading only: what is raised here would end the training
            logger.warning("why the workers are started again could not be noted: %s", error)


def first_cause(failures: dict[int, Exception]) -> BaseException:
    """What started the failure of a group. A worker's own error goes before the broken connections of those beside it."""
    errors = [_unwrapped(failures[rank]) for rank in sorted(failures)]
    return min(errors, key=lambda error: 0 if isinstance(error, DinorayError) else 2 if _is_broken_connection(error) else 1)


def _is_hopeless(error: BaseException) -> bool:
    """All that dinoray raises on purpose, but for storage and network trouble: it would be the same again."""
    return isinstance(error, DinorayError) and not isinstance(error, TransientError)


def _is_broken_connection(error: BaseException) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "Connection closed by peer" in str(error) or "gloo" in str(error).lower()


def _unwrapped(error: BaseException) -> BaseException:
    """The worker's own exception, out of Ray's wrappings."""
    inner = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None) or \
        getattr(error, "controller_failure", None)
    return _unwrapped(inner) if isinstance(inner, BaseException) else error


def _cause(error: ray.train.TrainingFailedError) -> BaseException:
    failures = getattr(error, "worker_failures", None)
    return first_cause(failures) if failures else _unwrapped(error)


def _in_short(error: BaseException) -> str:
    return error.what if isinstance(error, DinorayError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:500]


def ray_storage(out: str) -> dict[str, Any]:
    """Where Ray Train keeps its own notes (a marker; no checkpoints), as RunConfig takes it: below the output, through the
    file system that reaches it for us."""
    if is_local(out):
        return {"storage_path": f"{local_path(out)}/_dinoray/ray"}
    fs, path = filesystem(f"{out}/_dinoray/ray", write=True)
    return {"storage_path": path, "storage_filesystem": pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))}
