"""Stored tokens are what the backbone gives for the window's pixels, computed here by hand; any layer, any plane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import dinoray
from dinoray.config import ExtractVolumeJob
from dinoray.volume_extraction import extract_volume
from tests.runs import tiny_backbone, use_tiny_backbone

SHAPE = (64, 96, 80)


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    use_tiny_backbone(monkeypatch)
    values = np.random.default_rng(5).integers(-500, 3000, SHAPE, dtype=np.int16)
    zarr.create_array(str(tmp_path / "em.zarr"), shape=SHAPE, chunks=(32, 32, 32), dtype="int16")[:] = values
    return values


def run(folder: Path, **fields: object) -> dinoray.io.volume_features.VolumeFeatures:
    extract_volume(ExtractVolumeJob(sources=(str(folder / "em.zarr"),), out=str(folder / "out"), model="vitt16", weights="random:0",
                                    no_ray=True, raw_voxel_size=(8,), voxel_size=(32,), window_px=64, halo_px=16,
                                    dense_dtype="float32", **fields), say=lambda line: None)
    return dinoray.open_features(str(folder / "out"))


def by_hand(volume: np.ndarray, plane: str, k: int, layer: int | None) -> np.ndarray:
    """Tokens [D, rows, cols] of target plane k: windows of 4 tokens every 2, blended by (1/4, 3/4) over two tokens."""
    backbone = tiny_backbone()
    slices = np.moveaxis(volume, {"xy": 0, "xz": 1, "yz": 2}[plane], 0).astype(np.float64)
    low, high = np.percentile(volume, 0.1), np.percentile(volume, 99.9)
    image = np.clip(((slices[4 * k + 1] + slices[4 * k + 2]) / 2 - low) / (high - low), 0, 1)
    rows, cols = image.shape[0] // 16, image.shape[1] // 16
    padded = np.pad(image, ((16, 64), (16, 64)), mode="reflect")
    total, weights = np.zeros((backbone.config.dim, rows + 8, cols + 8)), np.zeros((rows + 8, cols + 8))
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (backbone.config.mean, backbone.config.std))
    for i in range(0, rows, 2):
        for j in range(0, cols, 2):
            part = padded[i * 16:i * 16 + 64, j * 16:j * 16 + 64]
            pixels = torch.from_numpy(((part[None] - mean) / std)[None]).float()
            with torch.inference_mode():
                found = backbone(pixels, layers=None if layer is None else (layer,))
            tokens = (found if layer is None else found.layers[layer]).patches[0].permute(2, 0, 1).double().numpy()
            weight = np.outer(*([0.25 if first else 1, 0.75 if first else 1, 0.75 if not last else 1, 0.25 if not last else 1]
                                for first, last in ((i > 0, i + 2 >= rows), (j > 0, j + 2 >= cols))))
            total[:, i:i + 4, j:j + 4] += tokens * weight
            weights[i:i + 4, j:j + 4] += weight
    inside = np.s_[1:1 + rows, 1:1 + cols]
    np.testing.assert_allclose(weights[inside], 1)
    return total[(slice(None), *inside)]


@pytest.mark.parametrize("layer", [None, 0])
def test_tokens_are_those_of_the_backbone(volume: np.ndarray, tmp_path: Path, layer: int | None) -> None:
    features = run(tmp_path, layer=layer)
    for plane, k in (("xy", 3), ("xz", 23), ("yz", 0)):
        expected = by_hand(volume, plane, k, layer)
        normal = {"xy": 0, "xz": 1, "yz": 2}[plane]
        stored = np.moveaxis(features.tokens(plane)[:, :, :], 1 + normal, 1)[:, k]
        assert stored.shape == expected.shape
        assert np.abs(stored - expected).max() <= 1e-4 * np.abs(expected).max()
    assert features.facts["layers"] == (None if layer is None else [layer])
