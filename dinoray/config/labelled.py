"""Where images with their object masks are: one source of a training or evaluation set."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dinoray.config.secrets import secret_in_url


class LabelledSource(BaseModel):
    """One source of labelled images; a job takes several, mixed by their weights. Layouts: docs/training-data.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    path_fields: ClassVar[tuple[str, ...]] = ("images", "labels", "ids")

    images: str
    """Folder, glob or fsspec URL of the images, or the root of a COCO, CTC or DSB data set."""
    labels: str | None = None
    """Folder or glob of label images, or a COCO JSON; None: beside the images (Cellpose naming) or inside (DSB, CTC)."""
    kind: Literal["auto", "pairs", "cellpose", "dsb", "coco", "ctc"] = "auto"
    """Layout; `auto` tells it from what is there, and asks when several fit."""
    weight: float = Field(1.0, gt=0)
    """Share of samples drawn from this source, relative to the other sources."""
    ids: tuple[str, ...] | str | None = None
    """Only these image ids: a list, or `FILE.json#key/key`, a list in a JSON file such as `tests/splits.json#dsb2018/train`
    (of which this source may hold a part)."""
    pixel_size_um: float | None = Field(None, gt=0)
    """Pixel size in µm of all its images, whatever the files say."""
    channel: str | None = None
    """Name or 0-based number of the one channel to use; None: all."""

    @field_validator("ids", mode="before")
    @classmethod
    def _ids_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("channel", mode="before")
    @classmethod
    def _channel_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if isinstance(self.ids, str) and not all(self.ids.partition("#")):
            raise ValueError(f"ids: {self.ids!r} is neither a list nor FILE.json#key/key")
        if self.ids is not None and not self.ids:
            raise ValueError("ids: an empty list chooses nothing")
        if not self.images or self.labels == "":
            raise ValueError("images and labels: an empty path")
        for url in (self.images, self.labels or "", self.ids if isinstance(self.ids, str) else ""):
            secret = secret_in_url(url)
            if secret:
                raise ValueError(f"a URL holds {secret}: give credentials through the environment instead")
        return self

    def paths(self) -> dict[str, str]:
        """Field -> path or URL, of those that are given as one."""
        return {name: value for name in self.path_fields if isinstance(value := getattr(self, name), str)}
