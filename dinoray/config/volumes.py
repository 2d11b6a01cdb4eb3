"""The job over a volume."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dinoray.config.base import FeatureJob

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class ExtractVolumeJob(FeatureJob):
    """Three-plane features of a volume: `dinoray extract volume` and jobs/extract_volume.py.

    Slices along z, y and x go through the backbone at their native resolution; their tokens are stored
    (`output: planes`), or also averaged on the grid of `voxel_size` (`fused`).
    """

    runner: ClassVar[str] = "volume-features"
    command: ClassVar[str] = "volume"
    noun: ClassVar[str] = "slab"
    row_noun: ClassVar[str] = "token"

    sources: tuple[str, ...] = Field(min_length=1, max_length=1)
    """One volume: OME-Zarr, Zarr, N5, HDF5, a TIFF stack, or a folder (or glob) of slices; local or `s3://`."""
    raw_voxel_size: tuple[float, ...] | None = None
    """Level to read, by its voxel size in nm (one number, or z,y,x); default the finest. Where the source states no
    scale: its voxel size."""
    voxel_size: tuple[float, ...] | None = None
    """Target voxel in nm (one number, or z,y,x): the pitch of slices, and the grid of fused features; default 4 times
    the raw voxel."""
    dataset: str | None = None
    """Path of the array inside a container (Zarr, N5, HDF5)."""
    channel: str | None = None
    """Name or number (from 0) of the channel to read, where there are several."""
    time: int | None = Field(None, ge=0)
    """Time point (from 0) to read, where there are several."""
    crop: str | None = None
    """Part of the volume, in voxels of the level read: `z0:z1,y0:y1,x0:x1`."""
    planes: str = "auto"
    """`xy`, `xz`, `yz`, separated by commas; `auto`: all three, or xy alone where voxels differ by more than 3x."""
    slice_sampling: Literal["interpolate", "nearest", "antialias", "linspace"] = "interpolate"
    """How a target plane comes from raw slices: linear between the two nearest; the nearest; the mean over the plane's
    thickness; or slices at both ends and evenly between, as dinov3_playground does (not registered; for comparison)."""
    window_px: int = Field(512, ge=16, le=8192)
    """Side of the windows that go through the backbone, in (square) pixels; a multiple of the patch size."""
    halo_px: int = Field(32, ge=0, le=2048)
    """Margin of a window on each side, blended with its neighbours; a multiple of the patch size."""
    output: Literal["planes", "fused"] = "planes"
    """`planes`: one array of tokens per plane; `fused`: also their average on the target grid."""
    layer: int | None = Field(None, ge=0)
    """0-based transformer layer whose tokens are stored (after the final norm); default the last."""
    scaling: Literal["volume", "slice", "dtype"] = "volume"
    """Percentiles of the volume; each slice's own minimum and maximum in 8 bits (for comparison: it flickers, and needs
    a single window); or the dtype's full range."""
    scaling_sample: int = Field(64, ge=1, le=100_000)
    """Blocks of 64 x 64 x 64 voxels whose values fix the percentiles, chosen by the hash of their place."""
    foreground: str | None = None
    """Skip what is background: a number (voxels above it are foreground) or a mask volume (voxels other than 0)."""
    dense_dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored arrays; float16 is checked for overflow."""
    unit_windows: int | None = Field(None, ge=1)
    """Side of a unit in windows, rounded up to whole shards; default the smallest that computes at most 50 % twice."""
    unit_planes: int | None = Field(None, ge=1)
    """Target planes of a unit, rounded up to whole shards; default about 2,000 windows."""
    max_output_bytes: int = Field(1_000_000_000_000, ge=1)
    """Nothing is begun when the arrays would be larger than this, before compression."""
    memory_bytes: int = Field(4_000_000_000, ge=1)
    """Most bytes of host memory an actor may take beyond its size with the model loaded."""

    @field_validator("raw_voxel_size", "voxel_size", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = value.split(",")
        return (value,) if isinstance(value, int | float) else value

    @field_validator("channel", "crop", "foreground", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("planes", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("raw_voxel_size", "voxel_size"):
            value = getattr(self, name)
            if value is not None and (len(value) not in (1, 3) or min(value) <= 0):
                raise ValueError(f"{name}: one positive number of nm, or three (z,y,x)")
        if self.planes != "auto" and not self.plane_names():
            raise ValueError(f"planes: {self.planes!r} is neither auto nor some of xy,xz,yz")
        if self.window_px < 4 * self.halo_px:
            raise ValueError("window_px must be at least 4 times halo_px: a pixel may lie in two windows a side, not more")
        self.crop_box()
        return self

    def plane_names(self) -> tuple[str, ...]:
        """The planes that were named, in the order xy, xz, yz; () for `auto` and for names that are none."""
        names = [name.strip() for name in self.planes.split(",")]
        known = tuple(name for name in ("xy", "xz", "yz") if name in names)
        return known if len(known) == len(names) else ()

    def crop_box(self) -> tuple[tuple[int, int], ...] | None:
        """`crop` as ((z0, z1), (y0, y1), (x0, x1)). Raises ValueError."""
        if self.crop is None:
            return None
        match = re.fullmatch(r"(\d+):(\d+),(\d+):(\d+),(\d+):(\d+)", self.crop.replace(" ", ""))
        if not match:
            raise ValueError(f"crop: {self.crop!r} is not z0:z1,y0:y1,x0:x1 in voxels")
        ends = [int(n) for n in match.groups()]
        return tuple(zip(ends[::2], ends[1::2], strict=True))

    def mask_source(self) -> str | None:
        """The mask volume, when `foreground` is no number."""
        return self.foreground if self.foreground is not None and not _NUMBER.fullmatch(self.foreground) else None

    def other_inputs(self) -> tuple[str, ...]:
        mask = self.mask_source()
        return () if mask is None else (mask,)
