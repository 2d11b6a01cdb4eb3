"""The demo: a volume that is made the same everywhere, both jobs run and verified, and the lines it prints are true."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

from dinoray import demo
from dinoray.io.volumes import VolumeRequest, open_volume


def test_the_volume_is_the_same_every_time_and_has_membranes() -> None:
    a, b = (demo.draw_volume((24, 40, 40)) for _ in range(2))
    assert a.dtype == np.uint8 and a.shape == (24, 40, 40) and (a == b).all()
    assert (demo.draw_volume((24, 40, 40), seed=1) != a).any()
    assert 0.02 < (a < 90).mean() < 0.6 and (a > 120).mean() > 0.3  # dark lines around bright cells


def test_a_volume_that_is_there_is_kept_and_a_torn_one_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "VOLUME_SHAPE", (16, 24, 24))
    folder = demo.write_volume(tmp_path / "volume.zarr")
    chunk = next(p for p in folder.rglob("c/**/*") if p.is_file())
    before = chunk.stat().st_mtime_ns
    demo.write_volume(folder)
    assert chunk.stat().st_mtime_ns == before
    (folder / "zarr.json").unlink()
    chunk.write_bytes(b"torn")
    with open_volume(VolumeRequest(str(demo.write_volume(folder)))) as volume:
        assert volume.shape == (16, 24, 24) and volume.voxel_size_nm == (16.0,) * 3
        assert (volume.read(slice(0, 16), slice(0, 24), slice(0, 24)) == demo.draw_volume((16, 24, 24))).all()


def test_the_demo_runs_verifies_and_its_lines_read_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", "vitt16")
    monkeypatch.setattr(demo, "VOLUME_SHAPE", (64, 64, 80))
    lines: list[str] = []
    assert demo.run_demo(str(tmp_path / "demo"), no_ray=True, say=lines.append) == 0
    for name in ("features", "volume_features"):
        assert (tmp_path / "demo" / name / "_SUCCESS").exists()
    pages = [line.removeprefix("look at ") for line in lines if line.startswith("look at /")]
    assert [Path(page).name for page in pages] == ["report.html", "volume_report.html"]
    assert all("✓ verified" in Path(page).read_text() for page in pages)
    code = [match[1] for line in lines if (match := re.search(r'python -c "(.*)"', line))]
    assert len(code) == 2
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code[1], {})
    assert shown.getvalue().startswith("(16, 16, 20) (64.0, 64.0, 64.0) ") and "nan" not in shown.getvalue()
    again: list[str] = []
    demo.run_demo(str(tmp_path / "demo"), no_ray=True, say=again.append)  # resumes: nothing is left to do
    assert [line for line in again if "complete:" in line] == [line for line in lines if "complete:" in line]
