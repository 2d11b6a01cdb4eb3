"""Does the 3D model learn? FIB-25 with regions apart in z, raw alone and raw with tokens, against a watershed, on one machine.

    python -m benchmarks.volumes_learning --out runs/volumes [--minutes 25] [--models raw both full]

Train z < 118, validation z 120..168 (in the gap), test z >= 170, which is scored once. Tokens of each region are extracted from
that region alone and stored; affinities by `dinoray train context-fusion`, instances by `dinoray segment volume`, scores by
`dinoray evaluate volume`; the threshold is chosen on the validation. `watershed`: smoothed intensity, its two settings chosen on
the validation. Every stage keeps its result in `--out`: a run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from scipy import ndimage
from skimage.morphology import h_minima
from skimage.segmentation import watershed

from benchmarks.common import hardware, table
from benchmarks.volumes_data import FIB_NM, fib25
from dinoray.config import ExtractVolumeJob, SegmentVolumeJob, TrainContextFusionJob
from dinoray.errors import Stopped
from dinoray.train import train
from dinoray.vision.volume_metrics import Contingency, InstanceScore, average_precision, instance_score
from dinoray.volume_extraction import extract_volume
from dinoray.volume_segmentation import segment_volume

ROOT = Path(__file__).parent.parent
REGIONS = {"train": "0:118,0:250,0:250", "validation": "120:168,0:250,0:250", "test": "170:250,0:250,0:250"}
BLOCKS = (2, 5, 5)
"""Sub-blocks of the test region for the bootstrap."""
MODELS = {"raw": {"inputs": "raw", "fusion": "none"}, "both": {"inputs": "both", "fusion": "none"},
          "full": {"inputs": "both", "fusion": "full", "context_factor": 2}}


class Bench:
    """The volume, its tokens, and the folder of results."""

    def __init__(self, out: Path, minutes: float, backbone: str, weights: str, steps: int):
        self.out, self.minutes, self.backbone, self.weights, self.steps = out, minutes, backbone, weights, steps
        self.raw, self.bodies = fib25(ROOT.parent / "shared/data", out / "data")
        box = [tuple(map(int, part.split(":"))) for part in REGIONS["test"].split(",")]
        self.test_box = tuple(slice(*pair) for pair in box)
        self.truth = zarr.open_array(self.bodies / "0", mode="r")[self.test_box].astype(np.int64)

    def tokens(self, region: str) -> str:
        """The stored tokens of a region, made of that region alone."""
        out = self.out / f"tokens_{region}"
        if not (out / "_SUCCESS").exists():
            extract_volume(ExtractVolumeJob(sources=str(self.raw), out=str(out), model=self.backbone, weights=self.weights,
                                            crop=REGIONS[region], voxel_size=FIB_NM, window_px=256, halo_px=0, no_ray=True), print)
        return str(out)

    def source(self, region: str, with_tokens: bool) -> dict[str, Any]:
        """A region for the training."""
        found: dict[str, Any] = {"raw": str(self.raw), "labels": str(self.bodies), "region": REGIONS[region]}
        return found | ({"tokens": self.tokens(region)} if with_tokens else {})

    def trained(self, name: str) -> Path:
        """The checkpoint of a model, trained for at most `minutes`."""
        given = MODELS[name]
        with_tokens = given["inputs"] != "raw"
        job = TrainContextFusionJob(
            **given, train=(self.source("train", with_tokens),), validation=(self.source("validation", with_tokens),),  # type: ignore[arg-type]
            out=str(self.out / name), model=self.backbone if with_tokens else None, weights=self.weights if with_tokens else None,
            target="affinities", classes=("background", "body"), crop_voxels=(48,), base_channels=16, levels=3, steps=self.steps,
            batch_size=2, micro_batch=2, learning_rate=1e-3, warmup_steps=50, validate_every=250, checkpoint_every=250,
            log_every=25, ema_decay=0.99, precision="bfloat16", device="cpu", no_ray=True,
            stop_after_s=max(1.0, self.minutes * 60 - self.seconds(name)))
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
        out = self.out / f"labels_{name}"
        if not (out / "_SUCCESS").exists():
            checkpoint = self.trained(name)
            extra = {"tokens": self.tokens("test")} if MODELS[name]["inputs"] != "raw" else {}
            segment_volume(SegmentVolumeJob(sources=str(self.raw), checkpoint=str(checkpoint), out=str(out), crop=REGIONS["test"],  # type: ignore[arg-type]
                                            no_ray=True, **extra), print)
        return zarr.open_array(out / "labels.zarr/0", mode="r")[:].astype(np.int64)

    def watershed(self) -> np.ndarray:
        """Instances of the test region without learning; sigma and depth chosen on the validation region."""
        raw, bodies = (zarr.open_array(p / "0", mode="r")[:] for p in (self.raw, self.bodies))
        low, high = (int(n) for n in REGIONS["validation"].split(",")[0].split(":"))
        truth = bodies[low:high].astype(np.int64)
        pairs = list(itertools.product((1, 2, 3, 4), (2, 5, 10, 20)))
        errors = [score(smoothed_watershed(raw[low:high], *pair), truth).rand_error for pair in pairs]
        best = pairs[int(np.argmin(errors))]
        print(f"watershed: sigma {best[0]}, depth {best[1]}: validation Rand error {min(errors):.4f}")
        return smoothed_watershed(raw[self.test_box], *best)


def smoothed_watershed(raw: np.ndarray, sigma: float, depth: float) -> np.ndarray:
    """Watershed of the negative smoothed intensity (cells are bright, membranes dark) from minima at least `depth` deep."""
    height = -ndimage.gaussian_filter(raw.astype(np.float32), sigma)
    markers = ndimage.label(h_minima(height, depth), np.ones((3, 3, 3)))[0]
    return watershed(height, markers).astype(np.int64)


def score(found: np.ndarray, truth: np.ndarray) -> InstanceScore:
    """Of one box."""
    return instance_score(Contingency().add(found, truth))


def block_errors(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Rand error of each sub-block."""
    errors = []
    for place in itertools.product(*(range(n) for n in BLOCKS)):
        box = tuple(slice(n * i // k, n * (i + 1) // k) for i, k, n in zip(place, BLOCKS, truth.shape, strict=True))
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
    given = parser.parse_args()
    bench = Bench(given.out.absolute(), given.minutes, given.backbone, given.weights, given.steps)
    results: dict[str, Any] = {}
    errors: dict[str, np.ndarray] = {}
    for name in ["watershed", *given.models]:
        kept = given.out / f"score_{name}.json"
        if not kept.exists():
            found = bench.watershed() if name == "watershed" else bench.labels(name)
            pairs = Contingency().add(found, bench.truth)
            kept.write_text(json.dumps({**asdict(instance_score(pairs)), "ap50": average_precision(pairs),
                                        "seconds": bench.seconds(name),
                                        "blocks": block_errors(found, bench.truth).tolist()}, indent=1))
        results[name] = json.loads(kept.read_text())
        errors[name] = np.array(results[name]["blocks"])
    rows = [[name, *(f"{r[key]:.4f}" for key in ("rand_error", "vi_split", "vi_merge", "ap50")), f"{r['seconds'] / 60:.1f}"]
            for name, r in results.items()]
    lines = [hardware(), f"FIB-25, test z >= 170; {given.backbone} with weights {given.weights}; at most {given.steps} steps, "
             f"{given.minutes:g} minutes a model.\n",
             table(["model", "adapted Rand error", "VI split", "VI merge", "AP50", "minutes of training"], rows)]
    rng = np.random.default_rng(0)
    picks = rng.integers(0, int(np.prod(BLOCKS)), (10_000, int(np.prod(BLOCKS))))
    for a, b in itertools.combinations(results, 2):
        differences = (errors[b] - errors[a])[picks].mean(axis=1)
        low, high = np.percentile(differences, [2.5, 97.5])
        lines.append(f"- {b} - {a}: {(errors[b] - errors[a]).mean():+.4f} [{low:+.4f}, {high:+.4f}] (mean over sub-blocks, 95 %)")
    text = "\n".join(lines)
    (given.out / "results.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
