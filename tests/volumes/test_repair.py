"""`retry` of a volume's quarantined slabs: what was mended is computed, what was committed stays; `extend` is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

import dinoray
from dinoray.config import ExtractVolumeJob
from dinoray.errors import BadRequest, ChangedRequest
from dinoray.generations import generations, quarantined_now
from dinoray.io.stores import open_store
from dinoray.repair import extend, retry
from dinoray.session import Outcome
from dinoray.status import status_lines
from dinoray.verification import verify_deep
from dinoray.volume_extraction import extract_volume
from tests.runs import data_objects, use_tiny_backbone


def run(source: Path, out: Path) -> Outcome:
    return extract_volume(ExtractVolumeJob(
        sources=(str(source),), out=str(out), model="vitt16", weights="random:0", no_ray=True, raw_voxel_size=(8,), window_px=64,
        halo_px=16, output="fused", scaling="dtype", unit_windows=2, unit_planes=8), say=lambda line: None)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_tiny_backbone(monkeypatch)
    array = zarr.create_array(str(tmp_path / "em.zarr"), shape=(64, 96, 160), chunks=(32, 48, 40), dtype="uint8")
    array[:] = np.random.default_rng(0).integers(0, 255, array.shape, dtype=np.uint8)
    return tmp_path / "em.zarr"


def test_a_chunk_that_was_mended_is_retried_and_nothing_else_changes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole")
    chunk = source / "c/1/0/3"
    good = chunk.read_bytes()
    chunk.write_bytes(good[:100])
    broken = run(source, tmp_path / "out")
    store = open_store(str(tmp_path / "out"))
    reasons = set(quarantined_now(generations(store))["reason"].to_pylist())
    assert broken.exit_code == 3 and reasons == {"decode", "missing_tokens"}
    before, whole = data_objects(tmp_path / "out"), data_objects(tmp_path / "whole")
    assert 0 < len(before) < len(whole) and all(whole[key] == data for key, data in before.items())
    assert np.isnan(dinoray.open_features(str(tmp_path / "out"))[:, :, :]).any()
    verify_deep(store)

    again = retry(str(tmp_path / "out"), say=lambda line: None)  # nothing was mended: the same slabs are quarantined again
    assert again.exit_code == 3 and data_objects(tmp_path / "out") == before

    chunk.write_bytes(good)
    mended = retry(str(tmp_path / "out"), say=lambda line: None)
    assert mended.exit_code == 0
    assert data_objects(tmp_path / "out") == whole
    verify_deep(store)
    assert any("retry" in line for line in status_lines(str(tmp_path / "out")))
    assert run(source, tmp_path / "out").executed_units == 0  # the first command still knows its output
    assert np.isfinite(dinoray.open_features(str(tmp_path / "out"))[:, :, :]).all()


def test_another_volume_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "c/1/0/3").write_bytes(b"torn")
    assert run(source, tmp_path / "out").exit_code == 3
    with pytest.raises(ChangedRequest, match="has changed since"):
        (source / "c/0/0/0").write_bytes(b"torn too")
        run(source, tmp_path / "out")
    zarr.create_array(str(source), shape=(64, 96, 161), chunks=(32, 48, 40), dtype="uint8", overwrite=True)[:] = 1
    with pytest.raises(ChangedRequest, match="another shape or place"):
        retry(str(tmp_path / "out"), say=lambda line: None)


def test_a_volume_cannot_be_extended(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    with pytest.raises(BadRequest, match="cannot be extended"):
        extend(str(tmp_path / "out"), [str(source)], say=lambda line: None)
