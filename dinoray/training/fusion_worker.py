"""One worker of a context-fusion training: builds the task, runs the loop, and at the end the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dinoray.config.fusion import TrainContextFusionJob
from dinoray.errors import OutputDamaged, SystemicError
from dinoray.failpoints import reach
from dinoray.io.stores import Store, open_store
from dinoray.training.context_fusion import ContextFusionTask, record_of
from dinoray.training.fusion_card import fusion_card
from dinoray.training.loop import fit, load_trained
from dinoray.training.spec import Report, TrainingSpec, still_ours
from dinoray.training.standing import CHECKPOINT
from dinoray.training.states import load_best, load_last
from dinoray.training.volume_sets import SURVEY_KEY, digest, listed, opened
from dinoray.training.workers import Workers
from dinoray.vision.distance_model import BackboneRecord
from dinoray.vision.fusion_checkpoint import FusionConfig, save_fusion
from dinoray.vision.fusion_model import FusionModel, new_model
from dinoray.vision.voxel_losses import class_weights
from dinoray.vision.weights import load_backbone


def run_context_fusion(spec: TrainingSpec, workers: Workers, report: Report) -> None:
    """Train to the end, or until asked to stop; the last one to finish finds the checkpoint written."""
    job, store = TrainContextFusionJob(**spec.job), open_store(spec.out)
    for name, sources in (("train", job.train), ("validation", job.validation)):
        if spec.inputs.get(name) != digest(listed(sources)):
            raise SystemicError(f"the {name} volumes are not those that the driver listed: they change while they are trained on",
                                where=store.url, todo="leave them alone, then run the same command again")
    try:
        survey = json.loads(store.get(SURVEY_KEY))
    except FileNotFoundError as error:
        raise OutputDamaged("the survey of the volumes is missing", where=f"{store.url}/{SURVEY_KEY}",
                            todo="run the training command again") from error
    train, validation = (opened(job, sources, 0.5, spec.digest or None) for sources in (job.train, job.validation))
    model = build_model(job, spec.weights or None, spec.digest or None, train[0].factor)
    weights = class_weights(torch.tensor(survey["counts"])).numpy() if job.target == "classes" and job.class_balance else None
    task = ContextFusionTask(job, spec.fingerprint, model, train, validation, weights)
    if workers.is_first:
        task.measure_first()
    check = still_ours(spec, store)
    progress = fit(job, task, workers, store, report=report, check=check, run_name=spec.token)
    if progress.ended:
        finish(job, spec, task, workers, store, check)


def build_model(job: TrainContextFusionJob, weights: str | None, expect: str | None, factor: tuple[int, int, int]) -> FusionModel:
    """The model at the start of training, the same on every worker. Raises WeightsError for other weights."""
    record = record_of(job, factor)
    backbone = None
    if record.uses_backbone:
        # the driver's probe stays as the file is: it is what is staged for the workers
        dtype = torch.bfloat16 if job.precision == "bfloat16" and expect is not None else torch.float32
        backbone = load_backbone(job.model, weights, dtype=dtype, accept_license=job.accept_dinov3_license, expect_digest=expect)
    return new_model(record, backbone, seed=job.seed, checkpointing=job.gradient_checkpointing, slice_batch=job.slice_batch)


def finish(job: TrainContextFusionJob, spec: TrainingSpec, task: ContextFusionTask, workers: Workers, store: Store,
           check: Callable[[], None] = lambda: None) -> None:
    """The best weights, their figures by all workers, then the folder by the first."""
    last = load_last(store)
    progress = last["progress"] if last else {}
    del last
    state = load_best(store, progress, workers.device)
    if state["fingerprint"] != spec.fingerprint:
        raise OutputDamaged("the best state is of another training", where=f"{store.url}/_dinoray/states",
                            todo="delete _dinoray/states to begin anew")
    load_trained(task.model, state["model"], store.url)
    task.model.eval()
    with torch.inference_mode():
        figures, threshold = task.figures(workers)
    if not workers.is_first:
        workers.barrier()
        return
    region, backbone = task.train.regions[0], task.model.backbone
    config = FusionConfig(
        model=task.model.record, target=job.target, classes=job.classes, offsets=job.offsets if job.target == "affinities" else (),
        backbone=None if backbone is None else BackboneRecord(
            model=backbone.config.name, weights=job.weights, digest=spec.digest, included=False, mean=backbone.config.mean,
            std=backbone.config.std),
        voxel_nm=region.label_grid.pitch_nm, raw_voxel_nm=region.raw_grid.pitch_nm, context_factor=job.context_factor,
        crop_voxels=job.crop_shape, threshold=threshold, metrics=figures,
        training=training_facts(job, spec, task, state["step"], progress))
    reach("train.checkpoint")
    check()
    save_fusion(store, CHECKPOINT, task.model, config, fusion_card)
    workers.barrier()


def training_facts(job: TrainContextFusionJob, spec: TrainingSpec, task: ContextFusionTask, best_step: int,
                   progress: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the checkpoint should know of its making. No paths, no secrets: volumes by their last part."""
    voxels = [int(np.prod(region.label_grid.shape)) for region in task.train.regions]
    return {"fingerprint": spec.fingerprint, "kind": spec.kind, "seed": job.seed, "steps": progress.get("step"),
            "best_step": best_step, "ended_by": progress.get("ended"), "seconds": round(progress.get("seconds", 0.0), 1),
            "batch_size": job.batch_size, "learning_rate": job.learning_rate, "loss": job.loss, "precision": job.precision,
            "device": job.device, "training_voxels": sum(voxels), "best_validation_loss": progress.get("best_loss"),
            "sources": [{"raw": source.raw.rstrip("/").rsplit("/", 1)[-1], "region": source.region, "weight": source.weight}
                        for source in job.train],
            "augmentation": json.loads(job.augmentation.model_dump_json()), "torch": torch.__version__}
