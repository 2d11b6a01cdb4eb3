"""`dinoray evaluate volume`: the figures of the whole, whatever the blocks; grids that do not fit are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dinoray.errors import BadRequest
from dinoray.vision.volume_metrics import Contingency, average_precision, class_scores, confusion, instance_score
from dinoray.volume_evaluation import evaluate_volume, open_labels
from tests.runs import complete
from tests.training.volumes import blobs, write_volume


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    truth = blobs((40, 50, 60))
    pred = np.roll(truth, 1, axis=2)
    pred[pred == 3] = 4
    return write_volume(tmp_path / "p.zarr", pred, (8.0,) * 3), write_volume(tmp_path / "t.zarr", truth, (8.0,) * 3), pred, truth


def test_instances_in_blocks_score_as_the_whole(pair, monkeypatch) -> None:
    monkeypatch.setattr("dinoray.volume_evaluation.BLOCK", 17)
    with open_labels(str(pair[0])) as pred, open_labels(str(pair[1])) as truth:
        found = evaluate_volume(pred, truth)
    whole = Contingency().add(pair[2].astype(np.int64), pair[3].astype(np.int64))
    assert found.instances == instance_score(whole) and found.ap50 == average_precision(whole)
    assert found.voxels == pair[3].size and 0 < found.instances.rand_error < 1
    assert found.true_objects == len(np.unique(pair[3])) - 1 and found.predicted_objects == len(np.unique(pair[2])) - 1


def test_classes_with_a_region_and_an_unknown_label(tmp_path) -> None:
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 4, (30, 20, 20)).astype(np.uint8), rng.integers(0, 3, (30, 20, 20)).astype(np.uint8)
    with open_labels(str(write_volume(tmp_path / "p.zarr", pred, (8.0,) * 3))) as p, \
            open_labels(str(write_volume(tmp_path / "t.zarr", truth, (8.0,) * 3))) as t:
        found = evaluate_volume(p, t, classes=["background", "a", "b"], region=((5, 25), (0, 20), (3, 20)), unknown=3)
        box = np.s_[5:25, 0:20, 3:20]
        expected = class_scores(confusion(pred[box], truth[box], 3, truth[box] != 3), ["background", "a", "b"])
        assert found.classes == expected and found.voxels == int((truth[box] != 3).sum())
        with pytest.raises(BadRequest, match="classes 0..3"):
            evaluate_volume(p, t, classes=["background", "a", "b"])
        with pytest.raises(BadRequest, match="inside the truth"):
            evaluate_volume(p, t, region=((0, 31), (0, 20), (0, 20)))


def test_a_prediction_of_a_part_is_placed_by_its_translation(tmp_path) -> None:
    truth = blobs((30, 30, 30))
    part = write_volume(tmp_path / "p.zarr", truth[10:20, 5:25, :], (8.0,) * 3, (10 * 8 + 4.0, 5 * 8 + 4.0, 4.0))
    with open_labels(str(part)) as pred, open_labels(str(write_volume(tmp_path / "t.zarr", truth, (8.0,) * 3))) as true:
        assert evaluate_volume(pred, true, region=((10, 20), (5, 25), (0, 30))).instances.rand_error == pytest.approx(0)
        assert evaluate_volume(pred, true).instances.rand_error > 0.1, "what is not covered is background"
        with pytest.raises(BadRequest, match="do not meet"):
            evaluate_volume(pred, true, region=((0, 5), (0, 5), (0, 5)))


@pytest.mark.parametrize(("size", "place", "message"), [((16.0,) * 3, (8.0,) * 3, "voxels of"),
                                                        ((8.0,) * 3, (4.0, 4.0, 7.0), "beside the truth")])
def test_grids_that_do_not_fit_are_refused(tmp_path, size, place, message) -> None:
    labels = blobs((20, 20, 20))
    with open_labels(str(write_volume(tmp_path / "p.zarr", labels, size, place))) as pred, \
            open_labels(str(write_volume(tmp_path / "t.zarr", labels, (8.0,) * 3))) as truth, \
            pytest.raises(BadRequest, match=message):
        evaluate_volume(pred, truth)


def test_floats_are_no_labels(tmp_path) -> None:
    with pytest.raises(BadRequest, match=r"float|integers|whole numbers"):
        open_labels(str(write_volume(tmp_path / "p.zarr", np.zeros((8, 8, 8), np.float32), (8.0,) * 3)))


def test_the_command(pair, tmp_path) -> None:
    argv = [sys.executable, "-m", "dinoray.cli", "evaluate", "volume", "--pred", str(pair[0]), "--truth", str(pair[1])]
    printed = complete([*argv, "--out", str(tmp_path / "scores")])
    assert "adapted Rand error" in printed and "variation of information" in printed
    found = json.loads((tmp_path / "scores/evaluation.json").read_text())
    assert found["instances"]["rand_error"] > 0 and found["settings"]["pred"] == str(pair[0])
    assert "z0:z1" in complete([*argv, "--region", "1:2"], code=2)


def test_the_label_of_unknown_voxels_may_be_the_largest_there_is(tmp_path) -> None:
    truth = blobs((20, 20, 20)).astype(np.uint64)
    truth[:5] = 2**64 - 1
    with open_labels(str(write_volume(tmp_path / "p.zarr", blobs((20, 20, 20)), (8.0,) * 3))) as pred, \
            open_labels(str(write_volume(tmp_path / "t.zarr", truth, (8.0,) * 3))) as true:
        found = evaluate_volume(pred, true, unknown=2**64 - 1)
        assert found.voxels == 15 * 20 * 20 and found.instances.rand_error == pytest.approx(0)
        with pytest.raises(BadRequest, match="2\\^63"):
            evaluate_volume(pred, true)
