"""The model card of a checkpoint: README.md in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from dinoray.vision.distance_model import SegmenterConfig


def model_card(config: SegmenterConfig) -> str:
    """What it is, what it was trained on, how good it was on the validation images, and how to use it.

    `config` is the one that `save_checkpoint` settled: its digests are of what is written.
    """
    facts, metrics, backbone = config.training, config.metrics, config.backbone
    from_scratch = (backbone.weights or "").startswith("random")
    head: dict = {"library_name": "dinoray", "tags": ["cell-segmentation", "instance-segmentation", "distance-map", "dinov3"]}
    if not from_scratch:
        head |= {"license": "other", "license_name": "dinov3-license", "base_model": backbone.weights or backbone.model}
    size = "unknown" if config.median_diameter_px is None else f"{config.median_diameter_px:.1f} px"
    pixel = "not given" if config.pixel_size_um is None else f"{config.pixel_size_um:g} µm"
    how = "trained with the decoder" if backbone.included else "frozen"
    start = "from scratch" if from_scratch else f"from {backbone.weights or 'the official weights'}"
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:.4f} |" if isinstance(value, float) else
                     f"| {name.replace('_', ' ')} | {value} |" for name, value in metrics.items())
    sources = "\n".join(f"- `{s['images']}`{', ids ' + s['ids'] if s.get('ids') else ''} (weight {s['weight']:g})"
                        for s in facts.get("sources", []))
    marked = f"Connected parts above {config.peak:g}" if config.markers == "components" else \
        f"Maxima above {config.peak:g} that rise by {config.marker_height:g}"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---
# Distance maps of cells over {backbone.model}

A UNet decoder over DINOv3 tokens ({backbone.model}, {how}, {start}) that predicts, for every pixel, the distance to its
cell's outside divided by the cell's largest such distance. {marked} mark cells, which a watershed fills
down to {config.fill:g}.

```
dinoray segment cells IMAGES --checkpoint THIS_FOLDER --out OUT
```

Cells in training: median diameter {size}, pixel size {pixel}. Other scales are resampled (`--pixel-size-um`,
`--diameter-px`). Channels `{config.channels}`, intensities scaled by `{config.scaling}` (percentiles
{config.scaling_percents[0]:g} and {config.scaling_percents[1]:g}).

## Data

{sources or "not recorded"}

{facts.get('training_images', '?')} images to train on, {facts.get('validation_images', '?')} to validate on.

## Validation

| figure | value |
|---|---|
{rows}

Thresholds were chosen on these validation images: expect a little less elsewhere.

## Training

```json
{json.dumps({k: v for k, v in facts.items() if k not in ('sources', 'augmentation')}, indent=1)}
```

`seconds` is the wall time of the steps that are in the result, without those that a restart computed again.

Digest of all weights: `{config.weights_digest}`; of the backbone: `{backbone.digest}`.
"""
