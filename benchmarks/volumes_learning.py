"""Does the 3D model learn? Regions of a labelled volume apart from each other, against a watershed, on one machine.

    python -m benchmarks.volumes_learning --out runs/volumes [--data fib25] [--minutes 25] [--models raw both full]

`fib25`: train z < 118, validation z 120..168 (in the gap), test z >= 170, which is scored once; `nuclei`, `stardist`: parts
along x. Tokens of each region are extracted from that region alone and stored; affinities by `dinoray train context-fusion`,
instances by `dinoray segment volume`, connected components at one of several thresholds or mutex watershed, whichever is best on
the validation. `watershed`: of the smoothed intensity (fib25), or of the distance inside Otsu's threshold, its two settings
chosen on the validation. Every stage keeps its result in `--out`: a
run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zarr
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import h_maxima, h_minima
from skimage.segmentation import watershed

from benchmarks.common import hardware, table
from benchmarks.volumes_data import fib25, nuclei, stardist
from dinoray.config import ExtractVolumeJob, SegmentVolumeJob, TrainContextFusionJob
from dinoray.errors import Stopped
from dinoray.io.volumes import VolumeRequest, open_volume
from dinoray.train import train
from dinoray.vision.affinities import components, mutex_watershed
from dinoray.vision.volume_metrics import Contingency, InstanceScore, average_precision, instance_score
from dinoray.volume_extraction import extract_volume
from dinoray.volume_segmentation import segment_volume

ROOT = Path(__file__).parent.parent
@dataclass(frozen=True)
class Data:
    """A labelled volume and how it is used."""

    load: Callable[[Path, Path], tuple[Path, Path]]
    regions: dict[str, str]
    crop: tuple[int, int, int]
    levels: int
    blocks: tuple[int, int, int]
    """Sub-blocks of the test region for the bootstrap."""
    dense: bool
    """Every voxel belongs to an object."""


DATA = {
    "fib25": Data(fib25, {"train": "0:118,0:250,0:250", "validation": "120:168,0:250,0:250", "test": "170:250,0:250,0:250"},
                  (48, 48, 48), 3, (2, 5, 5), True),
    "nuclei": Data(nuclei, {"train": "0:60,0:256,0:120", "validation": "0:60,0:256,130:180", "test": "0:60,0:256,190:256"},
                   (48, 48, 48), 3, (1, 4, 2), False),
    "stardist": Data(stardist, {"train": "0:31,0:61,0:28", "validation": "0:31,0:28,32:57", "test": "0:31,31:61,32:57"},
                     (24, 24, 24), 2, (1, 2, 2), False),
}
OFFSETS = tuple(tuple(n * (a == axis) for a in range(3)) for n in (1, 3, 9) for axis in range(3))
"""Pairs of voxels whose affinities are learned: neighbours attract, those farther apart keep objects from running together."""
MODELS = {"raw": {"inputs": "raw", "fusion": "none"}, "both": {"inputs": "both", "fusion": "none"},
          "full": {"inputs": "both", "fusion": "full", "context_factor": 2}}


class Bench:
    """The volume, its tokens, and the folder of results."""

    def __init__(self, out: Path, minutes: float, backbone: str, weights: str, steps: int, data: str, overrides: list[str]):
        self.out, self.minutes, self.backbone, self.weights, self.steps = out, minutes, backbone, weights, steps
        self.data = DATA[data]
        self.overrides = {key: yaml.safe_load(value) for key, _, value in (given.partition("=") for given in overrides)}
        self.raw, self.bodies = self.data.load(ROOT.parent / "shared/data", out / "data")
        self.test_box, self.validation_box = (
            tuple(slice(*map(int, part.split(":"))) for part in self.data.regions[name].split(","))
            for name in ("test", "validation"))
        self.voxel_nm = open_volume(VolumeRequest(str(self.raw))).voxel_size_nm
        self.truth = zarr.open_array(self.bodies / "0", mode="r")[self.test_box].astype(np.int64)

    def tokens(self, region: str) -> str:
        """The stored tokens of a region, made of that region alone."""
        out = self.out / f"tokens_{region}"
        if not (out / "_SUCCESS").exists():
            extract_volume(ExtractVolumeJob(sources=str(self.raw), out=str(out), model=self.backbone, weights=self.weights,
                                            crop=self.data.regions[region], voxel_size=self.voxel_nm, window_px=256, halo_px=0,
                                            no_ray=True), print)
        return str(out)

    def source(self, region: str, with_tokens: bool) -> dict[str, Any]:
        """A region for the training."""
        found: dict[str, Any] = {"raw": str(self.raw), "labels": str(self.bodies), "region": self.data.regions[region]}
        return found | ({"tokens": self.tokens(region)} if with_tokens else {})

    def trained(self, name: str) -> Path:
        """The checkpoint of a model, trained for at most `minutes`."""
        given = MODELS[name]
        with_tokens = given["inputs"] != "raw"
        values = {
            **given, "train": (self.source("train", with_tokens),), "validation": (self.source("validation", with_tokens),),
            "out": str(self.out / name), "model": self.backbone if with_tokens else None,
            "weights": self.weights if with_tokens else None, "target": "affinities", "offsets": OFFSETS,
            "classes": ("background", "body"),
            "crop_voxels": self.data.crop, "base_channels": 16, "levels": self.data.levels, "steps": self.steps, "batch_size": 2,
            "micro_batch": 2, "learning_rate": 1e-3, "warmup_steps": 50, "validate_every": 250, "checkpoint_every": 250,
            "log_every": 25, "ema_decay": 0.99, "precision": "bfloat16", "device": "cpu", "no_ray": True,
            "stop_after_s": max(1.0, self.minutes * 60 - self.seconds(name))}
        job = TrainContextFusionJob(**(values | self.overrides))
        if not (self.out / name / "checkpoint/config.json").exists():
            try:
                train(job, print)
            except Stopped as stop:
                raise SystemExit(f"{name}: {stop.what}: fewer --steps fit into {self.minutes:g} minutes") from stop
        return self.out / name / "checkpoint"

    def seconds(self, name: str) -> float:
        """Of the training so far, over all runs."""
        progress = self.out / name / "_dinoray/progress.json"
        return json.loads(progress.read_text())["seconds"] if progress.exists() else 0.0

    def labels(self, name: str) -> np.ndarray:
        """Instances of the test region."""
        out = self.segmented(name, "test", **self.chosen(name))
        return zarr.open_array(out / "labels.zarr/0", mode="r")[:].astype(np.int64)

    def segmented(self, name: str, region: str, **settings: Any) -> Path:
        """The output of `dinoray segment volume` on a region."""
        out = self.out / (f"labels_{name}" if region == "test" else f"labels_{name}_{region}")
        if not (out / "_SUCCESS").exists():
            checkpoint = self.trained(name)
            extra = {"tokens": self.tokens(region)} if MODELS[name]["inputs"] != "raw" else {}
            segment_volume(SegmentVolumeJob(sources=str(self.raw), checkpoint=str(checkpoint), out=str(out),  # type: ignore[arg-type]
                                            crop=self.data.regions[region], precision="bfloat16", memory_bytes=12 * 10**9,
                                            no_ray=True, **extra, **settings), print)
        return out

    def chosen(self, name: str) -> dict[str, Any]:
        """How affinities become instances: what is best on the whole validation region, from its stored affinities."""
        kept = self.out / f"chosen_{name}.json"
        if not kept.exists():
            out = self.segmented(name, "validation")
            values = zarr.open_array(out / "dense/probabilities.zarr/0", mode="r")[:].astype(np.float32) / np.float32(255)
            truth = zarr.open_array(self.bodies / "0", mode="r")[self.validation_box].astype(np.int64)
            tried: list[tuple[float, dict[str, Any]]] = [
                (score(components(values, t), truth).rand_error, {"instances": "components", "threshold": t})
                for t in (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)]
            tried.append((score(mutex_watershed(values, OFFSETS), truth).rand_error, {"instances": "mutex"}))
            for error, settings in tried:
                print(f"{name}: {settings}: validation Rand error {error:.4f}")
            kept.write_text(json.dumps(min(tried, key=lambda pair: pair[0])[1]))
        return json.loads(kept.read_text())

    def watershed(self) -> np.ndarray:
        """Instances of the test region without learning; the two settings chosen on the validation region."""
        raw, bodies = (zarr.open_array(p / "0", mode="r")[:] for p in (self.raw, self.bodies))
        truth = bodies[self.validation_box].astype(np.int64)
        method = smoothed_watershed if self.data.dense else distance_watershed
        pairs = list(itertools.product((1, 2, 3, 4), (2, 5, 10, 20) if self.data.dense else (0.5, 1, 2, 4)))
        errors = [score(method(raw[self.validation_box], *pair), truth).rand_error for pair in pairs]
        best = pairs[int(np.argmin(errors))]
        print(f"watershed: sigma {best[0]}, depth {best[1]}: validation Rand error {min(errors):.4f}")
        return method(raw[self.test_box], *best)


def smoothed_watershed(raw: np.ndarray, sigma: float, depth: float) -> np.ndarray:
    """Watershed of the negative smoothed intensity (cells are bright, membranes dark) from minima at least `depth` deep."""
    height = -ndimage.gaussian_filter(raw.astype(np.float32), sigma)
    markers = ndimage.label(h_minima(height, depth), np.ones((3, 3, 3)))[0]
    return watershed(height, markers).astype(np.int64)


def distance_watershed(raw: np.ndarray, sigma: float, depth: float) -> np.ndarray:
    """Objects brighter than Otsu's threshold of the smoothed intensity, parted where their distance to the background has maxima
    that rise by `depth` voxels."""
    smooth = ndimage.gaussian_filter(raw.astype(np.float32), sigma)
    inside = smooth > threshold_otsu(smooth)
    distance = ndimage.distance_transform_edt(inside).astype(np.float32)
    markers = ndimage.label(h_maxima(distance, depth), np.ones((3, 3, 3)))[0]
    return watershed(-distance, markers, mask=inside).astype(np.int64)


def score(found: np.ndarray, truth: np.ndarray) -> InstanceScore:
    """Of one box."""
    return instance_score(Contingency().add(found, truth))


def block_errors(found: np.ndarray, truth: np.ndarray, blocks: tuple[int, int, int]) -> np.ndarray:
    """Rand error of each sub-block that holds an object."""
    errors = []
    for place in itertools.product(*(range(n) for n in blocks)):
        box = tuple(slice(n * i // k, n * (i + 1) // k) for i, k, n in zip(place, blocks, truth.shape, strict=True))
        if not truth[box].any():
            continue
        errors.append(score(found[box], truth[box]).rand_error)
    return np.array(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--models", nargs="*", default=["raw", "both"], choices=list(MODELS))
    parser.add_argument("--backbone", default="vitt16")
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--data", default="fib25", choices=list(DATA))
    parser.add_argument("overrides", nargs="*", help="key=value of the training jobs")
    given = parser.parse_args()
    bench = Bench(given.out.absolute(), given.minutes, given.backbone, given.weights, given.steps, given.data, given.overrides)
    results: dict[str, Any] = {}
    errors: dict[str, np.ndarray] = {}
    for name in ["watershed", *given.models]:
        kept = given.out / f"score_{name}.json"
        if not kept.exists():
            found = bench.watershed() if name == "watershed" else bench.labels(name)
            pairs = Contingency().add(found, bench.truth)
            kept.write_text(json.dumps({**asdict(instance_score(pairs)), "ap50": average_precision(pairs),
                                        "seconds": bench.seconds(name),
                                        "blocks": block_errors(found, bench.truth, bench.data.blocks).tolist()}, indent=1))
        results[name] = json.loads(kept.read_text())
        errors[name] = np.array(results[name]["blocks"])
    rows = [[name, *(f"{r[key]:.4f}" for key in ("rand_error", "vi_split", "vi_merge", "ap50")), f"{r['seconds'] / 60:.1f}"]
            for name, r in results.items()]
    lines = [hardware(), f"{given.data}, test {bench.data.regions['test']}; {given.backbone} with weights {given.weights}; "
             f"at most {given.steps} steps, {given.minutes:g} minutes a model. {' '.join(given.overrides)}\n",
             table(["model", "adapted Rand error", "VI split", "VI merge", "AP50", "minutes of training"], rows)]
    rng = np.random.default_rng(0)
    count = len(next(iter(errors.values())))
    picks = rng.integers(0, count, (10_000, count))
    for a, b in itertools.combinations(results, 2):
        differences = (errors[b] - errors[a])[picks].mean(axis=1)
        low, high = np.percentile(differences, [2.5, 97.5])
        lines.append(f"- {b} - {a}: {(errors[b] - errors[a]).mean():+.4f} [{low:+.4f}, {high:+.4f}] (mean over sub-blocks, 95 %)")
    text = "\n".join(lines)
    (given.out / "results.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
