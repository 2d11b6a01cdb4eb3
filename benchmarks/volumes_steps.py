"""Steps of the context-fusion training: time with tokens on the fly and stored, and their memory, forecast and measured.

    python -m benchmarks.volumes_steps [--repeats 5] [--skip-speed] [--skip-memory]

Speed: vits16 (random weights), raw:label voxels 1:4, crops of 64^3, b = 16, the same crops with tokens computed and with tokens
given, in turn. Memory: peaks (VmHWM) of fresh processes, above the process with the model loaded, of the extraction and of the
UNet's step, beside the forecast of dinoray.training.fusion_memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import hardware, table
from dinoray.training.fusion_memory import FirstStep, forecast
from dinoray.vision.crop_features import crop_tokens, planes_for
from dinoray.vision.fusion_model import FusionModel, FusionRecord, VolumeCrop, new_model
from dinoray.vision.voxel_grids import VoxelGrid
from dinoray.vision.weights import load_backbone

NM = 16.0
CALIBRATION = [(16, 1, 64, 4, "float32"), (16, 2, 64, 4, "float32"), (16, 2, 64, 4, "bfloat16")]
"""(base channels, volumes per batch, crop, raw voxels per label voxel, precision): what HOLES and LIBRARIES of
dinoray.training.fusion_memory were fitted to."""
CHECKS = [(24, 1, 64, 4, "float32"), (32, 1, 64, 4, "float32"), (32, 2, 64, 4, "bfloat16"), (24, 2, 64, 4, "float32")]
"""They were not."""


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


class Steps:
    """What `forecast` and a step need of a task: a model and its loss, on crops in memory."""

    def __init__(self, model: FusionModel):
        self.model = model
        self.first = FirstStep(torch.device("cpu"))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.unet.parameters())}]

    def loss(self, samples: list[VolumeCrop]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model.unet(self.model.prepare(samples))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="sum")
        return loss, torch.tensor(1.0)


def measure(base: int, volumes: int, side: int, factor: int, precision: str) -> None:
    """In a fresh process: print the forecast and the peak of each phase of one step."""
    task = Steps(model_of(base, factor).train())
    crops, autocast = [crop_of(side, factor, i) for i in range(volumes)], torch.bfloat16 if precision == "bfloat16" else None
    forecast_ = forecast(task, crops, autocast)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(task.parameter_groups())
    task.model.unet.register_forward_pre_hook(lambda module, args: task.first.extracted())
    task.first.began()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        loss, _ = task.loss(crops)
    loss.backward()
    optimizer.step()
    task.first.ended()
    shapes = task.model.backbone.config
    fused = volumes * shapes.dim * side**3 * 4
    print(json.dumps({"forecast": forecast_, "measured": task.first.peaks, "fused": fused}))


def memory() -> None:
    """The table of forecasts and peaks."""
    rows = []
    for settings in CALIBRATION + CHECKS:
        out = subprocess.run([sys.executable, "-m", "benchmarks.volumes_steps", "--measure", *map(str, settings)],
                             capture_output=True, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        for phase, expected in found["forecast"].items():
            measured = found["measured"][phase]
            rows.append([f"b={settings[0]}, {settings[1]} volumes, {settings[2]}^3, 1:{settings[3]}, {settings[4]}"
                         + (" *" if settings in CALIBRATION else ""), phase,
                         f"{expected / 2**20:.0f}", f"{measured / 2**20:.0f}", f"{(expected - measured) / 2**20:+.0f}",
                         f"{expected / measured - 1:+.0%}", f"{found['fused'] / 2**20:.0f}" if phase == "extraction" else ""])
    print(table(["settings (* fitted to)", "phase", "forecast (MiB)", "measured (MiB)", "apart (MiB)", "", "one fused copy (MiB)"],
                rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(*map(int, given.measure[:4]), given.measure[4])
        return
    print(hardware())
    if not given.skip_speed:
        speed(given.repeats)
    if not given.skip_memory:
        memory()


if __name__ == "__main__":
    main()
