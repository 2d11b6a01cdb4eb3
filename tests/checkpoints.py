"""Checkpoints of the tests: a real backbone and a real decoder whose weights are set by hand, so that cells are found
without any training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoray.config import SegmentCellsJob
from dinoray.extraction import segment_cells
from dinoray.io.stores import open_store
from dinoray.session import Outcome
from dinoray.vision import distance_model
from dinoray.vision.decoders.unet2d import tap_layers
from dinoray.vision.distance_model import BackboneRecord, DecoderRecord, SegmenterConfig, new_model, save_checkpoint
from dinoray.vision.variants import variant
from dinoray.vision.weights import load_backbone
from tests.runs import tiny_backbone
from tests.vision.distance_models import FOUR

STEEP = 12.0
"""The map is sigmoid(STEEP * (x - 0.5)) of the pixels' mean x in [0, 1]: above 0.47 where x > 0.49, above 0.09 where
x > 0.31."""


def use_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process know the backbone of `seeing_checkpoint(..., model=FOUR.name)`: 4 layers of width 16."""
    monkeypatch.setattr(distance_model, "variant", lambda name: FOUR if name == FOUR.name else variant(name))
    monkeypatch.setattr(distance_model, "load_backbone", lambda *args, **kwargs: tiny_backbone(FOUR))


def seeing_checkpoint(folder: Path, *, model: str = FOUR.name, included: bool = False, **fields: object) -> Path:
    """Write a checkpoint whose distance map is a steep function of the pixels themselves: bright blobs are cells.

    Everything in the decoder is zero but one path: the mean of the three planes through the stem at full resolution, the
    last stage and the head. `model`: a variant for other processes, else the tiny one.
    """
    backbone = tiny_backbone(FOUR) if model == FOUR.name else load_backbone(model, "random:0")
    shape = backbone.config
    record = DecoderRecord(taps=tap_layers(shape.depth), channels=(4, 4, 4, 4), norm="none", stem_levels=1)
    built = new_model(backbone, record, frozen=True)
    decoder = built.decoder
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        into, out = decoder.stem[0][0], decoder.stem[0][3]
        into.weight[0, :, 1, 1] = torch.tensor(shape.std) / 3
        into.bias[0] = sum(shape.mean) / 3
        out.weight[0, 0, 1, 1] = 1.0
        first, second = decoder.blocks[-1][0], decoder.blocks[-1][3]
        first.weight[0, first.in_channels - 4, 1, 1] = 1.0  # the stem comes last among what is joined
        second.weight[0, 0, 1, 1] = 1.0
        decoder.head.weight[0, 0] = STEEP
        decoder.head.bias[0] = -STEEP / 2
    config = SegmenterConfig(**{
        "backbone": BackboneRecord(model=model, weights="random:0", digest=backbone.digest, included=included, mean=shape.mean,
                                   std=shape.std),
        "decoder": record, "crop_px": 64, "scaling": "dtype", **fields})
    save_checkpoint(open_store(str(folder.parent)), folder.name, built, config)
    return folder


def run_segment(sources: Path | str, checkpoint: Path, out: Path, *, say: Callable[[str], None] = lambda line: None,
                **fields: object) -> Outcome:
    """Segment in this process (without Ray unless no_ray=False)."""
    return segment_cells(SegmentCellsJob(sources=(str(sources),), checkpoint=str(checkpoint), out=str(out),
                                         **{"no_ray": True, **fields}), say=say)


def blobs(shape: tuple[int, int], count: int, seed: int, radius: float = 6.0) -> np.ndarray:
    """float64 [Y, X] in [0, 1]: `count` round blobs that do not touch, bright in the middle, on a dark ground."""
    rng = np.random.default_rng(seed)
    step = int(2 * radius + 4)
    middles = [range(step // 2, side - step // 2 + 1, step) for side in shape]
    places = [(y, x) for y in middles[0] for x in middles[1]]
    image = np.zeros(shape)
    reach = step // 2
    blob = np.clip(1.1 - np.hypot(*np.mgrid[-reach:reach + 1, -reach:reach + 1]) / radius, 0, 1)
    for n in rng.choice(len(places), count, replace=False):
        y, x = places[n]
        part = image[max(0, y - reach):y + reach + 1, max(0, x - reach):x + reach + 1]
        np.maximum(part, blob[max(0, reach - y):, max(0, reach - x):][:part.shape[0], :part.shape[1]], out=part)
    return image
