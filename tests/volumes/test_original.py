"""Told to do as the original does, `extract_volume` gives the original's features; by default it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from dinoray.config import ExtractVolumeJob
from dinoray.vision.weights import save_backbone
from dinoray.volume_extraction import extract_volume
from tests.runs import tiny_backbone, use_tiny_backbone
from tests.vision.oracles import allow_broken_torchvision
from tests.volumes.original import eight_bits, fused_features, slices

VOXEL_NM, TARGET_NM = 16.0, 64.0
AS_THE_ORIGINAL = {"slice_sampling": "linspace", "scaling": "slice", "halo_px": 0}


def blobs(shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    """A volume that differs everywhere: a coarse random pattern, a gradient along every axis, and noise."""
    rng = np.random.default_rng(3)
    coarse = rng.random([-(-n // 16) for n in shape])
    fine = np.kron(coarse, np.ones((16, 16, 16)))[tuple(slice(n) for n in shape)]
    slope = sum(np.linspace(0, weight, n).reshape([-1 if a == axis else 1 for a in range(3)])
                for axis, (n, weight) in enumerate(zip(shape, (1.0, 0.6, 0.3), strict=True)))
    values = fine + slope + 0.3 * rng.random(shape)
    return (values / values.max() * np.iinfo(dtype).max * 0.9).astype(dtype)


def fused(folder: Path, volume: np.ndarray, **fields: Any) -> np.ndarray:
    """[D, z, y, x] as a user gets them: the volume as a Zarr array in, the array of fused features out, read by zarr."""
    source = folder / "raw.zarr"
    if not source.exists():
        zarr.create_array(str(source), shape=volume.shape, dtype=volume.dtype, chunks=(32, 32, 32))[:] = volume
    out = folder / f"out{len(list(folder.iterdir()))}"
    job = ExtractVolumeJob(sources=(str(source),), out=str(out), model="vitt16", weights="random", no_ray=True, device="cpu",
                           precision="float32", raw_voxel_size=(VOXEL_NM,), voxel_size=(TARGET_NM,), output="fused",
                           dense_dtype="float32", window_px=max(volume.shape) + 2 * fields["halo_px"], **fields)
    outcome = extract_volume(job, say=lambda line: None)
    assert outcome.exit_code == 0
    return zarr.open_array(str(out / "dense/fused.zarr/0"), mode="r")[...]


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """volume -> the original's features, by transformers with the weights that the jobs of this test compute with."""
    allow_broken_torchvision()  # else transformers cannot be imported beside a CPU-only torch
    from transformers import DINOv3ViTModel

    use_tiny_backbone(monkeypatch)
    config = tiny_backbone().config
    save_backbone(tiny_backbone(), tmp_path / "weights")
    model = DINOv3ViTModel.from_pretrained(tmp_path / "weights", dtype=torch.float32).eval()

    @torch.inference_mode()
    def compute(volume: np.ndarray) -> np.ndarray:
        target = [round(n * VOXEL_NM / TARGET_NM) for n in volume.shape]
        return fused_features(volume, target, lambda x: model(x).last_hidden_state, mean=config.mean, std=config.std).numpy()

    return compute


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference over the root mean square of the features."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.sqrt(np.square(theirs, dtype=np.float64).mean()))


@pytest.mark.parametrize(("shape", "dtype"), [((128, 128, 128), "uint8"), ((128, 128, 128), "uint16"), ((64, 112, 96), "uint16")])
def test_the_originals_flow_is_reproduced(shape, dtype, tmp_path, reference):
    volume = blobs(shape, dtype)
    found = fused(tmp_path, volume, **AS_THE_ORIGINAL)
    assert found.shape[1:] == tuple(n // 4 for n in shape) and found.dtype == np.float32
    assert distance(found, reference(volume)) <= 1e-4


def test_each_of_the_originals_rules_matters(tmp_path, reference):
    """So the test above could fail: with one rule changed to ours the features are others."""
    volume = blobs((64, 64, 64), "uint16")
    theirs = reference(volume)
    assert distance(fused(tmp_path, volume, **AS_THE_ORIGINAL), theirs) <= 1e-4
    for change in ({"slice_sampling": "interpolate"}, {"slice_sampling": "nearest"}, {"scaling": "volume"}, {"halo_px": 16}):
        moved = distance(fused(tmp_path, volume, **{**AS_THE_ORIGINAL, **change}), theirs)
        assert moved > 1e-2, change


def test_the_reference_takes_both_end_slices_and_rounds_down():
    ramp = np.arange(10)[:, None, None] * np.ones((1, 2, 2))
    assert slices(ramp, 0, 4)[:, 0, 0].tolist() == [0, 3, 6, 9]
    assert slices(ramp, 0, 5)[:, 0, 0].tolist() == [0, 2, 4, 6, 9]
    assert eight_bits(np.array([[1000, 1001], [1002, 1004]], np.uint16)).tolist() == [[0, 63], [127, 255]]
    assert not eight_bits(np.full((2, 2), 7, np.uint16)).any()
