"""dinoray: image collections and volumes of any size through DINOv3, with output that can be trusted.

Public names are imported lazily, so that `import dinoray` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "load_backbone": "dinoray.vision.weights",
    "save_backbone": "dinoray.vision.weights",
    "open_features": "dinoray.io.tables",
    "open_masks": "dinoray.io.masks",
    "extract_images": "dinoray.extraction",
    "segment_cells": "dinoray.extraction",
    "extract_volume": "dinoray.volume_extraction",
    "segment_volume": "dinoray.volume_segmentation",
    "ExtractCellsJob": "dinoray.config",
    "ExtractImagesJob": "dinoray.config",
    "ExtractVolumeJob": "dinoray.config",
    "SegmentCellsJob": "dinoray.config",
    "SegmentVolumeJob": "dinoray.config",
    "DinorayError": "dinoray.errors",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'dinoray' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__
