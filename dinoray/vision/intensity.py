"""From raw counts to what the backbone sees: channel policies, 16-bit-safe scaling, CLAHE.

Raw pixels keep their dtype until they are scaled, on the device, by `(x - low) / (high - low)` clipped to
[0, 1]; then comes the checkpoint's mean and std (dinoray.vision.extractor). 8-bit RGB is divided by 255.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinoray.config import channel_groups
from dinoray.errors import BadRequest, ItemError
from dinoray.vision.quality import percentiles

Scaling = dict[str, dict[str, tuple[float, float]]]
"""group (plate or folder) -> `scaling_key` of the channel -> (low, high) in raw counts."""


@dataclass(frozen=True, slots=True)
class ChannelRow:
    """One row's channels: its `name`, the channel `indices`, and how they become three planes.

    `mode`: `repeat` (one channel three times), `three` (as they are), `mean` (scaled, averaged, repeated).
    `full_range`: divide by the dtype's maximum instead of percentiles (8-bit RGB).
    """

    name: str
    indices: tuple[int, ...]
    mode: str
    full_range: bool = False


def default_names(num_channels: int, is_rgb8: bool) -> tuple[str, ...]:
    """Names of channels that no file, pattern or manifest names."""
    if is_rgb8:
        return ("R", "G", "B")
    return ("gray",) if num_channels == 1 else tuple(str(i) for i in range(num_channels))


def channel_names(given: tuple[str, ...] | None, num_channels: int, is_rgb8: bool) -> tuple[str, ...]:
    """The names of an image's channels, each once: a file may call two channels DAPI; the second is DAPI_2."""
    names: list[str] = []
    for name in given or default_names(num_channels, is_rgb8):
        unique, number = name, 1
        while unique in names:
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return tuple(names)


def channel_rows(policy: str, names: tuple[str, ...], is_rgb8: bool) -> list[ChannelRow]:
    """The rows that a channel policy makes of an image with these channels (design 4.5).

    Raises ItemError `channel_count` when the image has not the channels that an explicit policy needs.
    """
    count = len(names)
    if policy == "auto":
        policy = "rgb" if is_rgb8 else "each"
    if policy == "rgb":
        if count != 3:
            raise ItemError("channel_count", f"{count} channels ({', '.join(names)}), but channels=rgb needs 3")
        return [ChannelRow("rgb", (0, 1, 2), "three", full_range=is_rgb8)]
    if policy == "mean":
        return [ChannelRow("mean", tuple(range(count)), "mean" if count > 1 else "repeat", full_range=is_rgb8)]
    if policy == "each":
        return [ChannelRow(name, (i,), "repeat", full_range=is_rgb8) for i, name in enumerate(names)]
    rows = []
    for name, members in (channel_groups(policy) or {}).items():
        missing = [m for m in members if m not in names]
        if missing:
            raise ItemError("channel_count", f"no channel {', '.join(missing)} for group {name}: the image has "
                            f"{', '.join(names)}", todo="name channels as the files or the pattern do")
        rows.append(ChannelRow(name, tuple(names.index(m) for m in members), "three", full_range=is_rgb8))
    return rows


def scaling_key(name: str, dtype: np.dtype) -> str:
    """What a channel's scaling is stored under: its name, and its dtype unless that is uint16.

    8-bit and 16-bit images of one folder must not share percentiles: the 8-bit ones would all turn black.
    """
    return name if dtype == np.uint16 else f"{name} [{np.dtype(dtype).name}]"


def full_range(dtype: np.dtype) -> tuple[float, float]:
    """(0, maximum) of an integer dtype, (0, 1) for float."""
    return (0.0, float(np.iinfo(dtype).max)) if np.issubdtype(dtype, np.integer) else (0.0, 1.0)


def limits(pixels: np.ndarray, names: tuple[str, ...], row: ChannelRow, *, rule: str, group: str,
           table: Scaling | None, percents: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), float32 or float64 [len(row.indices)] as `scale` computes, for a row of an image [C, Y, X].

    `rule`: `plate` looks `group` up in `table`; `image` takes this image's own percentiles; `dtype` the full
    range. Raises ItemError `no_scaling` when the statistics pass saw no readable image of that channel.
    """
    low, high = [], []
    for i in row.indices:
        if row.full_range or rule == "dtype":
            pair = full_range(pixels.dtype)
        elif rule == "image":
            pair = tuple(percentiles(pixels[i], percents))
        else:
            pair = (table or {}).get(group, {}).get(scaling_key(names[i], pixels.dtype))
            if pair is None:
                raise ItemError("no_scaling", f"no intensity scaling for channel {names[i]} of {group!r}: none of "
                                "the images sampled there could be read or had it",
                                todo="raise scaling_sample, or use scaling=image")
        low.append(pair[0])
        high.append(pair[1] if pair[1] > pair[0] else pair[0] + 1.0)
    kind = np.float32 if exact_in_float32(pixels.dtype) else np.float64
    lows = np.asarray(low, dtype=kind)
    return lows, np.maximum(np.asarray(high, dtype=kind), np.nextafter(lows, kind(np.inf)))  # never equal once rounded


def exact_in_float32(dtype: np.dtype) -> bool:
    """Whether float32 holds every value of an image dtype; 32- and 64-bit integers and float64 need float64."""
    return dtype.itemsize <= 2 or dtype == np.float32


def scale(plane: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32 plane in [0, 1]: for host-side steps; the same arithmetic as on the device where float32 is exact."""
    kind = np.float32 if exact_in_float32(plane.dtype) else np.float64
    scaled = (plane.astype(kind) - kind(low)) / kind(high - low)
    return np.clip(scaled, 0.0, 1.0, out=scaled).astype(np.float32, copy=False)


def clahe_tile(tile_px: int, tile_um: float | None, pixel_size_um: float | None) -> int:
    """Side of a CLAHE tile in px. Raises ItemError `pixel_size` when µm are asked for and no size is known."""
    if tile_um is None:
        return tile_px
    if pixel_size_um is None:
        raise ItemError("pixel_size", "clahe_tile_um needs a pixel size and this image has none",
                        todo="give --pixel-size-um, or clahe_tile_px")
    return max(8, round(tile_um / pixel_size_um))


def clahe(plane: np.ndarray, *, tile: int, clip: float, origin: tuple[int, int] = (0, 0), bins: int = 256) -> np.ndarray:
    """Contrast-limited adaptive histogram equalisation of a plane [Y, X] in [0, 1] -> float32 in [0, 1].

    After Zuiderveld (Graphics Gems IV, 1994) with one change: tiles have a fixed side and lie on a lattice
    anchored at the image origin, so a block with a margin of two tiles equals the same part of the whole
    (`origin` = the block's position in the image). Border tiles use the pixels they have.
    """
    if tile < 2 or clip <= 1:
        raise BadRequest(f"clahe needs tile >= 2 and clip > 1, not {tile} and {clip}")
    height, width = plane.shape
    levels = np.minimum((plane * bins).astype(np.int32), bins - 1)
    y = np.arange(height) + origin[0]
    x = np.arange(width) + origin[1]
    first_y, first_x = y[0] // tile, x[0] // tile
    ny, nx = y[-1] // tile - first_y + 1, x[-1] // tile - first_x + 1
    cell = (y // tile - first_y)[:, None] * nx + (x // tile - first_x)[None, :]
    counts = np.bincount((cell * bins + levels).ravel(), minlength=ny * nx * bins).reshape(ny * nx, bins)
    total = counts.sum(axis=1, keepdims=True)
    ceiling = np.maximum(1.0, clip * total / bins)
    excess = np.maximum(counts - ceiling, 0).sum(axis=1, keepdims=True)
    mapping = np.cumsum(np.minimum(counts, ceiling) + excess / bins, axis=1) / total
    mapping = mapping.reshape(ny, nx, bins).astype(np.float32)

    def neighbours(position: np.ndarray, first: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        centre = (position + 0.5) / tile - 0.5 - first  # in tiles, relative to the first tile's centre
        lower = np.floor(centre).astype(np.int64)
        return np.clip(lower, 0, n - 1), np.clip(lower + 1, 0, n - 1), (centre - lower).astype(np.float32)

    y0, y1, wy = neighbours(y, first_y, ny)
    x0, x1, wx = neighbours(x, first_x, nx)
    wy, wx = wy[:, None], wx[None, :]
    top = mapping[y0[:, None], x0[None], levels] * (1 - wx) + mapping[y0[:, None], x1[None], levels] * wx
    bottom = mapping[y1[:, None], x0[None], levels] * (1 - wx) + mapping[y1[:, None], x1[None], levels] * wx
    return np.clip(top * (1 - wy) + bottom * wy, 0.0, 1.0)
