"""`dinoray train distance-map` and what else is done with its output: the real command, without Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from dinoray.cli import app
from dinoray.config import TrainDistanceMapJob
from dinoray.errors import BadRequest, ChangedRequest, Stopped, SystemicError
from dinoray.status import status_lines
from dinoray.train import train_distance_map
from dinoray.training.states import load_best, load_last
from dinoray.training.survey import store_survey
from dinoray.verification import open_run
from dinoray.vision.distance_model import load_segmenter
from tests.runs import complete, environment, run, use_tiny_backbone
from tests.training.toys import disc_job, last_state, make_discs, write_job


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    return make_discs(tmp_path / "in")


def train(values: dict[str, Any]) -> tuple[Any, list[str]]:
    said: list[str] = []
    return train_distance_map(TrainDistanceMapJob(**values), said.append, command="dinoray train"), said


@pytest.mark.slow
def test_the_life_of_a_training(discs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = disc_job(discs, out, steps=40, stop_after_s=0.5)
    argv = write_job(tmp_path / "job.yaml", values)
    stopped = complete(argv, code=1)
    assert f"resume with: dinoray train distance-map {tmp_path / 'job.yaml'}" in stopped.splitlines()[0]
    assert "Stopped: training stopped at step" in stopped
    step = last_state(out)["progress"]["step"]
    assert 0 < step < 40
    assert any("not finished; resume with: dinoray train distance-map" in line for line in status_lines(str(out)))

    (tmp_path / "short.yaml").write_text(yaml.safe_dump(values | {"steps": 41}))
    refused = complete([*argv[:-1], str(tmp_path / "short.yaml")], code=2)
    assert "ChangedRequest" in refused and "settings.steps: 40 -> 41" in refused

    process = subprocess.Popen([*argv, "stop_after_s=null", "log_every=1"], env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
        while last_state(out)["progress"]["step"] == step:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        held = complete(argv, code=2)
        assert "OutputHeld: another driver works on this output" in held
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 1
    assert "stopped by SIGTERM; resume with: dinoray train distance-map" in printed and f"going on from step {step}" in printed

    done = complete([*argv, "stop_after_s=null"])
    assert "complete: 40 steps (steps)" in done.splitlines()[-1] and f"--checkpoint {out}/checkpoint" in done.splitlines()[-1]
    model, config = load_segmenter(str(out / "checkpoint"))
    assert (config.crop_px, config.training["steps"], config.backbone.included) == (32, 40, True)
    assert f"digest {config.weights_digest[:12]}  " in done.splitlines()[-1]
    assert config.weights_digest in (out / "checkpoint/README.md").read_text()
    best = load_best(open_store_of(out), load_last(open_store_of(out))["progress"])
    assert bool((model.decoder.head.weight == best["model"]["decoder.head.weight"]).all())
    lines = list(status_lines(str(out)))
    assert lines[1].startswith("step 40/40  loss ") and lines[-1] == f"ended by steps; checkpoint {out}/checkpoint"
    assert not (out / "_dinoray/driver.json").exists()

    for command in (["verify"], ["retry"], ["extend", str(discs)], ["export"]):
        refused = CliRunner().invoke(app, [command[0], str(out), *command[1:]])
        assert isinstance(refused.exception, BadRequest), (command, refused)
        assert "the output of a training" in str(refused.exception)
    with pytest.raises(BadRequest, match="the output of a training"):
        open_run(str(out))


def open_store_of(out: Path) -> Any:
    from dinoray.io.stores import open_store

    return open_store(str(out))


def test_an_output_belongs_to_one_kind_of_job(discs: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        train(disc_job(discs, out, stop_after_s=1e-6))
    record = (out / "_dinoray/job.json").read_bytes()
    with pytest.raises(ChangedRequest, match="the output of a training"):
        run(pictures, out)
    assert (out / "_dinoray/job.json").read_bytes() == record
    use_tiny_backbone(monkeypatch)
    run(pictures, tmp_path / "features")
    monkeypatch.undo()
    with pytest.raises(ChangedRequest, match="made with other settings or data"):
        train(disc_job(discs, tmp_path / "features"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.docx").write_text("mine")
    with pytest.raises(BadRequest, match="not empty and not dinoray's"):
        train(disc_job(discs, tmp_path / "other"))


def test_images_that_change_are_refused(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = disc_job(discs, tmp_path / "out")
    with pytest.raises(Stopped):
        train(values | {"stop_after_s": 1e-6})
    moved = discs.rename(tmp_path / "moved")
    with pytest.raises(BadRequest):
        train(values)
    moved.rename(discs)
    original = (discs / "00_img.png").read_bytes()
    (discs / "00_img.png").write_bytes(original + b" ")
    with pytest.raises(ChangedRequest, match=r"inputs.(train|validation): 1 changed \(00_img: [\d,]+ -> [\d,]+ bytes\)"):
        train(values)
    (discs / "00_img.png").write_bytes(original)
    name = (discs / "00_img.png").rename(discs / "aside")
    other = np.array(Image.open(name))[::-1]
    Image.fromarray(other).save(discs / "00_img.png")
    (discs / "00_img.png").write_bytes((discs / "00_img.png").read_bytes().ljust(len(original))[:len(original)])
    with pytest.raises(ChangedRequest, match=r"1 changed \(00_img: as large, but written anew"):
        train(values)
    name.rename(discs / "00_img.png")
    for kind in ("img", "masks"):
        (discs / f"00_{kind}.png").rename(discs / f"new_{kind}.png")
    with pytest.raises(ChangedRequest) as caught:
        train(values)
    assert "1 removed (00_img)" in str(caught.value) and "1 added (new_img)" in str(caught.value)
    # ... and while it runs: the workers list them again
    fresh = disc_job(discs, tmp_path / "fresh")
    plain = store_survey

    def store_and_change(store, name, survey):
        plain(store, name, survey)
        for file in discs.glob("*_img.png"):
            os.utime(file, ns=(1, 1))

    monkeypatch.setattr("dinoray.training.distance_kind.store_survey", store_and_change)
    with pytest.raises((SystemicError, BadRequest)):
        train(fresh)


def test_copied_images_are_the_same_images(discs: Path, tmp_path: Path) -> None:
    values = disc_job(discs, tmp_path / "out")
    with pytest.raises(Stopped):
        train(values | {"stop_after_s": 1e-6})
    fingerprint = json.loads((tmp_path / "out/_dinoray/job.json").read_text())["fingerprint"]
    copied = shutil.copytree(discs, tmp_path / "copied", copy_function=shutil.copyfile)
    shutil.rmtree(discs)
    outcome, said = train(disc_job(copied, tmp_path / "out"))
    assert outcome.fingerprint == fingerprint and any("looking whether" in line for line in said)
    assert outcome.progress["ended"] == "steps"


@pytest.mark.parametrize(("change", "told"), [
    ({"crop_size": 64}, "crop_size: there is no such field"),
    ({"crop_px": 100}, "crop_px=100 is not a multiple of the patch size 16 [crop_px]\n  use 96 or 112"),
    ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
    ({"steps": 5, "warmup_steps": 5}, "warmup_steps: 5 steps of warm-up leave nothing of steps=5"),
    ({"workers": "4,2"}, "workers: '4,2' is neither N nor MIN,MAX"),
    ({"train": []}, "train: Tuple should have at least 1 item"),
    ({"train": [{"images": "/nowhere/at/all"}]}, "/nowhere/at/all"),
    ({"train": [{"images": "x", "wight": 1}]}, "wight: there is no such field"),
    ({"model": None, "weights": None}, "no model was named"),
    ({"backbone_learning_rate": None}, "a frozen backbone with random weights sees nothing"),
    ({"model": "vitx99"}, "vitx99"),
    ({"pixel_size_um": 1.0, "diameter_px": 10.0}, "give pixel_size_um or diameter_px, not both"),
    ({"augmentation": {"p_rotate": 2}}, "augmentation.p_rotate: Input should be less than or equal to 1"),
    ({"out": "s3://key:secret@bucket/x"}, "give credentials through the environment instead"),
    ({"device": "cuda"}, "there is no CUDA device here"),
])
def test_bad_jobs_are_refused_with_a_line_that_helps(change: dict[str, Any], told: str, discs: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from dinoray.cli.train import run_training_script

    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one here")
    argv = write_job(tmp_path / "job.yaml", disc_job(discs, tmp_path / "out") | change)
    assert run_training_script(TrainDistanceMapJob, argv[-1:]) == 2
    shown = capsys.readouterr()
    assert told in shown.err, shown.err
    assert "the job is not valid" not in shown.err or "--" not in shown.err, "a job file has no flags"
    assert "secret@" not in shown.err + shown.out
    assert not (tmp_path / "out").exists(), "nothing was run"


def test_files_that_are_no_job_and_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dinoray.cli.train import run_training_script

    assert run_training_script(TrainDistanceMapJob, []) == 2
    assert run_training_script(TrainDistanceMapJob, [str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert run_training_script(TrainDistanceMapJob, [str(tmp_path / "list.yaml")]) == 2
    shown = capsys.readouterr()
    assert "usage: python jobs/train_distance_map.py" in shown.out
    assert "backbone_learning_rate" in shown.err, "the fields of this job are listed"
    script = Path(__file__).resolve().parents[2] / "jobs" / "train_distance_map.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "none.yaml")], env=environment(), capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 2 and "cannot read the job file" in done.stderr


def test_idle_workers_are_pointed_out_and_history_is_json(discs: Path, tmp_path: Path) -> None:
    from dinoray.train import _notes

    job = TrainDistanceMapJob(**disc_job(discs, tmp_path / "o") | {"no_ray": False, "workers": "1,8", "batch_size": 8})
    assert _notes(job) == ["8 workers share 4 micro-batches of a step, so 4 of them will idle: a micro_batch of at most 1 has work "
                           "for all"]
    assert _notes(job.model_copy(update={"batch_size": 4, "micro_batch": 1})) == [
        "a batch of 4 samples has no work for 8 workers: 4 of them will idle"]
    assert _notes(job.model_copy(update={"no_ray": True})) == [] == _notes(job.model_copy(update={"micro_batch": 1}))
    outcome, said = train(disc_job(discs, tmp_path / "out", steps=3, validate_every=2))
    assert outcome.exit_code == 0 and outcome.progress["ended"] == "steps"
    history = json.loads((tmp_path / "out/history.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [row["step"] for row in history] == [1, 2, 2, 3, 3]
    again, told = train(disc_job(discs, tmp_path / "out", steps=3, validate_every=2))
    assert again.checkpoint == outcome.checkpoint and told[1:] == said[-3:]
    assert "not one cell of the validation images was found" in told[1], "three steps teach nothing"


def test_what_was_refused_and_then_mended_trains_in_the_same_folder(discs: Path, tmp_path: Path) -> None:
    images = shutil.copytree(discs, tmp_path / "images")
    for number in (50, 51):
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(images / f"{number}_img.png")
        (images / f"{number}_masks.png").write_bytes(b"bad")
    values = disc_job(images, tmp_path / "out", steps=3)
    with pytest.raises(BadRequest, match="cannot be used"):
        train(values)
    for number in (50, 51):
        (images / f"{number}_img.png").unlink()
        (images / f"{number}_masks.png").unlink()
    outcome, said = train(values)
    assert outcome.progress["ended"] == "steps"
    assert "what was begun here before, and ended before its first state, is replaced" in said
    shutil.copy(images / "00_img.png", images / "60_img.png")
    shutil.copy(images / "00_masks.png", images / "60_masks.png")
    with pytest.raises(ChangedRequest, match="1 added"):
        train(values)


def test_the_device_is_decided_once(discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = disc_job(discs, tmp_path / "out", steps=3)
    first, _ = train(values)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    again, _ = train(values)
    assert again.fingerprint == first.fingerprint, "auto stays what it was when the training began"


def test_batch_norms_on_workers_without_samples_are_refused(discs: Path, tmp_path: Path) -> None:
    values = disc_job(discs, tmp_path / "out", norm="batch") | {"no_ray": False, "workers": "1,4"}
    with pytest.raises(BadRequest, match="norm=batch needs samples on every worker"):
        train(values)
