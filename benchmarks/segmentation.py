"""Windows and images per second of the cell segmentation, against a loop over single windows.

    python benchmarks/segmentation.py [--model vits16] [--norm group] [--rounds 7] [--checkpoint FOLDER] [--skip-end-to-end]

Speed of the network, three ways on the same windows (of one image of 1080 px and 16 of 256 to 520 px), in turn in every
round, medians of the rounds and of their ratios: `loop` is what one would write by hand with the same model (float32, one
window per forward, torch's own threads); the others are dinoray's segmenter in float32 and in bfloat16 with default
settings: micro-batches of windows of all images, computed on several threads of one core each.

End to end, on the same images as 16-bit counts of discs of 8 to 30 px: scaling, windows, network with tokens, blending,
watershed, the table of cells and their mean features, one image per thread; images per second, and the share of every
stage. Weights are random without --checkpoint, so the watershed and the tables then get the true distance map of the
discs (made beforehand), because a random network finds no cells; with --checkpoint they get the network's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from common import hardware, table

from dinoray.io.decoded import DecodedImage
from dinoray.memory.budget import default_token_budget
from dinoray.memory.meter import available_cores
from dinoray.runners.compute import ComputePool
from dinoray.vision.decoders.unet2d import NORMS, tap_layers
from dinoray.vision.distance_model import (
    BackboneRecord,
    DecoderRecord,
    DistanceMapModel,
    SegmenterConfig,
    load_segmenter,
    new_model,
)
from dinoray.vision.segmentation_input import planes
from dinoray.vision.segmenter import Segmenter
from dinoray.vision.shapes import cell_table
from dinoray.vision.targets import distance_map
from dinoray.vision.weights import load_backbone


def segmenter(model: str, norm: str, checkpoint: str | None, precision: str) -> Segmenter:
    """The engine with default settings, of a checkpoint or with random weights."""
    dtype = getattr(torch, precision)
    if checkpoint:
        loaded, config = load_segmenter(checkpoint, dtype=dtype)
        return Segmenter(loaded, config, token_budget=default_token_budget(config.backbone.model, "cpu", precision))
    backbone = load_backbone(model, weights="random")
    shape = backbone.config
    record = DecoderRecord(taps=tap_layers(shape.depth), channels=(256, 128, 64, 32), norm=norm)  # type: ignore[arg-type]
    config = SegmenterConfig(backbone=BackboneRecord(model=model, digest=backbone.digest, included=False, mean=shape.mean,
                                                     std=shape.std), decoder=record)
    loaded = new_model(backbone, record, frozen=True).to(dtype).eval().requires_grad_(False)
    return Segmenter(loaded, config, token_budget=default_token_budget(model, "cpu", precision))


def pictures(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """(raw uint16 [1, Y, X], labels int32 [Y, X]) of discs and noise."""
    shapes = [(1080, 1080), *(tuple(rng.integers(256, 521, 2).tolist()) for _ in range(16))]
    found = []
    for height, width in shapes:
        labels = np.zeros((height, width), np.int32)
        for number in range(1, height * width // 1500):
            radius = rng.uniform(4, 15)
            cy, cx = rng.uniform(0, height), rng.uniform(0, width)
            part = tuple(slice(max(0, int(c - radius)), min(side, int(c + radius) + 2)) for c, side in zip((cy, cx), labels.shape,
                                                                                                         strict=True))
            y, x = np.ogrid[part]
            inside = ((y - cy) ** 2 + (x - cx) ** 2 < radius**2) & (labels[part] == 0)
            labels[part][inside] = number
        raw = (labels > 0) * 4000 + rng.normal(600, 80, (height, width))
        found.append((raw.clip(0, 65535).astype(np.uint16)[None], labels))
    return found


@torch.inference_mode()
def loop(model: DistanceMapModel, windows: list[np.ndarray]) -> None:
    """What one would write by hand."""
    torch.set_num_threads(available_cores())
    for window in windows:
        torch.sigmoid(model(torch.from_numpy(window)[None]))[0, 0].numpy()


def ours(engine: Segmenter, windows: list[np.ndarray]) -> None:
    """Micro-batches of equal windows, on as many threads as there are cores."""
    groups: dict[tuple, list[np.ndarray]] = {}
    for window in windows:
        groups.setdefault(window.shape, []).append(window)
    batches = []
    for (_, wy, wx), group in groups.items():
        step = engine.micro_batch(wy, wx)
        batches += [group[i:i + step] for i in range(0, len(group), step)]
    pool = ComputePool(engine.device, available_cores())
    try:
        list(pool.map(engine.predict, batches))
    finally:
        pool.close()


def seconds(call: Callable, *args: object) -> float:
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def network(model: str, norm: str, checkpoint: str | None, images: list[tuple[np.ndarray, np.ndarray]], rounds: int) -> None:
    """The three ways, interleaved."""
    exact, rough = (segmenter(model, norm, checkpoint, precision) for precision in ("float32", "bfloat16"))
    windows = [window for raw, _ in images for window in exact.plan_image(planes(DecodedImage(raw))).windows]
    ways = {"loop, float32": lambda: loop(exact.model, windows), "dinoray, float32": lambda: ours(exact, windows),
            "dinoray, bfloat16": lambda: ours(rough, windows)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            took = seconds(way)
            if number:  # the first round warms up
                times[name].append(took)
    base = times["loop, float32"]
    rows = [[name, f"{statistics.median(took):.2f}", f"{len(windows) / statistics.median(took):.1f}",
             f"{statistics.median(a / b for a, b in zip(base, took, strict=True)):.2f}",
             " ".join(f"{a / b:.2f}" for a, b in zip(base, took, strict=True))] for name, took in times.items()]
    print(f"{len(windows)} windows of {len(images)} images, {exact.config.backbone.model}, decoder "
          f"{exact.config.decoder.channels} ({exact.config.decoder.norm} norms), {available_cores()} threads, {rounds} "
          "interleaved rounds, medians\n")
    print(table(["", "seconds", "windows/s", "speed over the loop", "ratio of each round"], rows))


def end_to_end(model: str, norm: str, checkpoint: str | None, images: list[tuple[np.ndarray, np.ndarray]], rounds: int,
               precision: str) -> None:
    """Raw counts to rows, one image per thread."""
    engine = segmenter(model, norm, checkpoint, precision)
    truths = [distance_map(labels) for _, labels in images]
    stages: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        stages[name] = stages.get(name, 0.0) + time.perf_counter() - began

    def one(number: int) -> int:
        raw = images[number][0]
        with stage("scaling, windows"):
            plan = engine.plan_image(planes(DecodedImage(raw)))
        maps, tokens = [], []
        with stage("network"):
            step = engine.micro_batch(*plan.key)
            for i in range(0, len(plan.windows), step):
                map_, token = engine.predict(plan.windows[i:i + step], True)
                maps += list(map_)
                tokens += list(token)
        with stage("blending"):
            merged, grid = plan.merge(maps), plan.merge_tokens(tokens)
        with stage("watershed"):
            labels = engine.cells(merged if checkpoint else truths[number], raw.shape[1:])
        with stage("table of cells"):
            cells = cell_table(labels, raw, ("image",))
        with stage("features of cells"):
            engine.cell_features(grid, labels, 1.0, cells["object_id"])
        return len(cells["object_id"])

    pool, took, cells = ComputePool(engine.device, available_cores()), [], 0
    try:
        list(pool.map(one, range(len(images))))
        stages.clear()
        for _ in range(rounds):
            began = time.perf_counter()
            cells = sum(pool.map(one, range(len(images))))
            took.append(time.perf_counter() - began)
    finally:
        pool.close()
    total = sum(stages.values())
    print(f"end to end, {precision}: {len(images) / statistics.median(took):.2f} images/s "
          f"({sum(raw.size for raw, _ in images) / 1e6 / statistics.median(took):.2f} Mpx/s), {cells} cells\n")
    print(table(["stage", "ms per image and thread", "share"],
                [[name, f"{value / rounds / len(images) * 1e3:.1f}", f"{value / total:.1%}"] for name, value in stages.items()]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vits16")
    parser.add_argument("--norm", default="group", choices=NORMS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--checkpoint")
    parser.add_argument("--skip-end-to-end", action="store_true")
    given = parser.parse_args()
    print(hardware())
    shown = pictures(np.random.default_rng(0))
    network(given.model, given.norm, given.checkpoint, shown, given.rounds)
    if not given.skip_end_to_end:
        for kind in ("float32", "bfloat16"):
            end_to_end(given.model, given.norm, given.checkpoint, shown, max(2, given.rounds // 3), kind)
