"""The loop of every training: steps, validation, saved states, early stop. What is learned is the task's business.

All that a resumed run needs is in a state: model, optimizer, running mean, step, best figure, history. Samples and the
learning rate are functions of the step, so a resumed run equals an undisturbed one exactly on the same number of workers
and the same kind of device.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from dinoray.config.training import TrainingJob
from dinoray.driver import stop_mode
from dinoray.errors import ChangedRequest, OutputDamaged, SystemicError, TransientError
from dinoray.failpoints import reach
from dinoray.io.stores import Store
from dinoray.training.averaging import RunningMean
from dinoray.training.journal import Journal
from dinoray.training.sampling import Ahead, micro_batches
from dinoray.training.schedule import lr_factor
from dinoray.training.states import load_last, save_best, save_last
from dinoray.training.steps import Stepper
from dinoray.training.workers import Workers

STOP_LOOK_S = 5.0
"""Seconds between looks for `dinoray stop`."""


class Task(Protocol):
    """What is learned. A task may have `spent()`: seconds by the name of a part of its steps, since it was last asked; and
    `after_step()`: facts of this process that the step has shown, for whoever watches."""

    fingerprint: str
    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For AdamW: `params`, `lr` (the peak), `weight_decay` of each group."""
        ...

    def sample(self, index: int) -> Any:
        """Sample number `index` of the training, the same whoever asks (called from several threads)."""
        ...

    def loss(self, samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the losses, what their sum over a step is divided by)."""
        ...

    def validate(self, workers: Workers) -> dict[str, float]:
        """Figures of the un-augmented validation, the same on every worker; `loss` decides what is best."""
        ...


@dataclass
class Progress:
    """Where a training stands; part of every state."""

    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    bad_validations: int = 0
    seconds: float = 0.0
    """Wall time of the steps and validations up to `step`, over all runs; what a restart computed again counts once."""
    micro_batch: int = 0
    """What running out of memory has left of the job's; 0 is all of it."""
    best_state: dict[str, str] = field(default_factory=dict)
    """Where the best state is (dinoray.training.states)."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last logged one."""
    ended: str = ""
    """`steps` or `patience` when training is over."""
    history: list[dict[str, float]] = field(default_factory=list)
    """A row per logged step (`step`, `loss`, `lr`, `grad_norm`, `samples_per_s`, `*_share` of the steps' time: `wait_share` waited
    for samples, others are the task's) and per validation (`step`, `val_*`)."""


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What forward and backward are computed in; None is as the weights are."""
    return torch.bfloat16 if precision == "bfloat16" else None


def fit(job: TrainingJob, task: Task, workers: Workers, store: Store, *,
        report: Callable[[dict[str, float]], None] = lambda metrics: None, check: Callable[[], None] = lambda: None,
        run_name: str = "") -> Progress:
    """Train (or go on) until `job.steps`, early stop, or a request to stop; the progress says which.

    `report` is called on every worker after each saved state. `check` is called by the first worker before it writes, and
    raises when it must not any more. Raises ChangedRequest when the state is another job's, SystemicError when a sample or a
    step cannot be computed.
    """
    model = task.model.to(workers.device)
    workers.same_start_([*model.parameters(), *model.buffers()])
    optimizer = torch.optim.AdamW(task.parameter_groups(), betas=(0.9, job.beta2))
    peaks = [group["lr"] for group in optimizer.param_groups]
    mean = RunningMean(model, job.ema_decay) if job.ema_decay else None
    progress = _take_up(task, model, optimizer, mean, store, workers)
    micro_batch = min(progress.micro_batch or job.micro_batch, job.micro_batch)
    stepper = Stepper(model, optimizer, task.loss, workers, micro_batch=micro_batch,
                      clip_norm=job.clip_norm, autocast=autocast_dtype(job.precision))
    journal = None
    if workers.is_first:
        check()
        journal = Journal(store, progress, job.steps, workers.world, run_name)
        if progress.step:  # what a killed run saved a state of, but did not tell any more
            journal.store_now(progress)
    ahead = Ahead(task.sample, (workers.share(micro_batches(step, job.batch_size, job.micro_batch))
                                for step in range(progress.step, job.steps)), threads=job.data_threads)
    run = _Run(job, task, workers, store, model, optimizer, mean, stepper, progress, journal, report, check,
               saved=(progress.step, progress.ended) if progress.step else (-1, ""))
    try:
        while not progress.ended:
            if progress.step >= job.steps:
                progress.ended = "steps"
                break
            if run.must_stop():
                break
            reach("train.step")
            factor = lr_factor(progress.step, steps=job.steps, warmup_steps=job.warmup_steps, final=job.final_lr_fraction)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            model.train()
            waiting_since = time.monotonic()
            parts = ahead.next()
            run.waited_s += time.monotonic() - waiting_since
            result = stepper.step(parts, seed=(job.seed * 1_000_003 + progress.step) % 2**63)
            if mean is not None:
                mean.update(model)
            progress.step += 1
            run.after_step(result.loss, result.grad_norm, peaks[0] * factor)
        run.save()
    finally:
        ahead.close()
        if journal is not None:
            journal.close()
    return progress


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: parameters that ask for gradients, and the buffers that belong to the state (batch norms). A
    frozen backbone is not written again and again."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Take what `trained_tensors` gave. Raises OutputDamaged when it is of another model."""
    wanted = trained_tensors(model)
    wrong = sorted(name for name in wanted.keys() | tensors.keys()
                   if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape)
    if wrong:
        raise OutputDamaged(f"a saved state is of another model: {', '.join(wrong[:5])}", where=where,
                            todo="delete the output's _dinoray/states to begin anew")
    model.load_state_dict(tensors, strict=False)


def _take_up(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, mean: RunningMean | None, store: Store,
             workers: Workers) -> Progress:
    state = load_last(store, workers.device)
    step = state["progress"]["step"] if state else 0
    if workers.total(step)[0] != workers.world * step:
        raise TransientError("the workers have not read the same state", where=store.url, todo="they are started again")
    if state is None:
        return Progress()
    if state["fingerprint"] != task.fingerprint:
        raise ChangedRequest(f"the saved state is of training {state['fingerprint']}, this one is {task.fingerprint}",
                             where=store.url, todo="use another output folder for other settings or data")
    load_trained(model, state["model"], store.url)
    optimizer.load_state_dict(state["optimizer"])
    if mean is not None:
        mean.load(state["mean"])
    return Progress(**state["progress"])


@dataclass
class _Run:
    """One process's part in one run of `fit`."""

    job: TrainingJob
    task: Task
    workers: Workers
    store: Store
    model: nn.Module
    optimizer: torch.optim.Optimizer
    mean: RunningMean | None
    stepper: Stepper
    progress: Progress
    journal: Journal | None
    report: Callable[[dict[str, float]], None]
    check: Callable[[], None]
    began: float = field(default_factory=time.monotonic)
    looked: float = field(default_factory=time.monotonic)
    marked: float = field(default_factory=time.monotonic)
    stepping_since: float = field(default_factory=time.monotonic)
    stepping_s: float = 0.0
    """Seconds in this run's steps since the last logged one, without validations and saving."""
    waited_s: float = 0.0
    """What of `stepping_s` was spent waiting for samples."""
    saved: tuple[int, str] = (-1, "")
    """Step and `ended` of the newest state."""
    stepped: int = 0
    """Steps that `stepping_s` is of."""

    def must_stop(self) -> bool:
        """Whether `stop_after_s` is over or `dinoray stop` asks; all workers agree."""
        now = time.monotonic()
        if now - self.looked < STOP_LOOK_S and self.job.stop_after_s is None and not self.workers.joined:
            return False
        stop = self.job.stop_after_s is not None and now - self.began >= self.job.stop_after_s
        if self.workers.is_first and now - self.looked >= STOP_LOOK_S:
            self.looked = now
            stop = stop or stop_mode(self.store) is not None
        return not self.workers.agree(not stop)

    def after_step(self, loss: float, grad_norm: float, lr: float) -> None:
        job, progress = self.job, self.progress
        if self.stepper.micro_batch < job.micro_batch:
            progress.micro_batch = self.stepper.micro_batch
        progress.losses.append(loss)
        self.stepped += 1
        self.stepping_s += time.monotonic() - self.stepping_since
        facts = getattr(self.task, "after_step", dict)()
        if facts and self.journal is not None:
            self.journal.note(facts, progress)
        step = progress.step
        if step % job.log_every == 0 or step == job.steps:
            row = {"step": step, "loss": sum(progress.losses) / len(progress.losses), "lr": lr, "grad_norm": grad_norm,
                   "samples_per_s": self.stepped * job.batch_size / max(1e-9, self.stepping_s)}
            spent = {"wait": self.waited_s} | getattr(self.task, "spent", dict)()
            row |= {f"{name}_share": min(1.0, seconds / max(1e-9, self.stepping_s)) for name, seconds in spent.items()}
            self._tick()
            progress.losses, self.stepped, self.stepping_s, self.waited_s = [], 0, 0.0, 0.0
            progress.history.append(row)
            if self.journal is not None:
                self.journal.add(row, progress)
        if step % job.validate_every == 0 or step == job.steps:
            self._share_statistics()
            self._validate()
        if step % job.checkpoint_every == 0:
            self.save()
        self.stepping_since = time.monotonic()

    def _tick(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.marked
        self.marked = now

    def _validate(self) -> None:
        job, progress = self.job, self.progress
        self.model.eval()
        try:
            with self._averaged(), torch.inference_mode():
                figures = self.task.validate(self.workers)
        except torch.OutOfMemoryError as error:
            raise SystemicError("the validation does not fit the device's memory", where=str(self.workers.device),
                                todo="lower micro_batch, then run the same command again: it resumes") from error
        if not math.isfinite(figures["loss"]):  # it could never be the best, nor end the training by patience
            raise SystemicError(f"the loss of the validation at step {progress.step} is {figures['loss']}",
                                todo="lower learning_rate, or use precision=float32")
        row = {"step": progress.step, **{f"val_{name}": value for name, value in figures.items()}}
        progress.history.append(row)
        if figures["loss"] < progress.best_loss * (1 - job.min_improvement) or progress.best_step == 0:
            progress.bad_validations = 0
        else:
            progress.bad_validations += 1
        if figures["loss"] < progress.best_loss:
            progress.best_loss, progress.best_step = figures["loss"], progress.step
            if self.workers.is_first:
                self.check()
                with self._averaged():
                    progress.best_state = save_best(self.store, progress.step, {
                        "fingerprint": self.task.fingerprint, "step": progress.step, "model": trained_tensors(self.model)})
        if job.patience is not None and progress.bad_validations >= job.patience:
            progress.ended = "patience"
        if self.journal is not None:
            self.journal.add(row, progress)

    def _share_statistics(self) -> None:
        """Batch norms count what each worker sees: what is validated and written is the mean over all of them."""
        self.workers.mean_([buffer for buffer in self.model.buffers() if buffer.is_floating_point()])

    def _averaged(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mean is None else self.mean.applied(self.model)

    def save(self) -> None:
        """Save the newest state (first worker) and report it (all)."""
        progress = self.progress
        if self.saved == (progress.step, progress.ended):
            return
        self.saved = progress.step, progress.ended
        self._share_statistics()
        self._tick()
        if self.workers.is_first:
            self.check()
            if self.journal is not None:
                self.journal.keep()  # before the state: what a resumed run does not say again must be said
            state = {"fingerprint": self.task.fingerprint, "progress": vars(progress).copy(), "model": trained_tensors(self.model),
                     "optimizer": self.optimizer.state_dict(), "mean": None if self.mean is None else self.mean.tensors}
            save_last(self.store, progress.step, state, progress.best_state)
            if self.journal is not None:
                self.journal.store_now(progress)
        self.workers.barrier()  # a state is there before anyone goes on
        self.report({"step": float(progress.step), "best_loss": progress.best_loss})
