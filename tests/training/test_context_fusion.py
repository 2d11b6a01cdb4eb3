"""The context-fusion task on the shared trainer.

The same loss however samples are shared, resumed to the bit, and a context that is really used: a label that only structure outside
of the crop decides.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dinoray.config.fusion import TrainContextFusionJob
from dinoray.errors import BadRequest
from dinoray.io.stores import LocalStore
from dinoray.io.volume_grid import Triple
from dinoray.report.fusion_page import render_fusion
from dinoray.train import train as train_volumes
from dinoray.training.context_fusion import ContextFusionTask, record_of
from dinoray.training.fusion_memory import forecast
from dinoray.training.loop import fit
from dinoray.training.sampling import micro_batches
from dinoray.training.steps import Stepper
from dinoray.training.volume_regions import Region
from dinoray.training.volume_sets import survey
from dinoray.training.workers import Workers
from dinoray.vision.fusion_checkpoint import read_fusion_config
from dinoray.vision.fusion_model import new_model
from tests.runs import tiny_backbone
from tests.training import group
from tests.training.toys import assert_same_state, last_state, timeless
from tests.training.volumes import build, fusion_job, make_pair, write_volume

WITH_CONTEXT = {"inputs": "both", "fusion": "full", "model": "vitt16", "weights": "random", "context_factor": 2, "context_cells": 4}


def pixel_nm(job: TrainContextFusionJob, source) -> Triple | None:
    if job.fusion == "none":
        return None
    with_labels = Region(source, keep_bytes=0)
    sizes = tuple(g / f * job.context_factor for g, f in zip(with_labels.label_grid.pitch_nm, with_labels.factor, strict=True))
    with_labels.close()
    return sizes  # type: ignore[return-value]


def make_task(job: TrainContextFusionJob, dtype: torch.dtype = torch.float32) -> ContextFusionTask:
    """With the tiny backbone where one is asked for."""
    train, validation = ([Region(s, keep_bytes=10**8, context_nm=pixel_nm(job, s)) for s in sources]
                         for sources in (job.train, job.validation))
    model = new_model(record_of(job, train[0].factor), tiny_backbone() if job.uses_backbone else None, seed=job.seed)
    model.unet.to(dtype)
    return ContextFusionTask(job, "f", model, train, validation)


def reduced(workers: Workers, values: dict[str, Any], cases: list[tuple[int, int]]) -> list[Any]:
    """For each (batch, micro-batch): (loss, the reduced gradient)."""
    found = []
    for batch, micro in cases:
        task = make_task(build(values), torch.float64)
        stepper = Stepper(task.model, torch.optim.SGD(task.parameter_groups(), lr=0.0), task.loss,
                          workers, micro_batch=micro, clip_norm=1e9)
        kept: list[torch.Tensor] = []
        stepper.optimizer.register_step_pre_hook(lambda opt, a, k, kept=kept, s=stepper:
                                                 kept.extend(p.grad.clone() for p in s.parameters))
        parts = [[task.sample(i) for i in part] for part in workers.share(micro_batches(0, batch, micro))]
        result = stepper.step(parts, seed=1)
        found.append((result.loss, torch.cat([g.reshape(-1) for g in kept])))
    return found


@pytest.mark.parametrize("fields", [{}, {"target": "affinities"}, WITH_CONTEXT], ids=["raw", "affinities", "context"])
def test_two_workers_compute_the_gradient_of_one(fields: dict[str, Any], tmp_path: Path) -> None:
    values = fusion_job(make_pair(tmp_path, classes="target" not in fields, factor=2), tmp_path / "out", **fields)
    whole = group.alone(reduced, values, [(4, 4)])[0]
    parts = group.in_group(2, reduced, tmp_path / "g", values, [(4, 1)])
    for found in parts:
        # losses are computed in float32 (as under autocast), gradients are summed in float64
        assert abs(found[0][0] - whole[0]) <= 1e-6 * abs(whole[0])
        scale = float(whole[1].abs().max())
        assert float((found[0][1] - whole[1]).abs().max()) <= 1e-5 * scale
    assert torch.equal(parts[0][0][1], parts[1][0][1])


@pytest.mark.parametrize("fields", [{"target": "affinities"}, WITH_CONTEXT | {"dropout": 0.2}], ids=["affinities", "context"])
def test_interrupted_anywhere_it_ends_the_same(fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, classes="target" not in fields)

    def train(name: str):
        job = build(fusion_job(pair, tmp_path / name, **fields))
        return fit(job, make_task(job), Workers(), LocalStore(str(tmp_path / name)))

    whole = train("whole")
    assert (whole.step, whole.ended) == (8, "steps") and whole.history[-1]["val_loss"] > 0
    assert ("val_iou" in whole.history[-1]) == ("target" not in fields)
    for point in ("train.step@6", "train.state@2"):
        name, _, passage = point.partition("@")
        monkeypatch.setattr("dinoray.failpoints._passed", Counter())
        monkeypatch.setenv("DINORAY_FAILPOINTS", f"{name}=raise@{passage}")
        with pytest.raises(OSError, match=name):
            train(point)
        monkeypatch.delenv("DINORAY_FAILPOINTS")
        assert timeless(train(point).history) == timeless(whole.history)
        assert_same_state(last_state(tmp_path / point), last_state(tmp_path / "whole"))


def test_it_learns_what_raw_shows(tmp_path: Path) -> None:
    job = build(fusion_job(make_pair(tmp_path, classes=True), tmp_path / "out", steps=100, validate_every=50, checkpoint_every=50))
    history = fit(job, make_task(job), Workers(), LocalStore(job.out)).history
    assert history[-1]["val_iou"] > 0.8


def lone_cube(folder: Path, shape: tuple[int, int, int] = (48, 48, 96)) -> tuple[Path, Path]:
    """One bright cube of label 1 in a corner: most crops are background alone."""
    raw, labels = np.full(shape, 50, np.uint8), np.zeros(shape, np.uint8)
    raw[4:14, 4:14, 4:14], labels[4:14, 4:14, 4:14] = 200, 1
    raw[::2] += 3
    return write_volume(folder / "raw.zarr", raw, (16.0,) * 3), write_volume(folder / "labels.zarr", labels, (16.0,) * 3)


@pytest.mark.parametrize("loss", ["focal_dice", "cross_entropy", "tversky"])
def test_crops_of_background_alone_and_a_class_that_never_occurs(loss: str, tmp_path: Path) -> None:
    pair, lines = lone_cube(tmp_path), []
    parts = [{"raw": str(pair[0]), "labels": str(pair[1]), "region": f"0:48,0:48,{x}"} for x in ("0:40", "56:96")]
    job = build(fusion_job(pair, tmp_path / "out", train=parts[:1], validation=parts[1:], loss=loss, steps=4, validate_every=2,
                           classes=["background", "object", "never"]))
    train_volumes(job, lines.append)
    assert any("class 2 (never) does not occur" in line for line in lines), lines
    history = LocalStore(job.out).get("history.json")
    assert all(np.isfinite(value) for row in json.loads(history) for name, value in row.items() if "loss" in name)
    config = read_fusion_config(f"{job.out}/checkpoint")
    assert np.isfinite(config.metrics["validation_loss"])
    with pytest.raises(BadRequest, match="background alone"):
        train_volumes(build(fusion_job(pair, tmp_path / "none", train=parts[1:], validation=parts[:1])), lines.append)


def test_the_memory_of_a_step_is_forecast_and_measured(tmp_path: Path) -> None:
    lines: list[str] = []
    job = build(fusion_job(make_pair(tmp_path, (24, 24, 48), classes=True), tmp_path / "out", steps=4))
    parts = [job.train[0].model_copy(update={"region": f"0:24,0:24,{x}"}) for x in ("0:22", "24:48")]
    train_volumes(job.model_copy(update={"train": tuple(parts[:1]), "validation": tuple(parts[1:])}), lines.append)
    told = [line for line in lines if line.startswith("memory of ")]
    assert len(told) == 2 and "forecast" in told[0] and "measured" in told[1], lines
    task = make_task(job)
    sizes = [forecast(task, [task.sample(i) for i in range(n)], None) for n in (1, 2, 4)]
    assert sizes[0]["step"] < sizes[1]["step"] < sizes[2]["step"]
    assert all(p.grad is None for p in task.model.parameters())
    # activations double with the micro-batch; weights, gradients and moments do not
    grown = [b["step"] - a["step"] for a, b in zip(sizes, sizes[1:], strict=False)]
    assert grown[1] == pytest.approx(2 * grown[0], rel=0.05)
    half = forecast(task, [task.sample(0)], torch.bfloat16)
    assert half["step"] < sizes[0]["step"] * 1.2


def test_figures_of_each_class_are_kept_and_shown(tmp_path: Path) -> None:
    job = build(fusion_job(make_pair(tmp_path, (24, 24, 48), classes=True), tmp_path / "out", steps=4))
    parts = [job.train[0].model_copy(update={"region": f"0:24,0:24,{x}"}) for x in ("0:22", "24:48")]
    job = job.model_copy(update={"train": tuple(parts[:1]), "validation": tuple(parts[1:])})
    train_volumes(job, lambda line: None)
    metrics = json.loads((tmp_path / "out/checkpoint/config.json").read_text())["metrics"]
    name = job.classes[1]
    assert metrics[f"validation_iou_{name}"] == pytest.approx(metrics["validation_iou"])
    iou, dice = (metrics[f"validation_{what}_{name}"] for what in ("iou", "dice"))
    assert dice == pytest.approx(2 * iou / (1 + iou))
    page = render_fusion(LocalStore(tmp_path / "out"))
    assert f"<td class=\"name\">{name}</td>" in page and f"{dice:.4f}" in page


@pytest.mark.parametrize("pair", [{"gamma": [0, 1.4]}, {"contrast": [0, 1]}, {"gamma": [1.4, 0.7]}, {"contrast": [-1, 1]}])
def test_tones_that_no_factor_leads_to_are_refused(tmp_path: Path, pair: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(pair))):
        build(fusion_job(make_pair(tmp_path, (16, 16, 16)), tmp_path / "out", augmentation=pair))


def test_a_class_outside_of_the_counted_boxes_is_rare_not_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = build(fusion_job(make_pair(tmp_path, (40, 40, 40), classes=True), tmp_path / "out", classes=["background", "a", "b"]))
    assert survey(job, LocalStore(tmp_path / "all"), lambda line: None, lambda: None)["counts"][2] == 0
    monkeypatch.setattr("dinoray.training.volume_sets.SIDE", 8)
    monkeypatch.setattr("dinoray.training.volume_sets.BLOCKS", 4)
    said: list[str] = []
    assert survey(job, LocalStore(tmp_path / "some"), said.append, lambda: None)["counts"][2] == 1
    assert any("class 2 (b)" in line and "rare" in line for line in said)
