"""The distance-map task: what its samples are, the survey before it, and what happens to images that turn bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from dinoray.config import TrainDistanceMapJob
from dinoray.config.augmentation import Augmentation
from dinoray.errors import BadRequest, ItemError, Stopped, SystemicError
from dinoray.io.stores import LocalStore
from dinoray.training.distance_map import DistanceMapTask, Images, weighted_squares
from dinoray.training.distance_worker import build_model, checkpoint_config, new_pool, prepared
from dinoray.training.labelled_sets import labelled_sets
from dinoray.training.spec import TrainingSpec
from dinoray.training.survey import SURVEY_SCHEMA, Survey, check_zooms, store_survey, stored_survey, survey_images
from dinoray.training.workers import Workers
from dinoray.vision.decoders.unet2d import UNet2D
from dinoray.vision.distance_model import DecoderRecord, new_model
from tests.runs import tiny_backbone
from tests.training.toys import disc_job, make_discs


def job(*folders: Path, out: str = "unused", **fields: Any) -> TrainDistanceMapJob:
    values = disc_job(folders[0], out, **fields)
    weights = fields.get("weights_of_sources") or [1.0] * len(folders)
    values.pop("weights_of_sources", None)
    sources = [{"images": str(folder), "weight": weight} for folder, weight in zip(folders, weights, strict=True)]
    return TrainDistanceMapJob(**values | {"train": sources})


def task_of(job: TrainDistanceMapJob) -> DistanceMapTask:
    train, validation = labelled_sets(job)
    model = new_model(tiny_backbone(), DecoderRecord(taps=(0, 1, 2), channels=(8, 8)), frozen=False)
    images = [Images(new_pool(job, part), np.ones(len(part))) for part in (train, validation)]
    return DistanceMapTask(job, "f", model, *images)


def survey(images: list, job: TrainDistanceMapJob, **fields: Any) -> tuple[Survey, list[str]]:
    said: list[str] = []
    found = survey_images(images, new_pool(job, images), threads=2, say=said.append, name="train",
                          **{"pixel_size_needed": False, **fields})
    return found, said


def test_a_sample_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    folder = make_discs(tmp_path / "in")
    one, other = task_of(job(folder)), task_of(job(folder, cache_bytes=0, data_threads=1, micro_batch=1))
    for index in (3, 0, 999, 3):
        a, b = one.sample(index), other.sample(index)
        assert a.pixels.shape == (3, 32, 32) and a.target.shape == (32, 32)
        assert a.pixels.tobytes() == b.pixels.tobytes() and a.target.tobytes() == b.target.tobytes()
        assert a.target.min() >= 0 and a.target.max() <= 1
    assert one.sample(1).pixels.tobytes() != one.sample(2).pixels.tobytes()
    assert task_of(job(folder, seed=1)).sample(3).pixels.tobytes() != one.sample(3).pixels.tobytes()


def test_sources_are_drawn_by_weight_whatever_their_size(tmp_path: Path) -> None:
    small, large = make_discs(tmp_path / "small", images=2), make_discs(tmp_path / "large", images=12, seed=1)
    mixed = job(small, large, weights_of_sources=[3.0, 1.0], validation_fraction=0.1, augmentation=Augmentation.off())
    task = task_of(mixed)
    numbers: list[int] = []
    plain = task.train.pool.read
    task.train.pool.read = lambda number: numbers.append(number) or plain(number)  # type: ignore[method-assign]
    for index in range(800):
        task.sample(index)
    sources = np.array([image.source for image in task.train.pool.images])[numbers]
    assert abs((sources == 0).mean() - 0.75) < 0.05
    counts = np.bincount(numbers)
    of_large = [counts[i] for i, image in enumerate(task.train.pool.images) if image.source == 1]
    assert min(of_large) > 0, "every image of a source is drawn"


def test_the_loss_is_the_sum_over_samples_however_they_are_grouped(tmp_path: Path) -> None:
    task = task_of(job(make_discs(tmp_path / "in"), foreground_weight=3.0))
    samples = [task.sample(i) for i in range(5)]
    task.model.eval()
    whole = task.loss(samples)
    parts = [task.loss(samples[:2]), task.loss(samples[2:])]
    assert float(whole[0]) == pytest.approx(sum(float(p[0]) for p in parts), rel=1e-5)
    assert float(whole[1]) == sum(float(p[1]) for p in parts) == sum(1.0 + 2.0 * (t > 0) for s in samples for t in s.target.ravel())
    logits, target = torch.tensor([[[[0.0, 100.0]]]]), torch.tensor([[[[0.0, 0.25]]]])
    assert [float(v) for v in weighted_squares(logits, target, 2.0)] == pytest.approx([0.25 + 2 * 0.75**2, 3.0])


def test_validation_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    task = task_of(job(make_discs(tmp_path / "in", side=70), validation_crops=7))
    alone = task.validate(Workers())["loss"]
    sums = np.zeros(2)
    for rank in range(3):
        workers = Workers()
        workers.rank, workers.world = rank, 3
        workers.total = lambda *values: (sums.__iadd__(values), [1.0, 1.0])[1]  # type: ignore[method-assign]
        task.validate(workers)
    assert sums[0] / sums[1] == pytest.approx(alone, rel=1e-5)


def test_which_norms_depend_on_the_batch_and_which_on_the_crop() -> None:
    assert TrainDistanceMapJob.model_fields["norm"].default == "group"

    def norms(kind: str) -> list[torch.nn.Module]:
        torch.manual_seed(0)
        decoder = UNet2D(16, 16, num_taps=3, channels=(16, 8, 8), norm=kind, stem_levels=2)
        convolutions = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
        return [m for m in decoder.modules() if list(m.parameters(recurse=False)) and not isinstance(m, convolutions)]

    def worst(kind: str) -> tuple[float, float]:
        """Largest change of a norm's output on a crop, and on one image of a batch."""
        found, of_crop, of_batch = norms(kind), 0.0, 0.0
        assert found, "the decoder has norms"
        for norm in found:
            channels = next(norm.parameters()).numel()
            x = torch.randn(3, channels, 12, 12, generator=torch.Generator().manual_seed(1)) + torch.linspace(-3, 3, 12)
            norm.train()
            whole = norm(x)
            of_crop = max(of_crop, float((norm(x[:, :, 3:9, 2:8]) - whole[:, :, 3:9, 2:8]).abs().max()))
            of_batch = max(of_batch, float((norm(x[1:2]) - whole[1:2]).abs().max()))
        return of_crop, of_batch

    assert max(worst("layer")) < 1e-5
    assert worst("group")[0] > 0.1 and worst("group")[1] < 1e-5, "the default: workers and micro-batches change nothing"
    assert min(worst("batch")) > 0.1, "the measure tells those that do"


def test_what_is_set_aside_does_not_depend_on_what_is_listed_beside_it(tmp_path: Path) -> None:
    folder = make_discs(tmp_path / "in", images=10)
    train, aside = labelled_sets(job(folder))
    assert len(aside) == 2 and len(train) == 8
    assert not {i.image_id for i in train} & {i.image_id for i in aside}
    ids = {i.image_id for i in aside}
    for number in (0, 1):
        name = sorted(i.image_id for i in train)[number]
        for suffix in ("_img.png", "_masks.png"):
            (folder / (name.removesuffix("_img") + suffix)).unlink()
    assert {i.image_id for i in labelled_sets(job(folder))[1]} == ids
    both = job(folder).model_copy(update={"validation": job(folder).train})
    with pytest.raises(BadRequest, match="8 images stand in both train and validation"):
        labelled_sets(both)


def test_something_is_always_left_to_train_on(tmp_path: Path) -> None:
    two = job(make_discs(tmp_path / "two", images=2), validation_fraction=0.9)
    assert [len(part) for part in labelled_sets(two)] == [1, 1]
    few = job(make_discs(tmp_path / "many", images=30), make_discs(tmp_path / "one", images=1, seed=4), validation_fraction=0.97)
    with pytest.raises(BadRequest, match="all images of source [01] .* would be set aside"):
        labelled_sets(few)


def test_a_pixel_size_that_is_the_models_blurs_nothing(tmp_path: Path) -> None:
    """0.65 has no exact float32: a zoom of 0.99999996 would resample every crop."""
    rows = [{"image_id": str(i), "source": 0, "pixel_size_um": size, "median_diameter_px": 9.0}
            for i, size in enumerate((0.65, 1.3, 0.65001))]
    store = LocalStore(str(tmp_path))
    store_survey(store, "train", Survey(pa.Table.from_pylist(rows, schema=SURVEY_SCHEMA)))
    found = stored_survey(store, "train")
    assert found is not None
    assert found.zooms(pixel_size_um=0.65, diameter_px=None).tolist() == [1.0, 2.0, 1.0]
    check_zooms(found, "train", pixel_size_um=0.65, diameter_px=None)
    with pytest.raises(BadRequest, match="0 would be enlarged 65 times"):
        check_zooms(found, "train", pixel_size_um=0.01, diameter_px=None)


def test_the_survey_lists_bad_images_and_refuses_too_many(tmp_path: Path) -> None:
    folder = make_discs(tmp_path / "in", images=24)
    asked = job(folder)
    images = sorted((image for part in labelled_sets(asked) for image in part), key=lambda image: image.image_id)
    (folder / "03_img.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(folder / "05_masks.png")
    relisted = sorted((image for part in labelled_sets(asked) for image in part), key=lambda image: image.image_id)
    found, said = survey(relisted, asked)
    assert found.good() == [i for i in range(24) if i != 3]
    assert found.table["objects"].to_pylist()[5] == 0, "an image without cells is a good one"
    counts = [len(np.unique(relisted[i].read_labels())) - 1 for i in found.good()]
    assert [found.table["objects"][i].as_py() for i in found.good()] == counts, "also those at the border"
    assert any(line.startswith("left out: ") and "03" in line for line in said)
    assert found.median_diameter(np.ones(24)) == pytest.approx(found.median_diameter(np.full(24, 2.0)) / 2)
    zooms = found.zooms(pixel_size_um=None, diameter_px=30.0)
    assert np.isfinite(zooms[found.good()]).all() and zooms[0] == pytest.approx(30 / found.table["median_diameter_px"][0].as_py())
    model = build_model(asked, TrainingSpec("distance-map", "", "", weights="random:0"))
    as_they_are, to_one_size = (checkpoint_config(asked.model_copy(update={"diameter_px": size}),
                                                  TrainingSpec("distance-map", "", "", weights="random:0"), model, found)
                                for size in (None, 30.0))
    low, high = as_they_are.diameter_range_px
    assert low <= as_they_are.median_diameter_px <= high
    assert to_one_size.diameter_range_px is None, "every image had one median: those of another are brought to it"
    assert to_one_size.median_diameter_px == pytest.approx(30.0, rel=0.1)
    with pytest.raises(BadRequest, match="24 of 24 labelled images cannot be used.*pixel size"):
        survey(relisted, asked, pixel_size_needed=True)
    store = LocalStore(str(tmp_path / "out"))
    assert stored_survey(store, "train") is None
    store_survey(store, "train", found)
    assert len(prepared(asked, store, "train", relisted).pool) == 23
    with pytest.raises(Exception, match="of other images"):
        prepared(asked, store, "train", relisted[1:] + relisted[:1])
    assert len(images) == 24


def test_a_source_without_a_usable_image_is_refused_and_a_survey_can_be_ended(tmp_path: Path) -> None:
    good, bad = make_discs(tmp_path / "good", images=30), make_discs(tmp_path / "bad", images=2)
    for file in bad.glob("*_img.png"):
        file.write_bytes(b"no picture")
    asked = job(good, bad)
    images = [image for part in labelled_sets(asked) for image in part]
    with pytest.raises(BadRequest, match=r"not one image of source 1 can be used.*\[train.1\]"):
        survey(images, asked)

    def check() -> None:
        raise Stopped("asked to")

    with pytest.raises(Stopped):
        survey(images, asked, check=check)
    for file in good.glob("*_masks.png"):
        Image.fromarray(np.zeros((64, 64), np.uint16)).save(file)
    asked = job(good)
    with pytest.raises(BadRequest, match="not one labelled image for train has a cell"):
        survey([image for part in labelled_sets(asked) for image in part], asked)


def test_an_image_that_turns_bad_stops_the_training_with_its_name(tmp_path: Path) -> None:
    folder = make_discs(tmp_path / "in", images=4)
    task = task_of(job(folder, cache_bytes=0))
    task.sample(0)
    for file in folder.glob("*_img.png"):
        file.write_bytes(b"torn")
    with pytest.raises(SystemicError, match="the labelled image 0._img could be used before and cannot now") as caught:
        task.sample(0)
    assert "_img.png" in str(caught.value)
    with pytest.raises(ItemError):
        task.train.pool.read(0)


def test_the_pool_keeps_what_fits_and_no_more(tmp_path: Path) -> None:
    folder = make_discs(tmp_path / "in", images=6)
    asked = job(folder)
    images = labelled_sets(asked)[0]
    size = new_pool(asked, images).read(0).nbytes
    pool = new_pool(job(folder, cache_bytes=2 * size), images)
    first = pool.read(0)
    assert pool.read(0) is first
    pool.read(1), pool.read(0), pool.read(2)
    assert pool.read(0) is first, "the least recently used one went"
    assert pool._held == 2 * size
    none = new_pool(job(folder, cache_bytes=0), images)
    assert none.read(0) is not none.read(0) and none._held == 0
