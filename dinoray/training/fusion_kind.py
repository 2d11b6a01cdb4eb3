"""The context-fusion training as the driver sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dinoray.config.fusion import TrainContextFusionJob
from dinoray.errors import BadRequest, SystemicError
from dinoray.io.stores import Store
from dinoray.training.context_fusion import ContextFusionTask
from dinoray.training.fusion_memory import forecast
from dinoray.training.fusion_worker import build_model
from dinoray.training.kinds import Say, Sets
from dinoray.training.loop import autocast_dtype
from dinoray.training.standing import memory_words
from dinoray.training.volume_samples import CropSampler
from dinoray.training.volume_sets import ListedVolume, digest, listed, opened, refuse_shared, survey
from dinoray.vision.backbone import Backbone
from dinoray.vision.decoders.unet3d import NORMS
from dinoray.vision.fusion_model import FusionModel

TRIED = 8
"""Places that are drawn before the training begins, to see whether its filters can be satisfied."""


class ContextFusionKind:
    """`TrainingKind` of volumes."""

    _model: FusionModel | None = None

    def settled(self, job: TrainContextFusionJob) -> TrainContextFusionJob:
        if job.backbone_learning_rate is not None:
            raise BadRequest("the backbone of a context-fusion training is frozen", where="backbone_learning_rate",
                             todo="leave it out")
        return job

    def sets(self, job: TrainContextFusionJob) -> Sets:
        found: Sets = {"train": listed(job.train), "validation": listed(job.validation)}
        refuse_shared(found["train"], found["validation"])
        return found

    def digest(self, listed: Sequence[ListedVolume]) -> str:
        return digest(listed)

    def probe(self, job: TrainContextFusionJob, sets: Sets) -> tuple[Backbone | None, int]:
        regions = [*opened(job, job.train, 0.0), *opened(job, job.validation, 0.0)]
        try:
            sampler = CropSampler(job, regions)  # refuses regions that no crop fits
            if len({tuple(round(v, 3) for v in (*r.raw_grid.pitch_nm, *r.label_grid.pitch_nm)) for r in regions}) > 1:
                raise BadRequest("the regions of train and validation have voxels of different sizes", where="validation",
                                 todo="choose levels by raw_voxel_size and label_voxel_size")
            try:
                for index in range(TRIED):
                    sampler.place(index)
            except SystemicError as error:
                raise BadRequest(error.what, where=error.where, todo=error.todo) from error
            model = build_model(job, job.weights, None, regions[0].factor)
            for region in regions:
                if model.backbone is not None:
                    region.attach(model.backbone.digest, job.context_factor)
        finally:
            for region in regions:
                region.close()
        self._model = model
        return model.backbone, sum(p.numel() for p in model.parameters() if p.requires_grad)

    def notes(self, job: TrainContextFusionJob, sets: Sets) -> list[str]:
        notes = [f"memory of a step beside the model, forecast from shapes: {memory_words(self._forecast(job))}"]
        if NORMS[job.norm]:
            notes.append(f"norm={job.norm}: {NORMS[job.norm]}")
        if job.dropout:
            notes.append("dropout: micro-batches and the number of workers change the training")
        if job.uses_backbone and (job.weights or "").startswith("random"):
            notes.append("the backbone has random weights and is not trained: its tokens say little")
        return notes

    def _forecast(self, job: TrainContextFusionJob) -> dict[str, int]:
        """Bytes of the phases of a step of `micro_batch` samples, on a CPU."""
        model, self._model = self._model, None
        if model is None:
            raise RuntimeError("the notes come after the probe")
        digest = None if model.backbone is None else model.backbone.digest
        train, validation = (opened(job, sources, 0.0, digest) for sources in (job.train, job.validation))
        try:
            task = ContextFusionTask(job, "", model, train, validation)
            return forecast(task, [task.sample(i) for i in range(job.micro_batch)], autocast_dtype(job.precision))
        except SystemicError as error:
            raise BadRequest(error.what, where=error.where, todo=error.todo) from error
        finally:
            for region in (*train, *validation):
                region.close()

    def survey(self, job: TrainContextFusionJob, store: Store, sets: Sets, say: Say, check: Callable[[], None]) -> None:
        survey(job, store, say, check)

    def same_content(self, job: TrainContextFusionJob, store: Store, sets: Sets, say: Say) -> bool:
        return False  # volumes are too large to be read for that

    def closing(self, config: dict[str, Any]) -> list[str]:
        return []

    def usage(self, checkpoint: str) -> str:
        return f"dinoray segment volume VOLUME --checkpoint {checkpoint} --out OUT"
