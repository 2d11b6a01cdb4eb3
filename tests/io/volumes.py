"""Outputs of a volume made of known tokens, written as a run writes them."""

from __future__ import annotations

import numpy as np

from dinoray.io.stores import Store
from dinoray.io.volume_arrays import create_arrays, encode_shard, shard_key, shards_of
from dinoray.io.volume_grid import ArraySpec, VolumeGrid


def centres(spec: ArraySpec) -> np.ndarray:
    """[3, z, y, x] float64: of every token, the nm of its centre along z, y, x."""
    axes = [t + p * np.arange(n) for t, p, n in zip(spec.translation_nm, spec.pitch_nm, spec.shape, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def put_array(store: Store, spec: ArraySpec, values: np.ndarray) -> None:
    """Every shard of an array."""
    values = values.astype(spec.dtype)
    for place, low, high in shards_of(spec, (0, 0, 0), spec.shape):
        part = values[(slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))]
        store.put(shard_key(spec, place), encode_shard(spec, part))


def put_volume(store: Store, grid: VolumeGrid, tokens: dict[str, np.ndarray] | None = None) -> None:
    """The planes of a volume: the given tokens, else the coordinates of their centres."""
    specs = grid.arrays(fused=False)
    create_arrays(store, specs, {"grid": grid.as_dict(), "model": "fake"})
    for spec in specs:
        put_array(store, spec, centres(spec) if tokens is None else tokens[spec.name])


def random_tokens(grid: VolumeGrid, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers for every plane."""
    rng = np.random.default_rng(seed)
    return {s.name: rng.normal(size=(s.dim, *s.shape)).astype(np.float32) for s in grid.arrays(fused=False)}


def from_memory(values: np.ndarray):
    """A reader of an array in memory."""
    return lambda z0, z1, y0, y1, x0, x1: values[:, z0:z1, y0:y1, x0:x1]
