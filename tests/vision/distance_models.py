"""Distance-map models of the tests: small random ones, and one whose maps are computed from the pixels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dinoray.vision.decoders.unet2d import tap_layers
from dinoray.vision.distance_model import BackboneRecord, DecoderRecord, DistanceMapModel, SegmenterConfig, new_model
from dinoray.vision.variants import BackboneConfig
from tests.runs import TINY, tiny_backbone

FOUR = replace(TINY, name="tiny16x4", depth=4)
"""Four layers, so that there are four depths to tap."""


def small_config(shape: BackboneConfig = FOUR, **fields: object) -> SegmenterConfig:
    """The config of `small_model`."""
    record = BackboneRecord(model=shape.name, digest="", included=False, mean=shape.mean, std=shape.std)
    decoder = DecoderRecord(taps=tap_layers(shape.depth), channels=(16, 8, 8, 4))
    return SegmenterConfig(**{"backbone": record, "decoder": decoder, "crop_px": 64, **fields})


def small_model(shape: BackboneConfig = FOUR, *, seed: int = 0, dtype: torch.dtype = torch.float32,
                norm: str = "layer") -> DistanceMapModel:
    """A real backbone and decoder with random weights; the head is scaled up so that the map is far from constant."""
    record = small_config(shape).decoder.model_copy(update={"norm": norm})
    model = new_model(tiny_backbone(shape), record, frozen=True, seed=seed)
    with torch.no_grad():
        model.decoder.head.weight.mul_(30)
    return model.to(dtype).eval().requires_grad_(False)


class SeenMap(nn.Module):
    """Stands for a decoder: the logit of the pixels' own value, undone of the normalisation. The map is the image."""

    pixel_values = 8

    def __init__(self, shape: BackboneConfig = FOUR):
        super().__init__()
        self.head = nn.Conv2d(1, 1, 1)
        self.mean, self.std = shape.mean[0], shape.std[0]

    def forward(self, pixels: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
        return torch.logit((pixels[:, :1].float() * self.std + self.mean).clamp(0, 1), eps=1e-6)


def seeing_model(shape: BackboneConfig = FOUR) -> DistanceMapModel:
    """A model whose distance map is its input: what a perfect network would give for an image that is a distance map."""
    return DistanceMapModel(tiny_backbone(shape), SeenMap(shape), tap_layers(shape.depth), frozen=True).eval()
