"""What a job with every `auto` settled is, and where the weights lie that its actors load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

from dinoray.config import UnitJob
from dinoray.errors import BadRequest
from dinoray.io.stores import Store
from dinoray.memory.budget import default_token_budget
from dinoray.staging import staged

FORMAT = 1
"""Version of the output's layout and rules; a new one cannot resume an old output."""
LIBRARIES = ("dinoray", "torch", "numpy", "pyarrow", "zarr", "numcodecs", "tifffile", "imagecodecs", "pillow")
"""Packages whose version may change a byte of any output."""


@dataclass
class Resolved:
    """A job with every `auto` settled. `identity` holds all that changes results; the fingerprint hashes it."""

    job: UnitJob
    device: str
    identity: dict[str, Any]
    numerics: dict[str, Any]
    """What runners compute with; its `device_kind` is not in the identity: on another kind receipts say `degraded`."""
    fingerprint: str
    digest: str
    weights_facts: dict[str, Any]
    described: dict[str, Any]
    """What the data files say of themselves."""
    description: str
    percents: tuple[float, float]
    """Percentiles of the raw intensities that become 0 and 1."""
    stage: Callable[[Any, Store, str], None] = field(repr=False)
    """Writes what was loaded below a prefix of a store, so that actors need nothing else."""
    loaded: Any = field(default=None, repr=False)
    """The model that the driver loaded to learn its digest; runners in this process compute with it."""
    staged_as: str = ""
    """Name of the folder where it is staged, where the digest of the weights does not tell all that is staged."""

    def release(self) -> None:
        """Forget the model."""
        self.loaded = None

    def weights_location(self) -> str:
        """What actors load: `random:SEED`, or the folder, named by digests, where the weights are staged now if need be."""
        if "checkpoint" not in type(self.job).model_fields and (self.job.weights or "").startswith("random"):
            return self.job.weights or ""
        return staged(self.job.staging or self.job.out, self.staged_as or self.digest, partial(self.stage, self.loaded))


def settle_device(job: UnitJob) -> tuple[str, str]:
    """(device, precision) that the job computes with. Raises BadRequest for CUDA where there is none."""
    import torch

    has_cuda = torch.cuda.is_available()
    device = job.device if job.device != "auto" else ("cuda" if has_cuda else "cpu")
    if device == "cuda" and not has_cuda and job.no_ray:
        raise BadRequest("there is no CUDA device here", where="--device", todo="use --device cpu")
    return device, job.precision if job.precision != "auto" else ("bfloat16" if device == "cuda" else "float32")


def settle_numerics(job: UnitJob, model: str, device: str, precision: str, libraries: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the results are computed with: the token budget's default by variant, batching, versions of all `LIBRARIES`
    and of these."""
    return {"device": device, "precision": precision,
            "token_budget": job.token_budget or default_token_budget(model, device, precision),
            "batching": "powers of two up to the budget", "attention": "sdpa", "rope": "float32",
            "libraries": {name: version(name) for name in LIBRARIES + libraries}}


def used_kind(device: str) -> str:
    """What must be equal for bytes to be equal (see `device_kind`), of the device as the driver sees it."""
    import torch

    from dinoray.runners.numerics import device_kind

    return "cuda" if device == "cuda" and not torch.cuda.is_available() else device_kind(torch.device(device))
