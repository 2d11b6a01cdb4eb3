"""Steps of the context-fusion training: time with tokens on the fly and stored, and their memory, forecast and measured.

    python -m benchmarks.volumes_steps [--repeats 5] [--skip-speed] [--skip-memory]

Speed: vits16 (random weights), raw:label voxels 1:4, crops of 64^3, b = 16, the same crops with tokens computed and with tokens
given, in turn. Memory: peaks (VmHWM) of fresh processes, above the process with the model loaded, of the extraction alone and of a
UNet step alone, beside the forecast of dinoray.memory.fusion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from benchmarks.common import hardware, table
from dinoray.memory.fusion import CropShapes, extraction_bytes, unet_bytes
from dinoray.memory.meter import reset_rss_peak, rss, rss_peak
from dinoray.vision.crop_features import crop_tokens, planes_for
from dinoray.vision.fusion_model import FusionRecord, VolumeCrop, new_model
from dinoray.vision.voxel_grids import VoxelGrid
from dinoray.vision.weights import load_backbone

NM = 16.0
SETTINGS = [(16, 1, 64, 4), (16, 2, 64, 4), (24, 1, 64, 4), (32, 1, 64, 4)]
"""(base channels, volumes per batch, crop, raw voxels per label voxel) of the memory table."""


def crop_of(side: int, factor: int, seed: int) -> VolumeCrop:
    """A crop of noise."""
    raw = np.random.default_rng(seed).random((side * factor,) * 3, np.float32)
    return VolumeCrop(grid(side, NM * factor), raw, grid(side * factor, NM))


def grid(side: int, pitch: float) -> VoxelGrid:
    return VoxelGrid((side,) * 3, (-(side - 1) / 2 * pitch,) * 3, (pitch,) * 3)


def model_of(base: int, factor: int):
    record = FusionRecord(outputs=3, factor=(factor,) * 3, inputs="both", fusion="none", base=base, levels=4)
    return new_model(record, load_backbone("vits16", "random:0"), slice_batch=32)


def step(model, optimizer, given) -> None:
    optimizer.zero_grad(set_to_none=True)
    logits = model.unet(given)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
    optimizer.step()


def speed(repeats: int) -> None:
    """Seconds of a step with tokens on the fly and stored, in turn."""
    side, factor, base = 64, 4, 16
    model = model_of(base, factor).train()
    optimizer = torch.optim.AdamW(model.unet.parameters())
    fresh = crop_of(side, factor, 0)
    tokens, grids = crop_tokens(model.backbone, torch.from_numpy(fresh.raw)[None], fresh.raw_grid, fresh.target_grid,
                                planes=planes_for(fresh.raw_grid), slice_batch=32)
    stored = VolumeCrop(fresh.target_grid, fresh.raw, fresh.raw_grid, tokens={p: (tokens[p][0].numpy(), grids[p]) for p in tokens})
    seconds: dict[str, list[float]] = {"on the fly": [], "stored": []}
    for _ in range(repeats + 1):
        for name, crop in (("on the fly", fresh), ("stored", stored)):
            began = time.perf_counter()
            step(model, optimizer, model.prepare([crop]))
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["on the fly"][1:], seconds["stored"][1:], strict=True)]
    print(table(["tokens", "seconds a step"], [[name, f"{value:.2f}"] for name, value in medians.items()]))
    print(f"stored tokens: {statistics.median(ratios):.2f} times as fast (rounds {min(ratios):.2f} to {max(ratios):.2f})\n")


def measure(phase: str, base: int, volumes: int, side: int, factor: int) -> None:
    """In a fresh process: print the forecast and the peak of a phase."""
    model = model_of(base, factor).train()
    crops = [crop_of(side, factor, i) for i in range(volumes)]
    config = model.backbone.config
    shapes = CropShapes((side,) * 3, (factor,) * 3, 3, config.patch_size, config.dim)
    before, raw = rss(), volumes * shapes.raw_voxels * 4
    reset_rss_peak()
    if phase == "extraction":
        model.prepare(crops)
        forecast = extraction_bytes(shapes, volumes=volumes, slice_batch=32, itemsize=4)
    else:
        model.backbone = None
        tokens = {p: (np.zeros((config.dim, *(n if a == i else -(-n * factor // config.patch_size)
                                              for a, n in enumerate((side,) * 3))),
                               np.float32)) for i, p in enumerate(("xy", "xz", "yz"))}
        grids = {p: VoxelGrid(t.shape[1:], *_placed(t.shape[1:], side * NM * factor)) for p, t in tokens.items()}
        crops = [VolumeCrop(c.target_grid, c.raw, c.raw_grid, tokens={p: (tokens[p], grids[p]) for p in tokens}) for c in crops]
        given = model.prepare(crops)
        before = rss()
        reset_rss_peak()
        step(model, torch.optim.AdamW(model.unet.parameters()), given)
        forecast = unet_bytes(shapes, volumes=volumes, base=base, levels=4,
                              parameters=sum(p.numel() for p in model.unet.parameters()),
                              in_values=factor**3, itemsize=4, checkpointing=False)
    print(json.dumps({"forecast": forecast, "measured": rss_peak() - before, "raw": raw}))


def _placed(shape, extent: float):
    pitch = tuple(extent / n for n in shape)
    return tuple(-(n - 1) / 2 * p for n, p in zip(shape, pitch, strict=True)), pitch


def memory() -> None:
    rows = []
    for settings in SETTINGS:
        for phase in ("extraction", "unet"):
            out = subprocess.run([sys.executable, "-m", "benchmarks.volumes_steps", "--measure", phase, *map(str, settings)],
                                 capture_output=True, text=True, check=True).stdout
            found = json.loads(out.splitlines()[-1])
            rows.append([f"b={settings[0]}, {settings[1]} volumes, {settings[2]}^3, 1:{settings[3]}", phase,
                         f"{found['forecast'] / 2**20:.0f}", f"{found['measured'] / 2**20:.0f}",
                         f"{found['forecast'] / found['measured'] - 1:+.0%}"])
    print(table(["settings", "phase", "forecast (MiB)", "measured (MiB)", "apart"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--measure", nargs=5)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure[0], *map(int, given.measure[1:]))
        return
    print(hardware())
    if not given.skip_speed:
        speed(given.repeats)
    if not given.skip_memory:
        memory()


if __name__ == "__main__":
    main()
