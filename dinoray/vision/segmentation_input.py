"""From an image's raw counts to the three planes that a segmentation network gets: the one place, for training and inference.

Two things differ from the planes of embeddings (dinoray.vision.intensity). One image gives one set of planes, so a
channel must be chosen where there are several. And 8-bit RGB is scaled like all else, because it is often dark
fluorescence that someone saved as a colour picture: with one (low, high) for its three channels, so that colours keep
their ratio.
"""

from __future__ import annotations

import numpy as np

from dinoray.config import channel_groups
from dinoray.errors import BadRequest, ItemError
from dinoray.io.decoded import DecodedImage
from dinoray.vision.intensity import ChannelRow, Scaling, channel_names, limits, scale, scaling_key
from dinoray.vision.quality import check_finite, percentiles

RULES = ("image", "plate", "dtype")


def input_row(channels: str, names: tuple[str, ...], is_rgb8: bool) -> ChannelRow:
    """Which channels of an image with these channel `names` become the three planes, and how.

    `channels`: `auto` (one channel repeated; 8-bit RGB as `rgb`), `rgb` (three channels as they are), `mean` (scaled,
    averaged, repeated), a channel's name or 0-based number (repeated; a name goes first), or `NAME=a,b,c` (three named
    channels).

    Raises ItemError `channel_count` when the image has not the channels, or `auto` has to choose among several;
    BadRequest when a group is not written as above.
    """
    count, listed = len(names), f"{len(names)} channels ({', '.join(names)})"
    if channels == "auto":
        if not is_rgb8 and count > 1:
            raise ItemError("channel_count", f"{listed}: which one shows the cells?",
                            todo=f"name a channel, e.g. {names[0]} (training: `channels: {names[0]}`, segmentation: "
                                 f"`--channel {names[0]}`), or rgb, mean, NAME=a,b,c")
        channels = "rgb" if is_rgb8 else names[0]
    if channels in names:
        return ChannelRow(channels, (names.index(channels),), "repeat")
    if channels == "rgb":
        if count != 3:
            raise ItemError("channel_count", f"{listed}, but channels=rgb needs 3", todo="name a channel")
        return ChannelRow("rgb", (0, 1, 2), "three")
    if channels == "mean":
        return ChannelRow("mean", tuple(range(count)), "mean")
    if "=" in channels:
        return _group_row(channels, names)
    if channels.isascii() and channels.isdigit() and int(channels) < count:
        return ChannelRow(names[int(channels)], (int(channels),), "repeat")
    raise ItemError("channel_count", f"no channel {channels}: the image has {listed}",
                    todo="name channels as the files do, or by number from 0")


def _group_row(channels: str, names: tuple[str, ...]) -> ChannelRow:
    try:
        groups = channel_groups(channels) or {}
    except ValueError as error:
        raise BadRequest(str(error), todo="write NAME=a,b,c with the names of three channels") from error
    if len(groups) != 1:
        raise BadRequest(f"channels: {channels!r} names {len(groups)} groups, but a network gets one", todo="name one group")
    (name, members), = groups.items()
    missing = [m for m in members if m not in names]
    if missing:
        raise ItemError("channel_count", f"no channel {', '.join(missing)} for group {name}: the image has {', '.join(names)}",
                        todo="name channels as the files do")
    return ChannelRow(name, tuple(names.index(m) for m in members), "three")


def share_limits(row: ChannelRow, channels: str, is_rgb8: bool) -> bool:
    """Whether the channels of a row have one pair of limits, so that colours keep their ratio: those of `rgb` (not of a group
    that is called rgb), and several of any 8-bit RGB. `channels` as for `input_row`."""
    return len(row.indices) > 1 and (is_rgb8 or row.name == "rgb" and "=" not in channels)


def planes(image: DecodedImage, *, channels: str = "auto", scaling: str = "image", percents: tuple[float, float] = (0.1, 99.9),
           group: str = "", table: Scaling | None = None) -> np.ndarray:
    """float32 [3, Y, X] in [0, 1], C-contiguous: `(x - low) / (high - low)` clipped, of the channels of `input_row`.

    `scaling`: `image` takes `percents` (low, high) of this image's channels; `plate` those of `group` in `table`;
    `dtype` the dtype's full range. The channels of `rgb`, and several channels of any 8-bit RGB, share one pair (`plate`:
    the lowest low and the highest high of them). Where both percentiles are one value, that value and all below become 0:
    a constant image is black (except under `dtype`). At its peak the work holds twice the result's memory, four times
    that of the result for float pixels.

    Raises ItemError `channel_count` (see `input_row`), `nan` (NaN or infinity in a channel that is used), `no_scaling`
    (`plate`, and the table lacks the channel), and BadRequest for an unknown `scaling`.
    """
    if scaling not in RULES:
        raise BadRequest(f"scaling: {scaling!r} is none of {', '.join(RULES)}")
    pixels = image.pixels
    names = channel_names(image.channel_names, len(pixels), image.is_rgb8)
    row = input_row(channels, names, image.is_rgb8)
    is_colour = share_limits(row, channels, image.is_rgb8)
    for i in sorted(set(row.indices)):
        check_finite(pixels[i])
    if scaling == "image" and is_colour:  # one pair, as if a table had it for each of the three
        pair = tuple(percentiles(pixels, percents))
        table, scaling = {group: {scaling_key(name, pixels.dtype): pair for name in names}}, "plate"
    low, high = limits(pixels, names, row, rule=scaling, group=group, table=table, percents=percents)
    if is_colour:
        low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
    out = np.empty((3, *pixels.shape[1:]), np.float32)
    if row.mode == "three":
        for k, i in enumerate(row.indices):
            out[k] = scale(pixels[i], low[k], high[k])
        return out
    out[0] = scale(pixels[row.indices[0]], low[0], high[0])
    for k, i in enumerate(row.indices[1:], start=1):
        out[0] += scale(pixels[i], low[k], high[k])
    out[0] /= len(row.indices)
    out[1:] = out[0]
    return out
