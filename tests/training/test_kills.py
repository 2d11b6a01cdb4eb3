"""kill -9 of the real command, anywhere: the same command again ends with the bytes of an undisturbed training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import complete
from tests.training.toys import assert_same_training, disc_job, make_discs, run_killed, write_job

KILLS = ("train.state@2", "train.step@2", "train.checkpoint@1")
"""One after the other on one output: between the newest state's object and its pointer, before a step, before the
checkpoint (tests/training/test_loop.py has every passage)."""


@pytest.mark.parametrize(("precision", "ema"), [
    pytest.param("float32", 0.0, marks=pytest.mark.slow), pytest.param("bfloat16", 0.9, marks=pytest.mark.slow)])
def test_killed_at_every_point_it_ends_with_the_same_bytes(precision: str, ema: float, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    images = make_discs(tmp_path / "in")
    fields = {"precision": precision, "ema_decay": ema}
    whole = write_job(tmp_path / "whole.yaml", disc_job(images, tmp_path / "whole", **fields))
    killed = write_job(tmp_path / "killed.yaml", disc_job(images, tmp_path / "killed", **fields))
    for number, point in enumerate(KILLS):
        printed = run_killed(killed, point.replace("@", "=kill@"))
        assert ("looking at" in printed) == (number == 0), "images are looked at once"
    printed = complete(killed)
    assert "going on from step 8" in printed and "complete: 8 steps" in printed
    complete(whole)
    assert_same_training(tmp_path / "whole", tmp_path / "killed")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    assert "complete: 8 steps" in complete(killed)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    assert after == before, "the same command on what is complete writes nothing"
