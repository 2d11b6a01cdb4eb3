"""From a job to exactly what will be computed: device, precision, weights, numerics, fingerprint.

Nothing is read but the weights. What comes out is stored with the output and compared on resume.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dinoray.config import ExtractCellsJob, ExtractImagesJob, ExtractVolumeJob, FeatureJob
from dinoray.errors import BadRequest
from dinoray.io.stores import open_store
from dinoray.memory.budget import default_token_budget
from dinoray.units import fingerprint_of

FORMAT = 1
"""Version of the output's layout and rules; a new one cannot resume an old output."""
LIBRARIES = ("dinoray", "torch", "numpy", "pyarrow", "zarr", "numcodecs", "tifffile", "imagecodecs", "pillow")
VOLUME_LIBRARIES = ("tensorstore", "h5py")
"""Packages whose version may change a byte of the output."""


STAGED_MARKER = "STAGED"
"""Written last into a folder of staged weights."""


@dataclass
class Resolved:
    """A job with every `auto` settled. `identity` holds all that changes results; the fingerprint hashes it."""

    job: FeatureJob
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
    backbone: Any = field(default=None, repr=False)

    def release(self) -> None:
        """Forget the model that the driver loaded to learn its digest."""
        self.backbone = None

    def weights_location(self) -> str:
        """What actors load: `random:SEED`, or the folder, named by digest, where the weights are staged now if need be."""
        if (self.job.weights or "").startswith("random"):
            return self.job.weights or ""
        base = self.job.staging or self.job.out
        prefix = f"_dinoray/weights/{self.digest}"
        store = open_store(base)
        if not store.exists(f"{prefix}/{STAGED_MARKER}"):
            from dinoray.vision.weights import save_backbone

            with tempfile.TemporaryDirectory(prefix="dinoray-stage-") as folder:
                save_backbone(self.backbone, folder)
                for file in sorted(Path(folder).iterdir()):
                    store.put(f"{prefix}/{file.name}", file.read_bytes())
            store.put(f"{prefix}/{STAGED_MARKER}", b"all files are here\n")
        return f"{store.url}/{prefix}"


def resolve(job: FeatureJob) -> Resolved:
    """Settle every `auto` and load the weights once. Raises BadRequest, WeightsError."""
    import torch

    from dinoray.runners.image_features import device_kind
    from dinoray.vision.tiling import windows
    from dinoray.vision.weights import load_backbone

    if job.model is None and job.weights is None:
        raise BadRequest("no model was named", where="--model", todo="say e.g. --model vits16 (official weights), "
                         "--model vits16 --weights FILE, or --model vits16 --weights random to try things out")
    has_cuda = torch.cuda.is_available()
    device = job.device if job.device != "auto" else ("cuda" if has_cuda else "cpu")
    if device == "cuda" and not has_cuda and job.no_ray:
        raise BadRequest("there is no CUDA device here", where="--device", todo="use --device cpu")
    precision = job.precision if job.precision != "auto" else ("bfloat16" if device == "cuda" else "float32")
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
    budget = job.token_budget or default_token_budget(config.name, device, precision)
    kind = device_kind(torch.device("cpu")) if device == "cpu" else (device_kind(torch.device("cuda")) if has_cuda else "cuda")
    job = job.model_copy(update={"model": config.name, "device": device, "precision": precision, "weights": weights,
                                 "token_budget": budget})
    libraries = LIBRARIES + (VOLUME_LIBRARIES if isinstance(job, ExtractVolumeJob) else ())
    numerics = {"device": device, "precision": precision, "token_budget": budget,
                "batching": "powers of two up to the budget", "attention": "sdpa", "rope": "float32",
                "libraries": {name: version(name) for name in libraries}}
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
    return Resolved(job, device, identity, {**numerics, "device_kind": kind}, fingerprint, backbone.digest, facts,
                    described, description, backbone)
