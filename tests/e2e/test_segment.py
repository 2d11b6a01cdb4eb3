"""`dinoray segment cells` as a user runs it: killed and resumed, with and without Ray, repaired, looked at."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml

import dinoray
from dinoray import cli, open_features, open_masks
from dinoray.config import SegmentCellsJob, build_job, recorded_job
from dinoray.errors import BadRequest
from dinoray.ledger import Ledger
from dinoray.request import absolute, resume_command
from dinoray.verification import open_run
from tests.checkpoints import blobs, run_segment, seeing_checkpoint
from tests.runners.test_image_features import reasons_of
from tests.runs import check_whole, complete, count, data_objects, environment, start_and_kill

REPOSITORY = Path(dinoray.__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", model="vitt16", median_diameter_px=9.0)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of three sizes; every fifth has two channels."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(23):
        image = (blobs((112, 112 + 24 * (i % 3)), 5 + i % 7, i) * 60_000 + 50).astype(np.uint16)
        pixels = np.stack([image, image[::-1]]) if i % 5 == 0 else image
        tifffile.imwrite(folder / f"{i:02d}.tif", pixels, photometric="minisblack",
                         metadata={"axes": "CYX"} if pixels.ndim == 3 else None)
    return folder


def command(images: Path, checkpoint: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "dinoray.cli", "segment", "cells", str(images), "--checkpoint", str(checkpoint),
            "--out", str(out), "--channel", "0", *flags]


def test_the_driver_is_killed_and_the_same_command_resumes(many: Path, checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--unit-items", "2", "--no-ray")
    clean, out = tmp_path / "clean", tmp_path / "out"
    printed = complete(command(many, checkpoint, clean, *flags)).splitlines()
    assert "peak 0.47, fill 0.09, scale estimated per image" in printed[0] and str(checkpoint) in printed[0]
    assert printed[-1].split("complete: ")[1].startswith(f"23 images, {sum(5 + i % 7 for i in range(23))} cells")
    assert any(line.startswith("scale estimated for 23 images: median factor") and "--diameter-px" in line for line in printed)
    receipts = out / "_dinoray/receipts"
    for moment in (1, 5):
        start_and_kill(command(many, checkpoint, out, *flags), lambda moment=moment: count(receipts) >= moment)
    done = {path.stem for path in receipts.iterdir()}
    attempts = Ledger(open_run(str(out))[0]).attempts()
    assert 5 <= len(done) < 12
    complete(command(many, checkpoint, out, *flags))
    check_whole(out)
    assert data_objects(out) == data_objects(clean)
    now = Ledger(open_run(str(out))[0]).attempts()
    assert {unit for unit in now if now[unit] > attempts.get(unit, 0)} == set(open_run(str(out))[1].unit_ids) - done


@pytest.mark.parametrize("point", ["unit.data=kill@2", "unit.receipt=kill@2", "run.verify=kill"])
def test_killed_at_a_point(many: Path, checkpoint: Path, tmp_path: Path, point: str) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(many.iterdir())[:6]:
        (few / path.name).write_bytes(path.read_bytes())
    flags = ("--unit-items", "2", "--no-ray", "--masks", "zarr")
    run_segment(few, checkpoint, tmp_path / "clean", channel="0", unit_items=2, masks="zarr")
    argv = command(few, checkpoint, tmp_path / "out", *flags)
    killed = subprocess.run(argv, env={**environment(), "DINORAY_FAILPOINTS": point}, capture_output=True, timeout=240)
    assert killed.returncode == -9
    complete(argv)
    check_whole(tmp_path / "out")
    assert data_objects(tmp_path / "out") == data_objects(tmp_path / "clean")


def test_an_image_that_kills_its_process_is_quarantined_alone(many: Path, checkpoint: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(many.iterdir())[:4]:
        (few / path.name).write_bytes(path.read_bytes())
    argv = command(few, checkpoint, tmp_path / "out", "--no-ray")
    poison = {**environment(), "DINORAY_FAILPOINTS": "item.load~02.tif=kill@*"}
    for _ in range(2):
        assert subprocess.run(argv, env=poison, capture_output=True, timeout=240).returncode == -9
    done = subprocess.run(argv, env=poison, capture_output=True, text=True, timeout=240)
    assert done.returncode == 3, done.stdout + done.stderr
    assert reasons_of(tmp_path / "out") == {"02.tif": "crashed"}
    check_whole(tmp_path / "out")
    assert sorted(open_masks(tmp_path / "out")) == ["00.tif", "01.tif", "03.tif"]
    assert "tried again" in complete([sys.executable, "-m", "dinoray.cli", "retry", str(tmp_path / "out")])
    assert len(open_masks(tmp_path / "out")) == 4


@pytest.mark.ray
@pytest.mark.slow
def test_two_actors_give_the_bytes_of_none(many: Path, tmp_path: Path, local_ray: None) -> None:
    checkpoint = seeing_checkpoint(tmp_path / "checkpoint", model="vitt16")
    run_segment(many, checkpoint, tmp_path / "local", channel="0", unit_items=2)
    outcome = run_segment(many, checkpoint, tmp_path / "ray", channel="0", unit_items=2, no_ray=False, workers="2")
    assert outcome.exit_code == 0
    check_whole(tmp_path / "ray")
    assert data_objects(tmp_path / "ray") == data_objects(tmp_path / "local")
    store, plan, ledger = open_run(str(tmp_path / "ray"))
    assert len({receipt.worker["pid"] for receipt in ledger.receipts(plan.unit_ids)}) == 2
    staged = {key for key, _ in store.list("_dinoray/weights")}
    assert {key.rsplit("/", 1)[1] for key in staged} == {"model.safetensors", "config.json", "README.md", "STAGED"}
    (checkpoint / "model.safetensors").unlink()  # what is staged is whole, the backbone included
    base = next(iter(staged)).rsplit("/", 1)[0]
    run_segment(many, Path(store.url) / base, tmp_path / "again", channel="0", unit_items=2)
    assert data_objects(tmp_path / "again") == data_objects(tmp_path / "ray")


def test_status_verify_report_and_export_know_this_kind(many: Path, checkpoint: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run_segment(many, checkpoint, out, channel="0")

    def said(*words: str) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "argv", ["dinoray", *words])
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code), printed.out + printed.err

    cells = sum(5 + i % 7 for i in range(23))
    code, text = said("status", str(out))
    assert code == 0 and f"{cells} cells" in text and ", cells " in text
    code, text = said("verify", "--deep", str(out))
    assert code == 0 and f"23 images in 1 unit, {cells} cells, 0 quarantined" in text
    code, text = said("export", str(out), "--to", str(tmp_path / "x.parquet"), "--pycytominer")
    assert code == 2 and "open_features" in text
    assert said("report", str(out))[0] in (0, 2)


def test_the_resume_command_is_the_same_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[SegmentCellsJob] = []

    class Done:
        exit_code = 0

    monkeypatch.setattr("dinoray.extraction.segment_cells", lambda job, say, leave: seen.append(job) or Done())
    monkeypatch.chdir(tmp_path)
    job = absolute(SegmentCellsJob(sources=("in dir",), out="out", checkpoint="my model", channel="DNA", diameter_px=12.5,
                                   masks="zarr", cell_features=False, peak=0.6))
    assert job.checkpoint == str(tmp_path / "my model")
    monkeypatch.setattr(sys, "argv", shlex.split(resume_command(job)))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0 and seen == [job]


@pytest.mark.parametrize(("values", "needle"), [
    ({"checkpoint": None}, "checkpoint"), ({"peak": 0.2, "fill": 0.3}, "--fill: must be below peak"), ({"peak": 1.0}, "--peak"),
    ({"channel": " "}, "--channel"), ({"channel": "x=a,b"}, "x=a,b"), ({"diameter_px": 0}, "--diameter-px"),
    ({"block_px": 100}, "--block-px"), ({"masks": "png"}, "--masks"), ({"model": "vits16"}, "model"),
    ({"checkpoint": "s3://key:secret@bucket/x"}, "credentials"),
])
def test_bad_values_are_named(values: dict, needle: str) -> None:
    with pytest.raises(BadRequest) as caught:
        build_job(SegmentCellsJob, {"sources": ("in",), "out": "out", "checkpoint": "c", **values})
    assert needle in caught.value.what
    assert "dinoray segment cells --help" in caught.value.todo or "model" in values


def test_what_is_part_of_the_result() -> None:
    job = SegmentCellsJob(sources=("in",), out="out", checkpoint="c", channel=1)
    assert job.channel == "1"
    settings = job.result_settings()
    assert not {"checkpoint", "weights", "workers", "prefetch_bytes"} & set(settings)
    assert {"peak", "block_px", "overlap_px", "masks", "cell_features", "neighbour_px", "unit_items"} <= set(settings)
    assert recorded_job(job.model_dump(mode="json")) == job
    for name, field in SegmentCellsJob.model_fields.items():
        assert field.description, f"{name} has no docstring"


def test_the_job_script_and_its_config(many: Path, checkpoint: Path, tmp_path: Path) -> None:
    config = REPOSITORY / "jobs/configs/segment_cells.yaml"
    assert build_job(SegmentCellsJob, yaml.safe_load(config.read_text())).checkpoint == "nuclei/checkpoint"
    printed = complete([sys.executable, str(REPOSITORY / "jobs/segment_cells.py"), str(config), f"sources={many}", "limit=3",
                        f"checkpoint={checkpoint}", f"out={tmp_path / 'out'}", "no_ray=true", "channel=0", "cell_features=false"])
    assert "3 images" in printed.splitlines()[-1]
    assert open_features(str(tmp_path / "out")).vectors == []
