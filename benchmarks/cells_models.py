"""What the model of benchmarks/cells_learning.py is compared with: its own decoder without tokens, a plain UNet, Otsu."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed
from torch import nn

from dinoray.vision.decoders.unet2d import conv_block
from dinoray.vision.distance_model import DistanceMapModel


class ZeroedTokens(nn.Module):
    """The same model whose tokens are all zero: what is left is the stem on the pixels and the decoder. The backbone is
    not computed, so a step takes less time."""

    def __init__(self, model: DistanceMapModel):
        super().__init__()
        self.decoder, config = model.decoder, model.backbone.config
        self.backbone, self.taps = SimpleNamespace(config=config), model.taps

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """As DistanceMapModel."""
        config = self.backbone.config
        x = _normalised(pixels, config)
        b, _, h, w = x.shape
        zeros = x.new_zeros(b, config.dim, h // config.patch_size, w // config.patch_size)
        return self.decoder(x, [zeros] * len(self.taps))


class PlainUNet(nn.Module):
    """Ronneberger et al. 2015 with padded convolutions, the norm that our decoder has, and four poolings."""

    def __init__(self, config, norm: str, base: int = 32):
        super().__init__()
        self.backbone = SimpleNamespace(config=config)
        widths = [base * 2**k for k in range(5)]
        self.decoder = nn.ModuleDict({
            "down": nn.ModuleList(conv_block(3 if k == 0 else widths[k - 1], widths[k], norm) for k in range(5)),
            "up": nn.ModuleList(nn.ConvTranspose2d(widths[k + 1], widths[k], 2, stride=2) for k in range(4)),
            "join": nn.ModuleList(conv_block(2 * widths[k], widths[k], norm) for k in range(4)),
            "head": nn.Conv2d(base, 1, 1)}).to(memory_format=torch.channels_last)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.decoder["head"].weight, std=0.01)
        nn.init.constant_(self.decoder["head"].bias, -2.0)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """As DistanceMapModel; sides are multiples of 16."""
        x = _normalised(pixels, self.backbone.config).contiguous(memory_format=torch.channels_last)
        kept = []
        for k, block in enumerate(self.decoder["down"]):
            x = block(x if k == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for k in reversed(range(4)):
            x = self.decoder["join"][k](torch.cat([self.decoder["up"][k](x), kept[k]], dim=1))
        return self.decoder["head"](x).float()


def plain_unet(config, parameters: int, seed: int, norm: str) -> PlainUNet:
    """The PlainUNet whose number of parameters is nearest to `parameters`."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        counts = {base: sum(p.numel() for p in PlainUNet(config, norm, base).parameters()) for base in range(8, 65)}
    return PlainUNet(config, norm, min(counts, key=lambda base: abs(counts[base] - parameters)))


def _normalised(pixels: torch.Tensor, config) -> torch.Tensor:
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (config.mean, config.std))
    return (pixels.float() - mean) / std


def otsu_watershed(planes: np.ndarray, min_distance: int, min_area: int) -> np.ndarray:
    """Otsu's threshold of the mean plane, the rarer side as foreground, then a watershed of its distance transform from
    local maxima at least `min_distance` px apart: what one does without learning. planes [3, Y, X] -> int32 [Y, X]."""
    gray = ndimage.gaussian_filter(planes.mean(axis=0), 1)
    if gray.max() == gray.min():
        return np.zeros(gray.shape, np.int32)
    mask = gray > threshold_otsu(gray)
    if mask.mean() > 0.5:
        mask = ~mask
    mask = ndimage.binary_fill_holes(mask)
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    peaks = peak_local_max(distance, min_distance=min_distance, labels=ndimage.label(mask)[0], exclude_border=False)
    markers = np.zeros(gray.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-distance, markers, mask=mask)
    areas = np.bincount(labels.ravel())
    labels[areas[labels] < min_area] = 0
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)
