"""Load weights strictly.

Strict means: every tensor of the model is filled from the file and every tensor of the file is used or is
one of the known training-only ones, or loading fails with both lists. Nothing is resized, guessed or left at
its initial value: with LayerScale at its 1e-5 initialisation a network looks alive and computes nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dinoray.errors import BadRequest, WeightsError
from dinoray.vision import layouts, rope
from dinoray.vision.backbone import Backbone
from dinoray.vision.canonical import build, weights_digest
from dinoray.vision.variants import LVD_MEAN, LVD_STD, SAT_MEAN, SAT_STD, BackboneConfig, variant
from dinoray.vision.weight_export import hugging_face_config, save_backbone
from dinoray.vision.weight_files import TensorReader, WeightFiles
from dinoray.vision.weight_hub import resolve

__all__ = ["OpenedWeights", "load_backbone", "load_normalisation", "open_weights", "resolve", "save_backbone",
           "weights_digest", "WeightFiles"]

DTYPES = (torch.float32, torch.bfloat16)


def load_backbone(
    model: str | BackboneConfig | None = None,
    weights: str | os.PathLike | WeightFiles | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    accept_license: bool = False,
    expect_digest: str | None = None,
) -> Backbone:
    """A DINOv3 ViT with weights, in eval mode, no gradients asked for.

    `model`: a variant's name, a BackboneConfig, or None to tell it from the weights. `weights`: a file, a
    folder, a hub id, what `resolve` returned, "random" (seed 0), "random:SEED", or None for the official
    weights of `model`. `expect_digest` refuses other weights. Raises BadRequest or WeightsError.
    """
    if dtype not in DTYPES:
        raise BadRequest(
            f"dtype is {dtype}", where="load_backbone", todo="use torch.float32 or torch.bfloat16"
        )
    opened = open_weights(model, weights, accept_license=accept_license)
    backbone = build(opened.config, opened.fetch, dtype, device)
    backbone.source, backbone.normalisation_rule = opened.source, opened.rule
    if expect_digest is not None and backbone.digest != expect_digest:
        raise WeightsError(
            f"the weights' digest is {backbone.digest}, not {expect_digest}",
            where=opened.source,
            todo="use the weights that the job was planned with",
        )
    return backbone


@dataclass(frozen=True)
class OpenedWeights:
    """Weights that fit `config` by names and shapes: what `build` needs, and what the file says of itself."""

    config: BackboneConfig
    fetch: Callable[[str], torch.Tensor]
    """Canonical name -> float32 tensor on the CPU; WeightsError when it holds NaN or infinity."""
    source: str
    rule: str
    """Where the normalisation comes from."""
    layout: str = "random"
    dtypes: dict[str, str] = field(default_factory=dict)
    """dtype in the file of each canonical tensor; empty for random weights."""
    num_tensors: int = 0
    num_training_only: int = 0
    """Tensors of the file that the model does not use, all of them known to serve training only."""


def open_weights(
    model: str | BackboneConfig | None = None,
    weights: str | os.PathLike | WeightFiles | None = None,
    *,
    accept_license: bool = False,
) -> OpenedWeights:
    """Find weights and check them by names and shapes; no value is read. Arguments as for `load_backbone`.

    Raises BadRequest or WeightsError.
    """
    config = variant(model) if isinstance(model, str) else model
    if isinstance(weights, str) and weights.partition(":")[0] == "random":
        if config is None:
            raise BadRequest("random weights for no model", where="weights (--weights)", todo="give model (--model)")
        return OpenedWeights(
            config.with_normalisation(LVD_MEAN, LVD_STD), _random(config, weights), weights, "default"
        )
    if not isinstance(weights, WeightFiles):
        weights = resolve(config.name if config else None, weights, accept_license=accept_license)
    opened = _open(weights, config)
    mean, std, rule = load_normalisation(weights)
    return replace(opened, config=opened.config.with_normalisation(mean, std), rule=rule)


def load_normalisation(found: WeightFiles) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """(mean, std, rule) for pixels in [0, 1]: preprocessor_config.json, else hub id or name, else LVD."""
    file = found.folder / "preprocessor_config.json"
    if file.is_file():
        try:
            data = json.loads(file.read_text())
            mean, std = (tuple(float(x) for x in data[key]) for key in ("image_mean", "image_std"))
            if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
                raise ValueError(f"image_mean {mean} and image_std {std}")
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"no usable normalisation: {error!r}",
                where=str(file),
                todo="give image_mean and image_std, three numbers each, or remove the file",
            ) from error
        return mean, std, "preprocessor_config.json"
    named = ((found.hub_id, "hub id"), (found.files[0].name, "file name"), (found.folder.name, "folder"))
    for name, kind in named:
        if "sat493m" in name:
            return SAT_MEAN, SAT_STD, f"{kind} {name} (sat493m)"
        if "lvd1689m" in name:
            return LVD_MEAN, LVD_STD, f"{kind} {name} (lvd1689m)"
    return LVD_MEAN, LVD_STD, "default (lvd1689m): nothing said otherwise"


def _open(found: WeightFiles, config: BackboneConfig | None) -> OpenedWeights:
    """Check a checkpoint by names and shapes before any value is read."""
    reader, where = TensorReader(found), found.source
    layout = layouts.recognise(reader.shapes, where)
    seen = layouts.facts(layout, reader.shapes)
    if config is None:
        config = layouts.config_from_facts(seen, where)
    differs = {k: v for k, v in seen.items() if v != getattr(config, k)}
    if differs:
        raise _other_model(config, seen, differs, where)
    if layout == "huggingface":
        _check_config_json(found.folder / "config.json", config)
    recipes = layouts.recipes(layout, config, reader.shapes)
    wanted = {source for recipe in recipes.values() for source in recipe.sources}
    missing = sorted(wanted - set(reader.shapes))
    unused = sorted(n for n in set(reader.shapes) - wanted if not layouts.is_training_only(n))
    if missing or unused:
        lists = [f"{kind}: {', '.join(n)}" for kind, n in (("missing", missing), ("unused", unused)) if n]
        raise WeightsError(
            f"the tensors do not fit {config.name} ({layout} layout); " + "; ".join(lists),
            where=where,
            todo="check --model and the file; every tensor must be used and none may lack",
        )
    if "rope_embed.periods" in reader.shapes:
        _check_periods(reader.read("rope_embed.periods"), config, where)
    shapes = layouts.canonical_shapes(config)

    def fetch(name: str) -> torch.Tensor:
        recipe = recipes[name]
        names = ", ".join(recipe.sources)
        try:
            tensor = recipe.build(*(reader.read(source) for source in recipe.sources))
        except ValueError as error:
            raise WeightsError(f"{names}: {error}", where=where, todo="check the file") from error
        if tuple(tensor.shape) != shapes[name]:
            raise WeightsError(
                f"{names} gives {tuple(tensor.shape)} where {config.name} has {shapes[name]}",
                where=where,
                todo="check --model and the file",
            )
        if not tensor.isfinite().all():
            raise WeightsError(f"{names} holds NaN or infinity", where=where, todo="get the file again")
        return tensor

    return OpenedWeights(
        config,
        fetch,
        where,
        rule="",
        layout=layout,
        dtypes={
            name: ", ".join(sorted({reader.dtypes[s] for s in recipe.sources})) or "absent, taken as 0"
            for name, recipe in recipes.items()
        },
        num_tensors=len(reader.shapes),
        num_training_only=len(set(reader.shapes) - wanted),
    )


def _other_model(config: BackboneConfig, seen: dict, differs: dict, where: str) -> WeightsError:
    try:
        looks = f"look like {layouts.config_from_facts(seen, where).name}"
    except WeightsError:
        looks = "are of another model"
    details = [f"{k} is {v} where {config.name} has {getattr(config, k)}" for k, v in differs.items()]
    return WeightsError(
        f"these weights {looks}, not {config.name}: {', '.join(details)}",
        where=where,
        todo="name the model of these weights with --model",
    )


def _check_config_json(file: Path, config: BackboneConfig) -> None:
    if not file.is_file():
        return
    try:
        data = json.loads(file.read_text())
        stated = {key: data[key] for key in hugging_face_config(config) if key in data}
    except (ValueError, TypeError) as error:
        raise WeightsError(f"unreadable: {error}", where=str(file), todo="download it again") from error
    ours = hugging_face_config(config)
    # what does not change the network's output: presentation, and training-time settings
    free = {"architectures", "image_size", "pos_embed_rescale", "layerscale_value"}
    differs = {k: v for k, v in stated.items() if k not in free and v != ours[k]}
    wrong = [f"{k} is {v} where {config.name} has {ours[k]}" for k, v in differs.items()]
    if wrong:
        raise WeightsError(
            "; ".join(wrong), where=str(file), todo="name the model of these weights with --model"
        )


def _check_periods(stored: torch.Tensor, config: BackboneConfig, where: str) -> None:
    ours = rope.periods(config.head_dim)
    # 1 %: published files may hold them in bfloat16
    if stored.shape != ours.shape or not torch.allclose(stored, ours, rtol=0.01, atol=0):
        raise WeightsError(
            f"rope_embed.periods {[round(x, 4) for x in stored.flatten().tolist()]} are not those of DINOv3",
            where=where,
            todo="these weights need other positions than this model computes",
        )


def _random(config: BackboneConfig, weights: str) -> Callable[[str], torch.Tensor]:
    """Weights from a seed: drawn on the CPU in canonical order, LayerScale 0.05..0.55 so the network acts.

    Only uniform numbers, and only exactly rounded arithmetic on them: the same seed gives the same bits, and
    so the same digest, on every kind of processor (normal deviates would not).
    """
    _, colon, seed = weights.partition(":")
    if colon and not (seed.isascii() and seed.isdigit() and int(seed) < 2**63):
        raise BadRequest(
            f"the seed is {seed!r}", where=f"weights (--weights) {weights}", todo="use random:SEED, a number"
        )
    generator = torch.Generator("cpu").manual_seed(int(seed or 0))
    shapes = layouts.canonical_shapes(config)

    def fetch(name: str) -> torch.Tensor:
        shape = shapes[name]
        if name.endswith("lambda1"):
            low, high = 0.05, 0.55
        elif "norm" in name and name.endswith("weight"):
            low, high = 0.8, 1.2
        elif "token" not in name and len(shape) > 1:
            high = (3 / math.prod(shape[1:])) ** 0.5  # deviation 1 / sqrt(fan in)
            low = -high
        else:
            low, high = (-0.2, 0.2) if "token" in name else (-0.03, 0.03)
        return torch.rand(shape, generator=generator, dtype=torch.float32).mul_(high - low).add_(low)

    return fetch
