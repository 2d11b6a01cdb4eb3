"""The checkpoint folder of a context-fusion UNet: `model.safetensors` (the UNet), `config.json` (`FusionConfig`: all that inference
needs to know) and `README.md` (the model card). The backbone is frozen, so it is named by its id and digest; another is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from dinoray.errors import BadRequest, WeightsError
from dinoray.io.stores import Store, open_store
from dinoray.vision.backbone import Backbone
from dinoray.vision.distance_model import BackboneRecord, state_digest
from dinoray.vision.fusion_model import FusionModel, FusionRecord, new_model
from dinoray.vision.weights import load_backbone

FORMAT = "dinoray-context-fusion/1"
_TODO = "give the folder that `dinoray train context-fusion` wrote (OUT/checkpoint)"


class FusionConfig(BaseModel):
    """config.json of a checkpoint: which voxels a volume must have, and what its logits mean."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal["dinoray-context-fusion/1"] = FORMAT
    """Version of the layout."""
    model: FusionRecord
    """The architecture."""
    backbone: BackboneRecord | None = None
    """Which backbone, where there is one."""
    target: Literal["classes", "affinities"]
    """What the logits are of."""
    classes: tuple[str, ...]
    """Names of the classes; with affinities all but the first are instances."""
    offsets: tuple[tuple[int, int, int], ...] = ()
    """Pairs of voxels whose affinities are predicted (z, y, x)."""
    voxel_nm: tuple[float, float, float]
    """Size of predicted voxels (z, y, x)."""
    raw_voxel_nm: tuple[float, float, float]
    """Size of raw voxels."""
    context_factor: int
    """Voxel size of the context, in predicted voxels."""
    crop_voxels: tuple[int, int, int]
    """Sides of the training crops, and of windows at inference, in predicted voxels."""
    scaling_percents: tuple[float, float] = (0.1, 99.9)
    """Percentiles of a volume that become 0 and 1."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Affinities above it join voxels; chosen on the validation regions."""
    weights_digest: str = ""
    """Digest of all weights, UNet and backbone."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Facts of the training: fingerprint, steps, seed, regions, settings."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Validation figures."""


def save_fusion(store: Store, prefix: str, model: FusionModel, config: FusionConfig,
                card: Callable[[FusionConfig], str]) -> FusionConfig:
    """Write the folder `prefix` of a store; returns the config with the digest of what was written. config.json comes last: a
    folder without it is no checkpoint."""
    tensors = {f"unet.{name}": tensor.detach().cpu().contiguous() for name, tensor in model.unet.state_dict().items()}
    digest = state_digest(tensors, config.backbone.digest if config.backbone else "")
    config = config.model_copy(update={"weights_digest": digest})
    store.put(f"{prefix}/model.safetensors", save_safetensors(tensors, metadata={"format": "pt"}))
    store.put(f"{prefix}/README.md", card(config).encode())
    store.put(f"{prefix}/config.json", (json.dumps(config.model_dump(mode="json"), indent=2) + "\n").encode())
    return config


def read_fusion_config(url: str) -> FusionConfig:
    """config.json of a checkpoint folder or URL. Raises BadRequest where there is none, or it is another thing's."""
    store = open_store(url)
    try:
        values = json.loads(store.get("config.json"))
    except FileNotFoundError as error:
        raise BadRequest("there is no checkpoint: config.json is missing", where=url, todo=_TODO) from error
    except ValueError as error:
        raise BadRequest(f"config.json cannot be read: {error}", where=url, todo=_TODO) from error
    if not isinstance(values, dict) or not str(values.get("format", "")).startswith("dinoray-context-fusion/"):
        raise BadRequest("config.json is not one of a context-fusion checkpoint", where=url, todo=_TODO)
    try:
        return FusionConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(f"config.json: {'.'.join(map(str, first['loc']))}: {first['msg']}", where=url,
                         todo="it was written by another version of dinoray, or edited") from error


def load_fusion(url: str, *, weights: str | None = None, backbone_dtype: torch.dtype = torch.float32,
                device: str | torch.device = "cpu", accept_license: bool = False) -> tuple[FusionModel, FusionConfig]:
    """A checkpoint's model in eval mode, every tensor filled and used, and its config. `weights` says where the backbone lies,
    instead of where the training job had it. The UNet is float32: autocast takes it from there.

    Raises BadRequest (no checkpoint, no weights), WeightsError (tensors missing, left over, of other shapes, another digest).
    """
    config, store = read_fusion_config(url), open_store(url)
    try:
        tensors = load_safetensors(store.get("model.safetensors"))
    except FileNotFoundError as error:
        raise WeightsError("the checkpoint has no model.safetensors", where=url, todo="copy the whole folder") from error
    except Exception as error:  # noqa: BLE001 - safetensors raises its own type, and others, for bytes that are no such file
        raise WeightsError(f"model.safetensors cannot be read: {error}", where=url, todo="copy it again") from error
    backbone: Backbone | None = None
    if config.backbone is not None:
        backbone = load_backbone(config.backbone.model, weights or config.backbone.weights, dtype=backbone_dtype, device=device,
                                 accept_license=accept_license, expect_digest=config.backbone.digest)
    model = new_model(config.model, backbone)
    wanted = {f"unet.{name}": tensor.shape for name, tensor in model.unet.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise WeightsError(f"{len(wrong)} tensors are missing, over or differ in shape: {', '.join(wrong[:5])}", where=url,
                           todo="config.json and model.safetensors are not of one checkpoint")
    damaged = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if damaged:
        raise WeightsError(f"NaN or infinity in {', '.join(damaged[:5])}", where=url,
                           todo="take an earlier checkpoint, or copy it again")
    digest = state_digest(tensors, config.backbone.digest if config.backbone else "")
    if config.weights_digest and digest != config.weights_digest:
        raise WeightsError(f"the weights' digest is {digest[:12]}, config.json says {config.weights_digest[:12]}", where=url,
                           todo="the file was changed or damaged: copy the checkpoint again")
    model.unet.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in tensors.items()})
    return model.to(device=device).eval().requires_grad_(False), config
