"""The model card of a context-fusion checkpoint: README.md in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from dinoray.vision.fusion_checkpoint import FusionConfig


def fusion_card(config: FusionConfig) -> str:
    """What it is, what it was trained on, how good it was on the validation regions, and how to use it."""
    facts, backbone, model = config.training, config.backbone, config.model
    head: dict = {"library_name": "dinoray", "tags": ["volume-segmentation", "electron-microscopy", "dinov3"]}
    if backbone is not None and not (backbone.weights or "").startswith("random"):
        head |= {"license": "other", "license_name": "dinov3-license", "base_model": backbone.weights or backbone.model}
    what = "affinities of voxels, from which instances are made" if config.target == "affinities" else \
        f"one of {', '.join(config.classes)} for each voxel"
    over = (f"three-plane tokens of {backbone.model} ({backbone.weights or 'the official weights'}, frozen)" if backbone
            else "raw voxels alone")
    context = ("no context" if model.fusion == "none"
               else f"a context {config.context_factor} times as wide as a crop ({model.fusion})")
    size, raw = ("x".join(f"{v:g}" for v in sizes) for sizes in (config.voxel_nm, config.raw_voxel_nm))
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:.4f} |" if isinstance(value, float) else
                     f"| {name.replace('_', ' ')} | {value} |" for name, value in config.metrics.items())
    sources = "\n".join(f"- `{s['raw']}`{', voxels ' + s['region'] if s.get('region') else ''} (weight {s['weight']:g})"
                        for s in facts.get("sources", []))
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---
# Context-fusion UNet

A 3D UNet that predicts {what}. It sees {model.inputs if model.inputs != 'both' else 'raw voxels and tokens'} of a crop
({over}), with {context}. Voxels of {size} nm (z x y x x) from raw voxels of {raw} nm.

```
dinoray segment volume VOLUME --checkpoint THIS_FOLDER --out OUT
```

## Data

{sources or "not recorded"}

{facts.get('training_voxels', 0):,} labelled voxels to train on.

## Validation

| figure | value |
|---|---|
{rows}

## Training

```json
{json.dumps({k: v for k, v in facts.items() if k not in ('sources', 'augmentation')}, indent=1)}
```
"""
