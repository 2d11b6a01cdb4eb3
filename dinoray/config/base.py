"""What every job over units shares, what those that compute features add, and which fields change no result."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dinoray.config.secrets import secret_in_url

EXECUTION_FIELDS = frozenset({
    "sources", "out", "weights", "workers", "no_ray", "decode_threads", "compute_threads", "staging", "strict",
    "max_failed_fraction", "accept_dinov3_license", "rounds", "stall_timeout_s", "prefetch_bytes", "takeover", "labels",
    "centroids", "unit_windows", "unit_planes", "max_output_bytes", "memory_bytes", "checkpoint",
})
"""Fields that change how a job runs, never what it writes. `sources`, `labels`, `centroids`, `weights` and `checkpoint` are
identified by content instead: the digest of the listing and the digests of the weights."""


class UnitJob(BaseModel):
    """What every job over units shares; `runner` names the kind's runner, `verb` and `command` its CLI command, `noun` and
    `row_noun` what its items and results are called in messages."""

    runner: ClassVar[str]
    verb: ClassVar[str] = "extract"
    command: ClassVar[str]
    noun: ClassVar[str] = "image"
    row_noun: ClassVar[str] = "row"
    retried: ClassVar[bool] = True
    """Whether `dinoray retry` can mend single items."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    sources: tuple[str, ...] = Field(min_length=1)
    """Folders, files, globs, fsspec URLs (`s3://...`), or CSV/Parquet manifests."""
    out: str
    """Output folder or URL; running the same job on it again resumes it."""
    weights: str | None = None
    """Hub id, folder, file, or `random[:SEED]`."""
    accept_dinov3_license: bool = False
    """You accept the DINOv3 License: the open timm mirror may then be used where the official one is gated."""
    staging: str | None = None
    """Folder or URL that all actors reach, for the weights (below `_dinoray/weights`); default `out`."""
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


class FeatureJob(UnitJob):
    """What every job that computes features shares."""

    model: str | None = None
    """Variant such as `vits16`; alone it means its official weights."""
    scaling_low_percent: float = Field(0.1, ge=0, le=100)
    """Percentile that becomes 0."""
    scaling_high_percent: float = Field(99.9, ge=0, le=100)
    """Percentile that becomes 1."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.scaling_low_percent >= self.scaling_high_percent:
            raise ValueError("scaling_low_percent must be below scaling_high_percent")
        return self
