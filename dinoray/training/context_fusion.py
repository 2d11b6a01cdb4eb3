"""Training of the context-fusion UNet: samples, loss and validation of volumes (dinoray.training.loop does the rest).

A sample is one crop with its labels and context, made by threads. On the device, slices of it go through the frozen backbone where
tokens are wanted and not stored (the extraction), and then through the UNet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dinoray.config.fusion import TrainContextFusionJob
from dinoray.errors import SystemicError
from dinoray.io.volume_grid import Shape
from dinoray.training.fusion_memory import FirstStep
from dinoray.training.parameters import parameter_groups
from dinoray.training.sampling import bounded_map
from dinoray.training.volume_regions import Region
from dinoray.training.volume_samples import CropSample, CropSampler
from dinoray.training.workers import Workers
from dinoray.vision.affinities import affinities, boundary_weights, components
from dinoray.vision.fusion_model import FusionModel, FusionRecord
from dinoray.vision.volume_metrics import ClassScore, Contingency, class_scores, confusion, instance_score
from dinoray.vision.voxel_losses import Pair, affinity_loss, class_loss

THRESHOLDS = (*(round(0.1 + 0.05 * i, 2) for i in range(18)), 0.97, 0.98, 0.99)
"""Affinities above one of them join voxels; the best on the validation is kept. One voxel of a leak joins two objects, so in dense
tissue the best are high."""
LOOKED_AT = 8
"""Places looked at for ground truth, for each validation crop."""
SMOOTHING = 0.04
"""Targets of affinities are drawn to 0.5 by this."""


@dataclass(frozen=True)
class Sample:
    """A crop and what is to be learned from it."""

    sample: CropSample
    target: np.ndarray
    """Classes [z, y, x] int64, or affinities [A, z, y, x] uint8."""
    known: np.ndarray
    """Where the target is to be learned, of the same shape (bool)."""
    weights: np.ndarray | None = None
    """Of voxels, for affinities: [z, y, x] float32."""


def record_of(job: TrainContextFusionJob, factor: Shape) -> FusionRecord:
    """The architecture that a job asks for."""
    return FusionRecord(outputs=len(job.offsets) if job.target == "affinities" else len(job.classes), factor=factor,
                        inputs=job.inputs, fusion=job.fusion, context_cells=job.context_cells, base=job.base_channels,
                        levels=job.levels, norm=job.norm, upsampling=job.upsampling, dropout=job.dropout)


class ContextFusionTask:
    """`dinoray.training.loop.Task` of volumes."""

    def __init__(self, job: TrainContextFusionJob, fingerprint: str, model: FusionModel, train: Sequence[Region],
                 validation: Sequence[Region], class_weights: np.ndarray | None = None):
        self.job, self.fingerprint, self.model = job, fingerprint, model
        self.train, self.validation = CropSampler(job, train), CropSampler(job, validation)
        self.class_weights = None if class_weights is None else torch.from_numpy(class_weights.astype(np.float32))
        self._extraction_s = 0.0
        self._class_scores: list[ClassScore] = []
        """Of the last validation."""
        self._first: FirstStep | None = None
        self.measured: dict[str, int] = {}
        """Bytes of each phase of the first step of this process, once it is over."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model.unet, self.job.learning_rate, self.job.weight_decay)

    # ---------------------------------------------------------------- samples

    def sample(self, index: int) -> Sample:
        return self._with_target(self.train.draw(index))

    def _with_target(self, crop: CropSample) -> Sample:
        job, grid = self.job, crop.crop.target_grid
        if job.target == "classes":
            found = crop.labels[crop.known]
            if found.size and not 0 <= int(found.min()) <= int(found.max()) < len(job.classes):
                raise SystemicError(f"labels {int(found.min())}..{int(found.max())} in a crop, but {len(job.classes)} classes",
                                    todo="name all classes in `classes`, and the label of unknown voxels in `unknown`, "
                                    "in a new out")
            return Sample(crop, np.where(crop.known, crop.labels, 0).astype(np.int64), np.ascontiguousarray(crop.known))
        labels, known = np.ascontiguousarray(crop.labels), np.ascontiguousarray(crop.known)
        values, valid = affinities(labels, job.offsets, known)
        weights = None
        if job.boundary_weight > 1:
            size = grid.pitch_nm
            weights = boundary_weights(labels, weight=job.boundary_weight, sigma_nm=job.boundary_sigma_voxels * min(size),
                                       voxel_nm=size, known=known)
        return Sample(crop, values, valid, weights)

    # ---------------------------------------------------------------- steps

    def loss(self, samples: list[Sample]) -> Pair:
        first = self._first
        if first is not None and first.peaks:  # accumulating: the largest of the step's micro-batches is the first
            first = None
        if first is not None:
            first.began()
        began = time.perf_counter()
        given = self.model.prepare([s.sample.crop for s in samples])
        if given.raw is not None and given.raw.is_cuda:
            torch.cuda.synchronize()  # or the time would be that of asking, not of doing
        self._extraction_s += time.perf_counter() - began
        if first is not None:
            first.extracted()
        logits = self.model.unet(given)
        device = logits.device
        target, known = (torch.from_numpy(np.stack([getattr(s, name) for s in samples])).to(device) for name in ("target", "known"))
        job = self.job
        if job.target == "affinities":
            weights = None if samples[0].weights is None else torch.from_numpy(np.stack([s.weights for s in samples])).to(device)  # type: ignore[misc]
            pair = affinity_loss(logits, target, known, weights=weights, smoothing=SMOOTHING)
        else:
            kind = "focal_dice" if job.loss == "auto" else job.loss
            weights = None if self.class_weights is None else self.class_weights.to(device)
            pair = class_loss(kind, logits, target, known, weights=weights, gamma=job.focal_gamma,
                              alpha=job.tversky[0], beta=job.tversky[1])
        return pair

    def spent(self) -> dict[str, float]:
        """Seconds of the extraction (slices through the backbone, or stored tokens and matrices) since it was last asked for."""
        seconds, self._extraction_s = self._extraction_s, 0.0
        return {"extraction": seconds}

    def measure_first(self) -> None:
        """Measure the memory of the next step."""
        self._first = FirstStep(next(self.model.unet.parameters()).device)

    def after_step(self) -> dict[str, Any]:
        """Facts of this process that the step which is just over has shown."""
        if self._first is None:
            return {}
        self._first.ended()
        self.measured, self._first = self._first.peaks, None
        return {"memory": self.measured}

    # ---------------------------------------------------------------- validation

    def validate(self, workers: Workers) -> dict[str, float]:
        """Mean loss over fixed, un-augmented crops of the validation regions; of classes also the mean IoU of those that occur."""
        job, total, count = self.job, 0.0, 0.0
        table = np.zeros((len(job.classes),) * 2, np.int64)
        places = workers.share(self._validation_places)
        with ThreadPoolExecutor(job.data_threads, thread_name_prefix="validate") as threads:
            samples = bounded_map(threads, lambda place: self._with_target(self.validation.at(*place)),
                                  places, 2 + job.data_threads)
            for sample in samples:
                loss, weight, logits = self._scored(sample)
                total, count = total + loss, count + weight
                if job.target == "classes":
                    table += confusion(logits.argmax(1)[0].cpu().numpy(), sample.target, len(job.classes), sample.known)
        total, count, *cells = workers.total(total, count, *table.ravel().tolist())
        if not count > 0:
            raise SystemicError("no voxel of the validation crops counts: their classes do not occur in the training regions",
                                todo="choose validation regions with classes that are trained on, in a new out")
        figures = {"loss": total / count}
        if job.target == "classes":
            scores = class_scores(np.array(cells).reshape(table.shape), list(job.classes))
            found = [s.iou for s in scores[1:] if s.iou == s.iou]
            if found:  # of validation crops that hold background alone there is none
                figures["iou"] = float(np.mean(found))
            self._class_scores = scores
        return figures

    def figures(self, workers: Workers) -> tuple[dict[str, float], float]:
        """(figures for the checkpoint, the threshold of affinities) on the validation crops: of classes IoU, Dice, precision and
        recall of each; of affinities the adapted Rand error and the variation of information of connected components, at the best
        of THRESHOLDS."""
        job = self.job
        if job.target == "classes":
            found = self.validate(workers)
            for score in self._class_scores:
                of_class = {"iou": score.iou, "dice": score.dice, "precision": score.precision, "recall": score.recall}
                # NaN: a class that neither occurs nor is found has none
                found |= {f"{what}_{score.name}": value for what, value in of_class.items() if value == value}
            return {f"validation_{name}": value for name, value in found.items()}, 0.5
        names = ("rand_error", "vi_split", "vi_merge")
        totals, crops = np.zeros((len(THRESHOLDS), len(names))), 0
        for place in workers.share(self._validation_places):
            sample = self._with_target(self.validation.at(*place))
            values = torch.sigmoid(self._scored(sample)[2])[0].float().cpu().numpy()
            truth, known = sample.sample.labels, sample.sample.known
            if not (truth[known] != 0).any():
                continue
            crops += 1
            for k, threshold in enumerate(THRESHOLDS):
                score = instance_score(Contingency().add(components(values, threshold), truth, known))
                totals[k] += [getattr(score, name) for name in names]
        crops_, *sums = workers.total(crops, *totals.ravel().tolist())
        if not crops_:
            return {}, 0.5
        means = np.array(sums).reshape(totals.shape) / crops_
        best = int(np.argmin(means[:, 0]))
        return {f"validation_{name}": float(v) for name, v in zip(names, means[best], strict=True)}, THRESHOLDS[best]

    def _scored(self, sample: Sample) -> tuple[float, float, torch.Tensor]:
        found: list[torch.Tensor] = []
        keep = self.model.unet.register_forward_hook(lambda module, args, output: found.append(output))
        spent = self._extraction_s  # of steps alone
        try:
            with torch.autocast(next(self.model.unet.parameters()).device.type, dtype=torch.bfloat16,
                                enabled=self.job.precision == "bfloat16"):
                loss, weight = self.loss([sample])
        finally:
            keep.remove()
            self._extraction_s = spent
        return float(loss), float(weight), found[0]

    @cached_property
    def _validation_places(self) -> list[tuple[Region, Shape]]:
        """Crops side by side over the validation regions, evenly thinned to validation_crops."""
        places = []
        for region in self.validation.regions:
            starts = []
            for available, wanted in zip(region.label_grid.shape, self.validation.shape, strict=True):
                spare = available - wanted
                count = -(-available // wanted)
                starts.append([spare // 2] if spare <= 0 else [round(i * spare / (count - 1)) for i in range(count)])
            places += [(region, (z, y, x)) for z in starts[0] for y in starts[1] for x in starts[2]]
        # of very many, those that are looked at for ground truth are thinned first
        if len(places) > LOOKED_AT * self.job.validation_crops:
            places = [places[i] for i in np.linspace(0, len(places) - 1, LOOKED_AT * self.job.validation_crops).round().astype(int)]
        places = [p for p in places if p[0].labels(p[1], self.validation.shape)[1].any()]
        if len(places) > self.job.validation_crops:
            places = [places[i] for i in np.linspace(0, len(places) - 1, self.job.validation_crops).round().astype(int)]
        return places
