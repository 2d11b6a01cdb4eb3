"""Jobs that segment: cell instances in collections of 2D images."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dinoray.config.images import CollectionJob, channel_groups


class SegmentCellsJob(CollectionJob):
    """Cell instances in a collection of 2D images: `dinoray segment cells` and jobs/segment_cells.py.

    One mask per image at its own resolution, and one row per cell.
    """

    runner: ClassVar[str] = "cell-masks"
    verb: ClassVar[str] = "segment"
    command: ClassVar[str] = "cells"
    row_noun: ClassVar[str] = "cell"

    checkpoint: str
    """Folder or URL of a checkpoint that `dinoray train distance-map` wrote (OUT/checkpoint)."""
    weights: str | None = None
    """Where a backbone that the checkpoint names but does not include lies now: hub id, folder, file."""
    channel: str | None = None
    """The channel that shows the cells, by name or 0-based number (or `rgb`, `mean`, `NAME=a,b,c`); default the checkpoint's
    policy."""
    pixel_size_um: float | None = Field(None, gt=0)
    """Pixel size in µm where the files do not say it; images are resampled to the checkpoint's pixel size."""
    diameter_px: float | None = Field(None, gt=0)
    """Median diameter of the cells in px of the images as they are; used instead of pixel sizes."""
    scaling: Literal["image", "plate", "dtype"] | None = None
    """Intensities: percentiles per image; per plate (or folder) and channel; the dtype's full range; default the
    checkpoint's."""
    peak: float | None = Field(None, gt=0, lt=1)
    """A cell's marker is where the distance map is above this; default the checkpoint's."""
    fill: float | None = Field(None, gt=0, lt=1)
    """Cells are where the distance map is above this; default the checkpoint's."""
    markers: Literal["components", "hmaxima"] | None = None
    """Markers are the connected parts above `peak`, or maxima above it that rise above their surroundings; default the
    checkpoint's."""
    marker_height: float | None = Field(None, gt=0, lt=1)
    """How far such maxima rise, of 1; default the checkpoint's."""
    min_area_px: int = Field(0, ge=0)
    """Smaller cells are dropped, in px of the image."""
    overlap_px: int | None = Field(None, ge=0)
    """Overlap of the windows an image is predicted in, in px at the model's scale; default a quarter of a window."""
    masks: Literal["tiff", "zarr"] = "tiff"
    """Masks as compressed int32 TIFF, or as OME-Zarr 0.5 labels."""
    cell_features: bool = True
    """A column `feature`: the mean of the backbone's last tokens over each cell."""
    neighbour_px: float = Field(10.0, ge=0)
    """Cells whose edges are no farther apart than this, in px of the image, count as neighbours."""
    block_px: int = Field(4096, ge=512, le=32_768)
    """Images of more pixels than the square of this are segmented in blocks of this side, and joined."""
    unit_items: int = Field(32, ge=1, le=100_000)
    """Most images in a unit; the rows of all their cells are held in memory until the unit is written."""

    @field_validator("channel", mode="before")
    @classmethod
    def _channel_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.peak is not None and self.fill is not None and self.fill >= self.peak:
            raise ValueError("fill: must be below peak: a cell's marker lies inside the cell")
        if self.channel is not None and not self.channel.strip():
            raise ValueError("channel: an empty name")
        if self.channel is not None and "=" in self.channel and len(channel_groups(self.channel)) != 1:
            raise ValueError(f"channel: {self.channel!r} names several groups, and one image gives one mask")
        return self

    def other_inputs(self) -> tuple[str, ...]:
        return (self.checkpoint,)
