"""Thumbnails: inputs read again and scaled as the model saw them, small enough to stand inside the page.

An input that cannot be read (moved, changed, access denied, too large for a thumbnail) becomes a `Picture`
with a `problem` instead of pixels. Arrays are uint8 [h, w, 3].
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup
from PIL import Image

from dinoray.errors import DinorayError, ItemError, OutputDamaged
from dinoray.io.images import DecodedImage, Limits, load_item
from dinoray.io.items import Item
from dinoray.report.run import Run
from dinoray.vision import intensity

LIMITS = Limits(max_pixels=2**26, max_bytes=2**30, max_file_bytes=2**30)
"""Inputs above these are not read again for a thumbnail; also the memory of one reader."""
READERS = 2
PALETTE = ((0.25, 0.45, 1.0), (0.1, 0.9, 0.25), (1.0, 0.2, 0.15), (1.0, 0.8, 0.1), (0.95, 0.3, 0.95), (0.2, 0.9, 0.95))
"""Colours of channels in a composite, by the channel's place; further channels are gray."""
COLOUR_NAMES = ("blue", "green", "red", "yellow", "magenta", "cyan")
BRIGHT_BACKGROUND = 0.25
"""Median of a channel as shown, above which its background counts as bright."""
_NATURAL = {"R": (1.0, 0.0, 0.0), "G": (0.0, 1.0, 0.0), "B": (0.0, 0.0, 1.0)}


@dataclass
class Picture:
    """One input: a thumbnail per channel row of the output, and one of all of them together."""

    item: Item
    channels: dict[str, np.ndarray] = field(default_factory=dict)
    composite: np.ndarray | None = None
    coloured: tuple[str, ...] = ()
    """Channels in the composite, in the order of PALETTE; empty for a picture in natural colours or gray."""
    problem: str = ""
    """Why there are no pixels, in one line."""


def read_pictures(items: Iterable[Item], run: Run, *, side: int) -> dict[str, Picture]:
    """The pictures of `items` by item id, longest side `side` px."""
    scaling = read_scaling(run) if run.settings["scaling"] == "plate" else None
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda item: read_picture(item, run.settings, scaling, side=side), items)
        return {picture.item.item_id: picture for picture in found}


def read_scaling(run: Run) -> intensity.Scaling:
    """The run's stored scaling: group -> channel -> (low, high); later generations add groups and channels.

    Raises OutputDamaged when that of the first plan is missing, or one cannot be read.
    """
    scaling: intensity.Scaling = {}
    for part in run.generations:
        key = f"{part.prefix}/plan/scaling.parquet"
        if part.number and not run.store.exists(key):
            continue  # it shares the first plan's
        try:
            rows = pq.read_table(io.BytesIO(run.store.get(key))).to_pylist()
            for row in rows:
                scaling.setdefault(row["group"], {}).setdefault(row["channel"], (row["low"], row["high"]))
        except (OSError, pa.ArrowException, KeyError) as error:
            raise OutputDamaged(f"the intensity scaling of the run is missing or cannot be read: {error!r}",
                                where=f"{run.store.url}/{key}",
                                todo="restore the folder _dinoray from a copy") from error
    return scaling


def read_picture(item: Item, settings: dict[str, Any], scaling: intensity.Scaling | None, *, side: int) -> Picture:
    """Read one input again; every error of the input or its storage ends in `problem`."""
    try:
        image = load_item(item, LIMITS, z_projection=settings.get("z_projection", "refuse")).image
        return _draw(item, image, settings, scaling, side)
    except DinorayError as error:
        reason = f"{error.reason}: " if isinstance(error, ItemError) else ""
        return Picture(item, problem=f"{reason}{error.what}")


def _draw(item: Item, image: DecodedImage, settings: dict[str, Any], scaling: intensity.Scaling | None,
          side: int) -> Picture:
    names = intensity.channel_names(image.channel_names, len(image.pixels), image.is_rgb8)
    rows = intensity.channel_rows(settings["channels"], names, image.is_rgb8)
    percents = (settings["scaling_low_percent"], settings["scaling_high_percent"])
    height, width = thumbnail_size(*image.pixels.shape[1:], side)
    picture = Picture(item)
    for row in rows:
        low, high = intensity.limits(image.pixels, names, row, rule=settings["scaling"], group=item.group,
                                     table=scaling, percents=percents)
        planes = [intensity.scale(shrink(image.pixels[i], height, width), a, b)
                  for i, a, b in zip(row.indices, low, high, strict=True)]
        if row.mode == "mean":
            planes = [np.mean(planes, axis=0)]
        picture.channels[row.name] = as_uint8(np.stack(planes * (3 // len(planes)), axis=-1))
    if len(rows) == 1 or rows[0].mode != "repeat":
        picture.composite = picture.channels[rows[0].name]
    return picture


def draw_composites(pictures: list[Picture]) -> None:
    """Fill `composite` of the pictures with several gray channels, the same way for all of them.

    The brightest of the coloured channels shows at each place. A channel whose background is bright in most
    of the pictures (transmitted light) would hide the others and is left out.
    """
    multi = [picture for picture in pictures if picture.channels and picture.composite is None]
    backgrounds: dict[str, list[float]] = {}
    for picture in multi:
        for name, gray in picture.channels.items():
            backgrounds.setdefault(name, []).append(float(np.median(gray[..., 0])) / 255)
    bright = {name for name, values in backgrounds.items() if median(values) > BRIGHT_BACKGROUND}
    for picture in multi:
        natural = set(picture.channels) == set(_NATURAL)
        kept = tuple(name for name in picture.channels if name not in bright or natural) or tuple(picture.channels)
        picture.coloured = () if natural else kept
        total = np.zeros(picture.channels[kept[0]].shape, dtype=np.float32)
        for place, name in enumerate(kept):
            colour = _NATURAL[name] if natural else PALETTE[place] if place < len(PALETTE) else (0.5, 0.5, 0.5)
            np.maximum(total, picture.channels[name] / np.float32(255) * np.float32(colour), out=total)
        picture.composite = as_uint8(total)


def thumbnail_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Size whose longest side is at most `side` px; small images keep theirs."""
    factor = min(1.0, side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def shrink(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """A plane [Y, X] of any dtype as float32 [height, width], averaged over areas; NaN and infinity become 0."""
    values = np.nan_to_num(plane.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if values.shape == (height, width):
        return values
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BOX))


def as_uint8(values: np.ndarray) -> np.ndarray:
    """[0, 1] to 0..255, rounded and clipped."""
    return np.clip(values * 255 + 0.5, 0, 255).astype(np.uint8)


def data_uri(pixels: np.ndarray, *, quality: int = 82) -> Markup:
    """Pixels uint8 [h, w, 3] as a JPEG data URI, without metadata, so equal pixels give equal text."""
    sink = io.BytesIO()
    gray = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if gray else pixels))
    image.save(sink, "JPEG", quality=quality, optimize=True, **({} if gray else {"subsampling": 0}))
    return Markup("data:image/jpeg;base64,") + base64.b64encode(sink.getvalue()).decode()


def one_line(text: str, limit: int = 300) -> str:
    """Text without line breaks and control characters, cut to `limit` characters."""
    flat = re.sub(r"[\s\x00-\x1f\x7f]+", " ", re.sub(r"\s*\n\s*", "; ", text.strip()))
    return flat if len(flat) <= limit else flat[:limit - 1] + "…"
