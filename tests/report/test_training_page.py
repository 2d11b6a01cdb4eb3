"""The page of a training: what is on record, at every stage of its life, with hostile names and damaged records."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dinoray.config import TrainDistanceMapJob
from dinoray.errors import BadRequest, OutputDamaged
from dinoray.io.stores import Store, open_store
from dinoray.io.training_examples import Example, store_examples
from dinoray.report.html import write_report
from dinoray.report.training_page import render_training
from dinoray.report.training_records import is_training, open_training
from dinoray.train import train_distance_map
from dinoray.training.survey import SURVEY_SCHEMA, Survey, store_survey
from dinoray.vision.instance_metrics import score_image
from dinoray.vision.targets import distance_map
from tests.report.test_report import HOSTILE, Tags
from tests.training.toys import disc_job, make_discs
from tests.vision.labels import four_cells

HISTORY = [row for step in range(10, 101, 10) for row in (
    {"step": step, "loss": 1.0 / step, "lr": 1e-3 * (1 - step / 100), "grad_norm": 10.0 / step, "samples_per_s": 20.0},
    {"step": step, "val_loss": 0.02 + abs(step - 70) / 1000})]


def record(store: Store, **fields: object) -> None:
    """The record of a job as `dinoray train` writes it."""
    job = TrainDistanceMapJob(train=({"images": f"/data/{HOSTILE}"},), out=store.url, model="vitt16", weights="random:0",
                              backbone_learning_rate=1e-3, steps=100, warmup_steps=5, **fields)  # type: ignore[arg-type]
    settings = {k: v for k, v in job.result_settings().items() if k not in ("model", "train", "validation")}
    store.put("_dinoray/job.json", json.dumps({
        "kind": "train distance-map", "command": "dinoray train distance-map job.yaml", "fingerprint": "f" * 16,
        "identity": {"settings": settings, "model": "vitt16", "weights_digest": "d" * 64},
        "job": job.model_dump(mode="json")}).encode())


def survey(store: Store, name: str, *, bad: int = 0) -> None:
    rows = [{"image_id": f"{name}{i}", "source": 0, "height": 64, "width": 80 + i, "objects": i, "diameters_px": [10.0 + i] * i,
             "median_diameter_px": 10.0 + i if i else None} for i in range(4)]
    rows += [{"image_id": f"{HOSTILE}{i}", "source": 0, "reason": "bad_labels", "message": "floats\nall over"} for i in range(bad)]
    store_survey(store, name, Survey(pa.Table.from_pylist(rows, schema=SURVEY_SCHEMA)))


def finished(folder: Path) -> str:
    """A whole training's output."""
    store = open_store(str(folder))
    record(store, augmentation={"p_blur": 0.0})
    survey(store, "train", bad=7)
    survey(store, "validation")
    store.put("history.json", json.dumps(HISTORY).encode())
    store.put("_dinoray/progress.json", json.dumps({"step": 100, "steps": 100, "seconds": 754.2, "best_loss": 0.02, "best_step": 70,
                                                    "ended": "steps"}).encode())
    store.put("checkpoint/config.json", json.dumps({
        "peak": 0.45, "fill": 0.07, "weights_digest": "e" * 64, "backbone": {"included": True, "digest": "b" * 64}, "decoder": {},
        "metrics": {"validation_images": 4, "validation_ap50_image_mean": 0.81234}, "training": {}, "channels": "auto",
        "scaling": "image", "scaling_percents": [0.1, 99.9], "crop_px": 256, "median_diameter_px": 21.5,
        "pixel_size_um": None}).encode())
    labels = four_cells()
    cells = np.where(labels == 4, 0, labels)
    pixels = np.repeat(((labels > 0) * 200).astype(np.uint8)[None], 3, axis=0)
    store_examples(store, [Example(HOSTILE, "worst", (0, 7), (200, 300), 0.75, pixels, distance_map(labels), distance_map(cells),
                                   labels, cells)])
    return str(folder)


def test_the_page_of_a_finished_training(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    assert write_report(out) == f"{out}/report.html"
    page = Path(out, "report.html").read_text()
    assert render_training(open_store(out)) == page
    parsed = Tags(page)
    text = re.sub(r"\s+", " ", parsed.text)
    for said in ("✓ checkpoint written", "12 min 34 s", "best: 0.02 at step 70", "0.8123", "markers above 0.45, cells above 0.07",
                 "bad_labels", "floats; all over", "and 2 more", "augmentation.p_blur 0", "median diameter 21.5 px",
                 "10% of these images", "part at x 7, y 0 of 300 × 200 px", "4 true, 3 predicted", "repeats nothing",
                 "20 samples/s"):
        assert said in text, said
    assert "script" not in {tag for tag, _ in parsed.tags} and HOSTILE in parsed.text
    assert all(attributes["src"].startswith("data:image/") for tag, attributes in parsed.tags if tag == "img")
    assert not re.search(r"url\(|@import", page) and not re.search(r"\b(nan|None|inf)\b", text)
    assert sum(tag == "svg" and attributes["class"] == "chart" for tag, attributes in parsed.tags) == 4
    assert sum(tag == "img" for tag, _ in parsed.tags) == 5


def test_a_training_shows_what_there_is_at_every_moment_of_its_life(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    record(store)
    text = Tags(render_training(store)).text
    assert "No step is on record yet" in text and "not been looked at yet" in text and "Nothing is logged yet" in text
    survey(store, "train")
    assert "median diameter" in Tags(render_training(store)).text
    store.put("_dinoray/progress.json", json.dumps({"step": 10, "steps": 100, "seconds": 2.0, "best_loss": math.inf,
                                                    "best_step": 0, "ended": ""}).encode())
    text = Tags(render_training(store)).text
    assert "Step 10 of 100" in text and "first saved state" in text and "inf" not in text.split()
    store.put("history.json", json.dumps(HISTORY[:1]).encode())
    text = Tags(render_training(store)).text
    assert "Loss" in text and "They are kept when the training ends" in text and "resumes the training" in text
    store.put("_dinoray/progress.json", json.dumps({"step": 100, "steps": 100, "ended": "steps"}).encode())
    assert "the checkpoint is not written yet" in Tags(render_training(store)).text


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    record(store, weight_decay=0.05, batch_size=3, decoder_channels=(8, 4), augmentation={"scale": (0.5, 2.0)})
    changed = dict(open_training(store).changed_settings())
    assert changed.pop("backbone_learning_rate") == 1e-3 and changed.pop("steps") == 100 and changed.pop("warmup_steps") == 5
    assert changed == {"batch_size": 3, "decoder_channels": [8, 4], "augmentation.scale": [0.5, 2.0]}


def test_the_report_does_not_overwrite_the_training(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    for inside in ("checkpoint/config.json", "history.json", "_dinoray/job.json", "tensorboard/x.html"):
        with pytest.raises(BadRequest, match="among the data"):
            write_report(out, f"{out}/{inside}")


@pytest.mark.parametrize("key", ["_dinoray/job.json", "history.json", "_dinoray/progress.json", "_dinoray/survey-train.parquet",
                                 "checkpoint/config.json", "_dinoray/examples.npz"])
def test_a_damaged_record_is_told_with_its_place(tmp_path: Path, key: str) -> None:
    out = finished(tmp_path / "out")
    other = {"_dinoray/job.json": b'{"kind": "train distance-map"}', "history.json": b'[{"loss": 1}]'}
    Path(out, key).write_bytes(other.get(key, b"{"))
    with pytest.raises(OutputDamaged) as caught:
        write_report(out)
    assert key in str(caught.value)


def test_other_outputs_are_no_trainings(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for text in (None, b"{}", b"[1]", b"no json", b'{"kind": 3}', b'{"kind": "volume"}'):
        if text is not None:
            store.put("_dinoray/job.json", text)
        assert not is_training(store)


@pytest.mark.slow
def test_a_real_training_leaves_what_its_page_shows(tmp_path: Path) -> None:
    job = disc_job(make_discs(tmp_path / "in"), tmp_path / "out")
    train_distance_map(TrainDistanceMapJob(**job), say=lambda line: None)
    found = open_training(open_store(str(tmp_path / "out")))
    assert found.examples and found.checkpoint is not None and found.progress["ended"] == "steps"
    assert {one.image_id for one in found.examples} <= set(found.surveys["validation"]["image_id"].to_pylist())
    for one in found.examples:
        score = score_image(one.cells, one.labels, thresholds=(0.5,))
        union = score.pred + score.truth - score.tp[0]
        assert one.ap50 == (score.tp[0] / union if union else 1.0)
        assert np.array_equal(one.target, distance_map(one.labels).astype(np.float16)) and one.labels.max() > 0
    text = Tags(Path(write_report(str(tmp_path / "out"))).read_text()).text
    assert "checkpoint written" in text and all(one.image_id in text for one in found.examples)
