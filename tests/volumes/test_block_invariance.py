"""A volume in one unit and in many: equal bytes. And its seams: no steps where windows meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

import dinoray
from dinoray.config import ExtractVolumeJob
from dinoray.io.volume_grid import Lattice
from dinoray.session import Outcome
from dinoray.verification import open_run, verify_deep
from dinoray.volume_extraction import extract_volume
from tests.conftest import texture
from tests.realdata import data_folder
from tests.runs import data_objects, use_tiny_backbone

FIB25 = "training_sample2/grayscale_maps"


def run(source: Path, out: Path, **fields: object) -> Outcome:
    values = {"model": "vitt16", "weights": "random:0", "no_ray": True, "raw_voxel_size": 8, **fields}
    return extract_volume(ExtractVolumeJob(sources=(str(source),), out=str(out), **values), say=lambda line: None)


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """70 x 150 x 240 voxels of noise, 16 bit: sides that are multiples of nothing."""
    rng = np.random.default_rng(3)
    array = zarr.create_array(str(tmp_path / "noise.zarr"), shape=(70, 150, 240), chunks=(32, 40, 64), dtype="uint16")
    array[:] = rng.integers(0, 5000, array.shape, dtype=np.uint16)
    return tmp_path / "noise.zarr"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [{"window_px": 64, "halo_px": 16}, {"window_px": 96, "halo_px": 16, "voxel_size": 21}],
                         ids=["lattice-32px", "lattice-64px"])
def test_one_unit_and_many_give_equal_bytes(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str,
                                            shape: dict) -> None:
    use_tiny_backbone(monkeypatch)
    common = {"precision": precision, "output": "fused", "token_budget": 64, **shape}
    one = run(noise, tmp_path / "one", unit_windows=10**6, unit_planes=10**6, compute_threads=2, **common)
    many = run(noise, tmp_path / "many", unit_windows=1, unit_planes=1, compute_threads=1, **common)
    some = run(noise, tmp_path / "some", unit_windows=4, unit_planes=16, **common)
    fused = sum(key.startswith("dense/fused") for key in data_objects(tmp_path / "one"))
    assert fused > 3 and one.num_units == 4 < some.num_units < many.num_units
    expected = data_objects(tmp_path / "one")
    assert data_objects(tmp_path / "many") == expected == data_objects(tmp_path / "some")
    verify_deep(open_run(str(tmp_path / "many"))[0])
    values = zarr.open_array(str(tmp_path / "many/dense/fused.zarr/0"), mode="r")[:]
    assert np.isfinite(values).all() and values.astype(np.float32).std() > 0.1


def test_every_forward_is_of_the_same_windows_whatever_the_unit(noise: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bytes must not rest on a kind device: the batches themselves are equal, position for position."""
    use_tiny_backbone(monkeypatch)
    from dinoray.vision.extractor import Extractor

    seen: list[set[bytes]] = []
    extract = Extractor.extract

    def recorded(self, crops):
        seen[-1].add(b"".join(crop.pixels.tobytes() for crop in crops))
        return extract(self, crops)

    monkeypatch.setattr(Extractor, "extract", recorded)
    for name, fields in (("one", {"unit_windows": 1000, "unit_planes": 1000}), ("many", {"unit_windows": 1, "unit_planes": 1})):
        seen.append(set())
        run(noise, tmp_path / name, window_px=64, halo_px=16, token_budget=64, planes="xy", **fields)
    assert seen[0] == seen[1] and len(seen[0]) > 30


def jumps(tokens: np.ndarray, rows: Lattice, cols: Lattice) -> tuple[float, float]:
    """Mean distance of neighbouring tokens [D, planes, y, x]: of pairs in the windows' overlap, and of the others."""
    found: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for axis, lattice in ((2, rows), (3, cols)):
        distance = np.linalg.norm(np.diff(tokens.astype(np.float32), axis=axis), axis=0)
        shared = [sum(lattice.start(w) <= t < lattice.start(w) + lattice.window for w in range(lattice.count)) > 1
                  for t in range(lattice.tokens)]
        for pair in range(lattice.tokens - 1):
            found[shared[pair] or shared[pair + 1]].append(np.take(distance, pair, axis - 1).mean())
    return float(np.mean(found[True])), float(np.mean(found[False]))


def check_seams(source: Path, out: Path, halo: int, **fields: object) -> None:
    run(source, out, model="vits16", window_px=128, halo_px=halo, planes="xy", **fields)
    features = dinoray.open_features(str(out))
    plane = features.grid.plane("xy")
    overlap, outside = jumps(features.tokens("xy")[:, :, :], plane.lattice(1), plane.lattice(2))
    print(f"halo {halo}: jump {overlap:.2f} in the overlap, {outside:.2f} outside: {overlap / outside:.3f}")
    assert overlap <= 1.1 * outside


@pytest.mark.parametrize("halo", [16, 32])
def test_no_seams_in_a_real_volume(tmp_path: Path, halo: int) -> None:
    check_seams(data_folder("fib25_neuroproof") / FIB25, tmp_path / "out", halo, raw_voxel_size=10, voxel_size=800)


@pytest.mark.parametrize("halo", [16, 32])
def test_no_seams_in_a_texture(tmp_path: Path, halo: int) -> None:
    volume = np.stack([texture((250, 300), seed) for seed in range(8)])
    array = zarr.create_array(str(tmp_path / "texture.zarr"), shape=volume.shape, chunks=(4, 128, 128), dtype=volume.dtype)
    array[:] = volume
    check_seams(tmp_path / "texture.zarr", tmp_path / "out", halo, voxel_size=32)
