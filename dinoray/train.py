"""The life of a training job, from its sources to the checkpoint folder. What the CLI and jobs/ call.

resolve -> list -> take the output -> record the request -> survey of the images -> steps in workers -> checkpoint. Every step
can be killed and is taken up by the next run of the same command.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from dinoray.config import TrainDistanceMapJob, TrainingJob
from dinoray.driver import Driver, refuse_if_held
from dinoray.errors import BadRequest, OutputDamaged, Stopped
from dinoray.io.stores import Store, open_store
from dinoray.request import KEY
from dinoray.staging import staged, store_backbone
from dinoray.train_request import check_training, forget, identity_of, recorded_device, recorded_identity, settled
from dinoray.training.kinds import TrainingKind, kind_of
from dinoray.training.listings import keep_listing
from dinoray.training.spec import TrainingSpec, run_worker
from dinoray.training.standing import CHECKPOINT, Watch, finished, read_progress
from dinoray.units import fingerprint_of
from dinoray.wording import plural


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training came to."""

    out: str
    fingerprint: str
    checkpoint: str
    progress: dict[str, Any]
    """Last figures: step, loss, val_loss, best_step, ended, ..."""

    @property
    def exit_code(self) -> int:
        """0: the checkpoint is written."""
        return 0


def train_distance_map(job: TrainDistanceMapJob, say: Callable[[str], None] = print, *, command: str = "",
                       leave: Callable[[str], None] | None = None) -> TrainingOutcome:
    """A distance-map UNet of cells: see `train`."""
    return train(job, say, command=command, leave=leave)


def train(job: TrainingJob, say: Callable[[str], None] = print, *, command: str = "",
          leave: Callable[[str], None] | None = None) -> TrainingOutcome:
    """Train to the end, or go on with a training. `say` gets the lines meant for the user.

    Raises BadRequest (nothing was run), ChangedRequest (the output is another training's), OutputHeld, SystemicError,
    Stopped (`stop_after_s`, `dinoray stop`): the same command resumes.
    """
    import torch

    kind = kind_of(job)
    store = open_store(job.out)
    job = kind.settled(settled(job, has_cuda=torch.cuda.is_available(), recorded=recorded_device(store)))
    sets = kind.sets(job)
    backbone, parameters = kind.probe(job, sets)
    inputs = {name: kind.digest(listed) for name, listed in sets.items()}
    identity = identity_of(job, backbone, inputs)
    before = recorded_identity(store, identity, sets)
    if before is not None and kind.same_content(job, store, sets, say):
        identity = before
    fingerprint = fingerprint_of(identity)
    known = check_training(store, fingerprint, identity, sets)
    over = "" if backbone is None else (f" over {backbone.config.name} from {backbone.source}, digest {backbone.digest[:12]}, "
                                        f"{'frozen' if job.backbone_learning_rate is None else 'trained too'}")
    say(f"dinoray {fingerprint}  {job.kind}{over}; {parameters / 1e6:.2f} M parameters learn, "
        f"{job.precision} on {job.device}  output {job.out}  resume with: {command or 'the same command'}")
    refuse_if_held(store, job.takeover)
    if finished(store, fingerprint):
        return _told(kind, store, fingerprint, say)
    _refuse_idle_statistics(job)
    for note in _notes(job) + kind.notes(job, sets):
        say(note)
    driver = Driver(store, command, say, takeover=job.takeover)
    driver.leave, driver.drained_note = leave, "before a step was begun"
    driver.drain_note = "a state is saved, then the training ends"
    with driver:
        if not known:
            if forget(store):
                say("what was begun here before, and ended before its first state, is replaced")
            record = {"fingerprint": fingerprint, "identity": identity, "command": command, "kind": f"train {job.kind}",
                      "job": job.model_dump(mode="json"), "libraries": {n: version(n) for n in ("torch", "numpy", "scipy")}}
            store.put(KEY, json.dumps(record, indent=1, sort_keys=True).encode())
        for name, listed in sets.items():
            keep_listing(store, name, listed)
        kind.survey(job, store, sets, say, driver.check)
        weights, digest = job.weights, ""
        if backbone is not None:
            digest = backbone.digest
            if not (job.weights or "").startswith("random"):
                weights = staged(job.staging or job.out, digest, partial(store_backbone, backbone))
        spec = TrainingSpec(job.kind, job.out, fingerprint, job.model_dump(mode="json"), weights or "", digest,
                            inputs, driver.token)
        backbone = None
        with Watch(store, driver.token, say) as watch:
            if job.no_ray:
                run_worker(spec)
            else:
                from dinoray.cluster.trainer import run_workers

                # until workers are at work, nobody but the driver sees a wish to stop
                run_workers(spec, say, check=lambda: driver.check_lost() if watch.begun else driver.check(),
                            begun=lambda: watch.begun)
        progress = read_progress(store)
        if not progress.get("ended"):
            raise Stopped(f"training stopped at step {progress.get('step', 0)} of {job.steps}; a state is saved", where=job.out,
                          todo=f"resume with: {command or 'the same command'}")
        if not finished(store, fingerprint):
            raise OutputDamaged("the training ended without a checkpoint", where=f"{store.url}/{CHECKPOINT}",
                                todo="run the same command again")
    return _told(kind, store, fingerprint, say)


def _refuse_idle_statistics(job: TrainingJob) -> None:
    """Raise BadRequest for batch norms on workers that never see a sample: their statistics would be averaged in."""
    workers, parts = 1 if job.no_ray else int(job.workers.split(",")[-1]), -(-job.batch_size // job.micro_batch)
    if getattr(job, "norm", "") == "batch" and workers > parts:
        raise BadRequest(f"norm=batch needs samples on every worker, and {workers} workers share {plural(parts, 'micro-batch')} of "
                         "a step", where="workers", todo="use norm=layer, fewer workers, or a smaller micro_batch")


def _notes(job: TrainingJob) -> list[str]:
    """What is allowed and hardly meant."""
    workers = 1 if job.no_ray else int(job.workers.split(",")[-1])
    parts = -(-job.batch_size // job.micro_batch)
    if workers > job.batch_size:
        return [f"a batch of {plural(job.batch_size, 'sample')} has no work for {workers} workers: "
                f"{workers - min(parts, job.batch_size)} of them will idle"]
    if workers > parts:
        noun = "micro-batch" if parts == 1 else "micro-batches"
        return [f"{workers} workers share {parts} {noun} of a step, so {workers - parts} of them will idle: a "
                f"micro_batch of at most {max(1, job.batch_size // workers)} has work for all"]
    return []


def _told(kind: TrainingKind, store: Store, fingerprint: str, say: Callable[[str], None]) -> TrainingOutcome:
    """The last lines of a training that is complete."""
    checkpoint, progress = f"{store.url}/{CHECKPOINT}", read_progress(store)
    config = json.loads(store.get(f"{CHECKPOINT}/config.json"))
    figures = ", ".join(f"{k.removeprefix('validation_').replace('_', ' ')} {v:.3f}" for k, v in config["metrics"].items()
                        if isinstance(v, float))
    out = shlex.quote(store.url)
    for line in kind.closing(config):
        say(line)
    say(f"look at it: dinoray report {out}  or: tensorboard --logdir {out}")
    say(f"dinoray {fingerprint}  complete: {progress['step']} steps ({progress['ended']}), best at {progress['best_step']}, "
        f"on validation {figures}  checkpoint {checkpoint}, digest {config['weights_digest'][:12]}  "
        f"use it: {kind.usage(shlex.quote(checkpoint))}")
    return TrainingOutcome(store.url, fingerprint, checkpoint, progress)
