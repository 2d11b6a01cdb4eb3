"""A training whose images and output are on S3 (moto's server on 127.0.0.1), on two workers of Ray Train."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinoray.io.stores import open_store
from dinoray.status import status_lines
from dinoray.vision.distance_model import load_segmenter
from tests.faults.s3_proxy import filled_bucket
from tests.runs import complete
from tests.training.toys import disc_job, make_discs, write_job


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A bucket that holds discs under in/."""
    with filled_bucket("cells", make_discs(tmp_path / "in"), "in") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield "cells"


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_from_s3_to_s3(bucket: str, tmp_path: Path) -> None:
    out = f"s3://{bucket}/training"
    values = disc_job(Path("unused"), out) | {"train": [{"images": f"s3://{bucket}/in"}], "no_ray": False, "workers": "2"}
    argv = write_job(tmp_path / "job.yaml", values)
    printed = complete([*argv, "stop_after_s=0.01"], code=1)
    assert "Stopped: training stopped at step" in printed
    printed += complete(argv)
    assert "complete: 8 steps" in printed
    assert list(status_lines(out))[-1] == f"ended by steps; checkpoint {out}/checkpoint"
    assert load_segmenter(f"{out}/checkpoint")[1].training["steps"] == 8
    store = open_store(out)
    keys = {key: store.get(key) for key, _ in store.list()}
    assert any(key.startswith("tensorboard/") and data for key, data in keys.items())
    assert len(json.loads(keys["history.json"])) == 8 + 3
    assert b"secret-that-must-not-leak" not in b"".join(keys.values()) + printed.encode()
