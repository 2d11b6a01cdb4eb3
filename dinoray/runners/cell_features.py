"""Features of cells: one row per cell and channel, a crop around each centroid, from one decode of its image.

The decode threads read the image and find its cells (in a label image, or in the plan where a table named them).
Crops are cut in chunks while earlier ones are computed, so an image of 100,000 cells holds a few chunks at a time;
crops of several images share micro-batches, as those of tiles do (dinoray.runners.image_features).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoray.config import ExtractCellsJob
from dinoray.errors import ItemError
from dinoray.io.images import DecodedImage, load_item
from dinoray.io.items import Item
from dinoray.io.label_images import label_plane, refuse_binary
from dinoray.runners.image_features import ChannelView, ImageFeatureRunner, Prepared, PreparedRow, for_torch
from dinoray.vision import crops
from dinoray.vision.extractor import Crop
from dinoray.vision.quality import check_pixels, quality

CHUNK_BYTES = 8 * 2**20
"""Blocks cut by one thread at once; `decode_threads` such chunks, and one more, may wait to be computed."""
MAX_BLOCK_PX = 8192
"""Largest side of a crop in source px: beyond it crop_um and the pixel size do not belong together."""


@dataclass(frozen=True)
class Cells:
    """The cells of one image, by rising id: ids, centroids (skimage's convention), area where labels tell it."""

    ids: np.ndarray
    y: np.ndarray
    x: np.ndarray
    area: np.ndarray | None
    labels: np.ndarray | None = None
    """The label image [Y, X], where neighbours are masked."""


class CellFeatureRunner(ImageFeatureRunner):
    """Unit of images with their cells -> receipt."""

    job: ExtractCellsJob
    objects = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._cutter = ThreadPoolExecutor(self.decode_threads, thread_name_prefix="cut")

    @staticmethod
    def resized_to(job: ExtractCellsJob) -> int:
        return job.crop_px

    def close(self) -> None:
        super().close()
        self._cutter.shutdown(wait=True, cancel_futures=True)

    # ---------------------------------------------------------------- decode threads

    def load(self, item: Item) -> Prepared:
        loaded = load_item(item, self.limits, z_projection=self.job.z_projection)
        image, read_s, decode_s = loaded.image, loaded.read_s, loaded.decode_s
        pixel_size = self._pixel_size(image)
        if pixel_size is None:
            raise ItemError("no_pixel_size", "the file does not say its pixel size, and crop_um needs one",
                            where=item.files[0].uri, todo="give --pixel-size-um")
        check_pixels(image.pixels)
        labels = None
        if item.labels is not None:
            found = load_item(Item(item.item_id, (item.labels,)), self.limits)
            labels = label_plane(found.image, image.pixels.shape[1:], item.labels.uri)
            read_s, decode_s = read_s + found.read_s, decode_s + found.decode_s
        began = time.monotonic()
        cells = self._cells(item, labels, image, pixel_size)
        prepared = Prepared((), read_s, decode_s, 0.0, item.num_bytes)  # with those of the labels
        if len(cells.ids):
            side = self.job.crop_um / pixel_size
            if side < 1:
                raise ItemError("too_small", f"a crop of {self.job.crop_um} µm is less than one pixel of {pixel_size} µm",
                                where=item.files[0].uri, todo="check --crop-um and --pixel-size-um")
            if crops.block_size(side, self.job.crop_px) > MAX_BLOCK_PX:
                raise ItemError("too_large", f"a crop of {self.job.crop_um} µm is {side:.0f} px wide at {pixel_size} µm per px",
                                where=item.files[0].uri, todo="check --crop-um and --pixel-size-um")
            views = [(view, self._values(item, image, view)) for view in self._views(item, image)]
            prepared.rows = self._stream(cells, views, side, prepared)
        prepared.prepare_s += time.monotonic() - began
        return prepared

    def _cells(self, item: Item, labels: np.ndarray | None, image: DecodedImage, pixel_size: float) -> Cells:
        if labels is not None:
            cells = Cells(*crops.objects_of(labels), labels if self.job.mask_neighbours else None)
            if len(cells.ids) == 1:
                refuse_binary(labels, item.labels.uri)
            return cells
        if item.objects is None:
            raise ItemError("missing_labels", "the plan names neither a label image nor centroids", where=item.item_id)
        ids, y, x = item.objects.arrays()
        if item.objects.unit == "um":
            y, x = y / pixel_size, x / pixel_size
        height, width = image.pixels.shape[1:]
        outside = ~((y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5))
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            raise ItemError("bad_centroids", f"{np.count_nonzero(outside)} centroids lie outside the image of {height} x {width} "
                            f"px (object {ids[i]}: y {y[i]:.1f}, x {x[i]:.1f})", where=item.files[0].uri,
                            todo="check the unit of x and y (px from 0, or x_um, y_um), and that the table is of these images")
        return Cells(ids, y, x, None)

    # ---------------------------------------------------------------- rows, while the unit's crops are computed

    def _stream(self, cells: Cells, views: list[tuple[ChannelView, dict[str, Any]]], side: float,
                prepared: Prepared) -> Iterator[PreparedRow]:
        """The rows, cell by cell and channel by channel; a few chunks are cut ahead of the reader."""
        n = crops.block_size(side, self.job.crop_px)
        per_cell = sum(len(view.seen) * view.seen.itemsize for view, _ in views) * n * n
        step = max(1, CHUNK_BYTES // per_cell)
        ahead: deque[Future[tuple[list[PreparedRow], float]]] = deque()
        try:
            for start in range(0, len(cells.ids), step):
                ahead.append(self._cutter.submit(self._cut, cells, range(start, min(start + step, len(cells.ids))), views, side))
                if len(ahead) > self.decode_threads:
                    yield from self._take(ahead, prepared)
            while ahead:
                yield from self._take(ahead, prepared)
        finally:
            for future in ahead:
                future.cancel()

    def _take(self, ahead: deque[Future[tuple[list[PreparedRow], float]]], prepared: Prepared) -> list[PreparedRow]:
        self.beats += 1
        rows, seconds = ahead.popleft().result()
        prepared.prepare_s += seconds
        return rows

    def _cut(self, cells: Cells, numbers: range, views: list[tuple[ChannelView, dict[str, Any]]],
             side: float) -> tuple[list[PreparedRow], float]:
        began = time.monotonic()
        rows = []
        for i in numbers:
            where = crops.place(float(cells.y[i]), float(cells.x[i]), side, self.job.crop_px)
            y0, x0, y1, x1 = where.box
            hidden = None
            if cells.labels is not None:
                block = crops.cut(cells.labels, where)
                hidden = (block != 0) & (block != cells.ids[i])
            found = {"tile": 0, "object_id": int(cells.ids[i]), "centroid_y_px": float(cells.y[i]),
                     "centroid_x_px": float(cells.x[i]), "area_px": None if cells.area is None else int(cells.area[i]),
                     "y0": y0, "x0": x0, "y1": y1, "x1": x1}
            for view, shared in views:
                raw = view.chosen[:, max(0, y0):max(0, y1), max(0, x0):max(0, x1)]
                crop = Crop(for_torch(crops.cut(view.seen, where)), view.low, view.high, view.row.mode, where, hidden)
                rows.append(PreparedRow(shared | found | quality(raw), crop))
        return rows, time.monotonic() - began
