"""The life of a training job, from its sources to the checkpoint folder. What the CLI and jobs/ call.

resolve -> list -> take the output -> record the request -> survey of the images -> steps in workers -> checkpoint. Every step
can be killed and is taken up by the next run of the same command.
"""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dinoray.config import TrainDistanceMapJob, canonical_json
from dinoray.driver import Driver, refuse_if_held
from dinoray.errors import BadRequest, ChangedRequest, OutputDamaged, Stopped
from dinoray.io.annotations import digest as listing_digest
from dinoray.io.stores import Store, is_local, local_path, open_store
from dinoray.request import KEY, differences
from dinoray.staging import staged
from dinoray.training.labelled_sets import labelled_sets
from dinoray.training.spec import TrainingSpec, run_worker
from dinoray.training.survey import store_survey, stored_survey, survey_images
from dinoray.units import fingerprint_of
from dinoray.wording import plural

FORMAT = 1
"""Version of the rules of a training; a new one cannot resume an old output."""
WATCH_S = 1.0


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
    """Train to the end, or go on with a training. `say` gets the lines meant for the user.

    Raises BadRequest (nothing was run), ChangedRequest (the output is another training's), OutputHeld, SystemicError,
    Stopped (`stop_after_s`, `dinoray stop`): the same command resumes.
    """
    import torch

    from dinoray.training.distance_worker import CHECKPOINT, new_pool
    from dinoray.vision.weight_export import save_backbone

    job = absolute_paths(job)
    job = job.model_copy(update=_settled(job, torch.cuda.is_available()))
    store = open_store(job.out)
    train, validation = labelled_sets(job)
    backbone, parameters = _probe(job)
    if job.crop_px % backbone.config.patch_size:
        raise BadRequest(f"crop_px={job.crop_px} is not a multiple of the patch size {backbone.config.patch_size}", where="crop_px")
    settings = {k: v for k, v in job.result_settings().items() if k not in ("model", "train", "validation")}
    sources = [source.model_dump(mode="json", exclude={"images", "labels", "ids"}) for source in (*job.train, *job.validation)]
    identity = {"format": FORMAT, "kind": job.kind, "settings": settings, "sources": sources, "model": backbone.config.name,
                "weights_digest": backbone.digest,
                "inputs": {"train": listing_digest(train), "validation": listing_digest(validation)}}
    fingerprint = fingerprint_of(identity)
    done = check_training(store, fingerprint, identity)
    say(f"dinoray {fingerprint}  {job.kind} over {backbone.config.name} from {backbone.source}, digest {backbone.digest[:12]}, "
        f"{'frozen' if job.backbone_learning_rate is None else 'trained too'}; {parameters / 1e6:.2f} M parameters learn, "
        f"{job.precision} on {job.device}  output {job.out}  resume with: {command or 'the same command'}")
    refuse_if_held(store, job.takeover)
    driver = Driver(store, command, say, takeover=job.takeover)
    driver.leave = leave
    with driver:
        record = {"fingerprint": fingerprint, "identity": identity, "command": command, "kind": f"train {job.kind}",
                  "job": job.model_dump(mode="json"), "libraries": {n: version(n) for n in ("torch", "numpy", "scipy")}}
        if not done:
            store.put(KEY, json.dumps(record, indent=1, sort_keys=True).encode())
        for name, images in (("train", train), ("validation", validation)):
            if stored_survey(store, name) is None:
                say(f"looking at {plural(len(images), 'labelled image')} for {name}")
                survey = survey_images(images, new_pool(job, images), threads=job.data_threads, say=say,
                                       pixel_size_needed=job.pixel_size_um is not None)
                store_survey(store, name, survey)
        weights = job.weights if (job.weights or "").startswith("random") else staged(
            job.staging or job.out, backbone.digest, partial(save_backbone, backbone))
        spec = TrainingSpec(job.kind, job.out, fingerprint, job.model_dump(mode="json"), weights or "", backbone.digest)
        backbone = None
        with Watch(store, say):
            if job.no_ray:
                run_worker(spec)
            else:
                from dinoray.cluster.trainer import run_workers

                run_workers(spec, say, check=driver.check_lost)
        progress = read_progress(store)
        if not progress.get("ended"):
            raise Stopped(f"training stopped at step {progress.get('step', 0)} of {job.steps}; a state is saved", where=job.out,
                          todo=f"resume with: {command or 'the same command'}")
        if not store.exists(f"{CHECKPOINT}/config.json"):
            raise OutputDamaged("the training ended without a checkpoint", where=f"{store.url}/{CHECKPOINT}",
                                todo="run the same command again")
    checkpoint = f"{store.url}/{CHECKPOINT}"
    config = json.loads(store.get(f"{CHECKPOINT}/config.json"))
    figures = ", ".join(f"{k.removeprefix('validation_').replace('_', ' ')} {v:.3f}" for k, v in config["metrics"].items()
                        if isinstance(v, float))
    say(f"look at it: dinoray report {shlex.quote(job.out)}  or: tensorboard --logdir {shlex.quote(job.out)}")
    say(f"dinoray {fingerprint}  complete: {progress['step']} steps ({progress['ended']}), best at {progress['best_step']}, "
        f"on validation {figures}  checkpoint {checkpoint}  "
        f"use it: dinoray segment cells SRC --checkpoint {shlex.quote(checkpoint)} --out OUT")
    return TrainingOutcome(job.out, fingerprint, checkpoint, progress)


def _probe(job: TrainDistanceMapJob) -> tuple[Any, int]:
    """(the backbone, on the CPU; the number of parameters that learn). Raises WeightsError, BadRequest."""
    from dinoray.training.distance_worker import build_model

    model = build_model(job, TrainingSpec(job.kind, job.out, "", weights=job.weights or ""))
    return model.backbone, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _settled(job: TrainDistanceMapJob, has_cuda: bool) -> dict[str, Any]:
    """Every `auto` of the job, decided."""
    if job.model is None and job.weights is None:
        raise BadRequest("no model was named", where="model", todo="say e.g. model: vits16 (official weights), or with "
                         "`weights: random` and a backbone_learning_rate to train from scratch")
    weights = f"{job.weights}:0" if job.weights == "random" else job.weights
    if (weights or "").startswith("random") and job.backbone_learning_rate is None:
        raise BadRequest("a frozen backbone with random weights sees nothing", where="weights",
                         todo="give backbone_learning_rate to train it from scratch, or real weights")
    device = job.device if job.device != "auto" else ("cuda" if has_cuda else "cpu")
    if device == "cuda" and not has_cuda and job.no_ray:
        raise BadRequest("there is no CUDA device here", where="device", todo="use device=cpu")
    precision = job.precision if job.precision != "auto" else ("bfloat16" if device == "cuda" else "float32")
    return {"weights": weights, "device": device, "precision": precision}


def absolute_paths(job: TrainDistanceMapJob) -> TrainDistanceMapJob:
    """The job with absolute local paths, so that workers and a resumed run mean the same files."""
    def sources(given):
        changed = []
        for source in given:
            update = {name: str(local_path(url)) for name in ("images", "labels")
                      if (url := getattr(source, name)) is not None and is_local(url)}
            if isinstance(source.ids, str) and is_local(source.ids):
                file, _, key = source.ids.partition("#")
                update["ids"] = f"{local_path(file)}#{key}"
            changed.append(source.model_copy(update=update))
        return tuple(changed)

    out = str(local_path(job.out)) if is_local(job.out) else job.out.rstrip("/")
    weights = job.weights
    if weights and is_local(weights) and Path(weights).expanduser().exists():
        weights = str(local_path(weights))
    return job.model_copy(update={"out": out, "weights": weights, "train": sources(job.train),
                                  "validation": sources(job.validation)})


def check_training(store: Store, fingerprint: str, identity: dict[str, Any]) -> bool:
    """Whether the output is this training's already. Raises BadRequest, ChangedRequest when it is something else's."""
    try:
        record = json.loads(store.get(KEY))
    except FileNotFoundError:
        stray = next((key for key, _ in store.list() if not key.startswith("_dinoray/")), None)
        if stray is not None:
            raise BadRequest(f"the output folder is not empty and not dinoray's (it holds {stray})", where=store.url,
                             todo="choose a new or empty folder for out") from None
        return False
    if record.get("fingerprint") != fingerprint:
        changes = differences(record.get("identity", {}), json.loads(canonical_json(identity)))
        raise ChangedRequest("this output was made with other settings or data:\n  " + "\n  ".join(changes[:20]), where=store.url,
                             todo="use another out, or the same settings to resume")
    return True


def read_progress(store: Store) -> dict[str, Any]:
    """Last figures of a training; empty before the first."""
    try:
        return json.loads(store.get("_dinoray/progress.json"))
    except FileNotFoundError:
        return {}


class Watch(threading.Thread):
    """Tells the progress that the first worker notes, from wherever it runs."""

    def __init__(self, store: Store, say: Callable[[str], None]):
        super().__init__(daemon=True, name="watch")
        self.store, self.say, self._end, self._told = store, say, threading.Event(), read_progress(store).get("step", 0)
        self._next = 0.0

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        while not self._end.wait(WATCH_S):
            self._look()
        self._next = 0.0
        self._look()

    def _look(self) -> None:
        if time.monotonic() < self._next:
            return
        found = read_progress(self.store)
        if not found or found["step"] == self._told:
            return
        self._told, self._next = found["step"], time.monotonic() + 10.0
        words = [f"step {found['step']}/{found['steps']}"]
        words += [f"{name.replace('val_', 'validation ')} {found[name]:.4g}" for name in ("loss", "val_loss", "lr", "samples_per_s")
                  if name in found]
        self.say("  ".join(words))



