"""RunnerSpec: what an actor needs to build its runner, small enough to travel as an argument.

Weights are never shipped: the actor loads them from a path or store and checks the digest.
"""

from __future__ import annotations

import io
import os
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dinoray.config import recorded_job
from dinoray.errors import BadRequest, OutputDamaged, WeightsError
from dinoray.io.images import Limits
from dinoray.io.stores import LocalStore, Store, open_store, safe_join
from dinoray.ledger import Ledger
from dinoray.runners.base import Runner, UnitRunner
from dinoray.units import Plan

MIN_ITEM_TIMEOUT_S = 60.0
"""An item that is worked on alone has at least so long to give a sign."""


@dataclass(frozen=True)
class RunnerSpec:
    """`kind` is `image-features`, `cell-features`, `cell-masks`, `volume-features`, `statistics`, `volume-statistics` or `null`
    (reads nothing, writes a receipt: for benchmarks; its `job` holds `sleep_s`)."""

    kind: str
    out: str
    prefix: str = "_dinoray"
    job: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    """`random:SEED`, or the staged folder's URL; None loads what the job names."""
    digest: str = ""
    decode_threads: int = 2
    compute_threads: int = 1


def build_runner(spec: RunnerSpec, loaded: Any = None) -> Runner:
    """Build a runner in this process. `loaded` (Resolved.loaded) saves loading where the caller holds the model already."""
    runner = _build(spec, loaded)
    if isinstance(runner, UnitRunner):
        from dinoray.runners.isolation import run_isolated

        timeout_s = max(MIN_ITEM_TIMEOUT_S, spec.job.get("stall_timeout_s", MIN_ITEM_TIMEOUT_S))
        runner.isolate = partial(run_isolated, spec, item_timeout_s=timeout_s)
    return runner


def _build(spec: RunnerSpec, loaded: Any) -> Runner:
    store = open_store(spec.out)
    plan, ledger = Plan(store, spec.prefix), Ledger(store, spec.prefix)
    if spec.kind == "null":
        from dinoray.runners.null import NullRunner

        return NullRunner(plan, ledger, sleep_s=spec.job.get("sleep_s", 0.0))
    job = recorded_job(spec.job)
    if spec.kind == "statistics":
        from dinoray.runners.statistics import StatisticsRunner

        limits = Limits(max_pixels=job.max_pixels, max_bytes=job.max_file_bytes, max_file_bytes=job.max_file_bytes)
        return StatisticsRunner(plan, ledger, limits=limits, z_projection=job.z_projection,
                                decode_threads=spec.decode_threads, prefetch_bytes=job.prefetch_bytes)
    if spec.kind in ("volume-features", "volume-labels", "volume-statistics"):
        return _build_volume(spec, job, plan, ledger, loaded)
    scaling = _scaling(store, spec.prefix) if job.scaling == "plate" else None
    threads = {"decode_threads": spec.decode_threads, "compute_threads": spec.compute_threads}
    if spec.kind == "cell-masks":
        from dinoray.runners.cell_masks import CellMaskRunner

        model, config = loaded or _load_segmenter(spec, plan.facts["numerics"])
        return CellMaskRunner(job, plan, ledger, model, config, scaling=scaling, **threads)
    if spec.kind not in ("image-features", "cell-features"):
        raise BadRequest(f"no runner is called {spec.kind!r}", todo="use image-features, cell-features, cell-masks, "
                         "volume-features, volume-labels, statistics, volume-statistics or null")
    from dinoray.runners.cell_features import CellFeatureRunner
    from dinoray.runners.image_features import ImageFeatureRunner

    make = CellFeatureRunner if spec.kind == "cell-features" else ImageFeatureRunner
    return make(job, plan, ledger, loaded or _load(spec, plan.facts["numerics"]), scaling=scaling, **threads)


def _scaling(store: Store, prefix: str) -> dict[str, dict[str, tuple[float, float]]]:
    """The intensity scaling that was fixed before the plan was sealed."""
    from dinoray.runners.statistics import read_scaling

    key = f"{prefix}/plan/scaling.parquet"
    if not store.exists(key):
        raise OutputDamaged("the intensity scaling of the plan is missing", where=f"{store.url}/{key}",
                            todo="restore it from a copy, or use a new --out")
    return read_scaling(pq.read_table(io.BytesIO(store.get(key))))


def _build_volume(spec: RunnerSpec, job: Any, plan: Plan, ledger: Ledger, loaded: Any) -> Runner:
    from dinoray.volume_inputs import open_source

    if spec.kind == "volume-statistics":
        from dinoray.runners.volume_statistics import VolumeStatisticsRunner

        return VolumeStatisticsRunner(plan, ledger, volume=open_source(job), decode_threads=spec.decode_threads,
                                      prefetch_bytes=job.memory_bytes // 4)
    if spec.kind == "volume-labels":
        return _build_volume_labels(spec, job, plan, ledger, loaded)
    from dinoray.runners.volume_features import VolumeFeatureRunner

    backbone = loaded or _load(spec, plan.facts["numerics"])
    return VolumeFeatureRunner(job, plan, ledger, backbone, volume=open_source(job), decode_threads=spec.decode_threads,
                               compute_threads=spec.compute_threads)


def _build_volume_labels(spec: RunnerSpec, job: Any, plan: Plan, ledger: Ledger, loaded: Any) -> Runner:
    import torch

    from dinoray.runners.volume_labels import VolumeLabelRunner
    from dinoray.runners.volume_windows import open_reader
    from dinoray.vision.fusion_checkpoint import load_fusion

    if loaded is None:
        numerics = plan.facts["numerics"]
        folder = str(_local_copy(spec.weights)) if spec.weights else job.checkpoint
        device = numerics["device"] if torch.cuda.is_available() else "cpu"
        loaded = load_fusion(folder, weights=f"{folder}/backbone" if spec.weights else job.weights, device=device,
                             backbone_dtype=getattr(torch, numerics["precision"]), accept_license=job.accept_dinov3_license)
        if loaded[1].weights_digest != spec.digest:
            raise WeightsError(f"the staged checkpoint has the digest {loaded[1].weights_digest[:12]}, "
                               f"the plan says {spec.digest[:12]}", where=folder,
                               todo="delete the staged folder and run the same command again")
    model, config = loaded
    return VolumeLabelRunner(job, plan, ledger, model, config, reader=open_reader(job, config, plan.facts),
                             decode_threads=spec.decode_threads, compute_threads=spec.compute_threads)


def _load(spec: RunnerSpec, numerics: dict[str, Any]) -> Any:
    """Load the backbone an actor computes with. Raises WeightsError when its digest is not the plan's."""
    import torch

    from dinoray.vision.weights import load_backbone

    weights = spec.weights if spec.weights is not None else spec.job["weights"]
    if spec.weights is not None and not spec.weights.startswith("random"):
        weights = str(_local_copy(spec.weights))
    backbone = load_backbone(spec.job["model"], weights, dtype=getattr(torch, numerics["precision"]),
                             device=numerics["device"], accept_license=bool(spec.job.get("accept_dinov3_license")))
    if backbone.digest != spec.digest:
        raise WeightsError(f"the staged weights have digest {backbone.digest[:16]}, the plan has {spec.digest[:16]}",
                           where=spec.weights or "", todo="delete the staged weights and run again")
    return backbone


def _load_segmenter(spec: RunnerSpec, numerics: dict[str, Any]) -> Any:
    """The checkpoint's (model, config) that an actor computes with. Raises WeightsError when its digest is not the plan's."""
    import torch

    from dinoray.vision.distance_model import load_segmenter

    url = spec.weights if spec.weights is not None else spec.job["checkpoint"]
    model, config = load_segmenter(url, weights=spec.job["weights"] if spec.weights is None else None,
                                   dtype=getattr(torch, numerics["precision"]), device=numerics["device"],
                                   accept_license=bool(spec.job.get("accept_dinov3_license")))
    if config.weights_digest != spec.digest:
        raise WeightsError(f"the checkpoint has digest {config.weights_digest[:16]}, the plan has {spec.digest[:16]}", where=url,
                           todo="delete the staged weights and run again" if spec.weights else "give the checkpoint as it was")
    return model, config


def _local_copy(url: str) -> Path:
    """The staged folder itself when it is local, else a copy in this machine's temporary folder."""
    store = open_store(url)
    if isinstance(store, LocalStore):
        return store.root
    folder = Path(tempfile.gettempdir()) / f"dinoray-weights-{os.getuid()}" / safe_join(url.rstrip("/").rsplit("/", 1)[1])
    cache = LocalStore(folder)
    for key, size in store.list():
        if not cache.exists(key) or cache.path(key).stat().st_size != size:
            cache.put(key, store.get(key))
    return folder
