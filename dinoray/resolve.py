"""From a job to exactly what will be computed: device, precision, weights, numerics, fingerprint.

Nothing is read but the weights. What comes out is stored with the output and compared on resume.
"""

from __future__ import annotations

from dinoray.config import (
    ExtractCellsJob,
    ExtractImagesJob,
    ExtractVolumeJob,
    FeatureJob,
    SegmentCellsJob,
    SegmentVolumeJob,
    UnitJob,
)
from dinoray.errors import BadRequest
from dinoray.resolve_checkpoint import resolve_checkpoint
from dinoray.resolve_fusion import resolve_fusion
from dinoray.resolved import FORMAT, Resolved, settle_device, settle_numerics, used_kind
from dinoray.staging import store_backbone
from dinoray.units import fingerprint_of

VOLUME_LIBRARIES = ("tensorstore", "h5py")
"""Packages whose version may change a byte of the output of a volume."""


def resolve(job: UnitJob) -> Resolved:
    """Settle every `auto` and load the weights once. Raises BadRequest, WeightsError."""
    if isinstance(job, SegmentCellsJob):
        return resolve_checkpoint(job)
    return resolve_fusion(job) if isinstance(job, SegmentVolumeJob) else _resolve_features(job)


def _resolve_features(job: FeatureJob) -> Resolved:
    import torch

    from dinoray.vision.tiling import windows
    from dinoray.vision.weights import load_backbone

    if job.model is None and job.weights is None:
        raise BadRequest("no model was named", where="--model", todo="say e.g. --model vits16 (official weights), "
                         "--model vits16 --weights FILE, or --model vits16 --weights random to try things out")
    device, precision = settle_device(job)
    weights = f"{job.weights}:0" if job.weights == "random" else job.weights
    # under Ray the actors compute; the driver needs the weights in float32, to stage them as they are
    backbone = load_backbone(job.model, weights, dtype=getattr(torch, precision) if job.no_ray else torch.float32,
                             device=device if job.no_ray else "cpu", accept_license=job.accept_dinov3_license)
    config = backbone.config
    layers = ((job.layer,) if job.layer is not None else None) if isinstance(job, ExtractVolumeJob) else job.layers
    if layers and max(layers) >= config.depth:
        flag = "--layer" if isinstance(job, ExtractVolumeJob) else "--layers"
        raise BadRequest(f"layer {max(layers)} of {config.name}, which has layers 0..{config.depth - 1}", where=flag,
                         todo=f"layers are counted from 0; leave {flag} out for the last one")
    if isinstance(job, ExtractImagesJob):
        windows(job.tile_px, job.tile_px, size="tiles", tile_px=job.tile_px, patch=config.patch_size)
    resized = "resize_px" if isinstance(job, ExtractImagesJob) else "crop_px" if isinstance(job, ExtractCellsJob) else None
    if resized and getattr(job, resized) % config.patch_size:
        raise BadRequest(f"{resized}={getattr(job, resized)} is not a multiple of the patch size {config.patch_size}",
                         where="--" + resized.replace("_", "-"))
    numerics = settle_numerics(job, config.name, device, precision, VOLUME_LIBRARIES if isinstance(job, ExtractVolumeJob) else ())
    job = job.model_copy(update={"model": config.name, "device": device, "precision": precision, "weights": weights,
                                 "token_budget": numerics["token_budget"]})
    normalisation = {"mean": list(config.mean), "std": list(config.std)}
    identity = {"format": FORMAT, "settings": {k: v for k, v in job.result_settings().items() if k != "model"},
                "model": config.name, "weights_digest": backbone.digest, "normalisation": normalisation,
                "numerics": numerics}
    fingerprint = fingerprint_of(identity)
    preprocessing = {k: v for k, v in identity["settings"].items() if k.startswith(
        ("scaling", "size", "tile", "resize", "channels", "contrast", "clahe", "pixel_size", "crop", "mask",
         "raw_voxel", "voxel", "planes", "slice", "window", "halo", "foreground"))}
    is_random = (weights or "").startswith("random")
    # no path in here: the same weights from another folder must give the same bytes
    described = {"fingerprint": fingerprint, "model": config.name, "weights": weights if is_random else "see weights_digest",
                 "weights_digest": backbone.digest, "normalisation": normalisation, "precision": precision,
                 "preprocessing": preprocessing, "layers": list(layers) if layers else None,
                 "patch_size": config.patch_size}
    source = f"{backbone.source} (random weights: texture only)" if is_random else backbone.source
    description = (f"{config.name} from {source}, digest {backbone.digest[:12]}, normalisation "
                   f"{backbone.normalisation_rule}, {precision} on {device}")
    facts = {"digest": backbone.digest, "source": backbone.source, "normalisation": normalisation,
             "normalisation_rule": backbone.normalisation_rule}
    return Resolved(job, device, identity, {**numerics, "device_kind": used_kind(device)}, fingerprint, backbone.digest, facts,
                    described, description, (job.scaling_low_percent, job.scaling_high_percent), store_backbone, backbone)
