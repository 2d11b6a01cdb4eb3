"""`dinoray segment volume`: blocks give what the whole gives, any cut into units gives equal bytes.

Kills leave nothing behind, bad input is refused or quarantined.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from dinoray.errors import BadRequest, SystemicError
from dinoray.ledger import Ledger
from dinoray.repair import extend, retry
from dinoray.runners.volume_windows import _centred
from dinoray.status import status_lines
from dinoray.verification import open_run, verify_deep
from dinoray.vision.affinities import components
from dinoray.vision.fusion_model import FusionModel, VolumeCrop
from dinoray.volume_segmentation import segment_volume
from tests.runs import data_objects, tiny_backbone, use_tiny_backbone
from tests.training.volumes import write_volume
from tests.volumes.labelling import labels_of, make_checkpoint, probabilities_of, segment_job
from tests.volumes.making import make_volume, receipts_of

SHAPE = (70, 52, 61)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_volume(tmp_path_factory.mktemp("volume") / "v.zarr", SHAPE, voxel_nm=(16, 16, 16), seed=3)


def run(*args, **fields) -> list[str]:
    lines: list[str] = []
    outcome = segment_volume(segment_job(*args, **fields), lines.append)
    assert outcome.exit_code == 0, lines
    verify_deep(open_run(str(args[2]))[0])
    return lines


def whole(model, source: Path, limits, factor: int = 1) -> np.ndarray:
    """Logits [outputs, z, y, x] of the whole volume at once."""
    raw = zarr.open_array(source / "0", mode="r")[:].astype(np.float32)
    raw = np.clip((raw - np.float32(limits[0])) * np.float32(1 / (limits[1] - limits[0])), 0, 1)
    shape = tuple(n // factor for n in raw.shape)
    raw = raw[tuple(slice(0, n * factor) for n in shape)]
    crop = VolumeCrop(_centred(shape, (16.0,) * 3), raw, _centred(raw.shape, (16.0 / factor,) * 3))
    with torch.inference_mode():
        return model([crop])[0].numpy()


# ---------------------------------------------------------------- blocks and the whole


@pytest.mark.parametrize("target", ["classes", "affinities"])
def test_with_a_margin_of_the_receptive_radius_probabilities_are_those_of_the_whole_volume(source, tmp_path, target) -> None:
    checkpoint, model, _ = make_checkpoint(tmp_path / "c", target=target)
    radius = model.unet.unet.receptive_radius
    halo = -(-radius // 4) * 4
    lines = run(source, checkpoint, tmp_path / "out", window_voxels=4 * halo,
                halo_voxels=halo, blend=False, unit_windows=1, probabilities=target == "classes", probability_dtype="float32")
    assert any(f"receptive radius {radius}" in line and "blocks give exactly" in line for line in lines)
    logits = whole(model, source, open_run(str(tmp_path / "out"))[1].facts["limits"])
    expected = torch.softmax(torch.from_numpy(logits), 0).numpy() if target == "classes" else 1 / (1 + np.exp(-logits))
    found = probabilities_of(tmp_path / "out")
    assert len(Ledger(open_run(str(tmp_path / "out"))[0]).done()) > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected.std() > 0.05, "a constant would tell nothing"
    if target == "classes":
        assert (labels_of(tmp_path / "out") == found.argmax(0)).all()


@pytest.mark.parametrize(("fusion", "fields"), [("none", {}), ("none", {"blend": False}), ("none", {"precision": "bfloat16"}),
                                                ("full", {"precision": "bfloat16", "crop": "0:46,0:40,0:44"})])
def test_any_cut_into_units_gives_equal_bytes(source, tmp_path, monkeypatch, fusion, fields) -> None:
    use_tiny_backbone(monkeypatch)
    monkeypatch.setattr("dinoray.vision.fusion_checkpoint.load_backbone", lambda *args, dtype, **rest: tiny_backbone().to(dtype))
    checkpoint, _, _ = make_checkpoint(tmp_path / "c", target="affinities", fusion=fusion,
                                       inputs="raw" if fusion == "none" else "both")
    outs = []
    for windows in (1, 3, 100):
        outs.append(tmp_path / str(windows))
        run(source, checkpoint, outs[-1], unit_windows=windows, compute_threads=1 + windows % 2, **fields)
    units = [len(open_run(str(out))[1].stages[0]) for out in outs]
    assert units[0] > units[1] > units[2] == 1
    assert data_objects(outs[0]) == data_objects(outs[1]) == data_objects(outs[2])
    assert len(np.unique(labels_of(outs[0]))) > 10


def test_instances_are_the_connected_components_of_the_stored_affinities(source, tmp_path) -> None:
    checkpoint, _, _ = make_checkpoint(tmp_path / "c", target="affinities")
    run(source, checkpoint, tmp_path / "out", threshold=0.7)
    stored = probabilities_of(tmp_path / "out").astype(np.float32) / np.float32(255)
    labels, expected = labels_of(tmp_path / "out"), components(stored, 0.7)
    assert len(open_run(str(tmp_path / "out"))[1].stages) == 5
    pairs = np.unique(np.stack([labels.ravel().astype(np.int64), expected.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1] > 10
    assert labels.dtype == np.uint64 and ((labels == 0) == (expected == 0)).all()


def test_raw_finer_than_labels_and_a_volume_that_is_no_multiple(tmp_path) -> None:
    fine = make_volume(tmp_path / "v.zarr", (51, 40, 45), voxel_nm=(8, 8, 8), translation_nm=(100, 0, 0))
    checkpoint, model, _ = make_checkpoint(tmp_path / "c", factor=2)
    run(fine, checkpoint, tmp_path / "out", window_voxels=128, halo_voxels=None, unit_windows=None, probabilities=True,
        probability_dtype="float32")
    facts = open_run(str(tmp_path / "out"))[1].facts
    assert facts["grid"]["shape"] == [25, 20, 22]
    assert facts["grid"]["translation_nm"] == [104.0, 4.0, 4.0]  # the middle of two raw voxels of 8 nm, the first centred at 100
    expected = torch.softmax(torch.from_numpy(whole(model, fine, facts["limits"], 2)), 0).numpy()
    np.testing.assert_allclose(probabilities_of(tmp_path / "out"), expected, atol=1e-4)
    ome = json.loads((tmp_path / "out/labels.zarr/zarr.json").read_text())["attributes"]["ome"]
    scale, translation = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [16, 16, 16] and translation["translation"] == [104, 4, 4] and "image-label" in ome
    ome_zarr_models = pytest.importorskip("ome_zarr_models")
    opened = ome_zarr_models.open_ome_zarr(zarr.open_group(tmp_path / "out/labels.zarr", mode="r"))
    assert type(opened).__name__.startswith("ImageLabel")


# ---------------------------------------------------------------- kills, damage, refusals


def test_ended_and_run_again_it_goes_on_and_ends_with_the_same_bytes(source, tmp_path) -> None:
    checkpoint, _, _ = make_checkpoint(tmp_path / "c", target="affinities")
    run(source, checkpoint, tmp_path / "clean")
    shutil.copytree(tmp_path / "clean", tmp_path / "out")
    plan = open_run(str(tmp_path / "out"))[1]
    # as after a kill: some receipts of each stage are gone, and a shard of them is torn
    for stage in plan.stages:
        unit = plan.unit_ids[stage[len(stage) // 2]]
        receipt = tmp_path / f"out/_dinoray/receipts/{unit}.json"
        key = json.loads(receipt.read_text())["objects"][0]["key"]
        (tmp_path / "out" / key).write_bytes(b"torn")
        receipt.unlink()
    (tmp_path / "out/_SUCCESS").unlink()
    run(source, checkpoint, tmp_path / "out")
    assert data_objects(tmp_path / "out") == data_objects(tmp_path / "clean")


def test_windows_that_cannot_be_read_are_background_and_their_block_is_quarantined(tmp_path) -> None:
    source = make_volume(tmp_path / "v.zarr", (64, 64, 64), voxel_nm=(16, 16, 16))
    chunk = sorted((source / "0/c").rglob("1"))[-1]
    chunk.write_bytes(b"nothing")
    checkpoint, _, _ = make_checkpoint(tmp_path / "c")
    lines: list[str] = []
    outcome = segment_volume(segment_job(source, checkpoint, tmp_path / "out", scaling="dtype", unit_windows=100), lines.append)
    assert outcome.exit_code == 3 and outcome.tally.quarantined == 1, lines
    assert (labels_of(tmp_path / "out") != 0).mean() > 0.1
    assert any("segment it into a new --out" in line for line in lines) and not any("dinoray retry" in line for line in lines)
    verify_deep(open_run(str(tmp_path / "out"))[0])
    assert any("1 quarantined" in line for line in status_lines(str(tmp_path / "out")))
    with pytest.raises(BadRequest, match="not tried again"):
        retry(str(tmp_path / "out"))
    with pytest.raises(BadRequest, match="cannot be extended"):
        extend(str(tmp_path / "out"), [str(source)])


@pytest.mark.parametrize(("fields", "message"), [
    ({"threshold": 0.3}, "predicts classes"), ({"tokens": "x"}, "looks at no tokens"), ({"window_voxels": 18}, "multiples of 4"),
    ({"halo_voxels": 8}, "at least 4 times"), ({"max_output_bytes": 10}, "--max-output-bytes"),
    ({"memory_bytes": 1000}, "--memory-bytes"), ({"raw_voxel_size": 8.0}, "16 nm"), ({"crop": "0:99,0:10,0:10"}, "crop")])
def test_what_cannot_be_done_is_refused_before_work_starts(source, tmp_path, fields, message) -> None:
    checkpoint, _, _ = make_checkpoint(tmp_path / "c")
    with pytest.raises(BadRequest, match=message):
        segment_volume(segment_job(source, checkpoint, tmp_path / "out", **fields), print)
    assert not (tmp_path / "out/labels.zarr").exists()


def test_a_checkpoint_of_cells_is_refused(source, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"format": "dinoray-distance-map/1"}')
    with pytest.raises(BadRequest, match="context-fusion"):
        segment_volume(segment_job(source, tmp_path, tmp_path / "out"), print)


def test_a_volume_of_one_voxel_and_one_smaller_than_a_window(tmp_path) -> None:
    checkpoint, _, _ = make_checkpoint(tmp_path / "c")
    for shape in ((1, 1, 1), (3, 40, 2)):
        values = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
        source = write_volume(tmp_path / f"v{shape[0]}.zarr", values, (16.0,) * 3)
        run(source, checkpoint, tmp_path / f"o{shape[0]}", scaling="dtype")
        assert labels_of(tmp_path / f"o{shape[0]}").shape == shape


def test_with_a_context_windows_are_as_large_as_the_crops_whatever_the_unet_pools_by(source, tmp_path) -> None:
    from dinoray.label_planning import make_grid, open_source
    from dinoray.vision.fusion_checkpoint import read_fusion_config

    checkpoint, model, _ = make_checkpoint(tmp_path / "c", inputs="both", fusion="full", levels=3, crop=20)
    config, job = read_fusion_config(str(checkpoint)), segment_job(source, checkpoint, tmp_path / "out", window_voxels=None,
                                                                   halo_voxels=None)
    with open_source(job, config.raw_voxel_nm) as volume:
        multiple = model.unet.unet.multiple
        assert 20 % multiple
        assert make_grid(job, config, volume, multiple=multiple, has_context=True).window == (20, 20, 20)
        without = make_grid(job, config, volume, multiple=multiple, has_context=False)
        assert all(w % multiple == 0 for w in without.window)


@pytest.mark.parametrize("multiple", [4, 16, 32, 64])
def test_default_margins_are_never_none(multiple, tmp_path) -> None:
    from dinoray.label_planning import make_grid, open_source
    from dinoray.vision.fusion_checkpoint import read_fusion_config

    large = make_volume(tmp_path / "v.zarr", (300, 300, 300), voxel_nm=(16, 16, 16), chunk=150)
    checkpoint, _, _ = make_checkpoint(tmp_path / "c", crop=200)
    job = segment_job(large, checkpoint, tmp_path / "out", window_voxels=None, halo_voxels=None)
    with open_source(job, (16.0,) * 3) as volume:
        grid = make_grid(job, read_fusion_config(str(checkpoint)), volume, multiple=multiple, has_context=False)
    assert min(grid.halo) >= 32 and all(w % multiple == 0 and w >= 4 * h for w, h in zip(grid.window, grid.halo, strict=True))


def test_a_source_that_states_no_voxel_size_is_not_taken_to_have_the_models(tmp_path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "v.tif", np.random.default_rng(0).integers(0, 255, (20, 20, 20), np.uint8))
    checkpoint, _, _ = make_checkpoint(tmp_path / "c")
    with pytest.raises(BadRequest, match="voxel"):
        segment_volume(segment_job(tmp_path / "v.tif", checkpoint, tmp_path / "out", scaling="dtype"), print)
    run(tmp_path / "v.tif", checkpoint, tmp_path / "out", scaling="dtype", raw_voxel_size=16.0)


def test_a_full_device_gets_fewer_slices_at_once(source, tmp_path, monkeypatch) -> None:
    checkpoint, _, _ = make_checkpoint(tmp_path / "c", inputs="both")
    monkeypatch.setattr("dinoray.vision.fusion_checkpoint.load_backbone", lambda *args, dtype, **rest: tiny_backbone().to(dtype))
    use_tiny_backbone(monkeypatch)
    run(source, checkpoint, tmp_path / "a", crop="0:16,0:32,0:16")
    whole_, sizes = FusionModel.forward, []

    def small(model, crops):
        sizes.append(model.slice_batch)
        if model.slice_batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return whole_(model, crops)

    monkeypatch.setattr(FusionModel, "forward", small)
    limit = 8
    run(source, checkpoint, tmp_path / "b", crop="0:16,0:32,0:16")
    assert sizes[:3] == [32, 16, 8] and set(sizes[3:]) == {8}, "what fits is kept"
    np.testing.assert_array_equal(labels_of(tmp_path / "a"), labels_of(tmp_path / "b"))
    assert all(receipt.numerics["degraded"] for receipt in receipts_of(tmp_path / "b"))
    limit = 0
    with pytest.raises(SystemicError, match="too small for one window: CUDA out of memory"):
        segment_volume(segment_job(source, checkpoint, tmp_path / "d", crop="0:16,0:32,0:16"), print)
