"""One worker of a distance-map training: builds the task, runs the loop, and at the end the checkpoint.

The end: the best weights, thresholds chosen on the validation images from stored maps, the checkpoint folder.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from dinoray.config.training import TrainDistanceMapJob
from dinoray.errors import OutputDamaged
from dinoray.failpoints import reach
from dinoray.io.annotations import LabelledImage
from dinoray.io.stores import Store, open_store
from dinoray.training.card import model_card
from dinoray.training.distance_map import DistanceMapTask, Images, at_scale
from dinoray.training.examples import store_examples
from dinoray.training.image_pool import ImagePool
from dinoray.training.labelled_sets import labelled_sets
from dinoray.training.loop import fit, load_trained
from dinoray.training.spec import Report, TrainingSpec
from dinoray.training.states import load_state
from dinoray.training.survey import Survey, stored_survey
from dinoray.training.workers import Workers
from dinoray.vision.blending import Blend
from dinoray.vision.decoders.unet2d import tap_layers
from dinoray.vision.distance_model import (
    BackboneRecord,
    DecoderRecord,
    DistanceMapModel,
    SegmenterConfig,
    new_model,
    save_checkpoint,
)
from dinoray.vision.instance_metrics import score_image
from dinoray.vision.instances import instances
from dinoray.vision.weights import load_backbone

CHECKPOINT = "checkpoint"
"""Folder of the output that is the result."""
PEAKS = tuple(round(0.3 + 0.05 * i, 2) for i in range(9))
FILLS = tuple(round(0.05 + 0.01 * i, 2) for i in range(0, 16, 2))
"""Thresholds tried (the seeds' grid, with a step of 0.02 and up to 0.19 for the fill)."""
SEARCH_IMAGES = 200
"""Most validation images whose maps thresholds are chosen on."""


def run_distance_map(spec: TrainingSpec, workers: Workers, report: Report) -> None:
    """Train to the end, or until asked to stop; the last one to finish finds the checkpoint written."""
    job, store = TrainDistanceMapJob(**spec.job), open_store(spec.out)
    model = build_model(job, spec)
    train, validation = (prepared(job, store, name, images) for name, images in zip(
        ("train", "validation"), labelled_sets(job), strict=True))
    task = DistanceMapTask(job, spec.fingerprint, model, train, validation)
    progress = fit(job, task, workers, store, report=report)
    if progress.ended:
        finish(job, spec, task, workers, store)


def build_model(job: TrainDistanceMapJob, spec: TrainingSpec) -> DistanceMapModel:
    """The model at the start of training, the same on every worker. Raises WeightsError for other weights."""
    backbone = load_backbone(job.model, spec.weights or None, accept_license=job.accept_dinov3_license,
                             expect_digest=spec.digest or None)
    record = DecoderRecord(taps=tap_layers(backbone.config.depth), channels=job.decoder_channels, norm=job.norm,
                           stem_levels=job.stem_levels)
    return new_model(backbone, record, frozen=job.backbone_learning_rate is None, seed=job.seed)


def prepared(job: TrainDistanceMapJob, store: Store, name: str, images: list[LabelledImage]) -> Images:
    """Images that the survey found good, with their zooms. Raises OutputDamaged without a survey."""
    survey = stored_survey(store, name)
    if survey is None or survey.table.num_rows != len(images):
        raise OutputDamaged(f"the survey of the {name} images is missing or of other images",
                            where=f"{store.url}/_dinoray/survey-{name}.parquet", todo="run the training command again")
    zooms = survey.zooms(pixel_size_um=job.pixel_size_um, diameter_px=job.diameter_px)
    good = survey.good()
    return Images(new_pool(job, [images[i] for i in good]), zooms[good])


def new_pool(job: TrainDistanceMapJob, images: list[LabelledImage]) -> ImagePool:
    """A pool that reads as this job asks."""
    return ImagePool(images, channels=job.channels, scaling=job.scaling,
                     percents=(job.scaling_low_percent, job.scaling_high_percent), cache_bytes=job.cache_bytes)


def finish(job: TrainDistanceMapJob, spec: TrainingSpec, task: DistanceMapTask, workers: Workers, store: Store) -> None:
    """Thresholds by all workers, then the folder by the first."""
    state = load_state(store, "best", workers.device)
    if state is None or state["fingerprint"] != spec.fingerprint:
        raise OutputDamaged("the best state of the training is missing", where=f"{store.url}/_dinoray/states",
                            todo="delete _dinoray/states to begin anew")
    load_trained(task.model, state["model"], store.url)
    task.model.eval()
    train_survey = stored_survey(store, "train")
    config = checkpoint_config(job, spec, task.model, train_survey)
    peak, fill, figures = choose_thresholds(job, task, config, workers)
    if not workers.is_first:
        workers.barrier()
        return
    last = load_state(store, "last")
    progress = last["progress"] if last else {}
    config = config.model_copy(update={"peak": peak, "fill": fill, "metrics": figures, "training": training_facts(
        job, spec, store, task, state["step"], progress)})
    store_examples(store, task.validation, partial(whole_map, task.model, window=config.crop_px, at_once=job.micro_batch),
                   peak=peak, fill=fill)
    reach("train.checkpoint")
    save_checkpoint(store, CHECKPOINT, task.model, config, model_card(config))
    workers.barrier()


def checkpoint_config(job: TrainDistanceMapJob, spec: TrainingSpec, model: DistanceMapModel,
                      survey: Survey | None) -> SegmenterConfig:
    """config.json but for what is found on the validation images."""
    backbone = model.backbone
    median = pixel_size = None
    if survey is not None:
        good = survey.good()
        zooms = survey.zooms(pixel_size_um=job.pixel_size_um, diameter_px=job.diameter_px)
        median = survey.median_diameter(zooms)
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
        crop_px=job.crop_px, median_diameter_px=median, pixel_size_um=pixel_size)


def choose_thresholds(job: TrainDistanceMapJob, task: DistanceMapTask, config: SegmenterConfig,
                      workers: Workers) -> tuple[float, float, dict[str, Any]]:
    """(peak, fill, figures) with the best image-mean AP50 over the validation images; each map is computed once."""
    numbers = np.arange(len(task.validation.pool))
    if len(numbers) > SEARCH_IMAGES:
        numbers = numbers[np.linspace(0, len(numbers) - 1, SEARCH_IMAGES).round().astype(int)]
    grid = [(peak, fill) for peak in PEAKS for fill in FILLS]

    def scores(number: int) -> np.ndarray:
        """[len(grid), 4]: AP50, TP, FP, FN of one image."""
        planes, labels = at_scale(task.validation, number)
        distance = whole_map(task.model, planes, config.crop_px, job.micro_batch)
        rows = []
        for peak, fill in grid:
            score = score_image(instances(distance, peak=peak, fill=fill), labels, thresholds=(0.5,))
            tp, fp, fn = score.tp[0], score.pred - score.tp[0], score.truth - score.tp[0]
            rows.append((tp / (tp + fp + fn) if tp + fp + fn else 1.0, tp, fp, fn))
        return np.array(rows, dtype=float)

    mine = workers.share([int(n) for n in numbers])
    with ThreadPoolExecutor(job.data_threads, thread_name_prefix="thresholds") as threads:
        sums = sum(threads.map(scores, mine), np.zeros((len(grid), 4)))
    flat = workers.total(*sums.ravel().tolist(), float(len(mine)))
    images, sums = int(flat[-1]), np.array(flat[:-1]).reshape(sums.shape)
    best = int(np.argmax(sums[:, 0]))  # the first of equals: the same on every machine
    ap, tp, fp, fn = sums[best]
    peak, fill = grid[best]
    return peak, fill, {"validation_images": images, "validation_ap50_image_mean": ap / images,
                        "validation_ap50_pooled": tp / max(1.0, tp + fp + fn)}


def whole_map(model: DistanceMapModel, planes: np.ndarray, window: int, at_once: int) -> np.ndarray:
    """Distance map [Y, X] float32 of one image [3, Y, X], by overlapping windows of `window` px, `at_once` in a batch."""
    multiple = model.backbone.config.patch_size
    overlap = max(multiple, window // 4 // multiple * multiple)
    blend = Blend(*planes.shape[1:], window, overlap, multiple)
    found: list[np.ndarray] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack(batch)).to(model.decoder.head.weight.device)
            found.extend(torch.sigmoid(model(pixels))[:, 0].cpu().numpy())
        batch.clear()

    for piece in blend.windows(planes):
        batch.append(piece)
        if len(batch) == at_once:
            flush()
    if batch:
        flush()
    return blend.merge(found)


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
