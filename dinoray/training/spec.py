"""TrainingSpec: what a worker needs to build its part of a training, small enough to travel as an argument."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dinoray.driver import token_of_holder
from dinoray.errors import BadRequest, SystemicError
from dinoray.io.stores import Store, open_store
from dinoray.training.workers import Workers

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class TrainingSpec:
    """`kind` is `distance-map` or `context-fusion`; `job` a job's `model_dump`, every `auto` settled."""

    kind: str
    out: str
    fingerprint: str
    job: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    """`random:SEED`, or the staged folder's URL."""
    digest: str = ""
    """Of the backbone's weights at the start."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of the listings of what is trained on, as the driver saw them."""
    token: str = ""
    """Of the driver that this worker works for; empty where none holds the output."""


def still_ours(spec: TrainingSpec, store: Store) -> Callable[[], None]:
    """A check that raises SystemicError when the output is another driver's by now: a worker that outlived its driver must
    not write between the states of the next one."""
    def check() -> None:
        if spec.token and token_of_holder(store) != spec.token:
            raise SystemicError("another driver took this output over, or ours is gone", where=store.url,
                                todo="run the same command again if nothing is at work on it: it resumes")

    return check


def refuse_other_output(spec: TrainingSpec, store: Store) -> None:
    """Raise SystemicError when what this process sees at `out` is not the output that the driver holds."""
    try:
        there = json.loads(store.get("_dinoray/job.json")).get("fingerprint") == spec.fingerprint
    except FileNotFoundError:
        there = False
    if not there:
        raise SystemicError(f"worker on {socket.gethostname()} does not see the output", where=store.url,
                            todo="with several machines use s3:// or a folder that all of them share, for out and for the images")


def run_worker(spec: TrainingSpec, report: Report = lambda metrics: None) -> None:
    """One worker's whole part, in a process group if there is one: train, or go on; write the checkpoint when done.

    Raises what `dinoray.training.loop.fit` does.
    """
    device = torch.device(spec.job["device"])
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if spec.token:
        refuse_other_output(spec, open_store(spec.out))
    if spec.kind == "distance-map":
        from dinoray.training.distance_worker import run_distance_map

        run_distance_map(spec, Workers(device), report)
    elif spec.kind == "context-fusion":
        from dinoray.training.fusion_worker import run_context_fusion

        run_context_fusion(spec, Workers(device), report)
    else:
        raise BadRequest(f"no training is called {spec.kind!r}", todo="use distance-map or context-fusion")
