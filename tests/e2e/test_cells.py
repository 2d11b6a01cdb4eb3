"""`dinoray extract cells` from the command line: end to end, killed and resumed, under Ray, as a job script."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml

from dinoray import cli, open_features
from dinoray.config import ExtractCellsJob, ExtractImagesJob, build_job, canonical_json, recorded_job
from dinoray.errors import BadRequest
from dinoray.extraction import absolute, resume_command
from tests.conftest import texture
from tests.runs import check_whole, complete, data_objects, run_cells

FLAGS = ("--crop-um", "20", "--crop-px", "32", "--model", "vitt16", "--weights", "random", "--no-ray", "--unit-items", "2")


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Seven images of 0..6 cells each, in `img` (ImageJ TIFFs of 0.5 µm per px), and their labels in `lab`."""
    for folder in ("img", "lab"):
        (tmp_path / folder).mkdir()
    for i in range(7):
        labels = np.zeros((64, 80), np.uint8)
        for k in range(i):
            labels[8 + 8 * k:13 + 8 * k, 10 * k + 4:10 * k + 11] = k + 1
        tifffile.imwrite(tmp_path / f"img/{i}.tif", texture((64, 80), i, "uint16"), imagej=True, resolution=(2.0, 2.0),
                         metadata={"unit": "um"})
        tifffile.imwrite(tmp_path / f"lab/{i}_cp_masks.tif", labels)
    return tmp_path


def command(cells: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "dinoray.cli", "extract", "cells", str(cells / "img"), "--labels", str(cells / "lab"),
            "--out", str(out), *FLAGS, *flags]


def test_the_command_end_to_end(cells: Path) -> None:
    out = cells / "out"
    text = complete(command(cells, out))
    assert "complete: 7 images, 21 rows" in text and "1 without objects" in text
    check_whole(out)
    features = open_features(str(out))
    rows = features.table(["item_id", "object_id", "pixel_size_um"]).to_pylist()
    assert sorted((row["item_id"], row["object_id"]) for row in rows) == [(f"{i}.tif", k + 1) for i in range(7) for k in range(i)]
    assert {row["pixel_size_um"] for row in rows} == {0.5}
    assert "whole: 7 images" in complete([sys.executable, "-m", "dinoray.cli", "verify", "--deep", str(out)])
    assert "without objects" in complete(command(cells, out)), "once more is nothing to do"


@pytest.mark.parametrize("points", ["unit.receipt=kill@3", "plan.seal=kill"])
def test_killed_and_resumed_gives_the_same_bytes(cells: Path, points: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cells(cells / "img", cells / "clean", labels=str(cells / "lab"), crop_um=20.0, pixel_size_um=None, unit_items=2)
    monkeypatch.setenv("DINORAY_FAILPOINTS", points)
    complete(command(cells, cells / "out"), code=-9)
    monkeypatch.delenv("DINORAY_FAILPOINTS")
    complete(command(cells, cells / "out"))
    check_whole(cells / "out")
    assert data_objects(cells / "out") == data_objects(cells / "clean") != {}


def test_retry_takes_labels_that_came_later_and_extend_brings_its_own(cells: Path) -> None:
    out, late, more = cells / "out", cells / "lab/3_cp_masks.tif", cells / "more"
    held = late.read_bytes()
    late.unlink()
    assert "1 quarantined (1 missing_labels)" in complete(command(cells, out), code=3)
    late.write_bytes(held)
    dinoray = [sys.executable, "-m", "dinoray.cli"]
    assert "complete: 7 images, 21 rows" in complete([*dinoray, "retry", str(out), "--reason", "missing_labels"])
    (more / "img").mkdir(parents=True)
    (more / "lab").mkdir()
    (more / "img/9.tif").write_bytes((cells / "img/5.tif").read_bytes())
    (more / "lab/9_cp_masks.tif").write_bytes(b"no labels")
    bring = [*dinoray, "extend", str(out), str(more / "img"), "--labels", str(more / "lab")]
    assert "1 quarantined" in complete(bring, code=3)
    (more / "lab/9_cp_masks.tif").write_bytes((cells / "lab/5_cp_masks.tif").read_bytes())
    assert "complete: 8 images, 26 rows" in complete([*dinoray, "retry", str(out)])
    assert "whole: 8 images" in complete([*dinoray, "verify", "--deep", str(out)])
    rows = open_features(str(out)).table(["item_id", "object_id"]).to_pylist()
    assert sorted(r["object_id"] for r in rows if r["item_id"].endswith("9.tif")) == [1, 2, 3, 4, 5]


@pytest.mark.ray
def test_under_ray_the_same_bytes(cells: Path, local_ray: None) -> None:
    job = {"labels": str(cells / "lab"), "crop_um": 20.0, "pixel_size_um": None, "unit_items": 2}
    run_cells(cells / "img", cells / "local", **job)
    run_cells(cells / "img", cells / "ray", no_ray=False, workers="2", **job)
    check_whole(cells / "ray")
    assert data_objects(cells / "ray") == data_objects(cells / "local") != {}


def test_requests_that_are_refused_with_exit_code_2(cells: Path) -> None:
    for i in range(7):
        tifffile.imwrite(cells / f"img/{i}.tif", texture((64, 80), i, "uint16"))
    out = cells / "out"
    assert "--pixel-size-um" in complete(command(cells, out), code=2)
    (cells / "empty").mkdir()
    for values, needle in (({"labels": cells / "lab", "crop_px": 40}, "crop_px=40 is not a multiple"),
                           ({"labels": cells / "empty"}, "no image"), ({"labels": cells / "none"}, "no such file"),
                           ({"centroids": cells / "none.csv"}, "no such file")):
        with pytest.raises(BadRequest, match=needle):
            run_cells(cells / "img", out, **{k: v if isinstance(v, int) else str(v) for k, v in values.items()})
    assert not out.exists()


def test_the_job_script_and_its_example(cells: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    example = yaml.safe_load((root / "jobs/configs/extract_cells.yaml").read_text())
    assert build_job(ExtractCellsJob, example).crop_um == 60
    file = cells / "job.yaml"
    mine = {"sources": str(cells / "img"), "labels": str(cells / "lab"), "out": str(cells / "out"), "model": "vitt16",
            "weights": "random", "no_ray": True, "crop_px": 32}
    file.write_text(yaml.safe_dump({**example, **mine}))
    script = [sys.executable, str(root / "jobs/extract_cells.py"), str(file)]
    assert "complete: 7 images, 21 rows" in complete([*script, "crop_um=10"])
    assert "not valid" in complete([*script, "crop_um=-1"], code=2)
    check_whole(cells / "out")


# ---------------------------------------------------------------- the job


@pytest.mark.parametrize(("values", "needle"), [
    ({}, "exactly one of labels and centroids"),
    ({"labels": "a", "centroids": "b"}, "exactly one of labels and centroids"),
    ({"centroids": "a", "mask_neighbours": True}, "--mask-neighbours needs labels"),
    ({"labels": "a", "crop_um": 0}, "--crop-um"),
    ({"labels": "a", "crop_um": None}, "--crop-um"),
    ({"labels": "a", "features": "patches"}, "features"),
    ({"labels": "a", "size": "tiles"}, "size"),
    ({"labels": "s3://user:word@host/a"}, "password"),
])
def test_jobs_that_are_none(values: dict, needle: str) -> None:
    with pytest.raises(BadRequest, match=needle):
        build_job(ExtractCellsJob, {"sources": ("in",), "out": "out", "crop_um": 60, **values})


def test_crop_um_has_no_default() -> None:
    with pytest.raises(BadRequest, match="--crop-um: is needed"):
        build_job(ExtractCellsJob, {"sources": ("in",), "out": "out", "labels": "lab"})


def test_what_is_part_of_the_result() -> None:
    job = ExtractCellsJob(sources=("in",), out="out", labels="lab", crop_um=60)
    settings = job.result_settings()
    assert {"crop_um", "crop_px", "mask_neighbours"} <= set(settings) and not {"labels", "centroids"} & set(settings)
    assert job.model_copy(update={"labels": "elsewhere"}).result_settings() == settings
    for values in ({"crop_um": 61.0}, {"crop_px": 32}, {"mask_neighbours": True}, {"pixel_size_um": 1.0}):
        assert job.model_copy(update=values).result_settings() != settings
    for made in (job, ExtractImagesJob(sources=("in",), out="out")):
        assert recorded_job(made.model_dump(mode="json")) == made
        assert type(recorded_job(made.model_dump())) is type(made)
        for name, field in type(made).model_fields.items():
            assert field.description, f"{name} has no docstring"


def test_image_jobs_hash_to_what_they_did() -> None:
    """The settings that enter the fingerprint of an images job: none may come or go with jobs of cells."""
    settings = ExtractImagesJob(sources=("in",), out="out").result_settings()
    assert canonical_json(settings) == canonical_json({
        "channels": "auto", "clahe_clip": 2.0, "clahe_tile_px": 64, "clahe_tile_um": None, "contrast": "none",
        "dense_dtype": "float16", "device": "auto", "features": ["cls", "patch_mean"], "layers": None, "limit": None,
        "max_file_bytes": 4294967296, "max_pixels": 268435456, "model": None, "pattern": "auto", "pixel_size_um": None,
        "precision": "auto", "resize_px": 224, "scaling": "plate", "scaling_high_percent": 99.9, "scaling_low_percent": 0.1,
        "scaling_sample": 64, "size": "auto", "tile_px": 256, "token_budget": None, "unit_bytes": 1000000000, "unit_items": 256,
        "vector_dtype": "float32", "where": {}, "z_projection": "refuse"})


def test_the_resume_command_is_the_same_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[ExtractCellsJob] = []

    class Done:
        exit_code = 0

    monkeypatch.setattr("dinoray.extraction.extract_images", lambda job, say, leave: seen.append(job) or Done())
    monkeypatch.chdir(tmp_path)
    job = absolute(ExtractCellsJob(sources=("in dir",), out="out", labels="my labels", crop_um=12.5, mask_neighbours=True))
    assert (job.labels, job.centroids) == (str(tmp_path / "my labels"), None)
    monkeypatch.setattr(sys, "argv", shlex.split(resume_command(job)))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0 and seen == [job]
