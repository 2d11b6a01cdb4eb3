"""A small task whose steps take microseconds, and labelled pictures of discs: what the tests of trainings learn from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from dinoray.config.training import TrainingJob
from dinoray.io.stores import LocalStore
from dinoray.training.loop import Progress
from dinoray.training.sampling import generator
from dinoray.training.states import load_best, load_last
from dinoray.training.workers import Workers

TIMES = ("samples_per_s", "wait_share", "extraction_share")
"""Columns of the history that no two runs share."""


def toy_job(out: str | Path, **fields: Any) -> TrainingJob:
    """Ten steps of six samples, in micro-batches of two."""
    values = {"steps": 10, "batch_size": 6, "micro_batch": 2, "warmup_steps": 2, "learning_rate": 0.05, "validate_every": 3,
              "checkpoint_every": 4, "log_every": 1, "precision": "float32", "device": "cpu", "data_threads": 2}
    return TrainingJob(out=str(out), **values | fields)


class Toy:
    """`Task`: a small network learns a line; each sample has a weight of its own, by which its loss counts."""

    fingerprint = "toy"

    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.0, seed: int = 3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1)).to(dtype)
        self.dtype, self.seen = dtype, []

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "lr": 0.05, "weight_decay": 0.01}]

    def sample(self, index: int) -> tuple[int, np.ndarray, float, float]:
        """(index, x [5], y, weight)."""
        rng = generator(7, index)
        x = rng.normal(size=5)
        self.seen.append(index)
        return index, x, float(x @ np.arange(5.0) + 0.1 * rng.normal()), float(rng.random() + 0.1)

    def loss(self, samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, w = (torch.tensor(np.array([s[i] for s in samples]), dtype=self.dtype) for i in (1, 2, 3))
        return (w * (self.model(x)[:, 0].to(self.dtype) - y) ** 2).sum(), w.sum()

    def validate(self, workers: Workers) -> dict[str, float]:
        total, count = self.loss([self.sample(10**6 + i) for i in workers.share(range(7))])
        total, count = workers.total(float(total), float(count))
        return {"loss": total / count}


def timeless(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """A history without what depends on the machine's speed."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two saved states hold the same bits, but for times."""
    assert one.keys() == other.keys()
    for key in one:
        if key == "progress":
            assert timeless(one[key].pop("history")) == timeless(other[key].pop("history"))
            one[key].pop("seconds"), other[key].pop("seconds")
            assert one[key] == other[key]
        else:
            _assert_same(one[key], other[key], key)


def _assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_same(a, b, f"{where}.{i}")
    else:
        assert one == other, where


def last_state(out: str | Path) -> dict[str, Any]:
    """The newest state below an output."""
    state = load_last(LocalStore(str(out)))
    assert state is not None
    return state


def outcome(progress: Progress) -> tuple[int, str]:
    """(step, ended)."""
    return progress.step, progress.ended


# ---------------------------------------------------------------- pictures, and the real command


def make_discs(folder: Path, *, images: int = 8, side: int = 64, seed: int = 0) -> Path:
    """Gray pictures of bright discs `NN_img.png` with their label images `NN_masks.png`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    for number in range(images):
        labels = np.zeros((side, side), np.uint16)
        for k in range(1, 5):
            cy, cx, r = *rng.uniform(6, side - 6, 2), rng.uniform(4, 9)
            labels[(y - cy) ** 2 + (x - cx) ** 2 < r**2] = k
        picture = (labels > 0) * 150 + rng.integers(0, 60, (side, side))
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number:02d}_img.png")
        Image.fromarray(labels).save(folder / f"{number:02d}_masks.png")
    return folder


def disc_job(images: Path, out: Path | str, **fields: Any) -> dict[str, Any]:
    """A distance-map job of seconds on `make_discs`, as plain values."""
    return {"train": [{"images": str(images)}], "out": str(out), "model": "vitt16", "weights": "random",
            "backbone_learning_rate": 0.001, "learning_rate": 0.001, "crop_px": 32, "batch_size": 4, "micro_batch": 2, "steps": 8,
            "warmup_steps": 2, "validate_every": 3, "checkpoint_every": 3, "log_every": 1, "decoder_channels": [8, 8],
            "validation_crops": 4, "validation_fraction": 0.25, "no_ray": True, "stem_levels": 1, **fields}


def write_job(path: Path, values: dict[str, Any]) -> list[str]:
    """Store a job file; the command that runs it."""
    path.write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "dinoray.cli", "train", "distance-map", str(path)]


def run_killed(argv: list[str], points: str) -> str:
    """Run a command that kills itself at a failpoint; what it printed."""
    done = subprocess.run(argv, env={**os.environ, "DINORAY_FAILPOINTS": points}, capture_output=True, text=True, timeout=240)
    assert done.returncode == -9, done.stdout + done.stderr
    return done.stdout


def assert_same_training(one: Path, other: Path) -> None:
    """Two finished outputs: the same states, history and checkpoint, but for times."""
    assert_same_state(last_state(one), last_state(other))
    for out_a, out_b in ((one, other),):
        best = [load_best(LocalStore(str(out)), last_state(out)["progress"]) for out in (out_a, out_b)]
        _assert_same(best[0], best[1], "best")
        histories = [json.loads((out / "history.json").read_text()) for out in (out_a, out_b)]
        assert timeless(histories[0]) == timeless(histories[1])
        assert (out_a / "checkpoint/model.safetensors").read_bytes() == (out_b / "checkpoint/model.safetensors").read_bytes()
        assert (out_a / "_dinoray/examples.npz").read_bytes() == (out_b / "_dinoray/examples.npz").read_bytes()
        configs = [json.loads((out / "checkpoint/config.json").read_text()) for out in (out_a, out_b)]
        for config in configs:
            assert config["training"].pop("seconds") >= 0
        assert configs[0] == configs[1]
