"""Features of a volume beside the flow they come from: time and peak memory, the same slices, one window, no halo.

    python benchmarks/volume.py [--size 256] [--target 64] [--model vits16] [--repeats 3] [--device cpu|cuda] [--full]

`plain` is the original's flow written by hand (tests/volumes/original.py): all slices of a plane in one batch through
`transformers`' DINOv3ViTModel, features kept as float32 in memory, each plane resized to the target grid, the mean of three;
nothing is stored. The volume is in memory before its clock starts. bfloat16 on a GPU is autocast, as the original does; on a
CPU the model itself is bfloat16, which is faster there. torch has its default threads.

`dinoray` is `extract_volume` in this process without Ray, told to follow the original (linspace, slice, no halo): from
opening the volume to the verified output, both on tmpfs where there is one. `fused` stores the same array that `plain`
makes; `planes`, the default, stores the tokens that it is made of. Memory is the peak of the host above the level with
the model loaded and warm. Each measurement is a process of its own; the ways take turns, and medians are shown.

`--full` is 512^3 -> 128^3 with vitl16, dinoray alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from common import hardware, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dinoray.vision.weights  # noqa: E402
from dinoray.config import ExtractVolumeJob  # noqa: E402
from dinoray.memory.meter import available_cores, reset_rss_peak, rss, rss_peak  # noqa: E402
from dinoray.volume_extraction import extract_volume  # noqa: E402
from tests.vision.oracles import allow_broken_torchvision  # noqa: E402
from tests.volumes.original import fused_features  # noqa: E402

WAYS = {"plain float32": ("plain", "float32"), "plain bfloat16": ("plain", "bfloat16"),
        "dinoray bfloat16, fused": ("fused", "bfloat16"), "dinoray bfloat16, planes": ("planes", "bfloat16"),
        "dinoray float32, fused": ("fused", "float32")}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Most that dinoray may be from plain float32: Frobenius norm of the difference over that of the features."""
VOXEL_NM = 16.0
load_backbone = dinoray.vision.weights.load_backbone
SLAB = 16
"""Voxels along z of the part of the volume on which both sides are compared."""


def make_volume(path: Path, side: int) -> None:
    """Blobs and noise, uint16, in chunks of 64^3: written slab by slab."""
    rng = np.random.default_rng(0)
    array = zarr.create_array(str(path), shape=(side,) * 3, dtype="uint16", chunks=(64,) * 3)
    coarse = rng.gamma(1.0, 3000.0, (-(-side // 16),) * 3)
    for z in range(0, side, 64):
        depth = min(64, side - z)
        part = coarse[z // 16:-(-(z + depth) // 16)].repeat(16, 0).repeat(16, 1).repeat(16, 2)[:depth, :side, :side]
        array[z:z + depth] = (part + rng.normal(300, 100, part.shape)).clip(0, 65535).astype(np.uint16)


def load(given: argparse.Namespace, precision: str) -> torch.nn.Module:
    """Our backbone."""
    return load_backbone(given.model, str(given.scratch / "weights"), dtype=getattr(torch, precision), device=given.device)


class Plain:
    """The original's flow with a model that is loaded and warm."""

    def __init__(self, given: argparse.Namespace, precision: str):
        allow_broken_torchvision()  # else transformers cannot be imported beside a CPU-only torch
        from transformers import DINOv3ViTModel

        self.device, self.cast = given.device, precision == "bfloat16" and given.device != "cpu"
        self.dtype = torch.bfloat16 if precision == "bfloat16" and not self.cast else torch.float32
        self.model = DINOv3ViTModel.from_pretrained(given.scratch / "weights", dtype=self.dtype).eval().to(given.device)
        about = json.loads((given.scratch / "weights/preprocessor_config.json").read_text())
        self.normal = {"mean": about["image_mean"], "std": about["image_std"]}
        self.forward(torch.zeros(1, 3, given.size, given.size))

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.cast):
            return self.model(pixels.to(self.device, self.dtype)).last_hidden_state

    def run(self, volume: np.ndarray, ratio: float) -> np.ndarray:
        """Features [D, z, y, x] float32."""
        target = [round(n / ratio) for n in volume.shape]
        return fused_features(volume, target, self.forward, **self.normal, device=self.device).cpu().numpy()


class Ours:
    """The whole job; the model is loaded and warm."""

    def __init__(self, given: argparse.Namespace, precision: str):
        self.given, self.precision = given, precision
        backbone = load(given, precision)
        with torch.inference_mode():
            backbone(torch.zeros(1, 3, given.size, given.size, device=given.device))
        dinoray.vision.weights.load_backbone = lambda *args, **kwargs: backbone  # so that the job need not load it

    def run(self, output: str, out: Path, **fields: Any) -> Path:
        """The folder of the stored array, or of the arrays of the planes."""
        given = self.given
        job = ExtractVolumeJob(
            sources=(str(given.scratch / "raw.zarr"),), out=str(out), model=given.model, weights=str(given.scratch / "weights"),
            no_ray=True, device=given.device, precision=self.precision, raw_voxel_size=(VOXEL_NM,),
            voxel_size=(VOXEL_NM * given.size / given.target,), output=output, slice_sampling="linspace", scaling="slice",
            window_px=given.size, halo_px=0, **fields)
        extract_volume(job, say=lambda line: None)
        return out / "dense"


def compare(given: argparse.Namespace) -> dict[str, float]:
    """Distance of dinoray's features from plain float32 on the first SLAB voxels along z. Raises AssertionError when far."""
    volume = zarr.open_array(str(given.scratch / "raw.zarr"), mode="r")[:SLAB]
    expected = Plain(given, "float32").run(volume, given.size / given.target)
    found = {"plain bfloat16": Plain(given, "bfloat16").run(volume, given.size / given.target)}
    for precision in TOLERANCE:
        folder = Ours(given, precision).run("fused", given.scratch / f"check-{precision}", dense_dtype="float32",
                                            crop=f"0:{SLAB},0:{given.size},0:{given.size}")
        found[f"dinoray {precision}"] = zarr.open_array(str(folder / "fused.zarr/0"), mode="r")[...]
    far = {name: float(np.linalg.norm(values - expected) / np.linalg.norm(expected)) for name, values in found.items()}
    for precision, most in TOLERANCE.items():
        assert far[f"dinoray {precision}"] <= most, far
    return far


def measure(given: argparse.Namespace, kind: str, precision: str) -> dict[str, Any]:
    """Seconds and peak bytes of one way, in this process."""
    out = given.scratch / "out"
    side = Plain(given, precision) if kind == "plain" else Ours(given, precision)
    volume = zarr.open_array(str(given.scratch / "raw.zarr"), mode="r")[...] if kind == "plain" else None
    level = rss()
    reset_rss_peak()
    if given.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        level_device = torch.cuda.memory_allocated()
    began, cpu_began = time.perf_counter(), time.process_time()
    if isinstance(side, Plain):
        side.run(volume, given.size / given.target)
    else:
        side.run(kind, out)
    found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu_began, "peak": rss_peak() - level}
    if given.device == "cuda":
        found["device_peak"] = torch.cuda.max_memory_allocated() - level_device
    if out.exists():
        found["stored"] = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
        found["stages"] = json.loads((out / "_dinoray/summary.json").read_text())["seconds"]
        shutil.rmtree(out)
    return found


def in_process(given: argparse.Namespace, way: str) -> Any:
    """`measure` (or `compare`) in a fresh process."""
    argv = [sys.executable, __file__, "--way", way, "--scratch", str(given.scratch), "--size", str(given.size), "--target",
            str(given.target), "--model", given.model, "--device", given.device]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(given: argparse.Namespace) -> None:
    """Compare, take turns, print."""
    if not (given.scratch / "weights").exists():
        dinoray.vision.weights.save_backbone(load_backbone(given.model, "random"), given.scratch / "weights")
    make_volume(given.scratch / "raw.zarr", given.size)
    print(hardware())
    print(f"{given.model}, {given.size}^3 -> {given.target}^3, {3 * given.target} slices of {given.size} px, {given.device}, "
          f"{available_cores()} threads; medians of {given.repeats}; load average before: {os.getloadavg()[0]:.1f}")
    ways = {name: way for name, way in WAYS.items() if way[0] != "plain"} if given.full else WAYS
    if not given.full:
        far = in_process(given, "compare")
        print("distance from plain float32: " + ", ".join(f"{name} {value:.1e}" for name, value in far.items()))
    ways = {name: way for name, way in ways.items() if given.only in name}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name in ways:
            found[name].append(in_process(given, name))
    middle = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "stages"}
              for name, runs in found.items()}

    def over(base: str, name: str, key: str = "seconds") -> str:
        return f"{middle[base][key] / middle[name][key]:.2f}" if base in middle else ""

    keys = [("peak", "peak MB"), *([("device_peak", "on the GPU, MB")] if given.device == "cuda" else [])]
    print("\n" + table(
        ["", "seconds", "all runs (s)", "CPU s", "plain float32 / it", "plain bfloat16 / it", *(title for _, title in keys),
         "plain's peak / it", "stored MB"],
        [[name, f"{m['seconds']:.1f}", ", ".join(f"{run['seconds']:.1f}" for run in found[name]), f"{m['cpu']:.1f}",
          over("plain float32", name), over("plain bfloat16", name), *(f"{m[key] / 1e6:,.0f}" for key, _ in keys),
          over(f"plain {WAYS[name][1]}", name, "peak"), f"{m['stored'] / 1e6:,.0f}" if "stored" in m else ""]
         for name, m in middle.items()]))
    for name, runs in found.items():
        if "stages" in runs[0]:
            stages = {key: statistics.median(run["stages"][key] for run in runs) for key in runs[0]["stages"]}
            print(f"{name}: seconds by stage, summed over threads: " + ", ".join(f"{k} {v:.1f}" for k, v in stages.items()))
    half, single, ours = "plain bfloat16", "plain float32", "dinoray bfloat16, fused"
    if {half, single, ours} <= set(middle):
        print(f"\n{ours}: {over(half, ours)}x plain bfloat16 and {over(single, ours)}x plain float32 in seconds, "
              f"{over(half, ours, 'cpu')}x and {over(single, ours, 'cpu')}x in CPU seconds (all threads; other work on the "
              f"machine moves them less), 1/{over(half, ours, 'peak')} of plain bfloat16's peak memory")
    print(f"\nload average after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="voxels a side")
    parser.add_argument("--target", type=int, default=64, help="target voxels a side")
    parser.add_argument("--model", default="vits16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--full", action="store_true", help="512^3 -> 128^3 with vitl16, dinoray alone")
    parser.add_argument("--only", default="", help="ways whose name has this text")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.full:
        options.size, options.target, options.model = 512, 128, "vitl16"
    if options.way:
        print(json.dumps(compare(options) if options.way == "compare" else measure(options, *WAYS[options.way])))
    else:
        shared = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="dinoray-bench-", dir=shared if shared.is_dir() else None) as temporary:
            options.scratch = Path(temporary)
            main(options)
