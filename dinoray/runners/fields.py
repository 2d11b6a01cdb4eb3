"""One image on its way through a segmentation: from decoded pixels to the planes of its windows, and from its labels to
the rows and objects that are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from dinoray.config import SegmentCellsJob
from dinoray.io.cell_tables import cell_rows
from dinoray.io.images import DecodedImage, LoadedItem
from dinoray.io.items import Item
from dinoray.io.mask_files import mask_objects
from dinoray.ledger import StoredObject
from dinoray.vision import intensity
from dinoray.vision.cell_blocks import sample_pixels
from dinoray.vision.cell_scale import Scale
from dinoray.vision.quality import percentiles, percentiles_around, quality
from dinoray.vision.segmentation_input import input_row, planes, share_limits
from dinoray.vision.segmenter import WindowedImage
from dinoray.vision.shapes import cell_table
from dinoray.vision.stitching import Box


@dataclass
class Field:
    """One image after the decode threads. `windowed` when its maps can be computed; `planes` (of all of it, or of its middle)
    when its scale must be estimated before; neither when it is too large for one map."""

    image: DecodedImage
    row: intensity.ChannelRow
    """The channels that were chosen."""
    uri: str
    names: tuple[str, ...]
    """Of all channels."""
    pixel_size_um: float | None
    look: Look
    num_bytes: int
    seconds: dict[str, float]
    scale: Scale | None = None
    planes: np.ndarray | None = None
    windowed: WindowedImage | None = None
    maps: list[np.ndarray | None] | None = None
    tokens: list[np.ndarray | None] | None = None
    missing: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(Y, X) of the image."""
        return self.image.pixels.shape[1:]

    def seen(self, box: Box | None = None) -> np.ndarray:
        """float32 [3, y, x] in [0, 1]: what the network gets of the image, or of a box of it."""
        part = self.image if box is None else replace(self.image, pixels=self.image.pixels[:, box.y0:box.y1, box.x0:box.x1])
        return planes(part, channels=self.look.channels, scaling=self.look.scaling, percents=self.look.percents,
                      group=self.look.group, table=self.look.table)

    def fix_limits(self) -> None:
        """From here on all boxes are scaled alike, where intensities are scaled per image: as the whole image would be."""
        if self.look.scaling == "image":
            pixels = self.image.pixels
            if share_limits(self.row, self.look.channels, self.image.is_rgb8):
                pair = self._limits(pixels)
                found = {i: pair for i in self.row.indices}
            else:
                found = {i: self._limits(pixels[i:i + 1]) for i in self.row.indices}
            limits = {intensity.scaling_key(self.names[i], pixels.dtype): pair for i, pair in found.items()}
            self.look = replace(self.look, scaling="plate", table={self.look.group: limits})

    def _limits(self, pixels: np.ndarray) -> tuple[float, float]:
        """(low, high) of channels [C, Y, X]: exact for unsigned 8 and 16 bits. Of others by a sample, for the memory's sake,
        unless it is of one value: cells that are few, or lie together, can escape it."""
        if pixels.dtype in (np.uint8, np.uint16):
            low, high = percentiles(pixels, self.look.percents)
            return low, high
        sample = sample_pixels(lambda box: pixels[:, box.y0:box.y1, box.x0:box.x1], *self.shape)
        low, high = percentiles(sample, self.look.percents)
        if low == high:
            low, high = percentiles_around(pixels, low, self.look.percents)
        return low, high

    def expect(self, windows: int) -> None:
        """So many windows will be put."""
        self.maps, self.tokens, self.missing = [None] * windows, [None] * windows, windows

    def put(self, number: int, distance: np.ndarray, tokens: np.ndarray | None) -> bool:
        """The map and the tokens of one window; true with the last one."""
        self.maps[number], self.tokens[number] = distance, tokens
        self.missing -= 1
        return self.missing == 0


@dataclass(frozen=True)
class Look:
    """How raw pixels become what the network gets (dinoray.vision.segmentation_input)."""

    channels: str
    scaling: str
    percents: tuple[float, float]
    group: str
    table: intensity.Scaling | None


@dataclass
class Segmented:
    """What is stored of one image."""

    labels: np.ndarray | None
    pixel_size_um: float | None
    shared: dict[str, Any]
    """Values of all its cells' rows."""
    measured: dict[str, np.ndarray]
    feature: np.ndarray | None
    image_row: dict[str, Any]
    objects: list[StoredObject] = field(default_factory=list)
    seconds: float = 0.0

    def mask_objects(self, key: str) -> Iterator[tuple[str, bytes]]:
        """(key, bytes) of the mask's objects, once: the labels are dropped."""
        labels, self.labels = self.labels, None
        return mask_objects(labels, key, self.pixel_size_um)

    def cells(self) -> pa.Table:
        """The rows of its cells."""
        return cell_rows(self.shared, self.measured, self.feature)


def choose(item: Item, loaded: LoadedItem, job: SegmentCellsJob, percents: tuple[float, float],
           table: intensity.Scaling | None) -> Field:
    """Choose the channel of a decoded image. Raises ItemError `channel_count`."""
    image = loaded.image
    names = intensity.channel_names(image.channel_names, len(image.pixels), image.is_rgb8)
    row = input_row(job.channel, names, image.is_rgb8)
    uri = item.files[0 if len(item.files) == 1 or row.mode != "repeat" else row.indices[0]].uri
    look = Look(job.channel, job.scaling, percents, item.group, table)
    return Field(image, row, uri, names, image.pixel_size_um or job.pixel_size_um, look, loaded.num_bytes,
                 {"read": loaded.read_s, "decode": loaded.decode_s})


def measure(found: Field, labels: np.ndarray, features: Callable[[np.ndarray], np.ndarray] | None,
            job: SegmentCellsJob) -> Segmented:
    """The rows of an image and of its cells. `labels` int32 [Y, X]; `features`: ids -> float32 [n, D]."""
    pixels = found.image.pixels
    measured = cell_table(labels, pixels, found.names, found.pixel_size_um, neighbour_distance_px=job.neighbour_px)
    ids = measured["object_id"]
    image_row = {
        "uri": found.uri, "channel": found.row.name, "height": pixels.shape[1], "width": pixels.shape[2],
        "pixel_size_um": found.pixel_size_um, "num_cells": len(ids), "scale": found.scale.factor,
        "scale_source": found.scale.source,
        "median_diameter_px": float(np.median(measured["equivalent_diameter_px"])) if len(ids) else None,
        "cell_fraction": float(np.count_nonzero(labels) / labels.size),
        **quality(pixels[list(found.row.indices)])}
    feature = None if features is None else features(ids)
    return Segmented(labels, found.pixel_size_um, {"uri": found.uri}, measured, feature, image_row)
