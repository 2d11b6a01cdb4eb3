"""The flow that three-plane features come from (dinov3_playground), written plainly: what dinoray's own flow is compared with.

Independent of dinoray: numpy and torch, and a backbone given as a function. Everything of a plane is held at once, in
float32, as the original does; tests call it on small volumes, benchmarks/volume.py measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

Forward = Callable[[torch.Tensor], torch.Tensor]
"""Normalised pixels [B, 3, H, W] -> the last hidden state [B, 1 + registers + patches, D]."""


def slices(volume: np.ndarray, axis: int, count: int) -> np.ndarray:
    """`count` slices [count, rows, cols] across `axis` of a volume [z, y, x]: both ends and evenly between, rounded down."""
    chosen = np.linspace(0, volume.shape[axis] - 1, count, dtype=int)
    return np.stack([np.take(volume, index, axis) for index in chosen])


def eight_bits(picture: np.ndarray) -> np.ndarray:
    """A slice stretched from its own minimum and maximum to 0..255, rounded down: uint8."""
    low, high = picture.min(), picture.max()
    if low == high:
        return np.zeros(picture.shape, np.uint8)
    return ((picture - low) / (high - low) * 255).astype(np.uint8)


def pixels(pictures: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Slices [n, rows, cols] of any dtype -> normalised RGB [n, 3, rows, cols] float32."""
    gray = np.stack([eight_bits(picture) for picture in pictures])
    rgb = torch.from_numpy(gray)[:, None].expand(-1, 3, -1, -1).to(torch.float32) / 255
    return (rgb - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def plane_features(volume: np.ndarray, out_shape: Sequence[int], axis: int, forward: Forward, *, mean: Sequence[float],
                   std: Sequence[float], patch: int = 16, device: str = "cpu") -> torch.Tensor:
    """Features [D, *out_shape] float32 of the slices across `axis`, all of them in one batch; resized on `device`."""
    pictures = slices(volume, axis, out_shape[axis])
    height, width = pictures.shape[1] // patch, pictures.shape[2] // patch
    hidden = forward(pixels(pictures, mean, std))
    tokens = hidden[:, hidden.shape[1] - height * width:]  # CLS and registers come first
    features = tokens.float().cpu().numpy().reshape(len(pictures), height, width, -1)
    maps = torch.from_numpy(features.transpose(3, 0, 1, 2).copy()).to(device).permute(1, 0, 2, 3)  # once [D, n, h, w]
    in_plane = [n for a, n in enumerate(out_shape) if a != axis]
    resized = F.interpolate(maps, size=in_plane, mode="bilinear", align_corners=False)
    return torch.stack(list(resized), dim=1 + axis)


def fused_features(volume: np.ndarray, out_shape: Sequence[int], forward: Forward, *, mean: Sequence[float],
                   std: Sequence[float], patch: int = 16, device: str = "cpu") -> torch.Tensor:
    """The mean [D, *out_shape] float32 of the planes across z, y and x, on `device`."""
    planes = [plane_features(volume, out_shape, axis, forward, mean=mean, std=std, patch=patch, device=device) for axis in range(3)]
    return torch.stack(planes).mean(dim=0)
