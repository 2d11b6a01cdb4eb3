"""Batches of raw crops -> features: scaling on the device, padding, precision, OOM back-off.

Same bytes: for one batch of crops the result depends on the crops, the weights, precision and library
versions only. Batches are padded to a ladder of sizes (dinoray.memory.budget). On CPU every forward runs on
one thread (several at once), because the number of threads inside an operator can change the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dinoray.errors import ItemError
from dinoray.memory.budget import micro_batch, padded_batch
from dinoray.vision.backbone import Backbone
from dinoray.vision.backoff import BackOff
from dinoray.vision.crops import Place, filter_weights


@dataclass(frozen=True)
class Crop:
    """Raw pixels [C, h, w] of one row in the file's dtype, with `low`, `high` float32 [C]; see ChannelRow.mode.

    With `place` the pixels are the block of a square (dinoray.vision.crops) that is resampled to the extractor's
    `resize_px`; `hidden` bool [h, w] are pixels that become 0 once scaled.
    """

    pixels: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mode: str
    place: Place | None = None
    hidden: np.ndarray | None = None

    @property
    def key(self) -> tuple:
        """Crops with equal keys may share a batch."""
        return (self.mode, self.pixels.shape, self.pixels.dtype.str)

    @property
    def nbytes(self) -> int:
        """Bytes that this crop holds."""
        return self.pixels.nbytes + (0 if self.hidden is None else self.hidden.nbytes)


def column_names(features: Sequence[str], layers: Sequence[int] | None) -> list[tuple[str, str, int | None]]:
    """(column, feature, layer) for every vector or map: `cls`, or `cls_l05` where layers were asked for."""
    if layers is None:
        return [(feature, feature, None) for feature in features]
    return [(f"{feature}_l{layer:02d}", feature, layer) for layer in layers for feature in features]


class Extractor(BackOff):
    """Holds one backbone; `extract` may be called from several threads at once."""

    def __init__(self, backbone: Backbone, *, features: Sequence[str], layers: Sequence[int] | None,
                 token_budget: int, resize_px: int | None = None):
        self.backbone, self.features, self.layers = backbone, tuple(features), layers
        self.token_budget, self.resize_px = token_budget, resize_px
        self.device = next(backbone.parameters()).device
        self.dtype = next(backbone.parameters()).dtype
        self.mean = torch.tensor(backbone.config.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(backbone.config.std, device=self.device).view(1, 3, 1, 1)
        super().__init__(self.device)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patch grid (h, w) of a crop of `height` x `width` source pixels."""
        p = self.backbone.config.patch_size
        return (self.resize_px // p,) * 2 if self.resize_px else (height // p, width // p)

    def micro_batch(self, height: int, width: int) -> int:
        """Crops of this size per batch, from the token budget alone."""
        h, w = self.grid(height, width)
        return micro_batch(self.token_budget, h * w + 1 + self.backbone.config.num_registers)

    def extract(self, crops: Sequence[Crop]) -> dict[str, np.ndarray]:
        """Features of crops with equal keys: vectors [n, D] and maps [n, h, w, D] by column name, float32.

        After an out-of-memory error of the device the batch is halved and replayed, and the smaller size is
        kept for this shape. Raises ItemError `device_memory` when even one crop does not fit.
        """
        parts = self.in_parts(crops[0].key, crops)
        return parts[0] if len(parts) == 1 else {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def _too_large(self, crop: Crop) -> ItemError:
        return ItemError("device_memory", f"one crop of {crop.pixels.shape[1:]} px does not fit the device",
                         todo="use size=tiles, or a device with more memory")

    def _resample(self, blocks: torch.Tensor, places: Sequence[Place]) -> torch.Tensor:
        """Blocks [B, C, n, n] float32 -> their squares [B, C, resize_px, resize_px]: two products with the filters."""
        out_px = self.resize_px

        def weights(offset: str) -> torch.Tensor:
            filters = [filter_weights(getattr(p, offset), p.side, p.size, out_px) for p in places]
            return torch.from_numpy(np.stack(filters)).to(self.device)[:, None]

        return weights("offset_y") @ blocks @ weights("offset_x").mT

    @torch.inference_mode()
    def _forward(self, crops: Sequence[Crop]) -> dict[str, np.ndarray]:
        n = len(crops)
        height, width = crops[0].pixels.shape[1:]
        batch = padded_batch(n, max(n, self.micro_batch(height, width)))
        padded = [*crops, *[crops[-1]] * (batch - n)]
        raw = torch.from_numpy(np.stack([c.pixels for c in padded])).to(self.device)
        low = torch.from_numpy(np.stack([c.low for c in padded])).to(self.device)[:, :, None, None]
        high = torch.from_numpy(np.stack([c.high for c in padded])).to(self.device)[:, :, None, None]
        x = ((raw.to(torch.float32) - low) / (high - low)).clamp_(0.0, 1.0)
        if crops[0].hidden is not None:
            x = x.masked_fill_(torch.from_numpy(np.stack([c.hidden for c in padded])).to(self.device)[:, None], 0.0)
        if crops[0].mode == "mean":
            x = x.mean(dim=1, keepdim=True)
        if crops[0].place is not None:
            x = self._resample(x, [c.place for c in padded])
        elif self.resize_px:  # as the reference processor: after scaling, bilinear with antialias
            x = F.interpolate(x, size=(self.resize_px,) * 2, mode="bilinear", antialias=True, align_corners=False)
        x = ((x - self.mean) / self.std).to(self.dtype)
        tokens = self.backbone(x, layers=self.layers)
        found = {None: tokens} if self.layers is None else tokens.layers
        result = {}
        for column, feature, layer in column_names(self.features, self.layers):
            t = found[layer]
            # clone: a view would keep the tokens of the whole batch alive as long as one row's vector
            value = {"cls": lambda t=t: t.cls.clone(), "patch_mean": lambda t=t: t.patches.float().mean(dim=(1, 2)),
                     "patches": lambda t=t: t.patches}[feature]()
            result[column] = value[:n].float().cpu().numpy()
        return result
