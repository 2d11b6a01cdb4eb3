"""Pictures that a training keeps: what was stored is read back, the same bytes for the same pictures, damage is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dinoray.errors import OutputDamaged
from dinoray.io.stores import open_store
from dinoray.io.training_examples import KEY, Example, store_examples, stored_examples


def example(name: str, height: int, width: int, seed: int) -> Example:
    rng = np.random.default_rng(seed)
    maps = rng.random((2, height, width)).astype(np.float16)
    labels = rng.integers(0, 90_000, (2, height, width)).astype(np.int32)
    pixels = rng.integers(0, 255, (3, height, width)).astype(np.uint8)
    return Example(name, "worst", (3, 5), (100, 200), 0.25, pixels, *maps, *labels)


def test_what_is_stored_is_read_back_and_its_bytes_say_no_time(tmp_path: Path) -> None:
    store, kept = open_store(str(tmp_path)), [example("a", 7, 11, 0), example("b/<c>", 1, 1, 1)]
    store_examples(store, kept)
    found = stored_examples(store)
    assert [(one.image_id, one.why, one.origin, one.image_shape, one.ap50) for one in found] == [
        ("a", "worst", (3, 5), (100, 200), 0.25), ("b/<c>", "worst", (3, 5), (100, 200), 0.25)]
    for one, other in zip(kept, found, strict=True):
        for name in ("pixels", "target", "predicted", "labels", "cells"):
            put, got = getattr(one, name), getattr(other, name)
            assert np.array_equal(put, got) and put.dtype == got.dtype
    first = store.get(KEY)
    store_examples(store, found)
    assert store.get(KEY) == first


def test_none_before_they_are_written_and_damage_is_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert stored_examples(store) == []
    store_examples(store, [replace(example("a", 7, 11, 0), cells=np.zeros((7, 12), np.int32))])
    with pytest.raises(OutputDamaged, match="differ in shape"):
        stored_examples(store)
    store_examples(store, [example("a", 7, 11, 0)])
    whole = store.get(KEY)
    for data in (whole[:len(whole) // 2], b"", b"no archive"):
        store.put(KEY, data)
        with pytest.raises(OutputDamaged, match="cannot be read"):
            stored_examples(store)
