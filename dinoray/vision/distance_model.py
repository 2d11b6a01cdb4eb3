"""Backbone + decoder that predicts distance maps, and its checkpoint folder.

A checkpoint is a folder: `model.safetensors` (the decoder, and the backbone where it was trained), `config.json`
(`SegmenterConfig`: everything that inference needs to know) and `README.md` (the model card). A frozen backbone is named by
its hub id and digest, and another one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from dinoray.errors import BadRequest, WeightsError
from dinoray.io.stores import Store, open_store
from dinoray.vision import layouts
from dinoray.vision.backbone import Backbone
from dinoray.vision.canonical import build, published_tensors, weights_digest
from dinoray.vision.decoders.unet2d import UNet2D
from dinoray.vision.instances import H
from dinoray.vision.tokens import LayerTokens
from dinoray.vision.variants import variant
from dinoray.vision.weights import load_backbone

FORMAT = "dinoray-distance-map/1"


class BackboneRecord(BaseModel):
    """Which backbone a checkpoint stands on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """Variant, such as `vits16`."""
    weights: str | None = None
    """What the training job named: hub id, path, `random:SEED`."""
    digest: str
    """Digest of the backbone's weights (those in the file where `included`)."""
    included: bool
    """Whether model.safetensors holds the backbone."""
    mean: tuple[float, float, float]
    """Normalisation of pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Normalisation of pixels in [0, 1]."""


class DecoderRecord(BaseModel):
    """What `UNet2D` is built from."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    taps: tuple[int, ...]
    """0-based layers of the backbone whose maps it takes, shallow to deep."""
    channels: tuple[int, ...]
    """Channels of its stages."""
    norm: Literal["layer", "group", "batch", "none"] = "layer"
    """Kind of its norms."""
    stem_levels: int = 3
    """Resolutions at which the stem on the pixels joins."""


class SegmenterConfig(BaseModel):
    """config.json of a checkpoint: how pixels must look, and how maps become cells."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal["dinoray-distance-map/1"] = FORMAT
    """Version of the layout."""
    backbone: BackboneRecord
    """Which backbone."""
    decoder: DecoderRecord
    """Which decoder."""
    channels: str = "auto"
    """Channel policy of training (dinoray.vision.segmentation_input)."""
    scaling: Literal["image", "plate", "dtype"] = "image"
    """Intensity scaling of training."""
    scaling_percents: tuple[float, float] = (0.1, 99.9)
    """Percentiles that became 0 and 1."""
    crop_px: int = 256
    """Side of the training crops, and of windows at inference, in px."""
    median_diameter_px: float | None = None
    """Median diameter of the cells in the training crops, in px."""
    diameter_range_px: tuple[float, float] | None = None
    """Percentiles 5 and 95 of the diameters of these cells, in px: images whose cells seem to lie between them are segmented
    as they are."""
    pixel_size_um: float | None = None
    """Pixel size of the training crops, where known."""
    peak: float = Field(0.47, gt=0, lt=1)
    """Markers are where the map is above this; chosen on validation images."""
    fill: float = Field(0.09, gt=0, lt=1)
    """Cells are where the map is above this; chosen on validation images."""
    markers: Literal["components", "hmaxima"] = "components"
    """Kind of markers (dinoray.vision.instances.find_markers); chosen on validation images."""
    marker_height: float = Field(H, gt=0, lt=1)
    """How far maxima rise above their surroundings, where they are the markers; chosen on validation images."""
    weights_digest: str = ""
    """Digest of all weights, decoder and backbone."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Facts of the training: fingerprint, steps, seed, data, settings; `seconds`: wall time of the steps that are in the
    result, without those that a restart computed again."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Validation figures."""


class DistanceMapModel(nn.Module):
    """pixels [B, 3, H, W] in [0, 1] -> logits [B, 1, H, W] float32; H, W multiples of the patch size. sigmoid(logits) is
    the distance map: 0 on background, rising to 1 in the middle of each cell."""

    def __init__(self, backbone: Backbone, decoder: UNet2D, taps: tuple[int, ...], *, frozen: bool):
        super().__init__()
        self.backbone, self.decoder, self.taps, self.frozen = backbone, decoder, tuple(taps), frozen
        backbone.requires_grad_(not frozen)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._decoded(pixels, self.taps)[0]

    def with_tokens(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as of the call, and the backbone's last patch tokens [B, H/p, W/p, D] in its dtype, from one pass."""
        last = self.backbone.config.depth - 1
        logits, layers = self._decoded(pixels, (*self.taps, last))
        return logits, layers.layers[last].patches

    def _decoded(self, pixels: torch.Tensor, wanted: tuple[int, ...]) -> tuple[torch.Tensor, LayerTokens]:
        # no buffers: `model.to(torch.bfloat16)` would round the mean that pixels are shifted by
        mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1)
                     for values in (self.backbone.config.mean, self.backbone.config.std))
        x = ((pixels.float() - mean) / std).to(self.backbone.cls_token.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            layers = self.backbone(x, layers=wanted)
        return self.decoder(x.to(self.decoder.head.weight.dtype), [layers.maps[k] for k in self.taps]), layers


def new_model(backbone: Backbone, record: DecoderRecord, *, frozen: bool, seed: int = 0) -> DistanceMapModel:
    """A model with a freshly initialised decoder, the same for the same seed."""
    if max(record.taps) >= backbone.config.depth:
        raise BadRequest(f"layer {max(record.taps)} of {backbone.config.name}, which has layers 0..{backbone.config.depth - 1}",
                         where="decoder.taps")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = UNet2D(backbone.config.dim, backbone.config.patch_size, num_taps=len(record.taps), channels=record.channels,
                         norm=record.norm, stem_levels=record.stem_levels)
    # convolutions on CPU and on tensor cores are faster on channels that lie together
    return DistanceMapModel(backbone, decoder.to(memory_format=torch.channels_last), record.taps, frozen=frozen)


def state_digest(tensors: dict[str, torch.Tensor], backbone_digest: str) -> str:
    """sha256 over the decoder's tensors by name, as float32, and the backbone's digest."""
    hasher = hashlib.sha256(backbone_digest.encode())
    for name in sorted(tensors):
        hasher.update(f"{name} {list(tensors[name].shape)}\n".encode())
        hasher.update(tensors[name].detach().float().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes())
    return hasher.hexdigest()


def save_checkpoint(store: Store, prefix: str, model: DistanceMapModel, config: SegmenterConfig,
                    card: Callable[[SegmenterConfig], str] | None = None) -> SegmenterConfig:
    """Write the folder `prefix` of a store; returns the config with the digests of what was written, from which `card`
    makes the text of README.md.

    config.json is written last: a folder without it is no checkpoint. Raises BadRequest for a trained backbone that
    `config` leaves out: its digest would name other weights.
    """
    if not (model.frozen or config.backbone.included):
        raise BadRequest("the backbone was trained, but config.backbone.included is false", where=prefix,
                         todo="set included, so that the checkpoint holds it")
    decoder = {name: tensor.detach().cpu().contiguous() for name, tensor in model.decoder.state_dict().items()}
    tensors = {f"decoder.{name}": tensor for name, tensor in decoder.items()}
    if config.backbone.included:
        tensors |= {f"backbone.{name}": tensor.clone() for name, tensor in published_tensors(model.backbone)}
    digest = weights_digest(model.backbone) if config.backbone.included else model.backbone.digest
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"digest": digest}),
                                       "weights_digest": state_digest(decoder, digest)})
    store.put(f"{prefix}/model.safetensors", save_safetensors(tensors, metadata={"format": "pt"}))
    store.put(f"{prefix}/README.md", (card(config) if card else f"# {config.backbone.model} distance map\n").encode())
    store.put(f"{prefix}/config.json", (json.dumps(config.model_dump(mode="json"), indent=2) + "\n").encode())
    return config


def read_config(url: str) -> SegmenterConfig:
    """config.json of a checkpoint folder or URL. Raises BadRequest where there is none, or it is another thing's."""
    store = open_store(url)
    todo = "give the folder that `dinoray train distance-map` wrote (OUT/checkpoint)"
    try:
        values = json.loads(store.get("config.json"))
    except FileNotFoundError as error:
        raise BadRequest("there is no checkpoint: config.json is missing", where=url, todo=todo) from error
    except ValueError as error:
        raise BadRequest(f"config.json cannot be read: {error}", where=url, todo=todo) from error
    if not isinstance(values, dict) or not str(values.get("format", "")).startswith("dinoray-distance-map/"):
        raise BadRequest("config.json is not one of a distance-map checkpoint", where=url, todo=todo)
    try:
        return SegmenterConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(f"config.json: {'.'.join(map(str, first['loc']))}: {first['msg']}", where=url,
                         todo="it was written by another version of dinoray, or edited") from error


def load_segmenter(url: str, *, weights: str | None = None, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                   accept_license: bool = False) -> tuple[DistanceMapModel, SegmenterConfig]:
    """A checkpoint's model in eval mode, every tensor filled and used, and its config.

    `weights` says where a backbone that is not included lies, instead of where the training job had it. Raises BadRequest
    (no checkpoint, no weights), WeightsError (tensors missing, left over, of other shapes, or with another digest).
    """
    config, store = read_config(url), open_store(url)
    try:
        tensors = load_safetensors(store.get("model.safetensors"))
    except FileNotFoundError as error:
        raise WeightsError("the checkpoint has no model.safetensors", where=url, todo="copy the whole folder") from error
    except Exception as error:  # noqa: BLE001 - safetensors raises its own type, and others, for bytes that are no such file
        raise WeightsError(f"model.safetensors cannot be read: {error}", where=url, todo="copy it again") from error
    backbone = _backbone(config, tensors, url, weights, device, accept_license)
    model = new_model(backbone, config.decoder, frozen=True)
    wanted = {f"decoder.{name}": tensor.shape for name, tensor in model.decoder.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("backbone.")}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise WeightsError(f"{len(wrong)} of the decoder's tensors are missing, over or differ in shape: {', '.join(wrong[:5])}",
                           where=url, todo="config.json and model.safetensors are not of one checkpoint")
    damaged = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if damaged:
        raise WeightsError(f"NaN or infinity in {', '.join(damaged[:5])}", where=url,
                           todo="take an earlier checkpoint, or copy it again")
    model.decoder.load_state_dict({name.removeprefix("decoder."): tensors[name].float() for name in wanted})
    digest = state_digest(model.decoder.state_dict(), backbone.digest)
    if config.weights_digest and digest != config.weights_digest:
        raise WeightsError(f"the weights' digest is {digest[:12]}, config.json says {config.weights_digest[:12]}", where=url,
                           todo="the file was changed or damaged: copy the checkpoint again")
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), config


def _backbone(config: SegmenterConfig, tensors: dict[str, torch.Tensor], url: str, weights: str | None,
              device: str | torch.device, accept_license: bool) -> Backbone:
    record, shape = config.backbone, variant(config.backbone.model).with_normalisation(config.backbone.mean, config.backbone.std)
    if not record.included:
        backbone = load_backbone(record.model, weights or record.weights, device=device, accept_license=accept_license,
                                 expect_digest=record.digest)
        if (backbone.config.mean, backbone.config.std) != (shape.mean, shape.std):
            raise WeightsError("the backbone's normalisation is not the one it was trained with", where=url,
                               todo="use the weights from where the training job had them, with their preprocessor_config.json")
        return backbone
    wanted = layouts.canonical_shapes(shape)
    found = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    wrong = sorted(name for name in wanted.keys() | found.keys()
                   if name not in wanted or name not in found or tuple(found[name].shape) != tuple(wanted[name]))
    if wrong:
        raise WeightsError(f"{len(wrong)} of the backbone's tensors are missing, over or differ in shape: {', '.join(wrong[:5])}",
                           where=url, todo="config.json and model.safetensors are not of one checkpoint")
    backbone = build(shape, lambda name: found[name].float(), torch.float32, device)
    backbone.source = url
    if backbone.digest != record.digest:
        raise WeightsError(f"the backbone's digest is {backbone.digest[:12]}, config.json says {record.digest[:12]}", where=url,
                           todo="the file was changed or damaged: copy the checkpoint again")
    return backbone
