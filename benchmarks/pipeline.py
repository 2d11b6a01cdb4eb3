"""The whole job against a bare loop, and memory against the number of images.

    python benchmarks/pipeline.py [--images 600] [--repeats 3] [--model vits16] [--skip-memory]

Speed: the same files, model, precision and threads three ways, interleaved, in one run, medians:
`bare` is what one would write by hand in one process (read, decode with tifffile, scale, forward in
micro-batches with torch's own threads, one Parquet file at the end; nothing is checked, measured, hashed or
resumable); `--no-ray` and `ray` are dinoray with one actor. Time counts from the first unit to the last
receipt; Ray's start, the actor's start (imports, weights) and planning with statistics are printed apart.

Memory: peak of the summed USS of all processes, driver and Ray included, at 300 and at 3,000 images.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
import torch
from common import hardware, table

import dinoray
from dinoray.memory.budget import default_token_budget, micro_batch
from dinoray.memory.meter import available_cores, tree_uss

SIDE = 256


def make_images(folder: Path, count: int) -> None:
    """`count` LZW-compressed uint16 TIFFs of 256 x 256 px: smooth spots and noise, like a fluorescence crop."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    spots = np.kron(rng.gamma(1.0, 3000.0, (SIDE // 16, SIDE // 16)), np.ones((16, 16)))
    for i in range(count):
        picture = np.roll(spots, (7 * i, 3 * i), axis=(0, 1)) + rng.normal(300, 30, (SIDE, SIDE))
        tifffile.imwrite(folder / f"{i:05d}.tif", picture.clip(0, 65535).astype(np.uint16), compression="lzw")


def bare(folder: Path, backbone: torch.nn.Module, out: Path, budget: int) -> float:
    """Seconds of a loop written by hand; percentiles are given."""
    torch.set_num_threads(available_cores())
    files = sorted(folder.iterdir())
    size = micro_batch(budget, (SIDE // 16) ** 2 + 5)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.config.mean, backbone.config.std))
    dtype = next(backbone.parameters()).dtype
    began = time.perf_counter()
    cls, pooled = [], []
    with torch.inference_mode():
        for start in range(0, len(files), size):
            pixels = np.stack([tifffile.imread(file) for file in files[start:start + size]])
            x = torch.from_numpy(pixels)[:, None].float().sub(200).div(12_000).clamp(0, 1)
            tokens = backbone(((x - mean) / std).to(dtype))
            cls.append(tokens.cls.float().numpy())
            pooled.append(tokens.patches.float().mean((1, 2)).numpy())
    columns = {name: pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(parts).ravel()), backbone.config.dim)
               for name, parts in (("cls", cls), ("patch_mean", pooled))}
    pq.write_table(pa.table({"item_id": [f.name for f in files], **columns}), out, compression="zstd")
    return time.perf_counter() - began


def pipeline(folder: Path, out: Path, model: str, precision: str, *flags: str) -> dict[str, float]:
    """Run the command; seconds of its phases from the times of the files it writes."""
    began = time.time()
    done = subprocess.run(argv(folder, out, model, precision, *flags), capture_output=True, text=True, check=True)
    total = time.time() - began
    ray_start = next((float(line.split(" in ")[1].split()[0]) for line in done.stdout.splitlines()
                      if line.startswith("Ray ")), 0.0)
    times = {name: [f.stat().st_mtime for f in (out / "_dinoray" / name).iterdir()] for name in ("attempts", "receipts")}
    sealed = (out / "_dinoray/plan/index.parquet").stat().st_mtime
    return {"units": max(times["receipts"]) - min(times["attempts"]), "ray": ray_start, "total": total,
            "actor": min(times["attempts"]) - sealed}


def argv(folder: Path, out: Path, model: str, precision: str, *flags: str) -> list[str]:
    """The command that is measured."""
    return [sys.executable, "-m", "dinoray.cli", "extract", "images", str(folder), "--out", str(out), "--model", model,
            "--weights", "random", "--precision", precision, *flags]


def speed(folder: Path, count: int, repeats: int, model: str, precision: str) -> None:
    """The three ways, interleaved."""
    backbone = dinoray.load_backbone(model, weights="random", dtype=getattr(torch, precision))
    budget = default_token_budget(model, "cpu", precision)
    seconds: dict[str, list[float]] = {"bare": [], "no-ray": [], "ray": []}
    phases: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="dinoray-bench-") as scratch:
        bare(folder, backbone, Path(scratch) / "warm.parquet", budget)
        for i in range(repeats):
            seconds["bare"].append(bare(folder, backbone, Path(scratch) / "bare.parquet", budget))
            for name, flags in (("no-ray", ("--no-ray",)), ("ray", ("--workers", "1"))):
                out = Path(scratch) / f"{name}{i}"
                phase = pipeline(folder, out, model, precision, *flags)
                seconds[name].append(phase["units"])
                if name == "ray":
                    phases.append(phase)
                shutil.rmtree(out)
    base = statistics.median(seconds["bare"])
    rows = [[name, f"{statistics.median(values):.1f}", f"{count / statistics.median(values):.1f}",
             f"{base / statistics.median(values):.2f}", ", ".join(f"{v:.1f}" for v in values)]
            for name, values in seconds.items()]
    print(f"{count} TIFFs of {SIDE} px (uint16, LZW), {model}, {precision}, {available_cores()} threads, default settings\n")
    print(table(["", "seconds (median)", "images/s", "speed over bare", "all runs (s)"], rows))
    apart = {key: statistics.median(phase[key] for phase in phases) for key in ("ray", "actor", "total")}
    print(f"apart, for ray: Ray's start {apart['ray']:.1f} s, the actor's start {apart['actor']:.1f} s; "
          f"whole command {apart['total']:.1f} s\n")


def peak_memory(folder: Path, out: Path, model: str) -> int:
    """Peak of the summed USS of the command and all its descendants, in bytes."""
    process = subprocess.Popen(argv(folder, out, model, "float32", "--workers", "1"), stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_uss(process.pid))
        time.sleep(0.25)
    assert process.returncode == 0
    return peak


def memory(scratch: Path, model: str, repeats: int) -> None:
    """300 against 3,000 images, interleaved."""
    peaks: dict[int, list[int]] = {300: [], 3000: []}
    for count in peaks:
        make_images(scratch / f"m{count}", count)
    for i in range(repeats):
        for count, values in peaks.items():
            values.append(peak_memory(scratch / f"m{count}", scratch / f"mo{count}-{i}", model))
    small, large = (statistics.median(peaks[count]) for count in peaks)
    print(table(["peak USS of all processes", "300 images (MB)", "3,000 images (MB)", "growth"],
                [[model, f"{small / 1e6:.0f}", f"{large / 1e6:.0f}", f"{large / small - 1:+.1%}"]]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="vits16")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    print(hardware())
    with tempfile.TemporaryDirectory(prefix="dinoray-bench-") as temporary:
        base_folder = Path(temporary)
        if not given.skip_speed:
            make_images(base_folder / "images", given.images)
            speed(base_folder / "images", given.images, given.repeats, given.model, given.precision)
        if not given.skip_memory:
            memory(base_folder, "vitt16", 2)
