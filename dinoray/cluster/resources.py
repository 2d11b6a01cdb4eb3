"""Connecting to Ray, and the shape of the actors: how many, with which CPUs and GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from dinoray.errors import BadRequest
from dinoray.memory.budget import LOCAL_OBJECT_STORE_BYTES

logger = logging.getLogger(__name__)

CORES_PER_CPU_WORKER = 8
"""With `workers=auto` on CPU: one actor per so many cores. One actor computes several batches at once."""


@dataclass(frozen=True)
class ActorShape:
    """`min_workers`..`max_workers` actors with `num_cpus` and `num_gpus` each."""

    min_workers: int
    max_workers: int
    num_cpus: int
    num_gpus: int


def connect() -> bool:
    """Join the cluster that RAY_ADDRESS or a Ray job names, else start a local one; True when it is local.

    Never joins another user's cluster by accident: without RAY_ADDRESS nothing but a local one is used.
    """
    if ray.is_initialized():
        return False
    settings = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):
        with own_sigterm():
            ray.init(address="auto", **settings)
        return False
    # the C++ side shouts that actors have constructor arguments; ours are a few hundred bytes
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with quiet_stderr(), own_sigterm():
        ray.init(address="local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                 _node_ip_address="127.0.0.1", **settings)
    return True


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM that is set now: Ray puts its own in its place when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what Ray's C++ side prints while it starts; if the start fails, it is shown after all."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def actor_shape(workers: str, *, device: str, decode_threads: int | None, compute_threads: int | None) -> ActorShape:
    """Resolve `workers` against the cluster that is connected.

    CUDA: one GPU per actor, decode threads + 1 CPUs. CPU: `compute_threads` where given. Else the cores that are
    there now, shared among MAX actors; where nodes may still join and MIN is below MAX, among MIN actors, so that
    more actors mean more nodes; and one core while no node has any, because one core fits every node that may come.
    Raises BadRequest when not even one actor can ever fit, and when `auto` has nothing to count.
    """
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    grows = may_grow()
    there = gpus if device == "cuda" else cpus
    if grows and not there:
        kind = "GPU" if device == "cuda" else "CPU"
        if workers == "auto":
            raise BadRequest(f"no node of the cluster has a {kind} yet, so `auto` cannot tell how many actors to use",
                             where="--workers", todo="give MIN,MAX (e.g. --workers 1,8): nodes are then added for the work")
        logger.warning("no node of the cluster has a %s yet: waiting for one (dinoray doctor cluster shows the nodes)", kind)
    if workers == "auto":
        low = high = max(1, gpus if device == "cuda" else cpus // CORES_PER_CPU_WORKER)
    else:
        low, high = int(workers.split(",")[0]), int(workers.split(",")[-1])
    if device == "cuda":
        return ActorShape(low, high, (decode_threads or 4) + 1, 1)
    threads = compute_threads or max(1, min(cpus // (low if grows else high), largest))
    if not grows and threads * low > cpus:
        raise BadRequest(f"{low} actors of {threads} CPUs do not fit the cluster's {cpus} CPUs",
                         where="--workers", todo=f"use at most {max(1, cpus // threads)} workers, or fewer compute_threads")
    return ActorShape(low, high, threads, 0)


def may_grow() -> bool:
    """Whether nodes may still join: not in a local Ray that we started, so what does not fit there never will."""
    return bool(os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_ADDRESS"))


def disconnect(local: bool) -> None:
    """Leave the cluster; a local one ends. Jobs keep their connection: Ray ends it with the process."""
    if local:
        ray.shutdown()
