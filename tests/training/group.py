"""Functions that the processes of a real gloo group run, and what starts them."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinoray.errors import DinorayError
from dinoray.io.stores import LocalStore
from dinoray.training.loop import fit
from dinoray.training.sampling import micro_batches
from dinoray.training.steps import Stepper
from dinoray.training.workers import Workers
from tests.training.toys import Toy, toy_job


def in_group(world: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """[what `function(workers, *args)` gave on each of `world` processes]. A hang ends after 30 s as a failure."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_member, (world, str(folder), function, args), nprocs=world, join=True)
    results = [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]
    for result in results:
        assert "trouble" not in (result if isinstance(result, dict) else {}), result["trouble"]
    return results


def _member(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=30))
    try:
        result = function(Workers(), *args)
    except Exception:
        result = {"trouble": traceback.format_exc()}
    torch.save(result, f"{folder}/result-{rank}.pt")
    if not (isinstance(result, dict) and "trouble" in result):
        dist.barrier()  # gloo aborts a process that still talks to one that has left
    dist.destroy_process_group()


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """The same in this process, without a group, on one thread as the group's processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(Workers(), *args)
    finally:
        torch.set_num_threads(threads)


def gradients(workers: Workers, cases: list[tuple[int, int]], dtype: torch.dtype) -> list[Any]:
    """For each (batch, micro-batch): (loss, the reduced gradient, how many samples this worker had)."""
    found = []
    for batch, micro in cases:
        toy = Toy(dtype)
        optimizer = torch.optim.SGD(toy.parameter_groups(), lr=0.0)
        stepper = Stepper(toy.model, optimizer, toy.loss, workers, micro_batch=micro, clip_norm=1e9)
        kept: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(lambda opt, a, k, kept=kept, s=stepper: kept.extend(p.grad.clone() for p in s.parameters))
        parts = [[toy.sample(i) for i in part] for part in workers.share(micro_batches(3, batch, micro))]
        result = stepper.step(parts, seed=1)
        found.append((result.loss, result.grad_norm, torch.cat([g.reshape(-1) for g in kept]), sum(map(len, parts))))
    return found


def ten_steps(workers: Workers, out: str, fields: dict[str, Any], stop_at: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """A toy training, or its first part: (history, indices this worker made)."""
    toy = Toy(dtype)
    toy.model = toy.model.to(dtype)
    job = toy_job(out, **fields)
    if stop_at is not None:
        job = job.model_copy(update={"stop_after_s": 1e9})
        toy = StopsAt(toy, stop_at)  # type: ignore[assignment]
    try:
        progress = fit(job, toy, workers, LocalStore(out))
    except Enough:
        return {"seen": toy.seen}
    return {"history": progress.history, "seen": toy.seen, "step": progress.step, "ended": progress.ended}


class Enough(Exception):
    """Ends a toy training in the middle, on all workers at one step."""


class StopsAt:
    """A toy whose validation ends the process's part: as if all of it were killed there."""

    def __init__(self, toy: Toy, step: int):
        self.toy, self.left, self.model, self.fingerprint = toy, step, toy.model, toy.fingerprint
        self.seen = toy.seen
        self.parameter_groups, self.sample, self.loss = toy.parameter_groups, toy.sample, toy.loss

    def validate(self, workers: Workers) -> dict[str, float]:
        self.left -= 1
        if self.left == 0:
            raise Enough
        return self.toy.validate(workers)


def out_of_memory(workers: Workers, out: str, fields: dict[str, Any], bad_rank: int, at_step: int, fits: int) -> dict[str, Any]:
    """A toy training in which one worker's device holds only `fits` samples from `at_step` on."""
    toy = Toy()
    job = toy_job(out, **fields)
    plain, failures = toy.loss, []

    def loss(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if workers.rank == bad_rank and len(samples) > fits and at_step * job.batch_size <= samples[0][0] < 10**6:
            failures.append(len(samples))
            raise torch.OutOfMemoryError("no memory, says the test")
        return plain(samples)

    toy.loss = loss  # type: ignore[method-assign]
    try:
        progress = fit(job, toy, workers, LocalStore(out))
    except DinorayError as error:
        return {"error": f"{type(error).__name__}: {error}", "failures": failures}
    return {"history": progress.history, "failures": failures, "micro_batch": progress.micro_batch,
            "weights": torch.cat([p.detach().reshape(-1) for p in toy.model.parameters()])}


def batch_statistics(workers: Workers, out: str) -> dict[str, Any]:
    """A toy training with a batch norm: its buffers at the end, and the mean of what this worker alone saw in its last step."""
    toy = Toy(torch.float32)
    toy.model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    seen: list[torch.Tensor] = []
    toy.model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().mean(0)) if module.training else None)
    toy.parameter_groups = lambda: [{"params": list(toy.model.parameters()), "lr": 0.01, "weight_decay": 0.0}]  # type: ignore[method-assign]
    fit(toy_job(out, steps=4, checkpoint_every=2), toy, workers, LocalStore(out))
    return {"buffers": [toy.model[1].running_mean.clone(), toy.model[1].running_var.clone()], "own": seen[-1]}
