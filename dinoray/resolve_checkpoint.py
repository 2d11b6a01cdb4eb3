"""From a segmentation job to exactly what will be computed: its checkpoint, thresholds, device, numerics, fingerprint.

The checkpoint is loaded once, on the driver. Actors get it staged whole, the backbone included, so that hub access and
tokens stay with the driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dinoray.config import SegmentCellsJob
from dinoray.errors import BadRequest
from dinoray.io.stores import Store
from dinoray.resolved import FORMAT, Resolved, settle_device, settle_numerics, used_kind
from dinoray.units import fingerprint_of

if TYPE_CHECKING:
    from dinoray.vision.distance_model import DistanceMapModel, SegmenterConfig

LIBRARIES = ("scikit-image", "scipy")
"""Packages whose version may change a mask or a figure of a cell."""


def resolve_checkpoint(job: SegmentCellsJob) -> Resolved:
    """Settle every `auto` and load the checkpoint. Raises BadRequest, WeightsError."""
    import torch

    from dinoray.vision.distance_model import load_segmenter

    device, precision = settle_device(job)
    # under Ray the actors compute; the driver needs the weights in float32, to stage them as they are
    model, config = load_segmenter(job.checkpoint, weights=job.weights, accept_license=job.accept_dinov3_license,
                                   dtype=getattr(torch, precision) if job.no_ray else torch.float32,
                                   device=device if job.no_ray else "cpu")
    if not config.weights_digest:
        raise BadRequest("config.json of the checkpoint has no weights_digest", where=job.checkpoint,
                         todo="use a checkpoint as `dinoray train distance-map` writes it")
    numerics = settle_numerics(job, config.backbone.model, device, precision, LIBRARIES)
    job = job.model_copy(update={
        "device": device, "precision": precision, "token_budget": numerics["token_budget"],
        "channel": config.channels if job.channel is None else job.channel, "scaling": job.scaling or config.scaling,
        "peak": config.peak if job.peak is None else job.peak, "fill": config.fill if job.fill is None else job.fill,
        "markers": job.markers or config.markers, "marker_height": job.marker_height or config.marker_height})
    if job.fill >= job.peak:
        raise BadRequest(f"fill {job.fill:g} is not below peak {job.peak:g}", where="--fill",
                         todo="a cell's marker lies inside the cell: give a lower --fill or a higher --peak")
    if job.diameter_px is not None and config.median_diameter_px is None:
        raise BadRequest("the checkpoint does not say how large its cells were", where="--diameter-px",
                         todo="give --pixel-size-um, or no size")
    trained = {name: getattr(config, name) for name in ("crop_px", "median_diameter_px", "pixel_size_um")}
    trained["scaling_percents"] = list(config.scaling_percents)
    trained["diameter_range_px"] = None if config.diameter_range_px is None else list(config.diameter_range_px)
    normalisation = {"mean": list(config.backbone.mean), "std": list(config.backbone.std)}
    identity = {"format": FORMAT, "settings": job.result_settings(), "model": config.backbone.model,
                "weights_digest": config.weights_digest, "normalisation": normalisation, "checkpoint": trained,
                "numerics": numerics}
    fingerprint = fingerprint_of(identity)
    chosen = {name: getattr(job, name) for name in (
        "channel", "pixel_size_um", "diameter_px", "scaling", "peak", "fill", "markers", "marker_height", "min_area_px",
        "overlap_px", "block_px", "neighbour_px")}
    # no path in here: the same checkpoint from another folder must give the same bytes
    described = {"fingerprint": fingerprint, "kind": "cell-masks", "model": config.backbone.model,
                 "weights_digest": config.weights_digest, "normalisation": normalisation, "precision": precision,
                 "segmentation": chosen, "checkpoint": trained}
    description = (f"{config.backbone.model} distance map of {job.checkpoint}, digest {config.weights_digest[:12]}, "
                   f"peak {job.peak:g}, fill {job.fill:g}, {_scale_rule(job, config)}, {precision} on {device}")
    facts = {"digest": config.weights_digest, "source": job.checkpoint, "backbone_digest": config.backbone.digest,
             "normalisation": normalisation, "checkpoint": config.model_dump(mode="json")}
    return Resolved(job, device, identity, {**numerics, "device_kind": used_kind(device)}, fingerprint, config.weights_digest,
                    facts, described, description, tuple(config.scaling_percents), _stage, (model, config),
                    staged_as=f"{config.weights_digest}-{fingerprint_of(config.model_dump(mode='json'))}")


def _scale_rule(job: SegmentCellsJob, config: SegmenterConfig) -> str:
    """How images come to the model's scale, for the first line printed."""
    if job.diameter_px is not None:
        return f"scale by cell diameter ({job.diameter_px:.3g} px to the model's {config.median_diameter_px:.3g})"
    if config.pixel_size_um is not None:
        given = f"{job.pixel_size_um:g} µm where a file says none" if job.pixel_size_um else "estimated where a file says none"
        return f"scale by pixel size (to {config.pixel_size_um:g} µm; {given})"
    rule = "scale estimated per image" if config.median_diameter_px is not None else "images as they are (scale unknown)"
    return rule if job.pixel_size_um is None else \
        f"{rule}: --pixel-size-um does not set it, because the model has no pixel size (it gives areas in µm² alone)"


def _stage(loaded: tuple[DistanceMapModel, Any], store: Store, prefix: str) -> None:
    from dinoray.vision.distance_model import save_checkpoint

    model, config = loaded
    whole = config.model_copy(update={"backbone": config.backbone.model_copy(update={"included": True})})
    save_checkpoint(store, prefix, model, whole)
