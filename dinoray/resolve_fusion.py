"""From a job that segments a volume to exactly what will be computed: its checkpoint, threshold, device, numerics, fingerprint.

The checkpoint is loaded once, on the driver. Actors get it staged whole, the backbone included.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from dinoray.config.volume_segmentation import SegmentVolumeJob
from dinoray.errors import BadRequest
from dinoray.io.stores import Store
from dinoray.resolved import FORMAT, Resolved, settle_device, settle_numerics, used_kind
from dinoray.staging import store_backbone
from dinoray.units import fingerprint_of
from dinoray.volume_tokens import tokens_fingerprint

if TYPE_CHECKING:
    from dinoray.vision.fusion_checkpoint import FusionConfig
    from dinoray.vision.fusion_model import FusionModel

LIBRARIES = ("scipy", "tensorstore", "h5py")
"""Packages whose version may change a label."""


def resolve_fusion(job: SegmentVolumeJob) -> Resolved:
    """Settle every `auto` and load the checkpoint. Raises BadRequest, WeightsError."""
    import torch

    from dinoray.vision.fusion_checkpoint import load_fusion

    device, precision = settle_device(job)
    model, config = load_fusion(job.checkpoint, weights=job.weights, accept_license=job.accept_dinov3_license,
                                backbone_dtype=getattr(torch, precision) if job.no_ray else torch.float32,
                                device=device if job.no_ray else "cpu")
    if not config.weights_digest:
        raise BadRequest("config.json of the checkpoint has no weights_digest", where=job.checkpoint,
                         todo="use a checkpoint as `dinoray train context-fusion` writes it")
    for name, used in (("tokens", config.model.inputs != "raw"), ("context_tokens", config.model.fusion != "none")):
        if getattr(job, name) is not None and not used:
            raise BadRequest(f"the model looks at no {name.replace('_', ' ')}",
                             where="--" + name.replace("_", "-"), todo="leave it out")
    if config.target == "classes" and (job.threshold is not None or job.min_voxels or job.instances != "components"):
        raise BadRequest("the checkpoint predicts classes, not instances", where="--threshold, --min-voxels, --instances",
                         todo="leave them out, or use a checkpoint of affinities")
    if job.instances == "mutex" and find_spec("mwatershed") is None:
        raise BadRequest("mutex watershed needs a library that is not here", where="--instances",
                         todo="pip install 'dinoray[mutex]', or use --instances components")
    numerics = settle_numerics(job, config.backbone.model if config.backbone else "none", device, precision,
                               LIBRARIES + (("mwatershed",) if job.instances == "mutex" else ()))
    numerics["batching"] = "one window"
    job = job.model_copy(update={"device": device, "precision": precision, "token_budget": numerics["token_budget"],
                                 "threshold": None if config.target == "classes" else job.threshold or config.threshold})
    trained = config.model_dump(mode="json", include={"model", "target", "classes", "offsets", "voxel_nm", "raw_voxel_nm",
                                                      "context_factor", "crop_voxels", "scaling_percents"})
    stored = {name: tokens_fingerprint(url, name)
              for name in ("tokens", "context_tokens") if (url := getattr(job, name)) is not None}
    settings = {k: v for k, v in job.result_settings().items() if k not in ("tokens", "context_tokens")} | stored
    identity = {"format": FORMAT, "settings": settings, "weights_digest": config.weights_digest, "checkpoint": trained,
                "numerics": numerics}
    fingerprint = fingerprint_of(identity)
    # no path in here: the same checkpoint from another folder must give the same bytes
    described = {"fingerprint": fingerprint, "kind": "volume-labels", "weights_digest": config.weights_digest,
                 "precision": precision, "target": config.target, "classes": list(config.classes), "settings": settings}
    over = "raw voxels" if config.backbone is None else f"{config.backbone.model}"
    rule = f"threshold {job.threshold:g}, {job.instances}" if config.target == "affinities" else f"{len(config.classes)} classes"
    description = (f"{config.target} of {job.checkpoint} over {over}, digest {config.weights_digest[:12]}, {rule}, "
                   f"context {config.model.fusion}, {precision} on {device}")
    facts = {"digest": config.weights_digest, "source": job.checkpoint, "checkpoint": config.model_dump(mode="json")}
    return Resolved(job, device, identity, {**numerics, "device_kind": used_kind(device)}, fingerprint, config.weights_digest,
                    facts, described, description, tuple(config.scaling_percents), _stage, (model, config),
                    staged_as=f"{config.weights_digest}-{fingerprint_of(config.model_dump(mode='json'))}")


def _stage(loaded: tuple[FusionModel, FusionConfig], store: Store, prefix: str) -> None:
    from dinoray.vision.fusion_checkpoint import save_fusion

    model, config = loaded
    if model.backbone is not None:
        store_backbone(model.backbone, store, f"{prefix}/backbone")
    save_fusion(store, prefix, model, config, lambda _: "staged\n")
