"""The job that segments a volume."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dinoray.config.base import UnitJob
from dinoray.config.volume_labels import box_of


class SegmentVolumeJob(UnitJob):
    """Classes or instances of the voxels of a volume: `dinoray segment volume` and jobs/segment_volume.py.

    The labels are `labels.zarr`, at the voxel size that the model was trained on.
    """

    runner: ClassVar[str] = "volume-labels"
    verb: ClassVar[str] = "segment"
    command: ClassVar[str] = "volume"
    noun: ClassVar[str] = "block"
    row_noun: ClassVar[str] = "voxel"
    retried: ClassVar[bool] = False

    sources: tuple[str, ...] = Field(min_length=1, max_length=1)
    """One volume: OME-Zarr, Zarr, N5, HDF5, a TIFF stack, or a folder (or glob) of slices; local or `s3://`."""
    checkpoint: str
    """Folder or URL of a checkpoint that `dinoray train context-fusion` wrote (OUT/checkpoint)."""
    weights: str | None = None
    """Where the backbone that the checkpoint names lies now: hub id, folder, file."""
    raw_voxel_size: tuple[float, ...] | None = None
    """Level to read, by its voxel size in nm (one number, or z,y,x); default the checkpoint's. Where the source states no scale:
    its voxel size."""
    dataset: str | None = None
    """Path of the array inside a container (Zarr, N5, HDF5)."""
    channel: str | None = None
    """Name or number (from 0) of the channel to read, where there are several."""
    time: int | None = Field(None, ge=0)
    """Time point (from 0) to read, where there are several."""
    crop: str | None = None
    """Part of the volume, in voxels of the level read: `z0:z1,y0:y1,x0:x1`."""
    tokens: str | None = None
    """Output of `dinoray extract volume` on the same volume: its tokens are read instead of computed."""
    context_tokens: str | None = None
    """The same for the context, extracted at the context's voxel size."""
    scaling: Literal["volume", "dtype"] = "volume"
    """Intensities: percentiles of the volume (those of the checkpoint), or the dtype's full range."""
    scaling_sample: int = Field(64, ge=1, le=100_000)
    """Blocks of 64 x 64 x 64 voxels whose values fix the percentiles, chosen by the hash of their place."""
    window_voxels: tuple[int, ...] | None = None
    """Sides of the windows that go through the model, in predicted voxels: n, or z,y,x; default the checkpoint's crops with a
    context (which was trained at that size), else at least 128."""
    halo_voxels: int | None = Field(None, ge=0, le=1024)
    """Margin of a window on each side; default 32, and at most a quarter of the window."""
    blend: bool = True
    """Neighbouring windows are blended over their margins; otherwise the margins are thrown away, which costs less at the borders
    of units."""
    threshold: float | None = Field(None, gt=0, lt=1)
    """Affinities above it join voxels; default the checkpoint's."""
    instances: Literal["components", "mutex"] = "components"
    """How affinities become instances: connected components, or mutex watershed in blocks that are then joined."""
    min_voxels: int = Field(0, ge=0)
    """Smaller instances become background."""
    probabilities: bool = False
    """Store the probabilities of classes too (affinities are always stored)."""
    probability_dtype: Literal["uint8", "float16", "float32"] = "uint8"
    """Type of stored probabilities; uint8 is 255 for 1."""
    block_voxels: int = Field(256, ge=32, le=2048)
    """Side of the blocks in which instances are found and joined, in whole shards; about 200 bytes of memory a voxel."""
    shard_voxels: int = Field(128, ge=8, le=1024)
    """Side of a stored object, about: whole strides of windows."""
    unit_windows: int | None = Field(None, ge=1)
    """Side of a unit in windows, rounded up to whole shards; default the smallest that computes at most 50 % twice."""
    max_output_bytes: int = Field(1_000_000_000_000, ge=1)
    """Nothing is begun when the arrays would be larger than this, before compression."""
    memory_bytes: int = Field(4_000_000_000, ge=1)
    """Most bytes of host memory an actor may take beyond its size with the model loaded."""

    @field_validator("raw_voxel_size", "window_voxels", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = value.split(",")
        return (value,) if isinstance(value, int | float) else value

    @field_validator("channel", "crop", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("raw_voxel_size", "window_voxels"):
            value = getattr(self, name)
            if value is not None and (len(value) not in (1, 3) or min(value) <= 0):
                raise ValueError(f"{name}: one positive number, or three (z,y,x)")
        self.crop_box()
        return self

    def crop_box(self) -> tuple[tuple[int, int], ...] | None:
        """`crop` as ((z0, z1), (y0, y1), (x0, x1)). Raises ValueError."""
        return None if self.crop is None else box_of(self.crop, "crop")

    def other_inputs(self) -> tuple[str, ...]:
        return tuple(url for url in (self.checkpoint, self.tokens, self.context_tokens) if url is not None)
