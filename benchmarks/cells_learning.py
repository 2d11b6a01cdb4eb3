"""Does the distance-map UNet learn? The fixed protocol on DSB 2018, against what it must beat, on one machine.

    python -m benchmarks.cells_learning --out runs/learning [--minutes 60] [--only ours otsu ...]

`ours`: `dinoray train distance-map` with benchmarks/cells_learning.yaml (a ViT trained from scratch with the decoder) for at most
`--minutes` of wall time; its weights at half that time are kept. `conv`: a plain convolutional UNet of equal parameters, and
`zeroed`: ours with its ViT tokens zeroed, each on the same samples for half the time, compared with ours at half time. The
schedule of each falls over the steps that it would take in the whole time (speeds are measured first, interleaved). `otsu`: no
learning. Thresholds are chosen on the validation images from stored maps; the 65 test images are scored once, at the end.
Every stage keeps its result in `--out`: a run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from benchmarks.cells_models import ZeroedTokens, otsu_watershed, plain_unet
from benchmarks.common import hardware, table
from dinoray.config import TrainDistanceMapJob, build_job, read_job_file
from dinoray.config.labelled import LabelledSource
from dinoray.errors import Stopped
from dinoray.io.annotations import LabelledImage, list_labelled
from dinoray.io.stores import open_store
from dinoray.memory.meter import available_cores
from dinoray.train import train_distance_map
from dinoray.train_request import absolute_paths
from dinoray.training.distance_map import DistanceMapTask, Images
from dinoray.training.distance_worker import build_model, checkpoint_config, new_pool
from dinoray.training.image_pool import ImagePool
from dinoray.training.labelled_sets import labelled_sets
from dinoray.training.loop import fit, load_trained
from dinoray.training.parameters import parameter_groups
from dinoray.training.spec import TrainingSpec
from dinoray.training.states import load_last
from dinoray.training.steps import Stepper
from dinoray.training.survey import Survey, survey_images
from dinoray.training.workers import Workers
from dinoray.vision.blending import Blend
from dinoray.vision.bootstrap import paired_bootstrap, summarise
from dinoray.vision.cell_scale import cell_scale
from dinoray.vision.instance_metrics import ImageScore, score_image
from dinoray.vision.instances import H, instances
from dinoray.vision.resampling2d import resample, scaled_shape
from dinoray.vision.thresholds import Candidate, counts_at_half, search

ROOT = Path(__file__).parent.parent
SPLITS = ROOT / "tests/splits.json"
METRICS = ["AP@0.5", "AP@0.75", "AP@0.5:0.95", "SEG", "DET", "OP_CSB"]
PEAKS = [round(0.2 + 0.05 * i, 2) for i in range(9)]
FILLS = [round(0.03 + 0.02 * i, 2) for i in range(8)]
MARKERS = [("components", H), *(("hmaxima", h) for h in (0.1, 0.15, 0.25))]
FROM_SCRATCH = TrainingSpec("distance-map", "", "", weights="random:0")
ESTIMATING = {"peak": 0.45, "fill": 0.11, "markers": "hmaxima", "h": 0.15}
"""How cells are found when the size of an image's cells is estimated."""
MIN_AREA = 20
"""px; smaller objects are dropped."""


class Bench:
    """The job, its images, and the folder of results."""

    def __init__(self, out: Path, minutes: float, job_file: Path, overrides: list[str]):
        self.out, self.minutes = out, minutes
        out.mkdir(parents=True, exist_ok=True)
        values = read_job_file(job_file, overrides) | {"out": str(out / "ours")}
        self.job: TrainDistanceMapJob = absolute_paths(build_job(TrainDistanceMapJob, values))
        self.job = self.job.model_copy(update={"weights": "random:0", "device": "cpu" if not torch.cuda.is_available() else "cuda"})
        train, validation = labelled_sets(self.job)
        self.survey = survey_images(train, new_pool(self.job, train), threads=available_cores(), pixel_size_needed=False, say=print)
        self.train = self._scaled(train, self.survey)
        self.validation = self._scaled(validation, survey_images(validation, new_pool(self.job, validation), say=print,
                                                                 threads=available_cores(), pixel_size_needed=False))
        self.trained_at = checkpoint_config(self.job, FROM_SCRATCH, build_model(self.job, FROM_SCRATCH), self.survey)
        data = ROOT.parent / "shared/data"
        splits = json.loads(SPLITS.read_text())
        self.groups: dict[str, str] = splits["dsb2018"]["modality"]
        self.beside_train: set[str] = set(splits["dsb2018"]["test_beside_train"])
        test = list_labelled(LabelledSource(images=str(data / "dsb2018_stage1/stage1_test"), kind="dsb",
                                            ids=f"{SPLITS}#dsb2018/test"))
        phase = list_labelled(LabelledSource(images=str(data / "usiigaci_phase_train/*/raw.tif"),
                                             labels=str(data / "usiigaci_phase_train/*/instances_ids.png"), kind="pairs"))
        self.test, self.phase = new_pool(self.job, test), new_pool(self.job, phase)
        self.device = torch.device(self.job.device)

    def _scaled(self, found: list[LabelledImage], survey: Survey) -> Images:
        return Images(new_pool(self.job, found), survey.zooms(pixel_size_um=None, diameter_px=self.job.diameter_px))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON result, made if it is not there."""
        path = self.out / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make(), indent=1))
        return json.loads(path.read_text())

    # ---------------------------------------------------------------- training

    def models(self) -> dict[str, torch.nn.Module]:
        """The three networks at their start, by name."""
        ours = build_model(self.job, FROM_SCRATCH)
        count = sum(p.numel() for p in ours.parameters())
        zeroed = ZeroedTokens(build_model(self.job, FROM_SCRATCH))
        return {"ours": ours, "zeroed": zeroed, "conv": plain_unet(ours.backbone.config, count, self.job.seed, self.job.norm)}

    def task(self, model: torch.nn.Module, name: str) -> DistanceMapTask:
        """The same samples for any of the networks."""
        job = self.job

        class AnyModel(DistanceMapTask):
            def parameter_groups(self) -> list[dict[str, Any]]:
                if name == "ours":
                    return super().parameter_groups()
                return parameter_groups(model.decoder, job.learning_rate, job.weight_decay)

        task = AnyModel(job, name, model, self.train, self.validation)
        return task

    def speeds(self) -> dict[str, float]:
        """Seconds per step of each network: medians of interleaved steps on the same samples."""
        samples = [self.task(self.models()["conv"], "conv").sample(i) for i in range(self.job.batch_size)]
        steppers = {}
        for name, model in self.models().items():
            task = self.task(model.to(self.device).train(), name)
            steppers[name] = Stepper(model, torch.optim.AdamW(task.parameter_groups()), task.loss, Workers(self.device),
                                     micro_batch=self.job.micro_batch, clip_norm=1.0, autocast=torch.bfloat16)
        seconds: dict[str, list[float]] = {name: [] for name in steppers}
        for _ in range(6):
            for name, stepper in steppers.items():
                began = time.perf_counter()
                stepper.step([samples], 0)
                seconds[name].append(time.perf_counter() - began)
        return {name: statistics.median(found[1:]) for name, found in seconds.items()} | {
            f"{name}_parameters": sum(p.numel() for p in model.parameters()) for name, model in self.models().items()}

    def train_ours(self) -> None:
        """To half the time, a copy, and to the end of the steps or of the time."""
        half = self.minutes * 30
        progress = self.out / "ours/_dinoray/progress.json"
        spent = json.loads(progress.read_text())["seconds"] if progress.exists() else 0.0
        for name, limit in (("ours_half", half), ("ours_end", 2 * half)):
            if (self.out / name).exists():
                continue
            if spent < limit:
                try:
                    train_distance_map(self.job.model_copy(update={"stop_after_s": max(1.0, limit - spent)}), print)
                except Stopped as stop:
                    print(stop.what)
            spent = json.loads(progress.read_text())["seconds"]
            shutil.copytree(self.out / "ours", self.out / name)

    def train_other(self, name: str, steps: int) -> None:
        """`conv` or `zeroed` for half the time, on a schedule of `steps`."""
        model = self.models()[name]
        job = self.job.model_copy(update={"steps": steps, "stop_after_s": self.minutes * 30, "out": str(self.out / name)})
        store = open_store(job.out)
        progress = store.exists("_dinoray/progress.json") and json.loads(store.get("_dinoray/progress.json"))
        left = self.minutes * 30 - (progress["seconds"] if progress else 0.0)
        if left > 1:
            fit(job.model_copy(update={"stop_after_s": left}), self.task(model, name), Workers(self.device), store)

    def trained(self, name: str, folder: str) -> torch.nn.Module:
        """A network with the running mean of its weights at the last state of a folder."""
        state = load_last(open_store(str(self.out / folder)), self.device)
        model = self.models()[name].to(self.device)
        load_trained(model, state["model"], folder)
        if state["mean"]:
            with torch.no_grad():
                for parameter, value in state["mean"]["values"].items():
                    model.get_parameter(parameter).copy_(value)
        return model.eval()

    # ---------------------------------------------------------------- scoring

    def maps(self, name: str, model: torch.nn.Module, which: str, pool: ImagePool) -> list[np.ndarray]:
        """Distance maps of a set of images, computed once and kept."""
        path = self.out / f"maps_{name}_{which}.npz"
        if not path.exists():
            found = {}
            for i in range(len(pool)):
                pixels = pool.read(i)
                planes = np.ascontiguousarray(np.broadcast_to(pixels.planes, (3, *pixels.labels.shape)))
                found[str(i)] = self.map_of(model, planes)
            np.savez(path, **found)
        with np.load(path) as kept:
            return [kept[str(i)] for i in range(len(pool))]

    def map_of(self, model: torch.nn.Module, planes: np.ndarray) -> np.ndarray:
        """Distance map [Y, X] of an image [3, Y, X] whose cells are of unknown size, as `dinoray segment cells` makes it: at the
        scale at which they seem to have the size of the training's."""
        def look(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            distance = whole_map(model, image, self.job.crop_px, self.job.micro_batch)
            return instances(distance, **ESTIMATING), distance

        factor = cell_scale(planes, self.trained_at, look).factor
        at_scale = resample(planes, scaled_shape(planes.shape[1:], factor))
        found = whole_map(model, at_scale, self.job.crop_px, self.job.micro_batch)
        return np.clip(resample(found[None], planes.shape[1:])[0], 0, 1)

    def score(self, name: str, folder: str | None) -> dict[str, Any]:
        """Thresholds from the validation images, then the test images, once."""
        validation, truths = self.validation.pool, [self.validation.pool.read(i).labels for i in range(len(self.validation.pool))]
        if folder is None:
            grid = list(itertools.product((3, 5, 7, 10, 14), (0, 20, 40)))
            means = [np.mean([_ap50(otsu_watershed(_planes(validation, i), *pair), truths[i]) for i in range(len(validation))])
                     for pair in grid]
            best = grid[int(np.argmax(means))]
            chosen: dict[str, Any] = {"min_distance": best[0], "min_area": best[1], "validation_ap50": float(max(means))}

            def labels(which: str, pool: ImagePool) -> list[np.ndarray]:
                return [otsu_watershed(_planes(pool, i), *best) for i in range(len(pool))]
        else:
            model = self.trained(name.split("_")[0], folder)
            settings, best_ = ranked_settings(self.maps(name, model, "validation", validation), truths)[0]
            chosen = {**settings, "validation_ap50": best_.image_mean, "validation_seg": best_.seg}

            def labels(which: str, pool: ImagePool) -> list[np.ndarray]:
                return [instances(m, **settings) for m in self.maps(name, model, which, pool)]
        scores = {}
        for which, pool in (("test", self.test), ("phase", self.phase)):
            predicted = labels(which, pool)
            scores[which] = [asdict(score_image(found, pool.read(i).labels, image_id=pool.images[i].image_id))
                             for i, found in enumerate(predicted)]
            folder_ = self.out / "masks" / name / which
            folder_.mkdir(parents=True, exist_ok=True)
            for i, found in enumerate(predicted):
                tifffile.imwrite(folder_ / f"{pool.images[i].image_id.replace('/', '_')}.tif", found, compression="zlib")
        return {"chosen": chosen, **scores}


def ranked_settings(maps: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> list[tuple[dict[str, Any], Candidate]]:
    """The best arguments of `instances` for each kind of markers by the mean of AP50 and SEG, as the training chooses them; best
    first."""
    found = []
    for markers, h in MARKERS:
        best = search(maps, truths, score=counts_at_half, peaks=PEAKS, fills=FILLS, threads=available_cores(), markers=markers, h=h,
                      min_area=MIN_AREA, objective="ap_seg").best
        found.append(({"markers": markers, "h": h, "peak": best.peak, "fill": best.fill, "min_area": MIN_AREA}, best))
    return sorted(found, key=lambda pair: -pair[1].ap_seg)


def whole_map(model: torch.nn.Module, planes: np.ndarray, window: int, at_once: int) -> np.ndarray:
    """Distance map [Y, X] float32 of one image [3, Y, X], by overlapping windows of `window` px, `at_once` in a batch."""
    multiple = model.backbone.config.patch_size
    overlap = max(multiple, window // 4 // multiple * multiple)
    blend = Blend(*planes.shape[1:], window, overlap, multiple)
    found: list[np.ndarray] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        device = model.decoder.head.weight.device
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            found.extend(torch.sigmoid(model(torch.from_numpy(np.stack(batch)).to(device)).float())[:, 0].cpu().numpy())
        batch.clear()

    for piece in blend.windows(planes):
        batch.append(piece)
        if len(batch) == at_once:
            flush()
    if batch:
        flush()
    return blend.merge(found)


def _planes(pool: ImagePool, number: int) -> np.ndarray:
    pixels = pool.read(number)
    return np.broadcast_to(pixels.planes, (3, *pixels.labels.shape))


def _ap50(found: np.ndarray, truth: np.ndarray) -> float:
    tp, fp, fn, _ = counts_at_half(found, truth)
    return tp / (tp + fp + fn) if tp + fp + fn else 1.0


def _scores(rows: Sequence[dict[str, Any]]) -> list[ImageScore]:
    return [ImageScore(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}) for row in rows]


def _line(name: str, scores: list[ImageScore]) -> list[str]:
    found = summarise(scores, METRICS, resamples=10_000)

    def shown(metric: str, pooling: str) -> str:
        e = found.metrics[metric][pooling]
        return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"

    return [name, str(found.images), shown("AP@0.5", "image_mean"), shown("AP@0.5", "pooled"), shown("AP@0.75", "image_mean"),
            shown("AP@0.5:0.95", "image_mean"), shown("SEG", "pooled"), shown("DET", "pooled"), shown("OP_CSB", "pooled")]


HEADER = ["model", "images", "AP50 image-mean", "AP50 pooled", "AP75 image-mean", "AP50:95 image-mean", "SEG", "DET", "OP_CSB"]


def report(bench: Bench, results: dict[str, dict[str, Any]]) -> str:
    """All tables as markdown."""
    job = bench.job
    lines = [hardware(), f"At most {bench.minutes:g} minutes; batch {job.batch_size}, crops of {job.crop_px} px, {job.model}.\n"]
    tests = {name: _scores(found["test"]) for name, found in results.items()}
    lines += ["\n65 test images of DSB 2018 stage 1 (95 % intervals over images):\n",
              table(HEADER, [_line(name, scores) for name, scores in tests.items()])]
    modality_of = {s.image_id: bench.groups[s.image_id.rsplit("/", 1)[-1]] for s in next(iter(tests.values()))}
    for modality in sorted(set(modality_of.values())):
        rows = [_line(name, [s for s in scores if modality_of[s.image_id] == modality]) for name, scores in tests.items()]
        lines += [f"\n{modality}:\n", table(HEADER, rows)]
    apart = {name: [s for s in scores if s.image_id.rsplit("/", 1)[-1] not in bench.beside_train] for name, scores in tests.items()}
    lines += ["\nWithout the test images that are tiles of a field of training images:\n",
              table(HEADER, [_line(name, scores) for name, scores in apart.items()])]
    pairs = [(a, b) for a, b in (("ours_half", "conv"), ("ours_half", "zeroed"), ("ours_end", "otsu")) if a in tests and b in tests]
    rows = []
    for a, b in pairs:
        for pooling in ("image_mean", "pooled"):
            e = paired_bootstrap(tests[a], tests[b], "AP@0.5", pooling)
            rows.append([f"{a} - {b}", pooling.replace("_", "-"), f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"])
    if rows:
        lines += ["\nDifferences in AP50, paired over images:\n", table(["models", "", "difference"], rows)]
    lines += ["\n7 phase-contrast images (Usiigaci), never trained on:\n",
              table(HEADER, [_line(name, _scores(found["phase"])) for name, found in results.items()])]
    lines += ["\nChosen on validation:\n", "\n".join(f"- {name}: {found['chosen']}" for name, found in results.items()) + "\n"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--job", type=Path, default=ROOT / "benchmarks/cells_learning.yaml")
    parser.add_argument("--only", nargs="*", default=["otsu", "ours", "conv", "zeroed"])
    parser.add_argument("overrides", nargs="*", help="key=value of the job")
    given = parser.parse_args()
    bench = Bench(given.out, given.minutes, given.job, given.overrides)
    results: dict[str, dict[str, Any]] = {}
    if "otsu" in given.only:
        results["otsu"] = bench.once("score_otsu", lambda: bench.score("otsu", None))
    if {"ours", "conv", "zeroed"} & set(given.only):
        speeds = bench.once("speeds", bench.speeds)
        print(speeds, flush=True)
    if "ours" in given.only:
        bench.train_ours()
    for name in ("conv", "zeroed"):
        if name in given.only:
            bench.train_other(name, round(bench.job.steps * speeds["ours"] / speeds[name]))
    folders = {"ours_half": "ours_half", "ours_end": "ours_end", "conv": "conv", "zeroed": "zeroed"}
    for name, folder in folders.items():
        if (given.out / folder).exists():
            results[name] = bench.once(f"score_{name}", lambda name=name, folder=folder: bench.score(name, folder))
    text = report(bench, results)
    (given.out / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
