"""Pictures that a training keeps of its validation images: pixels, true and predicted maps and cells, as one object.

A training writes them at its end, when it has the model at hand; its report reads them without any model. The same examples
give the same bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinoray.errors import OutputDamaged
from dinoray.io.stores import Store

KEY = "_dinoray/examples.npz"
_ARRAYS = {"pixels": np.uint8, "target": np.float16, "predicted": np.float16, "labels": np.int32, "cells": np.int32}


@dataclass(frozen=True)
class Example:
    """A part of a validation image at the scale of the training, and what the trained model makes of it."""

    image_id: str
    why: str
    """What it was chosen for, such as `first` or `worst`."""
    origin: tuple[int, int]
    """(y, x) of the part in the image, px at the scale of the training."""
    image_shape: tuple[int, int]
    """Sides of the whole image at that scale, px."""
    ap50: float
    """TP / (TP + FP + FN) at IoU 0.5 of the part, not of the whole image; 1 where neither has cells."""
    pixels: np.ndarray
    """uint8 [3, h, w]."""
    target: np.ndarray
    """True distance map, float16 [h, w]."""
    predicted: np.ndarray
    """Predicted distance map, float16 [h, w]."""
    labels: np.ndarray
    """True cells, int32 [h, w]; those that the part cuts are cut."""
    cells: np.ndarray
    """Predicted cells, int32 [h, w]."""


def store_examples(store: Store, examples: Sequence[Example]) -> None:
    """Write them to `_dinoray/examples.npz`, in place of older ones."""
    arrays: dict[str, np.ndarray] = {}
    facts = [{"image_id": one.image_id, "why": one.why, "origin": one.origin, "image_shape": one.image_shape, "ap50": one.ap50}
             for one in examples]
    arrays["facts"] = np.frombuffer(json.dumps(facts, sort_keys=True).encode(), np.uint8)
    for number, one in enumerate(examples):
        arrays |= {f"{name}{number}": np.asarray(getattr(one, name), dtype) for name, dtype in _ARRAYS.items()}
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)  # members are dated 1980: no time of day gets in
    store.put(KEY, sink.getbuffer())


def stored_examples(store: Store) -> list[Example]:
    """Those of an output; none before its training has ended. Raises OutputDamaged when they cannot be read."""
    try:
        data = store.get(KEY)
    except FileNotFoundError:
        return []
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            found = [Example(one["image_id"], one["why"], tuple(one["origin"]), tuple(one["image_shape"]), one["ap50"],
                             **{name: arrays[f"{name}{number}"] for name in _ARRAYS}) for number, one in enumerate(facts)]
        for one in found:
            shapes = {one.labels.shape, one.target.shape, one.predicted.shape, one.cells.shape, one.pixels.shape[1:]}
            if len(shapes) > 1 or one.labels.ndim != 2 or len(one.pixels) != 3:
                raise ValueError(f"arrays of {one.image_id!r} differ in shape")
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise OutputDamaged(f"the pictures of the training cannot be read: {error!r}", where=f"{store.url}/{KEY}",
                            todo="delete this file: the report is then made without pictures") from error
    return found
