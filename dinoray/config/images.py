"""Jobs over collections of 2D images: whole images, and single cells."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dinoray.config.base import FeatureJob, UnitJob


class CollectionJob(UnitJob):
    """What the jobs over collections of 2D images share: which images, read how, in which units."""

    scaling_sample: int = Field(64, ge=1, le=100_000)
    """Images per plate (or folder) whose pixels fix the percentiles, chosen by the hash of their ids."""
    pixel_size_um: float | None = Field(None, gt=0)
    """Pixel size in µm where the files do not say it."""
    pattern: str = "auto"
    """File-name pattern: `auto`, `none`, a shipped name, or a regex with named groups."""
    where: dict[str, str] = Field(default_factory=dict)
    """Only items whose metadata match, e.g. `Plate: BR001*`."""
    limit: int | None = Field(None, ge=1)
    """Only the first N items, for pilots."""
    z_projection: Literal["refuse", "max", "middle"] = "refuse"
    """What to do with focus stacks inside one file."""
    max_pixels: int = Field(2**28, ge=1)
    """Largest declared Y*X; above it an image is quarantined before it is decoded."""
    max_file_bytes: int = Field(4 * 2**30, ge=1)
    """Largest file, and largest decoded image, in bytes."""
    unit_items: int = Field(256, ge=1, le=100_000)
    """Most images in a unit."""
    unit_bytes: int = Field(1_000_000_000, ge=1)
    """Most bytes of files in a unit, by the listing."""
    prefetch_bytes: int = Field(1_000_000_000, ge=1)
    """Decoded bytes an actor may hold ahead of the device."""


class ExtractJob(CollectionJob, FeatureJob):
    """What the jobs that extract features of collections of 2D images share."""

    features: tuple[str, ...] = ("cls", "patch_mean")
    """Which features; each kind of extraction says what it offers."""
    layers: tuple[int, ...] | None = None
    """0-based transformer layers; default the last one, without a suffix in the column names."""
    channels: str = "auto"
    """`auto`, `rgb`, `mean`, `each`, or groups of three: `NAME=a,b,c[;NAME2=d,e,f]`."""
    scaling: Literal["plate", "image", "dtype"] = "plate"
    """Percentiles per plate (or folder) and channel; per image; or the dtype's full range."""
    contrast: Literal["none", "clahe"] = "none"
    """Local contrast after scaling; `clahe` has tiles of fixed physical size anchored at the image origin."""
    clahe_tile_px: int = Field(64, ge=8, le=4096)
    """Side of a CLAHE tile in px, where `clahe_tile_um` is not given."""
    clahe_tile_um: float | None = Field(None, gt=0)
    """Side of a CLAHE tile in µm; needs the image's pixel size."""
    clahe_clip: float = Field(2.0, gt=1)
    """CLAHE clip limit as a multiple of the mean histogram height."""
    vector_dtype: Literal["float32", "float16"] = "float32"
    """Type of the vector columns; float16 is checked for overflow."""

    @field_validator("features", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("layers", mode="before")
    @classmethod
    def _split_layers(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part.strip()]
        return [value] if isinstance(value, int) else (value or None)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.features or len(set(self.features)) != len(self.features):
            raise ValueError("features: name each wanted feature once")
        if self.layers is not None and (len(set(self.layers)) != len(self.layers) or min(self.layers) < 0):
            raise ValueError("layers: distinct 0-based numbers")
        channel_groups(self.channels)
        return self


class ExtractImagesJob(ExtractJob):
    """Features of a collection of 2D images: `dinoray extract images` and jobs/extract_images.py."""

    runner: ClassVar[str] = "image-features"
    command: ClassVar[str] = "images"

    features: tuple[Literal["cls", "patch_mean", "patches"], ...] = ("cls", "patch_mean")
    """`cls` and `patch_mean` are columns, `patches` dense Zarr arrays."""
    size: Literal["auto", "native", "tiles", "resize"] = "auto"
    """`auto`: tiles where a side exceeds 2 * tile_px, else native; `resize`: the reference processor's geometry."""
    tile_px: int = Field(256, ge=32, le=4096)
    """Side of a tile in source pixels; a multiple of the patch size."""
    resize_px: int = Field(224, ge=16, le=4096)
    """Side after `size=resize`, a multiple of the patch size."""
    dense_dtype: Literal["float16", "float32"] = "float16"
    """Type of the dense arrays; float16 is checked for overflow."""


class ExtractCellsJob(ExtractJob):
    """Features of single cells in 2D images: `dinoray extract cells` and jobs/extract_cells.py.

    One row per cell and channel: a square of `crop_um` around the cell's centroid, resampled to `crop_px`.
    """

    runner: ClassVar[str] = "cell-features"
    command: ClassVar[str] = "cells"

    labels: str | None = None
    """Folder, glob, URL or manifest of label images (0 = background, each cell an integer), paired by name (docs/cells.md)."""
    centroids: str | None = None
    """CSV or Parquet table of cells, one row each: the image, x, y (px or µm), object_id (docs/cells.md)."""
    crop_um: float = Field(gt=0)
    """Side of the square around each centroid, in µm."""
    crop_px: int = Field(224, ge=16, le=4096)
    """Side that the square is resampled to, a multiple of the patch size."""
    mask_neighbours: bool = False
    """Pixels of other cells become 0 after scaling; needs `labels`."""
    features: tuple[Literal["cls", "patch_mean"], ...] = ("cls", "patch_mean")
    """Vector columns."""
    unit_items: int = Field(32, ge=1, le=100_000)
    """Most images in a unit; the rows of all their cells are held in memory until the unit is written."""

    @model_validator(mode="after")
    def _one_kind_of_objects(self) -> Self:
        if (self.labels is None) == (self.centroids is None):
            raise ValueError("give exactly one of labels and centroids: they say where the cells are")
        if self.mask_neighbours and self.labels is None:
            raise ValueError("mask_neighbours needs labels: centroids do not say which pixels are a neighbour's")
        return self

    def other_inputs(self) -> tuple[str, ...]:
        return tuple(url for url in (self.labels, self.centroids) if url is not None)


def channel_groups(policy: str) -> dict[str, tuple[str, str, str]] | None:
    """The named groups of a channel policy, or None for `auto`, `rgb`, `mean`, `each`.

    Raises ValueError (pydantic shows it with the field's name) for anything else.
    """
    if policy in ("auto", "rgb", "mean", "each"):
        return None
    groups: dict[str, tuple[str, str, str]] = {}
    for part in policy.split(";"):
        name, _, members = part.partition("=")
        names = tuple(m.strip() for m in members.split(","))
        name = name.strip()
        if not name or len(names) != 3 or not all(names) or name in groups:
            raise ValueError(f"channels: {policy!r} is not auto|rgb|mean|each or NAME=a,b,c[;NAME2=d,e,f]")
        groups[name] = names  # type: ignore[assignment]
    return groups
