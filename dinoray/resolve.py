"""From a job to exactly what will be computed: device, precision, weights, numerics, fingerprint.

Nothing is read but the weights. What comes out is stored with the output and compared on resume.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from dinoray.config import ExtractImagesJob
from dinoray.errors import BadRequest
from dinoray.io.stores import open_store
from dinoray.memory.budget import default_token_budget
from dinoray.units import fingerprint_of

FORMAT = 1
"""Version of the output's layout and rules; a new one cannot resume an old output."""
LIBRARIES = ("dinoray", "torch", "numpy", "pyarrow", "zarr", "numcodecs", "tifffile", "imagecodecs", "pillow")
"""Packages whose version may change a byte of the output."""


@dataclass
class Resolved:
    """A job with every `auto` settled. `identity` holds all that changes results; the fingerprint hashes it."""

    job: ExtractImagesJob
    device: str
    identity: dict[str, Any]
    fingerprint: str
    digest: str
    weights_facts: dict[str, Any]
    described: dict[str, Any]
    """What the data files say of themselves."""
    description: str
    backbone: Any = field(default=None, repr=False)

    def release(self) -> None:
        """Forget the model that the driver loaded to learn its digest."""
        self.backbone = None

    def weights_location(self, local: bool) -> str:
        """What actors load: `random:SEED`, or the folder (by digest) where the weights are staged now if need be."""
        del local
        if (self.job.weights or "").startswith("random"):
            return self.job.weights or ""
        if self.job.no_ray:
            return ""
        base = self.job.staging or f"{self.job.out}/_dinoray/weights"
        url = f"{base.rstrip('/')}/{self.digest}"
        from dinoray.vision.weights import staged_files

        store = open_store(url)
        if not store.exists("complete"):
            for name, data in staged_files(self.backbone):
                store.put(name, data)
            store.put("complete", b"")
        return url


def resolve(job: ExtractImagesJob) -> Resolved:
    """Settle every `auto` and load the weights once. Raises BadRequest, WeightsError."""
    import torch

    from dinoray.runners.image_features import device_kind
    from dinoray.vision.tiling import windows
    from dinoray.vision.weights import load_backbone

    if job.model is None and job.weights is None:
        raise BadRequest("no model was named", where="--model", todo="say e.g. --model vits16 (official weights), "
                         "--model vits16 --weights FILE, or --model vits16 --weights random to try things out")
    if job.model is None:
        raise BadRequest("weights without a model", where="--model", todo="say e.g. --model vits16")
    has_cuda = torch.cuda.is_available()
    device = job.device if job.device != "auto" else ("cuda" if has_cuda else "cpu")
    if device == "cuda" and not has_cuda and job.no_ray:
        raise BadRequest("there is no CUDA device here", where="--device", todo="use --device cpu")
    precision = job.precision if job.precision != "auto" else ("bfloat16" if device == "cuda" else "float32")
    weights = f"{job.weights}:0" if job.weights == "random" else job.weights
    backbone = load_backbone(job.model, weights, dtype=getattr(torch, precision),
                             device=device if job.no_ray else "cpu", accept_license=job.accept_dinov3_license)
    config = backbone.config
    if job.layers and max(job.layers) >= config.depth:
        raise BadRequest(f"layer {max(job.layers)} of {config.name}, which has layers 0..{config.depth - 1}",
                         where="--layers")
    windows(job.tile_px, job.tile_px, size="tiles", tile_px=job.tile_px, patch=config.patch_size)
    if job.resize_px % config.patch_size:
        raise BadRequest(f"resize_px={job.resize_px} is not a multiple of the patch size {config.patch_size}",
                         where="--resize-px")
    budget = job.token_budget or default_token_budget(config.name, device, precision)
    kind = device_kind(torch.device("cpu")) if device == "cpu" else (device_kind(torch.device("cuda")) if has_cuda else "cuda")
    job = job.model_copy(update={"device": device, "precision": precision, "weights": weights, "token_budget": budget})
    numerics = {"device": device, "device_kind": kind, "precision": precision, "token_budget": budget,
                "batching": "powers of two up to the budget", "attention": "sdpa", "rope": "float32",
                "libraries": {name: version(name) for name in LIBRARIES}}
    normalisation = {"mean": list(config.mean), "std": list(config.std), "rule": backbone.normalisation_rule}
    identity = {"format": FORMAT, "settings": {k: v for k, v in job.result_settings().items() if k != "model"},
                "model": config.name, "weights_digest": backbone.digest, "normalisation": normalisation,
                "numerics": numerics}
    fingerprint = fingerprint_of(identity)
    preprocessing = {k: v for k, v in identity["settings"].items() if k.startswith(
        ("scaling", "size", "tile", "resize", "channels", "contrast", "clahe", "pixel_size"))}
    described = {"fingerprint": fingerprint, "model": config.name, "weights": backbone.source,
                 "weights_digest": backbone.digest, "normalisation": normalisation, "precision": precision,
                 "preprocessing": preprocessing, "layers": list(job.layers) if job.layers else None,
                 "patch_size": config.patch_size}
    note = " (random weights: texture only)" if (weights or "").startswith("random") else ""
    description = (f"{config.name} {backbone.source}{note}, digest {backbone.digest[:12]}, normalisation "
                   f"{backbone.normalisation_rule}, {precision} on {device}")
    facts = {"digest": backbone.digest, "source": backbone.source, "normalisation": normalisation}
    return Resolved(job, device, identity, fingerprint, backbone.digest, facts, described, description, backbone)
