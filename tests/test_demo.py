"""The demo: its volume and cells are made the same everywhere, its jobs run and are verified, and the lines it prints are true."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from dinoray import demo
from dinoray.demo import cell_pictures, cells, images, volume
from dinoray.io.images import decode_image
from dinoray.io.volumes import VolumeRequest, open_volume


def test_the_volume_is_the_same_every_time_and_has_membranes() -> None:
    a, b = (volume.draw_volume((24, 40, 40)) for _ in range(2))
    assert a.dtype == np.uint8 and a.shape == (24, 40, 40) and (a == b).all()
    assert (volume.draw_volume((24, 40, 40), seed=1) != a).any()
    assert 0.02 < (a < 90).mean() < 0.6 and (a > 120).mean() > 0.3  # dark lines around bright cells


def test_a_volume_that_is_there_is_kept_and_a_torn_one_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "VOLUME_SHAPE", (16, 24, 24))
    folder = volume.write_volume(tmp_path / "volume.zarr")
    chunk = next(p for p in folder.rglob("c/**/*") if p.is_file())
    before = chunk.stat().st_mtime_ns
    volume.write_volume(folder)
    assert chunk.stat().st_mtime_ns == before
    (folder / "zarr.json").unlink()
    chunk.write_bytes(b"torn")
    with open_volume(VolumeRequest(str(volume.write_volume(folder)))) as found:
        assert found.shape == (16, 24, 24) and found.voxel_size_nm == (16.0,) * 3
        assert (found.read(slice(0, 16), slice(0, 24), slice(0, 24)) == volume.draw_volume((16, 24, 24))).all()


def test_cells_are_the_same_every_time_and_touch() -> None:
    pixels, labels = cell_pictures.draw_cells(96, seed=3)
    again = cell_pictures.draw_cells(96, seed=3)
    assert pixels.dtype == np.uint8 and (pixels == again[0]).all() and (labels == again[1]).all()
    assert (cell_pictures.draw_cells(96, seed=4)[1] != labels).any()
    ids, areas = np.unique(labels[labels > 0], return_counts=True)
    assert ids.tolist() == list(range(1, len(ids) + 1)) and len(ids) > 12  # contiguous
    assert areas.min() > 30 and areas.max() > 4 * areas.min()  # unequal
    assert all(ndimage.label(labels == number)[1] == 1 for number in ids)
    merged = ndimage.label(labels > 0)[1]
    assert merged < 0.8 * len(ids)  # many touch, so that a threshold alone joins them


def test_pictures_that_are_there_are_kept_and_half_written_ones_are_replaced(tmp_path: Path) -> None:
    torn = tmp_path / "set.making/images/field07.ome.tif"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    folder = cell_pictures.write_cells(tmp_path / "set", 2, seed=5)
    images, labels = ({path.name: path for path in (folder / name).iterdir()} for name in ("images", "labels"))
    assert sorted(images) == ["field00.ome.tif", "field01.ome.tif"] and sorted(labels) == ["field00.tif", "field01.tif"]
    before = images["field00.ome.tif"].stat().st_mtime_ns
    cell_pictures.write_cells(tmp_path / "set", 2, seed=5)
    assert images["field00.ome.tif"].stat().st_mtime_ns == before
    for number in range(2):
        pixels, truth = cell_pictures.draw_cells(cell_pictures.SIDE_PX, 5 + number)
        name = f"field{number:02d}"
        found = decode_image(images[f"{name}.ome.tif"].read_bytes(), name)
        assert (found.pixels[0] == pixels).all() and found.pixel_size_um == cell_pictures.PIXEL_UM
        assert (tifffile.imread(labels[f"{name}.tif"]) == truth).all()


def test_a_model_that_has_not_learned_fails_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"KNOWN": 6, "UNSEEN": 2, "STEPS": 2}.items():
        monkeypatch.setattr(cells, name, value)
    for name in ("show_images", "show_volume"):
        monkeypatch.setattr(demo, name, lambda *args, **kwargs: None)
    lines: list[str] = []
    assert demo.run_demo(str(tmp_path / "demo"), no_ray=True, say=lines.append) == 1
    assert lines[-1].startswith("demo FAILED: AP50 0.") and "training_report.html" in lines[-1]


def test_the_demo_runs_verifies_and_its_lines_read_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MODEL", "vitt16")
    monkeypatch.setattr(volume, "MODEL", "vitt16")
    monkeypatch.setattr(volume, "VOLUME_SHAPE", (64, 64, 80))
    monkeypatch.setattr(cells, "STEPS", 60)
    lines: list[str] = []
    assert demo.run_demo(str(tmp_path / "demo"), no_ray=True, say=lines.append) == 0
    for name in ("features", "volume_features", "cells/masks"):
        assert (tmp_path / "demo" / name / "_SUCCESS").exists()
    pages = [line.removeprefix("look at ") for line in lines if line.startswith("look at /")]
    assert [Path(page).name for page in pages] == [
        "report.html", "volume_report.html", "training_report.html", "masks_report.html", "evaluation.html"]
    assert all("✓ verified" in Path(pages[i]).read_text() for i in (0, 1, 3))
    code = [match[1] for line in lines if (match := re.search(r'python -c "(.*)"', line))]
    assert len(code) == 3
    shown = [_run(line) for line in code[1:]]
    assert shown[0].startswith("(16, 16, 20) (64.0, 64.0, 64.0) ") and "nan" not in shown[0]
    assert re.fullmatch(r"field00\.ome\.tif \(128, 128\) int32 [1-9]\d* cells\n", shown[1])
    scores = json.loads((tmp_path / "demo/cells/scores/evaluation.json").read_text())
    told = next(line for line in lines if "AP50" in line and "not seen" in line)
    assert f"AP50 {scores['summary']['metrics']['AP@0.5']['image_mean']['value']:.3f}" in told
    assert f"{scores['summary']['pred']} cells found of {scores['summary']['truth']} drawn" in told
    again: list[str] = []
    demo.run_demo(str(tmp_path / "demo"), no_ray=True, say=again.append)  # resumes: nothing is left to do
    assert [line for line in again if "complete:" in line] == [line for line in lines if "complete:" in line]
    assert told in again and not any(line.startswith("step ") for line in again)


def _run(code: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, {})
    return shown.getvalue()
