"""`--foreground`: background is not computed, what is computed is the same as without it, and no foreground is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

import dinoray
from dinoray.config import ExtractVolumeJob
from dinoray.errors import BadRequest
from dinoray.io.stores import open_store
from dinoray.session import Outcome
from dinoray.verification import open_run, verify_deep
from dinoray.volume_extraction import extract_volume
from tests.runs import data_objects, use_tiny_backbone

SHAPE = (96, 200, 400)
BLOB = (slice(30, 50), slice(40, 90), slice(290, 350))


def run(source: Path, out: Path, say: Callable[[str], None] = lambda line: None, **fields: object) -> Outcome:
    values = {"raw_voxel_size": (8,), "window_px": 64, "halo_px": 16, "output": "fused", "scaling": "dtype", "unit_windows": 2,
              "unit_planes": 8, "token_budget": 64, **fields}
    return extract_volume(ExtractVolumeJob(sources=(str(source),), out=str(out), model="vitt16", weights="random:0", no_ray=True,
                                           **values), say=say)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Dim noise, and one bright blob."""
    use_tiny_backbone(monkeypatch)
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 20, SHAPE, dtype=np.uint8)
    volume[BLOB] = rng.integers(100, 255, volume[BLOB].shape, dtype=np.uint8)
    zarr.create_array(str(tmp_path / "em.zarr"), shape=SHAPE, chunks=(32, 64, 64), dtype="uint8")[:] = volume
    return tmp_path / "em.zarr"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """The blob in voxels of 32 nm, as a label image of its own place: a coarser OME-Zarr with a translation."""
    labels = np.zeros((25, 51, 101), np.uint32)  # begins one voxel before the volume
    labels[1 + 30 // 4:1 + 50 // 4 + 1, 1 + 40 // 4:1 + 90 // 4 + 1, 1 + 290 // 4:1 + 350 // 4 + 1] = 7
    group = zarr.open_group(str(tmp_path / "mask.zarr"), mode="w", zarr_format=3)
    group.create_array("0", shape=labels.shape, chunks=(16, 16, 16), dtype="uint32")[:] = labels
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    place = [{"type": "scale", "scale": [32.0] * 3}, {"type": "translation", "translation": [-20.0] * 3}]  # (32 - 8) / 2 - 32
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"name": "m", "axes": axes, "datasets": [
        {"path": "0", "coordinateTransformations": place}]}]}
    return tmp_path / "mask.zarr"


@pytest.mark.parametrize("kind", ["threshold", "mask"])
def test_background_is_skipped_and_the_rest_is_the_same(source: Path, mask: Path, tmp_path: Path, kind: str) -> None:
    run(source, tmp_path / "all")
    foreground = "60" if kind == "threshold" else str(mask)
    outcome = run(source, tmp_path / "some", foreground=foreground)
    every, some = (dinoray.open_features(str(tmp_path / name)) for name in ("all", "some"))
    for name in ("xy", "xz", "yz"):
        whole, part = every.tokens(name)[:, :, :], some.tokens(name)[:, :, :]
        known = ~np.isnan(part[0])
        assert 0 < known.mean() < 0.7
        np.testing.assert_array_equal(part[:, known], whole[:, known])
    # every target voxel that holds some of the blob has features of all three planes, and they are the same
    inside = tuple(slice(s.start // 4, -(-s.stop // 4)) for s in BLOB)
    np.testing.assert_array_equal(some[inside], every[inside])
    assert np.isnan(some[:, :, :10]).any()
    assert outcome.exit_code == 0 and outcome.tally.rows < run(source, tmp_path / "all").tally.rows
    store, plan, ledger = open_run(str(tmp_path / "some"))
    verify_deep(store)
    receipts = list(ledger.receipts(plan.unit_ids))
    assert len(receipts) == len(plan), "empty boxes are receipts too"
    empty = {key for receipt in receipts for key in receipt.empty}
    stored = {key for key in data_objects(tmp_path / "some") if "/c/" in key}
    assert empty and not empty & stored
    assert empty | stored == {key for key in data_objects(tmp_path / "all") if "/c/" in key}
    assert sum(len(data) for data in data_objects(tmp_path / "some").values()) < \
        sum(len(data) for data in data_objects(tmp_path / "all").values())


@pytest.mark.parametrize("kind", ["threshold", "mask"])
def test_what_is_skipped_does_not_depend_on_the_units(source: Path, mask: Path, tmp_path: Path, kind: str) -> None:
    foreground = "60" if kind == "threshold" else str(mask)
    run(source, tmp_path / "one", foreground=foreground, unit_windows=1000, unit_planes=1000)
    run(source, tmp_path / "many", foreground=foreground, unit_windows=1, unit_planes=1)
    assert data_objects(tmp_path / "one") == data_objects(tmp_path / "many")


def test_no_foreground_at_all_is_said(source: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    job = ExtractVolumeJob(sources=(str(source),), out=str(tmp_path / "out"), model="vitt16", weights="random:0", no_ray=True,
                           raw_voxel_size=(8,), window_px=64, halo_px=16, foreground="255")
    assert extract_volume(job, say=lines.append).exit_code == 0
    assert any("not one token was computed" in line and "--foreground" in line for line in lines)
    assert "(0.0%)" in lines[-1] and not any("/c/" in key for key in data_objects(tmp_path / "out"))


@pytest.mark.parametrize("crop", [None, "8:56,16:136,160:380"])
def test_a_mask_without_a_scale_lies_on_a_volume_of_its_shape(source: Path, tmp_path: Path, crop: str | None) -> None:
    blob = np.zeros(SHAPE, bool)
    blob[BLOB] = True
    zarr.create_array(str(tmp_path / "scaled.zarr"), shape=SHAPE, chunks=(32, 64, 64), dtype="bool", attributes={
        "resolution": [8, 8, 8], "offset": [-4, -4, -4], "axes": list("zyx"), "units": ["nm"] * 3})[:] = blob
    zarr.create_array(str(tmp_path / "plain.zarr"), shape=SHAPE, chunks=(32, 64, 64), dtype="bool")[:] = blob
    cut = blob if crop is None else blob[8:56, 16:136, 160:380]
    tifffile.imwrite(tmp_path / "cut.tif", cut.astype(np.uint8), photometric="minisblack")
    outs = {}
    for mask in ("scaled.zarr", "plain.zarr", "cut.tif"):
        said: list[str] = []
        run(source, tmp_path / mask[:3], said.append, foreground=str(tmp_path / mask), crop=crop)
        outs[mask] = {key: data for key, data in data_objects(tmp_path / mask[:3]).items() if "/c/" in key}
        assert (mask != "scaled.zarr") == any("mask: " in line and "voxel by voxel" in line for line in said), said
    assert outs["scaled.zarr"] == outs["plain.zarr"] == outs["cut.tif"]
    assert np.isnan(dinoray.open_features(str(tmp_path / "pla"))[:]).any()


def test_a_mask_without_a_scale_of_another_shape_is_refused(source: Path, tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "plain.zarr"), shape=(96, 200, 399), chunks=(32, 64, 64), dtype="bool")[:] = True
    with pytest.raises(BadRequest, match="96 x 200 x 399 voxels, the volume 96 x 200 x 400"):
        run(source, tmp_path / "out", foreground=str(tmp_path / "plain.zarr"))


@pytest.mark.parametrize("foreground", ["abc", "nan", "~", "inf", "1,5", "gone.zarr"])
def test_what_is_neither_a_number_nor_a_mask_is_said(source: Path, tmp_path: Path, foreground: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    with pytest.raises(BadRequest, match="--foreground is neither a number nor a mask volume"):
        run(source, tmp_path / "out", foreground=foreground)


def test_a_mask_that_does_not_cover_the_volume_is_refused(source: Path, tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "small.zarr"), shape=(24, 50, 50), chunks=(8, 8, 8), dtype="uint8",
                      attributes={"resolution": [32, 32, 32], "offset": [0, 0, 0], "axes": list("zyx"), "units": ["nm"] * 3})[:] = 1
    with pytest.raises(BadRequest, match="the mask reaches from"):
        run(source, tmp_path / "out", foreground=str(tmp_path / "small.zarr"))
    assert not open_store(str(tmp_path / "out")).exists("_dinoray/job.json")
