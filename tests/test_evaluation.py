"""`dinoray evaluate cells`: what it prints and writes is what the metrics say; groups, refusals, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from dinoray import cli
from dinoray.config import SegmentCellsJob
from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest
from dinoray.evaluation import evaluate_cells, read_groups, table_lines
from dinoray.io.decoded import Limits
from dinoray.io.label_pairs import LabelPair, list_predictions, list_truth, pair_up
from dinoray.vision.bootstrap import bootstrap
from dinoray.vision.instance_metrics import THRESHOLDS, score_image
from tests.realdata import data_folder
from tests.runs import run, use_tiny_backbone


def squares(count: int, found: int, invented: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(pred, truth): `count` squares of 16 px, of which `found` are predicted with 12 of them (IoU 0.75)."""
    truth, pred = np.zeros((30, 60), np.uint16), np.zeros((30, 60), np.int32)
    for i in range(count + invented):
        y, x = divmod(i, 10)
        if i < count:
            truth[6 * y:6 * y + 4, 6 * x:6 * x + 4] = i + 1
        if i < found or i >= count:
            pred[6 * y:6 * y + 3, 6 * x:6 * x + 4] = 1000 + i
    return pred, truth


SET = {"a": squares(10, 8), "b": squares(2, 1, invented=1), "none": squares(0, 0), "worst": squares(5, 0, invented=5)}
"""AP at 0.5: 8/10, 1/3, 1, 0/10; pooled 9 of 17 true, 15 predicted: 9/23."""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(predictions, truth)."""
    for place in ("pred", "truth"):
        (tmp_path / place).mkdir()
    for name, (pred, truth) in SET.items():
        tifffile.imwrite(tmp_path / f"pred/{name}.tif", pred)
        tifffile.imwrite(tmp_path / f"truth/{name}_masks.tif", truth)
    return tmp_path / "pred", tmp_path / "truth"


def pairs_of(folders: tuple[Path, Path], **options) -> list[LabelPair]:
    return pair_up(list_predictions(str(folders[0])), list_truth(str(folders[1])), **options)[0]


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `dinoray evaluate cells` in this process."""
    monkeypatch.setattr(sys, "argv", ["dinoray", "evaluate", "cells", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_values_by_hand(folders: tuple[Path, Path]) -> None:
    found = evaluate_cells(pairs_of(folders), resamples=0)
    values = {name: (e["image_mean"].value, e["pooled"].value) for name, e in found.summary.metrics.items()}
    assert (found.summary.images, found.summary.truth, found.summary.pred) == (4, 17, 15)
    assert values["AP@0.5"] == pytest.approx(((8 / 10 + 1 / 3 + 1 + 0) / 4, 9 / 23))
    assert values["AP@0.75"] == values["AP@0.5"], "an IoU of 12/16 is at the threshold"
    assert values["AP@0.5:0.95"] == pytest.approx(((6 / 10 * (8 / 10 + 1 / 3) + 1) / 4, 6 / 10 * 9 / 23))
    assert values["SEG"] == pytest.approx(((0.6 + 0.375 + 0) / 3, 9 * 0.75 / 17))
    assert values["DET"] == pytest.approx((((1 - 20 / 100) + (1 - 11 / 20) + 1 + 0) / 4, 1 - (8 * 10 + 6) / 170))
    assert found.scores == [score_image(*SET[name], image_id=name) for name in sorted(SET)]


def test_threads_and_order_change_nothing(folders: tuple[Path, Path]) -> None:
    pairs, counted = pairs_of(folders), []
    one = evaluate_cells(pairs, resamples=200, threads=1, done=counted.append)
    four = evaluate_cells(pairs, resamples=200, threads=4)
    assert one.scores == four.scores and counted == [1, 2, 3, 4]
    assert table_lines(one.summary) == table_lines(four.summary)
    estimate = one.summary.metrics["AP@0.5"]["pooled"]
    assert estimate == bootstrap(one.scores, "AP@0.5", "pooled", n=200)


def test_what_is_printed_and_written(folders, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "new" / "eval"
    code, text, err = call(monkeypatch, capsys, "--pred", folders[0], "--truth", folders[1], "--out", out, "--bootstrap", 100,
                           "--thresholds", "0.3,0.5")
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert lines[0] == "all images: 4 images, 17 true objects, 15 predicted"
    assert any(line.split()[:2] == ["AP@0.5", "0.533"] and line.split()[-3] == "0.391" for line in lines)
    assert sorted(p.name for p in out.iterdir()) == ["evaluation.html", "evaluation.json", "evaluation.parquet"]
    record = json.loads((out / "evaluation.json").read_text())
    assert record["settings"]["thresholds"] == [0.3, 0.5] and record["settings"]["bootstrap"] == 100
    assert record["thresholds"] == [0.3, *THRESHOLDS]
    assert record["summary"]["metrics"]["AP@0.5"]["pooled"]["value"] == pytest.approx(9 / 23)
    assert [image["tp"][1] for image in record["images"]] == [8, 1, 0, 0]
    table = pq.read_table(out / "evaluation.parquet").to_pydict()
    assert table["image_id"] == ["a", "b", "none", "worst"] and table["tp@0.5"] == [8, 1, 0, 0]
    assert table["AP@0.5"] == pytest.approx([0.8, 1 / 3, 1, 0]) and table["SEG"] == [pytest.approx(0.6), 0.375, None, 0]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert call(monkeypatch, capsys, "--pred", folders[0], "--truth", folders[1], "--out", out, "--bootstrap", 100,
                "--thresholds", "0.3,0.5")[0] == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_groups(folders, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "groups.json").write_text(json.dumps({"set": {"modality": {"a": "bright", "b": "bright", "worst": "dark"}}}))
    code, text, _ = call(monkeypatch, capsys, "--pred", folders[0], "--truth", folders[1], "--bootstrap", 0,
                         "--out", tmp_path / "o", "--groups", f"{tmp_path}/groups.json#set/modality")
    assert code == 0
    heads = [line for line in text.splitlines() if not line.startswith(" ")][:4]
    assert heads == ["all images: 4 images, 17 true objects, 15 predicted", "(no group): 1 image, 0 true objects, 0 predicted",
                     "bright: 2 images, 12 true objects, 10 predicted", "dark: 1 image, 5 true objects, 5 predicted"]
    groups = json.loads((tmp_path / "o/evaluation.json").read_text())["groups"]
    assert groups["bright"]["metrics"]["AP@0.5"]["pooled"]["value"] == pytest.approx(9 / 13)
    assert groups["(no group)"]["metrics"]["SEG"]["pooled"]["value"] is None
    (tmp_path / "table.csv").write_text("image_id,site,day\na,1,mon\nb,1,tue\nnone,2,\n")
    assert read_groups(str(tmp_path / "table.csv"), "day") == {"a": "mon", "b": "tue"}
    assert read_groups(str(tmp_path / "groups.json") + "#set", "modality")["a"] == "bright"


def test_missing_predictions_are_said(folders, tmp_path: Path, monkeypatch, capsys) -> None:
    (folders[0] / "a.tif").unlink()
    tifffile.imwrite(folders[0] / "extra.tif", SET["a"][0])
    argv = ["--pred", folders[0], "--truth", folders[1], "--bootstrap", 10]
    code, _, err = call(monkeypatch, capsys, *argv)
    assert code == 2 and "1 of 4 images have no prediction: a" in err and "--allow-missing" in err
    code, text, _ = call(monkeypatch, capsys, *argv, "--allow-missing", "--out", tmp_path / "o")
    assert code == 0
    assert "1 image without a prediction, scored as empty: a" in text
    assert "1 prediction without true labels not scored: extra" in text
    assert json.loads((tmp_path / "o/evaluation.json").read_text())["images"][0]["pred"] == 0
    code, text, _ = call(monkeypatch, capsys, *argv, "--ids", "b,worst")
    assert code == 0 and "all images: 2 images, 7 true objects, 7 predicted" in text
    assert "1 prediction without true labels not scored: extra" in text, "those of images that were not asked for have some"


def test_thresholds_of_many_digits_keep_their_names(folders, tmp_path: Path, monkeypatch, capsys) -> None:
    """Names of six digits would be those of other thresholds: not scored, or two of one name."""
    code, text, err = call(monkeypatch, capsys, "--pred", folders[0], "--truth", folders[1], "--out", tmp_path / "o",
                           "--bootstrap", 10, "--thresholds", "0.12345678,0.74999999,0.75,0.75000001")
    assert (code, err) == (0, "")
    shown = {line.split()[0]: line.split()[1] for line in text.splitlines() if line.startswith("  ")}
    names = ("0.12345678", "0.74999999", "0.75", "0.75000001")
    assert [shown[f"recall@{name}"] for name in names] == ["0.575", "0.575", "0.575", "0.250"]
    table = pq.read_table(tmp_path / "o/evaluation.parquet").to_pydict()
    assert (table["tp@0.75"], table["tp@0.75000001"]) == ([8, 1, 0, 0], [0, 0, 0, 0])


def test_masks_above_the_limit_of_pixels(folders, monkeypatch, capsys) -> None:
    argv = ["--pred", folders[0], "--truth", folders[1], "--bootstrap", 0]
    code, _, err = call(monkeypatch, capsys, *argv, "--max-pixels", 30 * 60 - 1)
    assert code == 2 and "4 of 4 pairs cannot be scored" in err and "the limit is 1,799 (--max-pixels)" in err
    assert call(monkeypatch, capsys, *argv, "--max-pixels", 30 * 60)[0] == 0
    seen: list[Limits] = []

    def watched(pairs: list[LabelPair], *, limits: Limits, **options: object) -> None:
        seen.append(limits)
        raise BadRequest("enough")

    monkeypatch.setattr("dinoray.evaluation.evaluate_cells", watched)
    for pixels in ((), ("--max-pixels", 2**31)):
        assert "enough" in call(monkeypatch, capsys, *argv, *pixels)[2]
    assert [limits.max_pixels for limits in seen] == [SegmentCellsJob.model_fields["max_pixels"].default, 2**31]
    assert seen[1].max_bytes >= 4 * 2**31, "int32, as segment cells writes them"


@pytest.mark.parametrize(("flags", "message"), [
    (["--max-pixels", "0"], "0 pixels"),
    (["--thresholds", "half"], "not numbers"),
    (["--thresholds", "0"], "IoU thresholds 0.0"),
    (["--bootstrap", "-1"], "-1 draws"),
    (["--by", "day"], "--by names a column of --groups"),
    (["--kind", "zip"], "unknown layout"),
    (["--ids", "x"], "1 of 1 ids have no true labels: x"),
    (["--groups", "nowhere.json"], "no such file"),
    (["--pred", "nowhere"], "no such file or folder"),
    (["--kind", "dsb"], "no <id>/images"),
    (["--kind", "dsb", "--images", "x"], "leave --images out"),
])
def test_bad_requests_exit_with_2_and_write_nothing(folders, tmp_path: Path, monkeypatch, capsys, flags: list[str],
                                                    message: str) -> None:
    code, _, err = call(monkeypatch, capsys, "--pred", folders[0], "--truth", folders[1], "--out", tmp_path / "o", *flags)
    assert code == 2 and message in err
    assert not (tmp_path / "o").exists()


def test_true_labels_that_were_taken_for_images_are_named(folders, monkeypatch, capsys) -> None:
    tifffile.imwrite(folders[1] / "worst.tif", SET["worst"][1])
    argv = ("--pred", folders[0], "--truth", folders[1], "--bootstrap", "0")
    assert "taken for images" not in call(monkeypatch, capsys, *argv)[1], "it has its labels beside it"
    tifffile.imwrite(folders[1] / "lone.tif", SET["b"][1])
    code, text, _ = call(monkeypatch, capsys, *argv)
    assert code == 0 and "all images: 4 images" in text
    assert "1 file without a suffix such as _masks" in text and "taken for images and not scored: lone.tif" in text


def test_broken_files_are_named_all_at_once(folders: tuple[Path, Path]) -> None:
    tifffile.imwrite(folders[0] / "a.tif", np.ones((5, 5), np.uint16))
    tifffile.imwrite(folders[0] / "b.tif", np.full((30, 60), 0.5, np.float32))
    (folders[1] / "worst_masks.tif").write_bytes(b"II*\0")
    with pytest.raises(BadRequest) as refused:
        evaluate_cells(pairs_of(folders))
    message = str(refused.value)
    assert "3 of 4 pairs cannot be scored" in message
    assert "image a: the predicted labels are 5 x 5 px, the true ones 30 x 60" in message
    assert "b: labels are integers" in message and "worst_masks.tif" in message
    with pytest.raises(BadRequest, match="nothing to score"):
        evaluate_cells([])


def crumbs(value: int, pieces: int) -> np.ndarray:
    """`pieces` squares of one value."""
    return np.where(squares(pieces, pieces)[0] > 0, value, 0).astype(np.int32)


def test_one_prediction_in_crumbs_is_scored(folders: tuple[Path, Path]) -> None:
    """One bad object is no reason to refuse the evaluation of all others; true labels of one value still are."""
    tifffile.imwrite(folders[0] / "a.tif", crumbs(3, 6))
    found = evaluate_cells(pairs_of(folders), resamples=0)
    assert found.notes == ["1 prediction of one value in 4 or more separate pieces, scored as one object each: a"]
    assert [(s.image_id, s.pred, s.tp[0]) for s in found.scores[:2]] == [("a", 1, 0), ("b", 2, 1)]
    tifffile.imwrite(folders[1] / "b_masks.tif", crumbs(3, 4))
    with pytest.raises(BadRequest, match=r"1 of 4 pairs cannot be scored:\n  b: one value \(3\) in 4 separate pieces"):
        evaluate_cells(pairs_of(folders))


def test_predictions_that_are_all_binary_masks_are_refused(folders: tuple[Path, Path]) -> None:
    for name, pieces in (("a", 6), ("b", 1), ("none", 0), ("worst", 4)):
        tifffile.imwrite(folders[0] / f"{name}.tif", crumbs(255, pieces))
    with pytest.raises(BadRequest, match=r"binary masks, not labels: each has one value besides 0, 2 of 3 in 4 or more separate "
                       r"pieces: a, worst") as refused:
        evaluate_cells(pairs_of(folders))
    assert refused.value.where == "--pred" and "skimage.measure.label" in refused.value.todo
    tifffile.imwrite(folders[0] / "worst.tif", crumbs(255, 3))
    assert len(evaluate_cells(pairs_of(folders), resamples=0).notes) == 1, "single cells, of which one fell to pieces"


def test_thresholds_are_checked_before_a_file_is_read(folders: tuple[Path, Path]) -> None:
    pairs, done = pairs_of(folders), []
    (folders[0] / "a.tif").unlink()
    with pytest.raises(BadRequest, match="IoU thresholds 0.5, .*, 1.5") as refused:
        evaluate_cells(pairs, thresholds=[1.5], done=done.append)
    assert refused.value.where == "thresholds" and not done


def test_groups_that_cannot_be_read(tmp_path: Path, folders) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "no.csv").write_text("name,day\na,mon\n")
    for place, message in (("list.json", "not an object of image id: group"), ("no.json", "not a JSON file"),
                           ("no.csv", "a table of groups has the columns name, day"), ("none.json", "no such file")):
        with pytest.raises(BadRequest, match=message):
            read_groups(str(tmp_path / place), "day")
    with pytest.raises(BadRequest, match="none of the images has a group"):
        evaluate_cells(pairs_of(folders), groups={"other": "x"})


def test_an_unfinished_run_is_said(folders: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    """(An output of another job stands for one with masks: units, receipts and quarantine are the same.)"""
    use_tiny_backbone(monkeypatch)
    (tmp_path / "in").mkdir()
    for name, (pred, _) in SET.items():
        tifffile.imwrite(tmp_path / f"in/{name}.tif", pred.astype(np.uint16))
    (tmp_path / "in/broken.tif").write_bytes(b"II*\0")
    run(tmp_path / "in", tmp_path / "out", unit_items=2, max_failed_fraction=0.9)
    folders[0].rename(tmp_path / "out/masks")
    argv = ["--pred", tmp_path / "out", "--truth", folders[1], "--bootstrap", 0]
    code, text, _ = call(monkeypatch, capsys, *argv)
    assert code == 0 and text.splitlines()[:2] == ["2 images of the run in quarantine: constant 1, truncated 1", (
        "all images: 4 images, 17 true objects, 15 predicted")]
    next((tmp_path / "out/_dinoray/receipts").iterdir()).unlink()
    code, text, _ = call(monkeypatch, capsys, *argv)
    assert code == 0 and text.startswith("the run is unfinished: 1 of 3 units are not done\n")


def test_a_real_truth_against_itself(tmp_path: Path, monkeypatch, capsys) -> None:
    """DSB folders as truth, the same objects as label images with other numbers: perfect, with an interval of nothing."""
    source = data_folder("dsb2018_stage1") / "stage1_test"
    ids = sorted(p.name for p in source.iterdir() if p.is_dir())[:4]
    for one in list_truth(LabelledSource(images=str(source), kind="dsb", ids=tuple(ids))):
        labels = one.truth.read(Limits())
        tifffile.imwrite(tmp_path / f"{one.image_id}.tif", np.where(labels > 0, 70_000 - labels, 0).astype(np.int32))
    code, text, _ = call(monkeypatch, capsys, "--pred", tmp_path, "--truth", source, "--kind", "dsb", "--ids", ",".join(ids),
                         "--bootstrap", 100)
    assert code == 0
    rows = [line.split() for line in text.splitlines()[2:]]
    assert len(rows) == 16
    for name, *cells in rows:
        assert cells == ["1.000", "[1.000,", "1.000]"] * 2, name
