"""Training jobs: what all of them share, and the distance-map UNet of cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dinoray.config.augmentation import Augmentation
from dinoray.config.labelled import LabelledSource
from dinoray.config.secrets import secret_in_url

TRAINING_EXECUTION_FIELDS = frozenset({
    "out", "weights", "workers", "no_ray", "data_threads", "cache_bytes", "accept_dinov3_license", "max_restarts", "takeover",
    "staging", "log_every", "micro_batch", "stop_after_s",
})
"""Fields that change how a training runs, never which samples it sees or what it minimises. `weights` are identified by
their digest, the sources by the digest of their listing. `micro_batch` only orders a sum."""


class TrainingJob(BaseModel):
    """What every training shares. The global batch is here; how many workers share it is not part of the job."""

    kind: ClassVar[str]
    command: ClassVar[str]
    help_hint: ClassVar[str] = "docs/training.md explains each field"
    source_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that say what is trained on; what they hold has `path_fields` and `paths()`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    out: str
    """Output folder or URL (with several machines: one that all reach); the same job on it again resumes it."""
    model: str | None = None
    """Variant of the backbone, such as `vits16`; alone it means its official weights."""
    weights: str | None = None
    """Hub id, folder, file, or `random[:SEED]` to train from scratch."""
    accept_dinov3_license: bool = False
    """You accept the DINOv3 License: the open timm mirror may then be used where the official one is gated."""
    staging: str | None = None
    """Folder or URL that all workers reach, for the weights; default `out`."""
    seed: int = Field(0, ge=0, lt=2**63)
    """A sample is a function of this seed and its global index, and of nothing else."""
    steps: int = Field(10_000, ge=1)
    """Optimiser steps; the learning rate falls to its end over them."""
    batch_size: int = Field(16, ge=1)
    """Samples per step over all workers together."""
    micro_batch: int = Field(4, ge=1)
    """Samples per forward of one worker; it halves by itself when a device runs out of memory."""
    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate of what is new (AdamW)."""
    backbone_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the backbone; left out, the backbone is frozen."""
    weight_decay: float = Field(0.05, ge=0)
    """Of matrices and kernels; norms, biases, tokens and LayerScale have none."""
    beta2: float = Field(0.999, gt=0, lt=1)
    """Second moment's decay of AdamW; the first is 0.9."""
    warmup_steps: int = Field(250, ge=0)
    """Steps of linear warm-up, then a cosine down to `final_lr_fraction` at `steps`."""
    final_lr_fraction: float = Field(0.01, ge=0, le=1)
    """Share of the peak learning rate at the last step."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest global L2 norm of the gradient."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay per step of a running mean of the weights, which is then what is validated and written; 0 for none."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward and backward (autocast; weights stay float32). `auto`: bfloat16 on CUDA, float32 on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Resolved once, before the first step."""
    workers: str = "1"
    """Number of Ray Train workers, or `MIN,MAX` for an elastic group."""
    no_ray: bool = False
    """Train in this process, without Ray."""
    max_restarts: int = Field(3, ge=-1)
    """Times a failed group of workers is started again from the last checkpoint; -1 without limit."""
    data_threads: int = Field(2, ge=1)
    """Threads per worker that read and augment samples."""
    cache_bytes: int = Field(2_000_000_000, ge=0)
    """Decoded images a worker may keep."""
    validate_every: int = Field(250, ge=1)
    """Steps between validations (un-augmented)."""
    checkpoint_every: int = Field(250, ge=1)
    """Steps between checkpoints; a restart repeats at most so many."""
    patience: int | None = Field(None, ge=1)
    """Validations without improvement after which training ends early; default never."""
    min_improvement: float = Field(1e-4, ge=0)
    """Relative fall of the validation loss that counts as improvement for `patience`."""
    log_every: int = Field(20, ge=1)
    """Steps between lines of TensorBoard and of the progress."""
    stop_after_s: float | None = Field(None, gt=0)
    """Seconds of this run after which it saves a checkpoint and ends, to be resumed; default never."""
    takeover: bool = False
    """Take the output over from a driver that seems to be at work on it: you know that it is gone."""

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_text(cls, value: Any) -> str:
        return ",".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        parts = self.workers.split(",")
        if len(parts) > 2 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts) or int(parts[0]) > int(parts[-1]):
            raise ValueError(f"workers: {self.workers!r} is neither N nor MIN,MAX")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} steps of warm-up leave nothing of steps={self.steps}")
        for url in (self.out, self.staging or "", self.weights or "", *self.input_urls()):
            secret = secret_in_url(url)
            if secret:
                raise ValueError(f"a URL holds {secret}: give credentials through the environment instead")
        return self

    def input_urls(self) -> tuple[str, ...]:
        """Paths and URLs of all that is trained on."""
        return tuple(url for name in self.source_fields for source in getattr(self, name) for url in source.paths().values())

    def with_paths(self, change: Callable[[str], str]) -> Self:
        """The job with all that is trained on at the places that `change` gives."""
        return self.model_copy(update={name: tuple(
            source.model_copy(update={field: change(url) for field, url in source.paths().items()})
            for source in getattr(self, name)) for name in self.source_fields})

    def result_settings(self) -> dict[str, Any]:
        """The settings that change what is learned, as plain JSON values."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in TRAINING_EXECUTION_FIELDS}


class TrainDistanceMapJob(TrainingJob):
    """A UNet over DINOv3 that predicts distance maps of cells: `dinoray train distance-map` and jobs/train_distance_map.py."""

    kind: ClassVar[str] = "distance-map"
    command: ClassVar[str] = "distance-map"
    source_fields: ClassVar[tuple[str, ...]] = ("train", "validation")

    train: tuple[LabelledSource, ...] = Field(min_length=1)
    """Labelled images to learn from (docs/training-data.md)."""
    validation: tuple[LabelledSource, ...] = ()
    """Labelled images for the validation; without any, `validation_fraction` of the training images is set aside."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of images set aside where `validation` is empty, chosen by the hash of their ids."""
    crop_px: int = Field(256, ge=32, le=4096)
    """Side of a training crop, and of a window at inference; a multiple of the patch size."""
    channels: str = "auto"
    """`auto` (one channel, or 8-bit RGB), `rgb`, `mean`, the NAME or number of a channel, or `NAME=a,b,c`."""
    scaling: Literal["image", "dtype"] = "image"
    """Intensities: percentiles of each image, or the dtype's full range. The checkpoint keeps it for inference."""
    scaling_low_percent: float = Field(0.1, ge=0, le=100)
    """Percentile that becomes 0."""
    scaling_high_percent: float = Field(99.9, ge=0, le=100)
    """Percentile that becomes 1."""
    pixel_size_um: float | None = Field(None, gt=0)
    """Training images are resampled to this pixel size; every image must then have one. Default: as they are."""
    diameter_px: float | None = Field(None, gt=0)
    """Training images are resampled so that each one's median diameter is this. Default: as they are."""
    augmentation: Augmentation = Augmentation()
    """What training crops go through; validation crops go through nothing."""
    decoder_channels: tuple[int, ...] = Field((256, 128, 64, 32), min_length=1)
    """Channels of the decoder's stages, from the token grid to full resolution."""
    norm: Literal["layer", "group", "batch", "none"] = "group"
    """`group` depends on the window (always of `crop_px`, so how a collection is cut into units changes nothing); `layer` on
    neither batch nor window, and it learns far more slowly (docs/cells-learning.md); with `batch` the number of workers and the
    micro-batch change the result."""
    stem_levels: int = Field(3, ge=0, le=5)
    """Pixel resolutions (1, 1/2, 1/4, ...) at which a convolutional stem on the pixels joins the decoder."""
    foreground_weight: float = Field(1.0, gt=0)
    """Weight of pixels inside cells in the loss; background has 1."""
    validation_crops: int = Field(256, ge=1)
    """Most crops in a validation, spread evenly over the validation images."""

    @field_validator("channels", mode="before")
    @classmethod
    def _channels_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.scaling_low_percent >= self.scaling_high_percent:
            raise ValueError("scaling_low_percent must be below scaling_high_percent")
        if self.pixel_size_um is not None and self.diameter_px is not None:
            raise ValueError("give pixel_size_um or diameter_px, not both: each fixes the scale of the training images")
        return self
