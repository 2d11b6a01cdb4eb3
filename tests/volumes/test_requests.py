"""What is refused before any work starts, with exit code 2, a message that says what to do, and no trace in the output."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from dinoray.config import ExtractVolumeJob, build_job
from dinoray.errors import BadRequest, ChangedRequest
from dinoray.io.volume_grid import VolumeGrid
from dinoray.io.volumes import CHUNKS_BYTES, chunk_readers, open_volume
from dinoray.slabs import choose_sizes, windows_in_all, windows_once
from dinoray.volume_extraction import extract_volume
from dinoray.volume_inputs import volume_request
from dinoray.volume_memory import chunks_touched
from dinoray.volume_planning import Forecast, make_forecast, make_grid
from tests.runs import complete, use_tiny_backbone


@pytest.fixture
def source(tmp_path: Path) -> Path:
    array = zarr.create_array(str(tmp_path / "em.zarr"), shape=(64, 96, 130), chunks=(32, 48, 40), dtype="uint8")
    array[:] = np.random.default_rng(0).integers(0, 255, array.shape, dtype=np.uint8)
    return tmp_path / "em.zarr"


def job(source: Path | str, out: Path, **fields: object) -> ExtractVolumeJob:
    return build_job(ExtractVolumeJob, {"sources": str(source), "out": str(out), "model": "vitt16", "weights": "random:0",
                                        "no_ray": True, "raw_voxel_size": 8, "window_px": 64, "halo_px": 16, **fields})


def refused(source: Path, out: Path, **fields: object) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        extract_volume(job(source, out, **fields), say=lambda line: None)
    assert not out.exists() and caught.value.todo
    return caught.value


@pytest.mark.parametrize(("fields", "words"), [
    ({"max_output_bytes": 1000}, ["before compression", "--max-output-bytes"]),
    ({"memory_bytes": 1000}, ["of memory", "--memory-bytes", "--window-px"]),
    ({"window_px": 72}, ["not a multiple of the patch size", "--window-px"]),
    ({"halo_px": 8}, ["not a multiple of the patch size", "--halo-px"]),
    ({"voxel_size": 4}, ["finer than the raw one", "--voxel-size"]),
    ({"scaling": "slice"}, ["each slice in one window", "--scaling"]),
    ({"layer": 99}, ["layer 99", "--layer"]),
    ({"crop": "0:10,0:10,0:1000"}, ["crop"]),
    ({"raw_voxel_size": None}, ["--raw-voxel-size"]),
])
def test_what_cannot_be_done_is_refused_before_it_begins(source: Path, tmp_path: Path, fields: dict, words: list[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_backbone(monkeypatch)
    error = str(refused(source, tmp_path / "out", **fields))
    assert all(word in error for word in words), error


@pytest.mark.parametrize(("fields", "words"), [
    ({"planes": "xy,zz"}, "--planes: 'xy,zz'"), ({"raw_voxel_size": "8,8"}, "--raw-voxel-size: one"),
    ({"voxel_size": -1}, "--voxel-size: one"),
    ({"crop": "1:2"}, "valid:\n  --crop: '1:2' is not"), ({"window_px": 64, "halo_px": 32}, "--halo-px"),
    ({"sources": ["a", "b"]}, "sources"),
    ({"slice_sampling": "cubic"}, "--slice-sampling: "), ({"foreground": "s3://k:secret@bucket/mask.zarr"}, "password"),
])
def test_what_makes_no_sense_is_refused_by_the_job(tmp_path: Path, fields: dict, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        job("em.zarr", tmp_path / "out", **fields)
    assert "secret@" not in str(caught.value)


def test_a_target_voxel_as_long_as_the_volume_is_noticed(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for size in (64, 512, 5000, "16,64,1040"):
        one = job(source, tmp_path / "out", voxel_size=size)
        with open_volume(volume_request(one)) as volume:
            make_grid(one, volume, patch=16, dim=192, token_budget=2048, say=said.append)
    noticed = [line for line in said if "is --voxel-size in nm?" in line]
    assert [line.split(" along ")[1][0] for line in noticed] == list("z" "zyx" "x"), said
    assert noticed[0] == "a target voxel is 512 nm along z, all 64 voxels are 512 nm: is --voxel-size in nm?"


def test_values_may_be_written_in_several_ways(tmp_path: Path) -> None:
    one = job("em.zarr", tmp_path, voxel_size="64", planes=["xz", "xy"], channel=1, crop="0:4, 0:5, 1:6", foreground=12)
    assert one.voxel_size == (64.0,) and one.plane_names() == ("xy", "xz") and one.channel == "1"
    assert one.crop_box() == ((0, 4), (0, 5), (1, 6)) and one.foreground == "12" and one.mask_source() is None
    assert job("em.zarr", tmp_path, voxel_size="40,4,4").voxel_size == (40.0, 4.0, 4.0)
    assert job("em.zarr", tmp_path, foreground="mask.zarr").mask_source() == "mask.zarr"
    assert job("em.zarr", tmp_path, foreground="-1.5e3").mask_source() is None


def test_other_settings_are_refused_and_another_cut_into_units_is_not(source: Path, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_backbone(monkeypatch)
    extract_volume(job(source, tmp_path / "out"), say=lambda line: None)
    with pytest.raises(ChangedRequest, match="halo_px: 16 -> 0"):
        extract_volume(job(source, tmp_path / "out", halo_px=0), say=lambda line: None)
    same = extract_volume(job(source, tmp_path / "out", unit_windows=1, memory_bytes=3 * 10**9), say=lambda line: None)
    assert same.executed_units == 0


def test_the_command_line(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dinoray.cli", "extract", "volume", str(source), "--out", str(tmp_path / "out"), "--model",
               "vitt16", "--weights", "random", "--window-px", "64", "--halo-px", "16", "--no-ray"]
    assert "--raw-voxel-size" in complete(command, code=2)
    printed = complete([*command, "--raw-voxel-size", "8", "--crop", "0:32,0:48,0:64"])
    assert "32x48x64 voxels of 8 nm" in printed and "target voxel 32 nm" in printed and "complete:" in printed
    assert "resume with: dinoray extract volume" in printed
    resume = printed.split("same command again: ")[1].splitlines()[0].replace("dinoray ", "", 1)
    assert "done before" in complete([sys.executable, "-m", "dinoray.cli", *shlex.split(resume)])


def test_the_job_script_takes_the_shipped_configuration_and_overrides(source: Path, tmp_path: Path) -> None:
    """jobs/extract_volume.py FILE.yaml key=value: what `ray job submit` runs."""
    root = Path(__file__).resolve().parents[2]
    script = [sys.executable, str(root / "jobs/extract_volume.py"), str(root / "jobs/configs/extract_volume.yaml"),
              f"sources={source}", f"out={tmp_path / 'out'}", "model=vitt16", "weights=random", "no_ray=true", "window_px=64",
              "halo_px=16", "raw_voxel_size=[8, 8, 8]", "crop=0:32,0:48,0:64"]
    assert "complete: " in complete(script)
    assert "voxel_size: null -> [2.0]" in complete([*script, "voxel_size=2"], code=2)


@pytest.mark.parametrize("shape", [(512,) * 3, (2300,) * 3, (700, 4000, 9000), (10_000,) * 3, (60, 20_000, 20_000)])
@pytest.mark.parametrize("window", [(512, 32), (128, 32), (256, 0)])
def test_units_compute_at_most_half_again(shape: tuple[int, int, int], window: tuple[int, int]) -> None:
    grid = VolumeGrid(shape, (16.0,) * 3, (0.0,) * 3, (64.0,) * 3, 16, ("xy", "xz", "yz"), *window, 8, 384, "float16")
    sizes = choose_sizes(grid, None, None)
    assert 1 <= windows_in_all(grid, sizes) / windows_once(grid) <= 1.5
    for name in grid.planes:  # units are whole windows and whole shards
        plane = grid.plane(name)
        assert sizes.depth(plane) % plane.array.shards[plane.normal] == 0 or plane.shape[plane.normal] < plane.planes_per_shard


def forecast_of(tmp_path: Path, shape: tuple[int, int, int], chunks: tuple[int, int, int], **fields: object) -> Forecast:
    """Of a volume whose chunks are not stored, but for a file: a forecast reads none."""
    zarr.create_array(str(tmp_path / "big.zarr"), shape=shape, chunks=chunks, dtype="uint8")
    (tmp_path / "big.zarr/c/0/0").mkdir(parents=True)
    (tmp_path / "big.zarr/c/0/0/0").write_bytes(b"x")
    one = job(tmp_path / "big.zarr", tmp_path / "out", **fields)
    with open_volume(volume_request(one)) as volume:
        return make_forecast(one, make_grid(one, volume, patch=16, dim=192, token_budget=2048), volume, threads=2)


def test_a_volume_in_one_large_chunk_takes_that_chunk_once(tmp_path: Path) -> None:
    slabs = forecast_of(tmp_path, (256, 1024, 1024), (256, 1024, 1024)).slabs
    assert (slabs.chunk_bytes, slabs.planes.chunks) == (2**28, 1)
    assert slabs.bytes_of_chunks == 3 * 2**28 < slabs.smallest < 2 * 10**9


def test_chunks_that_no_budget_holds_are_named_and_the_advice_helps(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        forecast_of(tmp_path, (256, 1024, 1024), (256, 1024, 1024), memory_bytes=500_000_000)
    assert "a chunk of the source has 268,435,456 bytes (268 MB), 1 is in work at once" in caught.value.what
    assert "smaller chunks" in caught.value.todo and "--window-px" not in caught.value.todo
    (tmp_path / "small").mkdir()
    with pytest.raises(BadRequest) as caught:
        forecast_of(tmp_path / "small", (64, 256, 256), (32, 32, 32), memory_bytes=20_000_000, unit_windows=1, window_px=512)
    assert "chunk" not in str(caught.value) and "--window-px" in caught.value.todo and "--unit-windows" not in caught.value.todo


def test_of_large_chunks_fewer_are_in_work() -> None:
    assert [chunk_readers(n) for n in (1, 64**3, CHUNKS_BYTES // 8, CHUNKS_BYTES // 3, CHUNKS_BYTES, 2**31)] == [8, 8, 8, 3, 1, 1]


@given(st.integers(0, 50), st.lists(st.integers(0, 200), min_size=1, max_size=40, unique=True), st.integers(1, 60))
def test_chunks_touched_is_never_too_few(origin: int, indices: list[int], chunk: int) -> None:
    found = np.array(sorted(indices))
    touched = len(set(((found + origin) // chunk).tolist()))
    assert touched <= chunks_touched(found, chunk, 1000) <= len(indices)
    assert chunks_touched(found, chunk, touched) == touched, "never more than there are"
