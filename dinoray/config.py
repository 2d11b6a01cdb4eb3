"""Job models: what a user asks for, validated before anything runs.

Every field has its docstring; units stand in the names. A field changes results unless it is listed in
`EXECUTION_FIELDS`: the job fingerprint hashes all the others, so a new field is safe by default.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dinoray.errors import BadRequest

_SECRET_NAME = (r"[\w.-]{0,64}(?:sig(?:nature)?|token|secret|passw\w*|pwd|credential|auth(?:orization)?|api[-_]?key|"
                r"access[-_]?key(?:id)?|key-pair-id|jwt)")
_SECRET_QUERY = re.compile(rf"([?&;](?:{_SECRET_NAME})=)([^&;#\s'\"<>]+)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_PASSWORD = re.compile(r"([\w+.-]{1,32}://[^/\s@]{0,1000}:)([^/\s]{0,1000})@")

EXECUTION_FIELDS = frozenset({
    "sources", "out", "weights", "workers", "no_ray", "decode_threads", "compute_threads", "staging", "strict",
    "max_failed_fraction", "accept_dinov3_license", "rounds", "stall_timeout_s", "prefetch_bytes", "takeover", "labels",
    "centroids", "unit_windows", "unit_planes", "max_output_bytes", "memory_bytes",
})
"""Fields that change how a job runs, never what it writes. `sources`, `labels`, `centroids` and `weights` are
identified by content instead: the digest of the listing and the digest of the weights."""


Job = TypeVar("Job", bound=BaseModel)


class FeatureJob(BaseModel):
    """What every job that computes features shares; `runner` and `command` name the kind's runner and CLI command,
    `noun` and `row_noun` what its items and results are called in messages."""

    runner: ClassVar[str]
    command: ClassVar[str]
    noun: ClassVar[str] = "image"
    row_noun: ClassVar[str] = "row"

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    sources: tuple[str, ...] = Field(min_length=1)
    """Folders, files, globs, fsspec URLs (`s3://...`), or CSV/Parquet manifests."""
    out: str
    """Output folder or URL; running the same job on it again resumes it."""
    model: str | None = None
    """Variant such as `vits16`; alone it means its official weights."""
    weights: str | None = None
    """Hub id, folder, file, or `random[:SEED]`."""
    accept_dinov3_license: bool = False
    """You accept the DINOv3 License: the open timm mirror may then be used where the official one is gated."""
    staging: str | None = None
    """Folder or URL that all actors reach, for the weights (below `_dinoray/weights/<digest>`); default `out`."""
    scaling_low_percent: float = Field(0.1, ge=0, le=100)
    """Percentile that becomes 0."""
    scaling_high_percent: float = Field(99.9, ge=0, le=100)
    """Percentile that becomes 1."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on CUDA, float32 on CPU; fixed in the plan."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Resolved once, in the plan."""
    token_budget: int | None = Field(None, ge=64)
    """Tokens per micro-batch; default from a table by variant, precision and device."""
    max_failed_fraction: float = Field(0.1, ge=0, le=1)
    """The run stops above this share of quarantined items, after 200 items, overall and per plate."""
    workers: str = "auto"
    """`auto`, a number of actors, or `MIN,MAX` for an autoscaling cluster."""
    no_ray: bool = False
    """Run in this process, without Ray."""
    decode_threads: int | None = Field(None, ge=1)
    """Threads that read and decode, per actor."""
    compute_threads: int | None = Field(None, ge=1)
    """Micro-batches computed at once on CPU, each on one thread; default the cores of the actor."""
    rounds: int = Field(3, ge=1)
    """Rounds without one new receipt after which the run gives up."""
    stall_timeout_s: float = Field(1800.0, gt=0)
    """Seconds without any sign of movement from the actors after which a round is started anew."""
    takeover: bool = False
    """Take the output over from a driver that seems to be at work on it: you know that it is gone."""
    strict: bool = False
    """jobs/*.py: quarantined items make exit code 3 instead of 0."""

    @field_validator("sources", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_text(cls, value: Any) -> str:
        if isinstance(value, list | tuple):
            return ",".join(str(v) for v in value)
        return str(value)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not re.fullmatch(r"auto|[1-9]\d*|[1-9]\d*,[1-9]\d*", self.workers):
            raise ValueError(f"workers: {self.workers!r} is neither `auto`, N, nor MIN,MAX")
        if "," in self.workers and int(self.workers.split(",")[0]) > int(self.workers.split(",")[1]):
            raise ValueError(f"workers: MIN is above MAX in {self.workers!r}")
        if self.scaling_low_percent >= self.scaling_high_percent:
            raise ValueError("scaling_low_percent must be below scaling_high_percent")
        urls = (*self.sources, *self.other_inputs(), self.out, self.staging or "", self.weights or "")
        for url in urls:
            # it would stand in job.json, in rows and on the screen; the message does not repeat it
            secret = secret_in_url(url)
            if secret:
                raise ValueError(f"a URL holds {secret}: give credentials through the environment instead")
        return self

    def result_settings(self) -> dict[str, Any]:
        """The settings that change results, as plain JSON values."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in EXECUTION_FIELDS}

    def other_inputs(self) -> tuple[str, ...]:
        """Paths and URLs, besides the sources, whose content belongs to the inputs."""
        return ()


class ExtractJob(FeatureJob):
    """What the jobs over collections of 2D images share."""

    features: tuple[str, ...] = ("cls", "patch_mean")
    """Which features; each kind of extraction says what it offers."""
    layers: tuple[int, ...] | None = None
    """0-based transformer layers; default the last one, without a suffix in the column names."""
    channels: str = "auto"
    """`auto`, `rgb`, `mean`, `each`, or groups of three: `NAME=a,b,c[;NAME2=d,e,f]`."""
    scaling: Literal["plate", "image", "dtype"] = "plate"
    """Percentiles per plate (or folder) and channel; per image; or the dtype's full range."""
    scaling_sample: int = Field(64, ge=1, le=100_000)
    """Images per plate (or folder) whose pixels fix the percentiles, chosen by the hash of their ids."""
    contrast: Literal["none", "clahe"] = "none"
    """Local contrast after scaling; `clahe` has tiles of fixed physical size anchored at the image origin."""
    clahe_tile_px: int = Field(64, ge=8, le=4096)
    """Side of a CLAHE tile in px, where `clahe_tile_um` is not given."""
    clahe_tile_um: float | None = Field(None, gt=0)
    """Side of a CLAHE tile in µm; needs the image's pixel size."""
    clahe_clip: float = Field(2.0, gt=1)
    """CLAHE clip limit as a multiple of the mean histogram height."""
    pixel_size_um: float | None = Field(None, gt=0)
    """Pixel size in µm where the files do not say it."""
    vector_dtype: Literal["float32", "float16"] = "float32"
    """Type of the vector columns; float16 is checked for overflow."""
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


def recorded_model(values: dict[str, Any]) -> type[FeatureJob]:
    """The kind of job whose `model_dump` these values are: only volumes have a `voxel_size`, only cells a `crop_um`."""
    return ExtractVolumeJob if "voxel_size" in values else ExtractCellsJob if "crop_um" in values else ExtractImagesJob


def recorded_job(values: dict[str, Any]) -> FeatureJob:
    """The job whose `model_dump` these values are (job.json, RunnerSpec)."""
    return recorded_model(values)(**values)


def secret_in_url(url: str) -> str | None:
    """What kind of secret a URL holds ("a password", "a secret (X-Amz-Signature)"), None when it holds none.

    A presigned URL is a password: whoever reads it in a record or a row can use it.
    """
    if "://" not in url:
        return None  # `?` in a local path is a glob
    if _PASSWORD.match(url):
        return "a password"
    found = _SECRET_QUERY.search(url)
    return f"a secret ({found[1][1:-1]})" if found else None


def without_secrets(text: str) -> str:
    """A message with the passwords and signatures of the URLs in it replaced by `...`."""
    return _SECRET_QUERY.sub(r"\1...", _PASSWORD.sub(r"\1...@", text))


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


def _plain(error: Any) -> str:
    """What pydantic found, in plain words."""
    if error["type"] == "missing":
        return "is needed and was not given"
    return str(error["msg"]).removeprefix("Value error, ")


def build_job(model: type[Job], values: dict[str, Any]) -> Job:
    """Validate a job; every problem is listed with its field. Raises BadRequest."""
    try:
        return model.model_validate(values)  # not model(**values): YAML keys may be no text
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc']) or 'job'}: {_plain(e)}" for e in error.errors()]
        raise BadRequest("the job is not valid:\n  " + "\n  ".join(lines),
                         todo=f"fields: {', '.join(model.model_fields)}") from error


def read_job_file(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A job's YAML (safe loader) with `key=value` overrides, values read as YAML. Raises BadRequest."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, dates such as 2024-13-45
        raise BadRequest(f"cannot read the job file: {error}", where=str(path),
                         todo="give the path of a YAML file of `field: value` lines") from error
    if not isinstance(values, dict):
        raise BadRequest("a job file is a mapping of field: value", where=str(path),
                         todo=f"fields: {', '.join(ExtractImagesJob.model_fields)}")
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise BadRequest(f"not an override: {override!r}", todo="write key=value")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise BadRequest(f"not an override: {override!r}: {error}") from error
    return values


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the text that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
