"""`retry` of a volume's quarantined slabs: what was mended is computed, what was committed stays; `extend` is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import zarr

import dinoray
from dinoray.config import ExtractVolumeJob
from dinoray.errors import BadRequest, ChangedRequest
from dinoray.generations import generations, quarantined_now
from dinoray.io.fusion import plane_to_grid
from dinoray.io.stores import open_store
from dinoray.io.volume_grid import VolumeGrid
from dinoray.repair import extend, retry
from dinoray.session import Outcome
from dinoray.status import status_lines
from dinoray.verification import verify_deep
from dinoray.volume_extraction import extract_volume
from tests.runs import data_objects, use_tiny_backbone


def run(source: Path, out: Path, **fields: object) -> Outcome:
    values = {"unit_windows": 2, "unit_planes": 8, "token_budget": 64, **fields}
    return extract_volume(ExtractVolumeJob(
        sources=(str(source),), out=str(out), model="vitt16", weights="random:0", no_ray=True, raw_voxel_size=(8,), window_px=64,
        halo_px=16, output="fused", scaling="dtype", **values), say=lambda line: None)


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
    same = [key for key, data in before.items() if whole[key] == data]
    assert 5 < len(same) < len(whole), "some shards are whole, some are not"
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


def known(out: Path, name: str) -> np.ndarray:
    return ~np.isnan(zarr.open_array(str(out / f"dense/{name}.zarr/0"), mode="r")[0])


def test_a_corrupt_chunk_costs_the_windows_that_hold_it_and_nothing_else(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole")
    chunk = [(32, 64), (0, 48), (120, 160)]
    (source / "c/1/0/3").write_bytes(b"torn")
    run(source, tmp_path / "out")
    grid = VolumeGrid.read(dinoray.open_features(str(tmp_path / "out")).facts["grid"])
    lost = {}
    for name in ("xy", "xz", "yz"):
        plane = grid.plane(name)
        expected = np.ones(plane.shape, bool)
        (a, b), n = plane.axes, plane.normal
        for first in range(0, plane.shape[n], grid.micro_batch):
            slices = {i for k in range(first, min(first + grid.micro_batch, plane.shape[n])) for i in (4 * k + 1, 4 * k + 2)}
            for i, j in product(range(plane.lattice(a).count), range(plane.lattice(b).count)):
                tokens = {axis: (lattice.start(w), lattice.start(w) + lattice.window)
                          for axis, lattice, w in ((a, plane.lattice(a), i), (b, plane.lattice(b), j))}
                holds = any(chunk[n][0] <= s < chunk[n][1] for s in slices) and all(
                    low * 16 < chunk[axis][1] and high * 16 > chunk[axis][0] for axis, (low, high) in tokens.items())
                if holds:
                    box = {n: slice(first, first + grid.micro_batch)} | {x: slice(max(0, t[0]), t[1]) for x, t in tokens.items()}
                    expected[tuple(box[x] for x in range(3))] = False
        found = known(tmp_path / "out", name)
        np.testing.assert_array_equal(found, expected)
        assert 0.1 < found.mean() < 1
        one, other = (zarr.open_array(str(tmp_path / f"{o}/dense/{name}.zarr/0"), mode="r")[:] for o in ("out", "whole"))
        np.testing.assert_array_equal(one[:, found], other[:, found])
        lost[name] = plane_to_grid(lambda *box, one=one: one[(slice(None), *(slice(*box[2 * x:2 * x + 2]) for x in range(3)))],
                                   plane, (0, 0, 0), grid.target_shape)
    fused = known(tmp_path / "out", "fused")
    np.testing.assert_array_equal(fused, ~np.isnan(sum(lost.values())[0]))
    np.testing.assert_array_equal(dinoray.open_features(str(tmp_path / "out"))[:, :, :][0].shape, fused.shape)
    run(source, tmp_path / "many", unit_windows=1, unit_planes=1)
    run(source, tmp_path / "one", unit_windows=1000, unit_planes=1000)
    assert data_objects(tmp_path / "many") == data_objects(tmp_path / "out") == data_objects(tmp_path / "one")


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
