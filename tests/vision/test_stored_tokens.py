"""Tokens read from a store are those that a crop would have computed, at the same places; other tokens are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dinoray.config import ExtractVolumeJob
from dinoray.errors import BadRequest, ItemError
from dinoray.vision.crop_features import crop_tokens
from dinoray.vision.voxel_grids import VoxelGrid
from dinoray.volume_extraction import extract_volume
from dinoray.volume_tokens import open_tokens
from tests.runs import tiny_backbone, use_tiny_backbone
from tests.volumes.making import make_volume

SIDE, NM = 64, 16.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokens of a volume of one window, a plane at every voxel."""
    use_tiny_backbone(monkeypatch)
    make_volume(tmp_path / "v.zarr", (SIDE,) * 3, voxel_nm=(NM,) * 3, translation_nm=(40, 0, 0))
    extract_volume(ExtractVolumeJob(sources=str(tmp_path / "v.zarr"), out=str(tmp_path / "t"), model="vitt16", weights="random",
                                    voxel_size=NM, window_px=SIDE, halo_px=0, scaling="dtype", dense_dtype="float32", no_ray=True),
                   lambda line: None)
    return tmp_path / "t"


def opened(store: Path, **changes):
    return open_tokens(str(store), **({"digest": tiny_backbone().digest, "raw_voxel_nm": (NM,) * 3, "name": "tokens"} | changes))


def test_tokens_around_the_middle_are_those_of_the_whole_crop(store, tmp_path) -> None:
    import zarr

    raw = torch.from_numpy(zarr.open_array(tmp_path / "v.zarr/0", mode="r")[:].astype(np.float32) / 255)
    middle = tuple(t + (SIDE - 1) / 2 * NM for t in (40.0, 0.0, 0.0))
    grid = VoxelGrid((SIDE,) * 3, (-(SIDE - 1) / 2 * NM,) * 3, (NM,) * 3)
    expected, grids = crop_tokens(tiny_backbone(), raw[None], grid, grid, planes=("xy", "xz", "yz"), slice_batch=16)
    found = opened(store).around(middle, grid)
    for plane, (values, own) in found.items():
        assert own.pitch_nm == pytest.approx(grids[plane].pitch_nm)
        extra = [(a - b) / p for a, b, p in zip(grids[plane].first_nm, own.first_nm, own.pitch_nm, strict=True)]
        assert extra == pytest.approx([round(e) for e in extra], abs=1e-6) and min(extra) > -1e-6
        part = tuple(slice(round(e), round(e) + n) for e, n in zip(extra, grids[plane].shape, strict=True))
        np.testing.assert_allclose(values[(slice(None), *part)], expected[plane][0].float().numpy(), atol=2e-3)


def test_as_many_tokens_wherever_a_crop_lies_and_all_that_it_needs(store) -> None:
    tokens, shapes = opened(store), set()
    target = VoxelGrid((16,) * 3, (-7.5 * NM,) * 3, (NM,) * 3)
    for shift in (-24.0, -3.0, 0.0, 5.0, 24.0):
        centre = tuple(t + ((SIDE - 1) / 2 + shift) * NM for t in (40.0, 0.0, 0.0))
        found = tokens.around(centre, target)
        shapes.add(tuple(values.shape for values, _ in found.values()))
        for _, grid in found.values():
            for axis in range(3):
                first, last = grid.centres(axis)[[0, -1]]
                low, high = target.centres(axis)[[0, -1]]
                edge = grid.pitch_nm[axis] / 2 + NM
                assert first <= low + edge and last >= high - edge
    assert len(shapes) == 1


def test_other_tokens_are_refused(store, tmp_path) -> None:
    with pytest.raises(BadRequest, match="other weights"):
        opened(store, digest="0" * 64)
    with pytest.raises(BadRequest, match="voxels of"):
        opened(store, raw_voxel_nm=(8.0,) * 3)
    with pytest.raises(BadRequest, match="intensities"):
        opened(store, limits=(0.0, 100.0))
    assert opened(store, limits=(0.0, 255.0))
    with pytest.raises(BadRequest, match="no output"):
        open_tokens(str(tmp_path / "nothing"), digest="", raw_voxel_nm=(NM,) * 3, name="tokens")


def test_tokens_that_were_not_computed_are_no_features(store) -> None:
    sorted(p for p in (store / "dense/xz.zarr/0/c").rglob("*") if p.is_file())[0].unlink()
    target = VoxelGrid((16,) * 3, (-7.5 * NM,) * 3, (NM,) * 3)
    with pytest.raises(ItemError, match="missing_tokens|not there"):
        opened(store).around((40 + 8 * NM, 8 * NM, 8 * NM), target)
