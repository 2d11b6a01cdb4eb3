"""One worker of a distance-map training: builds the task, runs the loop, and at the end the checkpoint.

The end: the best weights, thresholds chosen on the validation images from stored maps, the checkpoint folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from dinoray.config.training import TrainDistanceMapJob
from dinoray.errors import OutputDamaged, SystemicError
from dinoray.failpoints import reach
from dinoray.io.annotations import LabelledImage, digest
from dinoray.io.stores import Store, open_store
from dinoray.training.card import model_card
from dinoray.training.distance_map import DistanceMapTask, Images
from dinoray.training.distance_thresholds import choose_thresholds, segmenter_of
from dinoray.training.examples import store_examples
from dinoray.training.image_pool import ImagePool
from dinoray.training.labelled_sets import labelled_sets
from dinoray.training.loop import fit, load_trained
from dinoray.training.spec import Report, TrainingSpec, still_ours
from dinoray.training.standing import CHECKPOINT
from dinoray.training.states import load_best, load_last
from dinoray.training.survey import Survey, stored_survey
from dinoray.training.workers import Workers
from dinoray.vision.decoders.unet2d import tap_layers
from dinoray.vision.distance_model import (
    BackboneRecord,
    DecoderRecord,
    DistanceMapModel,
    SegmenterConfig,
    new_model,
    save_checkpoint,
)
from dinoray.vision.weights import load_backbone


def run_distance_map(spec: TrainingSpec, workers: Workers, report: Report) -> None:
    """Train to the end, or until asked to stop; the last one to finish finds the checkpoint written."""
    job, store = TrainDistanceMapJob(**spec.job), open_store(spec.out)
    model = build_model(job, spec)
    listed = dict(zip(("train", "validation"), labelled_sets(job), strict=True))
    for name, images in listed.items():
        if spec.inputs.get(name, digest(images)) != digest(images):
            raise SystemicError(f"the {name} images are not those that the driver listed: they change while they are trained on",
                                where=store.url, todo="leave them alone, then run the same command again")
    total = sum(map(len, listed.values()))
    train, validation = (prepared(job, store, name, images, share=len(images) / total) for name, images in listed.items())
    task = DistanceMapTask(job, spec.fingerprint, model, train, validation)
    check = still_ours(spec, store)
    progress = fit(job, task, workers, store, report=report, check=check, run_name=spec.token)
    if progress.ended:
        finish(job, spec, task, workers, store, check)


def build_model(job: TrainDistanceMapJob, spec: TrainingSpec) -> DistanceMapModel:
    """The model at the start of training, the same on every worker. Raises WeightsError for other weights."""
    backbone = load_backbone(job.model, spec.weights or None, accept_license=job.accept_dinov3_license,
                             expect_digest=spec.digest or None)
    record = DecoderRecord(taps=tap_layers(backbone.config.depth), channels=job.decoder_channels, norm=job.norm,
                           stem_levels=job.stem_levels)
    return new_model(backbone, record, frozen=job.backbone_learning_rate is None, seed=job.seed)


def prepared(job: TrainDistanceMapJob, store: Store, name: str, images: list[LabelledImage], *, share: float = 1.0) -> Images:
    """Images that the survey found good, with their zooms, and `share` of cache_bytes. Raises OutputDamaged without a survey."""
    survey = stored_survey(store, name)
    if survey is None or survey.table["image_id"].to_pylist() != [image.image_id for image in images]:
        raise OutputDamaged(f"the survey of the {name} images is missing or of other images",
                            where=f"{store.url}/_dinoray/survey-{name}.parquet", todo="run the training command again")
    zooms = survey.zooms(pixel_size_um=job.pixel_size_um, diameter_px=job.diameter_px)
    good = survey.good()
    return Images(new_pool(job, [images[i] for i in good], share), zooms[good])


def new_pool(job: TrainDistanceMapJob, images: list[LabelledImage], share: float = 1.0) -> ImagePool:
    """A pool that reads as this job asks, and may keep `share` of its cache_bytes."""
    return ImagePool(images, channels=job.channels, scaling=job.scaling,
                     percents=(job.scaling_low_percent, job.scaling_high_percent), cache_bytes=int(share * job.cache_bytes))


def finish(job: TrainDistanceMapJob, spec: TrainingSpec, task: DistanceMapTask, workers: Workers, store: Store,
           check: Callable[[], None] = lambda: None) -> None:
    """Thresholds by all workers, then the folder by the first."""
    last = load_last(store)
    progress = last["progress"] if last else {}
    del last  # its tensors are not needed beside those of the best one
    state = load_best(store, progress, workers.device)
    if state["fingerprint"] != spec.fingerprint:
        raise OutputDamaged("the best state is of another training", where=f"{store.url}/_dinoray/states",
                            todo="delete _dinoray/states to begin anew")
    load_trained(task.model, state["model"], store.url)
    task.model.eval()
    train_survey = stored_survey(store, "train")
    config = checkpoint_config(job, spec, task.model, train_survey)
    segmenter = segmenter_of(job, task, config)
    chosen, figures = choose_thresholds(job, task, segmenter, workers)
    if not workers.is_first:
        workers.barrier()
        return
    config = config.model_copy(update={**chosen, "metrics": figures, "training": training_facts(
        job, spec, store, task, state["step"], progress)})
    store_examples(store, task.validation, segmenter.distance, peak=chosen["peak"], fill=chosen["fill"], markers=chosen["markers"],
                   h=chosen["marker_height"])
    reach("train.checkpoint")
    check()
    save_checkpoint(store, CHECKPOINT, task.model, config, model_card)
    workers.barrier()


def checkpoint_config(job: TrainDistanceMapJob, spec: TrainingSpec, model: DistanceMapModel,
                      survey: Survey | None) -> SegmenterConfig:
    """config.json but for what is found on the validation images."""
    backbone = model.backbone
    median = seen = pixel_size = None
    if survey is not None:
        good = survey.good()
        zooms = survey.zooms(pixel_size_um=job.pixel_size_um, diameter_px=job.diameter_px)
        median = survey.median_diameter(zooms)
        # with diameter_px every image was brought to one median, so one of another median is of a size that no image had
        seen = None if job.diameter_px else survey.diameter_range(zooms)
        sizes = {round(float(size), 6) for i in good if (size := survey.table["pixel_size_um"][i].as_py()) is not None}
        # one pixel size for all images is the model's own; mixed ones say nothing of its scale
        known = all(survey.table["pixel_size_um"][i].as_py() is not None for i in good)
        pixel_size = job.pixel_size_um or (sizes.pop() if len(sizes) == 1 and known and job.diameter_px is None else None)
    trained = job.backbone_learning_rate is not None
    return SegmenterConfig(
        backbone=BackboneRecord(model=backbone.config.name, weights=job.weights, digest=spec.digest, included=trained,
                                mean=backbone.config.mean, std=backbone.config.std),
        decoder=DecoderRecord(taps=model.taps, channels=job.decoder_channels, norm=job.norm, stem_levels=job.stem_levels),
        channels=job.channels, scaling=job.scaling, scaling_percents=(job.scaling_low_percent, job.scaling_high_percent),
        crop_px=job.crop_px, median_diameter_px=median, diameter_range_px=seen, pixel_size_um=pixel_size)


def training_facts(job: TrainDistanceMapJob, spec: TrainingSpec, store: Store, task: DistanceMapTask, best_step: int,
                   progress: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the checkpoint should know of its making. No paths, no secrets: sources by their last part."""
    return {"fingerprint": spec.fingerprint, "kind": spec.kind, "seed": job.seed, "steps": progress.get("step"),
            "best_step": best_step, "ended_by": progress.get("ended"), "seconds": round(progress.get("seconds", 0.0), 1),
            "batch_size": job.batch_size, "learning_rate": job.learning_rate, "backbone_learning_rate": job.backbone_learning_rate,
            "precision": job.precision, "device": job.device, "training_images": len(task.train.pool),
            "validation_images": len(task.validation.pool), "best_validation_loss": progress.get("best_loss"),
            "sources": [{"images": source.images.rstrip("/").rsplit("/", 1)[-1], "weight": source.weight,
                         "ids": source.ids.rsplit("/", 1)[-1] if isinstance(source.ids, str) else None} for source in job.train],
            "augmentation": json.loads(job.augmentation.model_dump_json()), "torch": torch.__version__}
