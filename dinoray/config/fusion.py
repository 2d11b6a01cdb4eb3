"""The training of the context-fusion UNet."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dinoray.config.augmentation import Factors
from dinoray.config.memory_levels import with_level
from dinoray.config.training import TrainingJob
from dinoray.config.volume_labels import LabelledVolume


class VolumeAugmentation(BaseModel):
    """What crops of a training go through; probabilities are of each kind, per sample."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    turns: Literal["auto", "cube", "plane", "flips", "none"] = "auto"
    """Turns and mirrorings of raw, context, tokens and labels together: all 48 of the cube; the 16 that keep z; mirrorings
    only. `auto`: as many as the voxels allow (the cube's where they are equal, the plane's where y and x are)."""
    p_tone: float = Field(0.8, ge=0, le=1)
    """Contrast and brightness."""
    contrast: Factors = (0.75, 1.33)
    """Factors of the distance to the mean."""
    brightness: float = Field(0.1, ge=0, le=1)
    """Most that is added or taken, in units of the scaled range."""
    gamma: Factors = (0.7, 1.4)
    """Exponents."""
    p_noise: float = Field(0.5, ge=0, le=1)
    """Gaussian noise."""
    noise: float = Field(0.05, ge=0, le=1)
    """Largest standard deviation, in units of the scaled range."""
    p_blur: float = Field(0.2, ge=0, le=1)
    """Gaussian blur within sections."""
    blur_sigma: float = Field(1.5, ge=0, le=16)
    """Largest, in raw voxels."""
    p_missing: float = Field(0.1, ge=0, le=1)
    """Sections that are lost: black in raw and where the context holds them; their labels stay."""
    p_shifted: float = Field(0.1, ge=0, le=1)
    """Sections that slipped, by up to `shift` voxels, in raw alone; their labels stay."""
    shift: int = Field(4, ge=0, le=64)
    """In raw voxels."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("contrast", "gamma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is above {high}; give (low, high)")
        return self


class TrainContextFusionJob(TrainingJob):
    """A 3D UNet on raw voxels and three-plane DINOv3 tokens, guided by a wider context: `dinoray train context-fusion` and
    jobs/train_context_fusion.py."""

    kind: ClassVar[str] = "context-fusion"
    command: ClassVar[str] = "context-fusion"
    help_hint: ClassVar[str] = "docs/training-volumes.md explains each field"
    source_fields: ClassVar[tuple[str, ...]] = ("train", "validation")

    train: tuple[LabelledVolume, ...] = Field(min_length=1)
    """Regions to learn from."""
    validation: tuple[LabelledVolume, ...] = Field(min_length=1)
    """Regions of the validation: other volumes, or parts that share no voxel with `train`, contexts included."""
    memory_level: Literal["24gb", "16gb", "12gb", "cpu"] | None = None
    """Settings that fit a card (or a small machine), for the fields that the job does not give: micro_batch, base_channels,
    crop_voxels, precision, model, slice_batch, gradient_checkpointing."""
    target: Literal["classes", "affinities"] = "classes"
    """What is predicted: a class for each voxel, or whether voxels belong to one instance."""
    classes: tuple[str, ...] = ("background", "object")
    """Names of the labels 0, 1, ..; with `affinities` all above 0 are instances."""
    offsets: tuple[tuple[int, int, int], ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    """Pairs of voxels whose affinities are predicted (z, y, x); the first three must be the faces."""
    crop_voxels: tuple[int, ...] = (64,)
    """Sides of a crop in voxels of the labels: n, or z, y, x."""
    inputs: Literal["raw", "tokens", "both"] = "both"
    """What the UNet sees of the crop."""
    fusion: Literal["full", "gate", "attention", "index_gate", "none"] = "full"
    """How the context acts; `none` is the plain UNet, `index_gate` the original's misaligned gate, for comparison."""
    context_factor: int = Field(4, ge=1, le=64)
    """Voxel size of the context, in those of the labels: it is as many times as wide as the crop."""
    context_cells: int = Field(8, ge=1, le=16)
    """Cells a side that the bottom attends to."""
    base_channels: int = Field(32, ge=4, le=256)
    """Channels b at full resolution: 16, 32, 64 or 128."""
    levels: int = Field(4, ge=1, le=6)
    """Halvings down to the bottom."""
    norm: Literal["layer", "group", "instance", "batch", "none"] = "layer"
    """`layer` depends on neither batch nor crop; what the others lose is said when the training starts."""
    upsampling: Literal["trilinear", "learned"] = "trilinear"
    """Of the decoder."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of whole channels. Then the order of micro-batches and the number of workers change the training."""
    gradient_checkpointing: bool = False
    """Compute blocks again in the backward instead of keeping them."""
    loss: Literal["auto", "cross_entropy", "focal", "dice", "tversky", "focal_dice", "affinity"] = "auto"
    """`auto`: focal_dice for classes, affinity for affinities."""
    class_balance: bool = True
    """Weigh classes by the inverse of how often they occur in the training regions."""
    tversky: tuple[float, float] = (0.3, 0.7)
    """Weights of false positives and false negatives of the Tversky loss."""
    focal_gamma: float = Field(2.0, ge=0, le=10)
    """Of the focal losses."""
    boundary_weight: float = Field(5.0, ge=1)
    """Of voxels at borders of instances, for affinities; 1 for none."""
    boundary_sigma_voxels: float = Field(2.0, gt=0)
    """How far the weight reaches, in label voxels."""
    min_known: float = Field(0.05, ge=0, le=1)
    """Smallest share of a crop's voxels with ground truth."""
    min_foreground: float = Field(0.0, ge=0, le=1)
    """Smallest share of the known voxels that are no background."""
    min_ids: int = Field(0, ge=0)
    """Fewest different labels in a crop."""
    max_attempts: int = Field(100, ge=1)
    """Places that are tried for a crop before the training is refused."""
    slice_batch: int = Field(32, ge=1)
    """Slices that go through the backbone at once."""
    scaling_sample: int = Field(64, ge=1, le=100_000)
    """Blocks of 64 x 64 x 64 voxels of a region whose values fix its percentiles 0.1 and 99.9."""
    augmentation: VolumeAugmentation = VolumeAugmentation()
    """What training crops go through; validation crops go through nothing."""
    validation_crops: int = Field(16, ge=1)
    """Most crops in a validation, spread evenly over its regions."""

    @model_validator(mode="before")
    @classmethod
    def _levelled(cls, values: Any) -> Any:
        return with_level(values) if isinstance(values, dict) else values

    @field_validator("crop_voxels", mode="before")
    @classmethod
    def _sides(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.crop_voxels) not in (1, 3) or min(self.crop_voxels) < 8:
            raise ValueError("crop_voxels: one number of at least 8, or three (z, y, x)")
        if self.target == "affinities" and self.offsets[:3] != ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            raise ValueError("offsets: the first three must be the faces [1,0,0], [0,1,0], [0,0,1]")
        if (self.loss == "affinity") != (self.target == "affinities") and self.loss != "auto":
            raise ValueError(f"loss: {self.loss} is not a loss of {self.target}")
        if len(self.classes) < 2 and self.target == "classes":
            raise ValueError("classes: background and one more at least")
        if self.uses_backbone and self.model is None and self.weights is None:
            raise ValueError("model: tokens and contexts need a backbone; with inputs=raw and fusion=none there is none")
        return self

    @property
    def uses_backbone(self) -> bool:
        """Whether anything goes through DINOv3."""
        return self.inputs != "raw" or self.fusion != "none"

    @property
    def crop_shape(self) -> tuple[int, int, int]:
        """z, y, x."""
        return self.crop_voxels * 3 if len(self.crop_voxels) == 1 else self.crop_voxels  # type: ignore[return-value]
