"""The distance-map training as the driver sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dinoray.config import TrainDistanceMapJob
from dinoray.errors import BadRequest
from dinoray.io.annotations import LabelledImage, digest
from dinoray.io.stores import Store
from dinoray.training.distance_worker import build_model, new_pool
from dinoray.training.kinds import Say, Sets
from dinoray.training.labelled_sets import labelled_sets
from dinoray.training.spec import TrainingSpec
from dinoray.training.survey import check_zooms, same_content, store_survey, stored_survey, survey_images
from dinoray.vision.backbone import Backbone
from dinoray.wording import plural


class DistanceMapKind:
    """`TrainingKind` of cells."""

    def settled(self, job: TrainDistanceMapJob) -> TrainDistanceMapJob:
        if job.model is None and job.weights is None:
            raise BadRequest("no model was named", where="model", todo="say e.g. model: vits16 (official weights), or with "
                             "`weights: random` and a backbone_learning_rate to train from scratch")
        if (job.weights or "").startswith("random") and job.backbone_learning_rate is None:
            raise BadRequest("a frozen backbone with random weights sees nothing", where="weights",
                             todo="give backbone_learning_rate to train it from scratch, or real weights")
        return job

    def sets(self, job: TrainDistanceMapJob) -> Sets:
        return dict(zip(("train", "validation"), labelled_sets(job), strict=True))

    def digest(self, listed: Sequence[LabelledImage]) -> str:
        return digest(listed)

    def probe(self, job: TrainDistanceMapJob, sets: Sets) -> tuple[Backbone, int]:
        model = build_model(job, TrainingSpec(job.kind, job.out, "", weights=job.weights or ""))
        size = model.backbone.config.patch_size
        if job.crop_px % size:
            raise BadRequest(f"crop_px={job.crop_px} is not a multiple of the patch size {size}", where="crop_px",
                             todo=f"use {max(size, job.crop_px // size * size)} or {(job.crop_px // size + 1) * size}")
        return model.backbone, sum(p.numel() for p in model.parameters() if p.requires_grad)

    def notes(self, job: TrainDistanceMapJob, sets: Sets) -> list[str]:
        return []

    def survey(self, job: TrainDistanceMapJob, store: Store, sets: Sets, say: Say, check: Callable[[], None]) -> None:
        for name, images in sets.items():
            if stored_survey(store, name) is None:
                say(f"looking at {plural(len(images), 'labelled image')} for {name}")
                found = survey_images(list(images), new_pool(job, list(images)), threads=job.data_threads, say=say, name=name,
                                      pixel_size_needed=job.pixel_size_um is not None, check=check)
                check_zooms(found, name, pixel_size_um=job.pixel_size_um, diameter_px=job.diameter_px)
                store_survey(store, name, found)

    def same_content(self, job: TrainDistanceMapJob, store: Store, sets: Sets, say: Say) -> bool:
        for name, images in sets.items():
            before = stored_survey(store, name)
            if before is None:
                return False
            say(f"files of {name} were written anew or lie elsewhere: looking whether {plural(len(images), 'labelled image')} "
                "hold what they held")
            if not same_content(before, survey_images(list(images), new_pool(job, list(images)), threads=job.data_threads, say=say,
                                                      name=name, pixel_size_needed=job.pixel_size_um is not None)):
                return False
        return True

    def closing(self, config: dict[str, Any]) -> list[str]:
        if config["metrics"]["validation_ap50_image_mean"]:
            return []
        return ["not one cell of the validation images was found: train for longer, and look at the pictures in the report"]

    def usage(self, checkpoint: str) -> str:
        return f"dinoray segment cells SRC --checkpoint {checkpoint} --out OUT"
