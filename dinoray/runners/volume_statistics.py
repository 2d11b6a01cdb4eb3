"""The statistics pass over a volume: histograms of a sample of its blocks, which fix one scaling for all of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from hashlib import blake2b
from itertools import product

import numpy as np

from dinoray.errors import ItemError
from dinoray.io.items import FileRef, Item
from dinoray.io.volumes import Volume
from dinoray.ledger import Ledger
from dinoray.runners.base import UnitRunner
from dinoray.runners.statistics import Histogram, StatisticsRunner, histogram
from dinoray.units import Plan
from dinoray.vision.intensity import scaling_key

BLOCK = 64
"""Voxels a side of a block of the sample."""
CHANNEL = "volume"
MOST_BLOCKS = 2_000_000
"""More blocks than these are thinned out evenly before the sample is drawn by hash."""


def sample_blocks(volume: Volume, count: int) -> list[Item]:
    """At most `count` blocks, those whose place has the smallest hash, in the order z, y, x: the same for any reader."""
    per_axis = [-(-n // BLOCK) for n in volume.shape]
    steps = [1, 1, 1]
    while np.prod([-(-n // s) for n, s in zip(per_axis, steps, strict=True)], dtype=np.float64) > MOST_BLOCKS:
        axis = max(range(3), key=lambda a: per_axis[a] / steps[a])
        steps[axis] += 1
    places = product(*(range(0, n, s) for n, s in zip(per_axis, steps, strict=True)))
    chosen = sorted(sorted(places, key=lambda p: blake2b("-".join(map(str, p)).encode(), digest_size=8).digest())[:count])
    itemsize = volume.dtype.itemsize
    return [Item("sample/" + "/".join(f"{i * BLOCK}-{min((i + 1) * BLOCK, n)}" for i, n in zip(place, volume.shape, strict=True)),
                 (FileRef(volume.ref.uri, BLOCK**3 * itemsize, volume.ref.version),)) for place in chosen]


class VolumeStatisticsRunner(StatisticsRunner):
    """Unit of blocks -> histogram of their raw values. Blocks that cannot be read are left to the main pass."""

    def __init__(self, plan: Plan, ledger: Ledger, *, volume: Volume, decode_threads: int, prefetch_bytes: int):
        UnitRunner.__init__(self, plan, ledger, decode_threads=decode_threads, prefetch_bytes=prefetch_bytes)
        self.volume = volume

    def close(self) -> None:
        super().close()
        self.volume.close()

    def load(self, item: Item) -> tuple[dict[str, Histogram], float, float, int]:
        began = time.monotonic()
        block = self.volume.read(*_ranges(item.item_id))
        read = time.monotonic()
        _check_finite(block, item, self.volume)
        values = histogram(block.reshape(block.shape[0] * block.shape[1], block.shape[2]))
        return {scaling_key(CHANNEL, block.dtype): values}, read - began, time.monotonic() - read, block.nbytes


def why_unusable(volume: Volume, block: Item) -> ItemError | None:
    """What is wrong with a block of the sample, None when it can be used. Raises TransientError, SystemicError."""
    try:
        _check_finite(volume.read(*_ranges(block.item_id)), block, volume)
    except ItemError as error:
        return error
    return None


def _check_finite(values: np.ndarray, block: Item, volume: Volume) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ItemError("nan", f"NaN or infinite voxels in {block.item_id}", where=volume.ref.uri)


def _ranges(item_id: str) -> Iterator[slice]:
    return (slice(*map(int, text.split("-"))) for text in item_id.split("/")[1:])
