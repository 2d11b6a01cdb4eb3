"""Where volumes with their labels are: one region of a training, a validation or an evaluation set."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dinoray.config.secrets import secret_in_url

_BOX = re.compile(r"(\d+):(\d+),(\d+):(\d+),(\d+):(\d+)")


def box_of(text: str, name: str) -> tuple[tuple[int, int], ...]:
    """`z0:z1,y0:y1,x0:x1` as ((z0, z1), (y0, y1), (x0, x1)). Raises ValueError."""
    match = _BOX.fullmatch(text.replace(" ", ""))
    if not match:
        raise ValueError(f"{name}: {text!r} is not z0:z1,y0:y1,x0:x1 in voxels")
    ends = [int(n) for n in match.groups()]
    return tuple(zip(ends[::2], ends[1::2], strict=True))


class LabelledVolume(BaseModel):
    """A region of a volume and its labels. All that is read of it, the context included, lies inside the region; beyond it
    voxels are mirrored and masked, so two regions that do not touch share no voxel."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    path_fields: ClassVar[tuple[str, ...]] = ("raw", "labels", "tokens", "context_tokens")

    raw: str
    """OME-Zarr, Zarr, N5, HDF5, a TIFF stack or a folder (or glob) of slices; local or `s3://`."""
    labels: str
    """Whole numbers at the voxel size that is to be predicted: classes, or ids of instances; 0 is background."""
    raw_dataset: str | None = None
    """Path of the array inside the container of `raw`."""
    label_dataset: str | None = None
    """Path of the array inside the container of `labels`."""
    raw_voxel_size: tuple[float, ...] | None = None
    """Level of `raw` to read, by its voxel size in nm (one number, or z,y,x); default the finest. Where the source states no
    scale: its voxel size."""
    label_voxel_size: tuple[float, ...] | None = None
    """The same of `labels`."""
    channel: str | None = None
    """Name or number (from 0) of the channel of `raw`, where there are several."""
    region: str | None = None
    """Part of `raw` in voxels of the level read: `z0:z1,y0:y1,x0:x1`; default all of it."""
    unknown: int | None = None
    """Label of voxels without ground truth; they are masked."""
    tokens: str | None = None
    """Output of `dinoray extract volume` on this region of `raw`: its tokens are read instead of computed."""
    context_tokens: str | None = None
    """The same for the context, extracted at the context's voxel size."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples that come from here, relative to the other volumes."""

    @field_validator("raw_voxel_size", "label_voxel_size", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = value.split(",")
        return (value,) if isinstance(value, int | float) else value

    @field_validator("channel", mode="before")
    @classmethod
    def _channel_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _sound(self) -> Self:
        for name in ("raw_voxel_size", "label_voxel_size"):
            value = getattr(self, name)
            if value is not None and (len(value) not in (1, 3) or min(value) <= 0):
                raise ValueError(f"{name}: one positive number of nm, or three (z,y,x)")
        if not self.raw or not self.labels:
            raise ValueError("raw and labels: an empty path")
        self.box()
        for url in (self.raw, self.labels, self.tokens or "", self.context_tokens or ""):
            secret = secret_in_url(url)
            if secret:
                raise ValueError(f"a URL holds {secret}: give credentials through the environment instead")
        return self

    def box(self) -> tuple[tuple[int, int], ...] | None:
        """`region` as ((z0, z1), (y0, y1), (x0, x1)). Raises ValueError."""
        return None if self.region is None else box_of(self.region, "region")

    def paths(self) -> dict[str, str]:
        """Field -> path or URL, of those that are given."""
        return {name: value for name in self.path_fields if (value := getattr(self, name)) is not None}
