"""One image on its way through a segmentation: from decoded pixels to the planes of its windows, and from its labels to
the rows and objects that are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dinoray.config import SegmentCellsJob
from dinoray.io.cell_tables import cell_rows
from dinoray.io.images import DecodedImage, LoadedItem
from dinoray.io.items import Item
from dinoray.io.label_images import mask_objects
from dinoray.ledger import StoredObject
from dinoray.vision import intensity
from dinoray.vision.cell_scale import Scale, known_scale
from dinoray.vision.distance_model import SegmenterConfig
from dinoray.vision.quality import quality
from dinoray.vision.segmentation_input import input_row, planes
from dinoray.vision.segmenter import WindowedImage
from dinoray.vision.shapes import cell_table


@dataclass
class Field:
    """One image after the decode threads: either `planes` (its scale must be estimated first) or `windowed`; neither when
    it is too large for one map."""

    image: DecodedImage
    row: intensity.ChannelRow
    """The channels that were chosen."""
    uri: str
    names: tuple[str, ...]
    """Of all channels."""
    pixel_size_um: float | None
    scale: Scale | None
    planes: np.ndarray | None
    num_bytes: int
    group: str
    seconds: dict[str, float]
    windowed: WindowedImage | None = None
    maps: list[np.ndarray | None] | None = None
    tokens: list[np.ndarray | None] | None = None
    missing: int = 0

    def expect(self, windows: int) -> None:
        """So many windows will be put."""
        self.maps, self.tokens, self.missing = [None] * windows, [None] * windows, windows

    def put(self, number: int, distance: np.ndarray, tokens: np.ndarray | None) -> bool:
        """The map and the tokens of one window; true with the last one."""
        self.maps[number], self.tokens[number] = distance, tokens
        self.missing -= 1
        return self.missing == 0


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


def choose(item: Item, loaded: LoadedItem, job: SegmentCellsJob, config: SegmenterConfig,
           scaling: intensity.Scaling | None) -> Field:
    """Choose the channel and scale intensities; the scale is known here or None. Raises ItemError."""
    image = loaded.image
    names = intensity.channel_names(image.channel_names, len(image.pixels), image.is_rgb8)
    row = input_row(job.channel, names, image.is_rgb8)
    uri = item.files[0 if len(item.files) == 1 or row.mode != "repeat" else row.indices[0]].uri
    pixel_size = image.pixel_size_um or job.pixel_size_um
    scale = known_scale(config, pixel_size_um=pixel_size, diameter_px=job.diameter_px)
    seen = planes(image, channels=job.channel, scaling=job.scaling, percents=config.scaling_percents, group=item.group,
                  table=scaling)
    return Field(image, row, uri, names, pixel_size, scale, seen, loaded.num_bytes, item.group,
                 {"read": loaded.read_s, "decode": loaded.decode_s})


def measure(found: Field, labels: np.ndarray, features: Callable[[np.ndarray], np.ndarray] | None,
            job: SegmentCellsJob) -> Segmented:
    """The rows of an image and of its cells. `labels` int32 [Y, X]; `features`: ids -> float32 [n, D]."""
    pixels = found.image.pixels
    measured = cell_table(labels, pixels, found.names, found.pixel_size_um, neighbour_px=job.neighbour_px)
    ids = measured["object_id"]
    image_row = {
        "uri": found.uri, "channel": found.row.name, "height": pixels.shape[1], "width": pixels.shape[2],
        "pixel_size_um": found.pixel_size_um, "num_cells": len(ids), "scale": found.scale.factor,
        "scale_source": found.scale.source,
        "median_diameter_px": float(np.median(np.sqrt(4 / np.pi * measured["area_px"]))) if len(ids) else None,
        "cell_fraction": float(np.count_nonzero(labels) / labels.size),
        **quality(pixels[list(found.row.indices)])}
    feature = None if features is None else features(ids)
    return Segmented(labels, found.pixel_size_um, {"uri": found.uri}, measured, feature, image_row)
