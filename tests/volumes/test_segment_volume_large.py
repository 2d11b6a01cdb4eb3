"""Segmented volumes: stored tokens, pyramids, margins that are wide enough, Ray, kills."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from dinoray.chaos.kills import Kill
from dinoray.chaos.striking import start_and_strike
from dinoray.config import ExtractVolumeJob
from dinoray.errors import BadRequest
from dinoray.io.stores import LocalStore
from dinoray.train import train
from dinoray.verification import open_run, verify_deep
from dinoray.vision.fusion_model import VolumeCrop
from dinoray.volume_extraction import extract_volume
from dinoray.volume_segmentation import segment_volume
from dinoray.volume_tokens import open_tokens
from tests.runs import data_objects, tiny_backbone, use_tiny_backbone
from tests.training.volumes import build, fusion_job, make_pair
from tests.volumes.labelling import labels_of, make_checkpoint, probabilities_of, segment_job
from tests.volumes.making import REPOSITORY, make_volume, receipts_of

FLAGS = {"window_voxels": 16, "halo_voxels": 4, "unit_windows": 1, "block_voxels": 32, "shard_voxels": 16, "precision": "float32",
         "device": "cpu", "decode_threads": 1, "compute_threads": 1}


def flags(**more: Any) -> list[str]:
    return [word for name, value in (FLAGS | more).items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extraction and checkpoints both compute with the tiny backbone."""
    use_tiny_backbone(monkeypatch)
    monkeypatch.setattr("dinoray.vision.fusion_checkpoint.load_backbone", lambda *args, dtype, **rest: tiny_backbone().to(dtype))


def test_with_tokens_from_the_store_blocks_give_what_the_whole_gives(tmp_path: Path, tiny: None) -> None:
    source = make_volume(tmp_path / "v.zarr", (70, 52, 61), voxel_nm=(16, 16, 16), seed=3)
    extract_volume(ExtractVolumeJob(sources=str(source), out=str(tmp_path / "tokens"), model="vitt16", weights="random",
                                    window_px=64, halo_px=16, voxel_size=16, no_ray=True), print)
    checkpoint, model, config = make_checkpoint(tmp_path / "c", inputs="both")
    halo = -(-model.unet.unet.receptive_radius // 4) * 4
    lines: list[str] = []
    segment_volume(segment_job(source, checkpoint, tmp_path / "out", tokens=str(tmp_path / "tokens"), window_voxels=4 * halo,
                               halo_voxels=halo, blend=False, unit_windows=1, probabilities=True,
                               probability_dtype="float32"), lines.append)
    assert any("blocks give exactly" in line for line in lines), lines
    facts = open_run(str(tmp_path / "out"))[1].facts
    low, high = facts["limits"]
    raw = np.clip((zarr.open_array(source / "0", mode="r")[:].astype(np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    from dinoray.training.volume_samples import centred

    tokens = open_tokens(str(tmp_path / "tokens"), digest=config.backbone.digest, raw_voxel_nm=(16.0,) * 3, name="tokens")
    target = centred(raw.shape, (16.0,) * 3)
    centre = tuple((n - 1) / 2 * 16.0 for n in raw.shape)
    crop = VolumeCrop(target, raw, target, tokens=tokens.around(centre, target))
    with torch.inference_mode():
        expected = torch.softmax(model([crop])[0], 0).numpy()
    np.testing.assert_allclose(probabilities_of(tmp_path / "out"), expected, atol=1e-4)
    assert len(receipts_of(tmp_path / "out")) > 2 and expected.std() > 0.05
    part = tmp_path / "part"
    extract_volume(ExtractVolumeJob(sources=str(source), out=str(part), model="vitt16", weights="random", window_px=64, halo_px=16,
                                    voxel_size=16, crop="0:70,0:52,0:40", no_ray=True), print)
    with pytest.raises(BadRequest, match=r"to 632 nm along x, what is segmented is -8 to 968 nm"):
        segment_volume(segment_job(source, checkpoint, tmp_path / "beyond", tokens=str(part)), print)
    without = tmp_path / "without"
    segment_volume(segment_job(source, checkpoint, without, probabilities=True, probability_dtype="float32"), print)
    assert np.abs(probabilities_of(without) - expected).max() > 1e-3, "tokens of windows are not those of the volume"


def test_a_level_of_a_pyramid_serves_the_model_and_another_its_context(tmp_path: Path, tiny: None) -> None:
    """16 nm for a model of 16 nm, and of three levels; the context of 32 nm comes from the level of 32 nm."""
    fine = np.random.default_rng(0).integers(0, 255, (64, 64, 64), np.uint8).astype(np.float32)
    levels = [fine]
    for _ in range(2):
        z, y, x = (n // 2 for n in levels[-1].shape)
        levels.append(levels[-1].reshape(z, 2, y, 2, x, 2).mean(axis=(1, 3, 5)))
    folder, datasets = tmp_path / "v.zarr", []
    for k, values in enumerate(levels):
        array = zarr.create_array(folder / str(k), shape=values.shape, dtype="uint8", chunks=(16,) * 3, zarr_format=3)
        array[:] = values.round().astype(np.uint8)
        pitch = 8.0 * 2**k
        datasets.append({"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": [pitch] * 3},
                                                                       {"type": "translation", "translation": [pitch / 2] * 3}]})
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    (folder / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {
        "ome": {"version": "0.5", "multiscales": [{"name": "v", "axes": axes, "datasets": datasets}]}}}))
    checkpoint, _, _ = make_checkpoint(tmp_path / "c", fusion="full", inputs="both")
    lines: list[str] = []
    segment_volume(segment_job(folder, checkpoint, tmp_path / "out"), lines.append)
    assert any(line.startswith("context: voxels of 32 nm") and "1 of them in a pixel" in line for line in lines), lines
    assert open_run(str(tmp_path / "out"))[1].facts["grid"]["shape"] == [32, 32, 32]
    verify_deep(open_run(str(tmp_path / "out"))[0])


@pytest.mark.slow
def test_the_shipped_margin_agrees_with_a_wider_one(tmp_path: Path) -> None:
    """A trained model of the default depth: halo 32, blended, against 48, on 99.5 % of the voxels' labels."""
    raw, labels = make_pair(tmp_path / "in", (96, 96, 160), classes=True)
    regions = [{"raw": str(raw), "labels": str(labels), "region": r} for r in ("0:96,0:96,0:96", "0:96,0:96,112:160")]
    train(build(fusion_job((raw, labels), tmp_path / "model", train=regions[:1], validation=regions[1:], steps=120, batch_size=2,
                           micro_batch=1, crop_voxels=32, levels=3, validate_every=30, checkpoint_every=30)), print)
    outs = []
    for halo in (None, 48):
        outs.append(tmp_path / f"out{halo}")
        # windows as wide in either case: what differs is how much of them counts
        segment_volume(segment_job(raw, tmp_path / "model/checkpoint", outs[-1], halo_voxels=halo, unit_windows=None,
                                   window_voxels=128 if halo is None else 192, shard_voxels=64, block_voxels=64), print)
    found = [labels_of(out) for out in outs]
    assert open_run(str(outs[0]))[1].facts["grid"]["halo"] != open_run(str(outs[1]))[1].facts["grid"]["halo"]
    assert (found[0] == found[1]).mean() >= 0.995
    assert 0.2 < (found[0] == 1).mean() < 0.8


@pytest.mark.slow
@pytest.mark.ray
def test_under_ray_with_kills_the_bytes_are_those_of_a_run_without_it(tmp_path: Path) -> None:
    source = make_volume(tmp_path / "v.zarr", (70, 52, 61), voxel_nm=(16, 16, 16), seed=3)
    checkpoint, _, _ = make_checkpoint(tmp_path / "c", target="affinities")
    base = [sys.executable, "-m", "dinoray.cli", "segment", "volume", str(source), "--checkpoint", str(checkpoint)]
    subprocess.run([*base, "--out", str(tmp_path / "clean"), "--no-ray", *flags()], check=True, cwd=REPOSITORY)
    store, rng, struck = LocalStore(tmp_path / "out"), random.Random(4), []
    argv = [*base, "--out", str(tmp_path / "out"), *flags(workers=2)]
    for kills in ([Kill("actor", "volume.data"), Kill("actor", "volume.receipt", 2), Kill("driver", "run.verify")], []):
        start = start_and_strike(argv, store, kills, rng=rng, work_s=1, units=len(receipts_of(tmp_path / "clean")))
        struck += start.carried_out
        assert start.code == (-signal.SIGKILL if kills else 0) and not start.again, start.printed
    assert len(struck) == 3, struck
    verify_deep(open_run(str(tmp_path / "out"))[0])
    assert data_objects(tmp_path / "out") == data_objects(tmp_path / "clean")
    assert len(np.unique(labels_of(tmp_path / "out"))) > 10


@pytest.mark.slow
def test_a_volume_four_times_larger_than_the_budget_passes_within_it(tmp_path: Path) -> None:
    """1 GB of raw voxels, 16 MB of labels, 256 MB: what the run's receipts say that it took above the process with its model."""
    side = 800
    source, budget = make_volume(tmp_path / "v.zarr", (side,) * 3, voxel_nm=(4, 4, 4), chunk=50, dtype="uint16"), 2 * side**3 // 4
    checkpoint, _, _ = make_checkpoint(tmp_path / "c", factor=4)
    fields = {"window_voxels": 24, "halo_voxels": 4, "blend": False, "unit_windows": None, "block_voxels": 48, "shard_voxels": 24,
              "memory_bytes": budget, "decode_threads": 1, "compute_threads": 1, "scaling": "dtype"}
    script = ("import sys, json; from tests.volumes.labelling import segment_job; "
              "from dinoray.volume_segmentation import segment_volume; "
              "sys.exit(segment_volume(segment_job(*sys.argv[1:4], **json.loads(sys.argv[4])), print).exit_code)")
    done = subprocess.run([sys.executable, "-c", script, str(source), str(checkpoint), str(tmp_path / "out"), json.dumps(fields)],
                          cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    receipts = receipts_of(tmp_path / "out")
    peak = max(receipt.memory.get("above_model", 0) for receipt in receipts)
    assert 0 < peak <= budget, (peak, budget)
    assert labels_of(tmp_path / "out").shape == (side // 4,) * 3
    verify_deep(open_run(str(tmp_path / "out"))[0])
