"""Training of the distance-map UNet: samples, loss and validation of cells (dinoray.training.loop does the rest).

A sample is one augmented crop of one labelled image; its target is made after the warp, each instance by itself
(dinoray.vision.targets). The loss is the squared error of the sigmoid, summed over pixels and divided by all workers' weights.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from dinoray.config.training import TrainDistanceMapJob
from dinoray.errors import ItemError, SystemicError
from dinoray.io.annotations import sample_weights
from dinoray.training.augmentation import augment, grid_crops, plain_crop
from dinoray.training.image_pool import ImagePool, Pixels
from dinoray.training.parameters import parameter_groups
from dinoray.training.sampling import bounded_map, generator, pick
from dinoray.training.workers import Workers
from dinoray.vision.distance_model import DistanceMapModel
from dinoray.vision.resampling2d import resample, resample_labels
from dinoray.vision.targets import distance_map


class Sample(NamedTuple):
    """A crop and what is to be learned from it."""

    pixels: np.ndarray
    """[3, c, c] float32 in [0, 1]."""
    target: np.ndarray
    """Distance map [c, c] float32."""


class Images(NamedTuple):
    """Labelled images with the factor that brings each to the scale of the training."""

    pool: ImagePool
    zooms: np.ndarray

    def read(self, number: int) -> Pixels:
        """Image `number`. Raises SystemicError where it cannot be read any more: without it the samples would be others."""
        try:
            return self.pool.read(number)
        except ItemError as error:
            raise SystemicError(f"the labelled image {self.pool.images[number].image_id} could be used before and cannot now: "
                                f"{error.what}", where=error.where, todo="restore it as it was, then run the same command again: "
                                "it resumes from the last state") from error


class DistanceMapTask:
    """`dinoray.training.loop.Task` of cells."""

    def __init__(self, job: TrainDistanceMapJob, fingerprint: str, model: DistanceMapModel, train: Images, validation: Images):
        self.job, self.fingerprint, self.model, self.train, self.validation = job, fingerprint, model, train, validation
        sources = [image.source for image in train.pool.images]
        self._of_source = [np.flatnonzero(np.array(sources) == i) for i in range(len(job.train))]
        self._shares = sample_weights([len(found) for found in self._of_source], [source.weight for source in job.train])

    def parameter_groups(self) -> list[dict[str, Any]]:
        job = self.job
        groups = parameter_groups(self.model.decoder, job.learning_rate, job.weight_decay)
        if job.backbone_learning_rate is not None:
            groups += parameter_groups(self.model.backbone, job.backbone_learning_rate, job.weight_decay)
        return groups

    def sample(self, index: int) -> Sample:
        rng = generator(self.job.seed, index)
        numbers = self._of_source[pick(rng, self._shares)]
        number = int(numbers[min(int(rng.random() * len(numbers)), len(numbers) - 1)])
        found = self.train.read(number)
        planes = np.broadcast_to(found.planes, (3, *found.labels.shape))
        pixels, labels = augment(planes, found.labels, self.job.crop_px, self.job.augmentation, rng,
                                 zoom=float(self.train.zooms[number]))
        return Sample(pixels, distance_map(labels))

    def loss(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.model.decoder.head.weight.device
        pixels = torch.from_numpy(np.stack([s.pixels for s in samples])).to(device, non_blocking=True)
        target = torch.from_numpy(np.stack([s.target for s in samples])).to(device, non_blocking=True)[:, None]
        return weighted_squares(self.model(pixels), target, self.job.foreground_weight)

    def validate(self, workers: Workers) -> dict[str, float]:
        """Mean loss over fixed, un-augmented crops of the validation images."""
        crops = workers.share(self._validation_crops())
        size, total, count = self.job.micro_batch, 0.0, 0.0
        with ThreadPoolExecutor(self.job.data_threads, thread_name_prefix="validate") as threads:
            samples = bounded_map(threads, self._validation_sample, crops, 2 * size + self.job.data_threads)
            batch: list[Sample] = []
            for sample in samples:
                batch.append(sample)
                if len(batch) == size:
                    total, count = _added(total, count, self._validation_loss(batch))
                    batch = []
            if batch:
                total, count = _added(total, count, self._validation_loss(batch))
        total, count = workers.total(total, count)
        return {"loss": total / count}

    def _validation_loss(self, batch: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.job.precision == "bfloat16":
            with torch.autocast(self.model.decoder.head.weight.device.type, dtype=torch.bfloat16):
                return self.loss(batch)
        return self.loss(batch)

    def _validation_crops(self) -> list[tuple[int, int, int]]:
        """(image, y0, x0), evenly among all crops that cover the validation images."""
        crops = []
        for number, zoom in enumerate(self.validation.zooms):
            height, width = self.validation.read(number).labels.shape
            crops += [(number, y, x) for y, x in grid_crops(*zoomed((height, width), zoom), self.job.crop_px)]
        if len(crops) <= self.job.validation_crops:
            return crops
        return [crops[i] for i in np.linspace(0, len(crops) - 1, self.job.validation_crops).round().astype(int)]

    def _validation_sample(self, crop: tuple[int, int, int]) -> Sample:
        number, y0, x0 = crop
        planes, labels = at_scale(self.validation, number)
        pixels, labels = plain_crop(planes, labels, y0, x0, self.job.crop_px)
        return Sample(pixels, distance_map(labels))


def weighted_squares(logits: torch.Tensor, target: torch.Tensor, foreground_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over pixels of weight x squared error of the sigmoid, sum of the weights), both [B, 1, H, W] -> scalars."""
    error = (torch.sigmoid(logits.to(target.dtype)) - target) ** 2
    weights = torch.where(target > 0, foreground_weight, 1.0).to(target.dtype)
    return (error * weights).sum(), weights.sum()


def zoomed(shape: tuple[int, int], zoom: float) -> tuple[int, int]:
    """Sides of an image at the scale of the training, px."""
    return tuple(max(1, round(side * float(zoom))) for side in shape)  # type: ignore[return-value]


def at_scale(images: Images, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(planes [3, y, x], labels [y, x]) of an image at the scale of the training."""
    found = images.read(number)
    shape = zoomed(found.labels.shape, images.zooms[number])
    planes = np.ascontiguousarray(np.broadcast_to(found.planes, (3, *found.labels.shape)))
    return resample(planes, shape), resample_labels(found.labels, shape)


def _added(total: float, count: float, more: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    return total + float(more[0]), count + float(more[1])
