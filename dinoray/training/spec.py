"""TrainingSpec: what a worker needs to build its part of a training, small enough to travel as an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dinoray.errors import BadRequest
from dinoray.training.workers import Workers

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class TrainingSpec:
    """`kind` is `distance-map`; `job` a job's `model_dump`, every `auto` settled."""

    kind: str
    out: str
    fingerprint: str
    job: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    """`random:SEED`, or the staged folder's URL."""
    digest: str = ""
    """Of the backbone's weights at the start."""


def run_worker(spec: TrainingSpec, report: Report = lambda metrics: None) -> None:
    """One worker's whole part, in a process group if there is one: train, or go on; write the checkpoint when done.

    Raises what `dinoray.training.loop.fit` does.
    """
    device = torch.device(spec.job["device"])
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if spec.kind != "distance-map":
        raise BadRequest(f"no training is called {spec.kind!r}", todo="use distance-map")
    from dinoray.training.distance_worker import run_distance_map

    run_distance_map(spec, Workers(device), report)
