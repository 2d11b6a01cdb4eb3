"""From a labelled volume to scored labels, by the real commands, without Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

from dinoray.status import status_lines
from dinoray.verification import open_run, verify_deep
from tests.runs import complete, data_objects, environment
from tests.training.volumes import fusion_job, make_pair

CLI = [sys.executable, "-m", "dinoray.cli"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def written(path: Path, values: dict) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.slow
def test_a_model_is_trained_used_and_measured(tmp_path: Path) -> None:
    raw, labels = make_pair(tmp_path / "in", (40, 40, 80), classes=True)
    regions = [{"raw": str(raw), "labels": str(labels), "region": r} for r in ("0:40,0:40,0:50", "0:40,0:40,56:80")]
    job = fusion_job((raw, labels), tmp_path / "model", train=regions[:1], validation=regions[1:], steps=150,
                     validate_every=50, checkpoint_every=50, norm="group")
    printed = complete([*CLI, "train", "context-fusion", written(tmp_path / "job.yaml", job)])
    assert "use it: dinoray segment volume VOLUME --checkpoint" in printed and "extraction" in printed
    assert any("context-fusion" in line for line in status_lines(str(tmp_path / "model")))
    again = complete([*CLI, "train", "context-fusion", str(tmp_path / "job.yaml")])
    assert "complete: 150 steps" in again

    out = tmp_path / "labels"
    segment = [*CLI, "segment", "volume", str(raw), "--checkpoint", str(tmp_path / "model/checkpoint"),
               "--out", str(out), "--no-ray"]
    assert "complete:" in complete(segment)
    assert "whole: " in complete([*CLI, "verify", str(out), "--deep"])
    assert "blocks" in complete([*CLI, "status", str(out)])
    found = complete([*CLI, "evaluate", "volume", "--pred", str(out), "--truth", str(labels), "--classes", "background,object",
                      "--out", str(tmp_path / "scores")])
    scores = json.loads((tmp_path / "scores/evaluation.json").read_text())
    assert scores["classes"][1]["iou"] > 0.7, found
    complete([*CLI, "report", str(out)])
    page = (out / "report.html").read_text()
    assert "Three planes through the middle" in page and "data:image/png" in page and "object" in page
    complete([*CLI, "report", str(tmp_path / "model")])
    assert "report.html" in os.listdir(tmp_path / "model")


@pytest.mark.slow
def test_instances_and_a_killed_driver(tmp_path: Path) -> None:
    raw, labels = make_pair(tmp_path / "in", (40, 40, 40))
    job = fusion_job((raw, labels), tmp_path / "model", target="affinities", classes=["background", "cell"], steps=150,
                     validate_every=50, checkpoint_every=50,
                     train=[{"raw": str(raw), "labels": str(labels), "region": "0:40,0:40,0:18"}],
                     validation=[{"raw": str(raw), "labels": str(labels), "region": "0:40,0:40,20:40"}])
    complete([*CLI, "train", "context-fusion", written(tmp_path / "job.yaml", job)])
    segment = [*CLI, "segment", "volume", str(raw), "--checkpoint", str(tmp_path / "model/checkpoint"), "--no-ray",
               "--threshold", "0.5",
               "--window-voxels", "16", "--halo-voxels", "4", "--shard-voxels", "16", "--block-voxels", "32", "--unit-windows", "1"]
    complete([*segment, "--out", str(tmp_path / "clean")])
    out = tmp_path / "out"
    for _ in range(3):
        process = subprocess.Popen([*segment, "--out", str(out)],
                                   env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list((out / "_dinoray/receipts").glob("*"))) if (out / "_dinoray/receipts").exists() else 0
        while process.poll() is None and len(list((out / "_dinoray/receipts").glob("*"))) < before + 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    complete([*segment, "--out", str(out)])
    verify_deep(open_run(str(out))[0])
    assert data_objects(out) == data_objects(tmp_path / "clean")
    assert len(np.unique(zarr.open_array(out / "labels.zarr/0", mode="r")[:])) > 1
    printed = complete([*CLI, "evaluate", "volume", "--pred", str(out), "--truth", str(labels)])
    assert "adapted Rand error" in printed
    complete([*CLI, "report", str(out)])
    assert "Sizes of instances" in (out / "report.html").read_text()
