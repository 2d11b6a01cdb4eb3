"""Patch tokens as colours: one PCA basis per channel, so that a colour means the same in every image of a channel.

A basis is fitted once on a deterministic sample of tokens of the run, with fixed signs and one robust scale
per component. A map draws the tiles of one (item, channel) into the image frame, overlaps averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import zarr
from sklearn.decomposition import PCA

from dinoray.errors import OutputDamaged
from dinoray.io.stores import is_local, local_path, safe_join
from dinoray.report.sample import Sample, evenly

MAX_GRIDS = 192
"""Patch grids that the bases of all channels together are fitted on."""
MIN_GRIDS = 8
"""But each on so many, where there are."""
MAX_TOKENS = 16_384
MAX_TILES = 1024
"""Tiles drawn into one map; an image with more is drawn in part."""
_READ_ROWS = 64
ROBUST_PERCENTS = (2.0, 98.0)
_UNCOVERED = 0.5


class DenseReader:
    """Patch grids of a run by (`dense_array`, index)."""

    def __init__(self, url: str):
        self.base = str(local_path(url)) if is_local(url) else url.rstrip("/")
        self._open = lru_cache(maxsize=32)(self._open_array)

    def _open_array(self, name: str) -> zarr.Array:
        folder, _, rest = name.partition(".zarr/")
        path = f"{self.base}/{safe_join(folder + '.zarr', rest)}"
        try:
            return zarr.open_array(path, mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise OutputDamaged(f"patch grids cannot be read: {error}", where=path,
                                todo="see `dinoray verify`, then run the extraction again") from error

    def grids(self, names: Sequence[str], indices: Sequence[int]) -> Iterator[np.ndarray]:
        """The grids [h, w, D] float32 of these references, in order; neighbours in an array are read together."""
        position = 0
        while position < len(names):
            stop = position + 1
            while (stop < len(names) and stop - position < _READ_ROWS and names[stop] == names[position]
                   and indices[stop] == indices[stop - 1] + 1):
                stop += 1
            block = self._open(names[position])[indices[position]:indices[stop - 1] + 1]
            yield from np.asarray(block, dtype=np.float32)
            position = stop


@dataclass(frozen=True)
class Basis:
    """Three directions of token space and the range that becomes 0..1 of red, green and blue."""

    mean: np.ndarray
    components: np.ndarray
    """[3, D]; missing ones are zero."""
    low: np.ndarray
    high: np.ndarray
    explained: tuple[float, ...]
    """Share of the sampled tokens' variance, per component."""
    num_tokens: int
    num_grids: int

    def project(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [..., D] -> components [..., 3], not yet scaled."""
        return (tokens - self.mean) @ self.components.T

    def colour(self, values: np.ndarray) -> np.ndarray:
        """Components [..., 3] -> [0, 1]."""
        return np.clip((values - self.low) / (self.high - self.low), 0.0, 1.0)


def fit_bases(sample: Sample, reader: DenseReader, channels: Sequence[str]) -> dict[str, Basis]:
    """Fit a basis for each of these channels; empty without patch grids."""
    if sample.dense_column is None or not sample.table.num_rows:
        return {}
    names = np.array(sample.table["channel"].to_pylist(), dtype=object)
    share = max(MIN_GRIDS, MAX_GRIDS // max(1, len(channels)))
    return {channel: _fit(sample, reader, np.flatnonzero(names == channel), share) for channel in channels}


def _fit(sample: Sample, reader: DenseReader, mine: np.ndarray, max_grids: int) -> Basis:
    """The basis of tokens of rows spread evenly over `mine`."""
    rows = mine[evenly(len(mine), max_grids)]
    part = sample.table.take(rows)
    per_grid = max(1, MAX_TOKENS // len(rows))
    tokens = []
    for grid in reader.grids(part[sample.dense_column].to_pylist(), part[sample.index_column].to_pylist()):
        flat = grid.reshape(-1, grid.shape[-1])
        tokens.append(flat[evenly(len(flat), per_grid)])
    return basis_of(np.concatenate(tokens), num_grids=len(rows))


def basis_of(tokens: np.ndarray, *, num_grids: int) -> Basis:
    """The basis of tokens [n, D] float32: sklearn's PCA, each component's largest loading made positive."""
    dim = tokens.shape[1]
    wanted = min(3, len(tokens) - 1, dim)
    components = np.zeros((3, dim), dtype=np.float32)
    explained: tuple[float, ...] = ()
    mean = tokens.mean(axis=0)
    if wanted > 0 and float(tokens.var(axis=0).max()) > 0:
        fitted = PCA(n_components=wanted, random_state=0).fit(tokens)
        largest = np.abs(fitted.components_).argmax(axis=1)
        signs = np.sign(fitted.components_[np.arange(wanted), largest])
        components[:wanted] = fitted.components_ * signs[:, None]
        explained = tuple(float(v) for v in fitted.explained_variance_ratio_)
    low, high = np.percentile((tokens - mean) @ components.T, ROBUST_PERCENTS, axis=0).astype(np.float32)
    empty = high <= low  # a component without spread is drawn mid-gray
    low, high = np.where(empty, low - 1, low), np.where(empty, high + 1, high)
    return Basis(mean, components, low, high, explained, len(tokens), num_grids)


def draw_map(basis: Basis, grids: Iterator[np.ndarray], boxes: np.ndarray, *, frame: tuple[int, int],
             size: tuple[int, int]) -> np.ndarray:
    """Colours float32 [h, w, 3] in [0, 1] of an image `frame` (Y, X in source px) drawn at `size` (h, w).

    `boxes` [n, 4]: y0, x0, y1, x1 of each grid in source px. What no tile covers is mid-gray.
    """
    total = np.zeros((*size, 3), dtype=np.float32)
    weight = np.zeros((*size, 1), dtype=np.float32)
    ys = (np.arange(size[0]) + 0.5) * frame[0] / size[0]
    xs = (np.arange(size[1]) + 0.5) * frame[1] / size[1]
    for grid, (y0, x0, y1, x1) in zip(grids, boxes, strict=True):
        rows, columns = np.flatnonzero((ys >= y0) & (ys < y1)), np.flatnonzero((xs >= x0) & (xs < x1))
        if not len(rows) or not len(columns):
            continue
        values = _interpolate(basis.project(grid), (ys[rows] - y0) / (y1 - y0), (xs[columns] - x0) / (x1 - x0))
        target = np.s_[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        total[target] += values
        weight[target] += 1
    colours = basis.colour(total / np.maximum(weight, 1))
    return np.where(weight > 0, colours, np.float32(_UNCOVERED))


def _interpolate(grid: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear values [len(y), len(x), 3] of a grid [h, w, 3] at relative places in [0, 1]; edges are kept."""

    def weights(places: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = np.clip(places * n - 0.5, 0, n - 1)
        lower = np.floor(position).astype(np.int64)
        return lower, np.minimum(lower + 1, n - 1), (position - lower).astype(np.float32)

    y_low, y_high, wy = weights(y, grid.shape[0])
    x_low, x_high, wx = weights(x, grid.shape[1])
    wy, wx = wy[:, None, None], wx[None, :, None]
    top = grid[y_low[:, None], x_low[None]] * (1 - wx) + grid[y_low[:, None], x_high[None]] * wx
    bottom = grid[y_high[:, None], x_low[None]] * (1 - wx) + grid[y_high[:, None], x_high[None]] * wx
    return top * (1 - wy) + bottom * wy
