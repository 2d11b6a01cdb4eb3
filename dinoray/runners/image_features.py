"""Features of images: one unit of images -> one Parquet file, and one Zarr folder when patch grids are asked for.

Per image, in the decode threads: read, decode, check, choose channels, cut windows, measure quality. Then,
per unit: crops of equal shape are gathered in plan order into micro-batches, computed (on CPU several at
once, each on one thread), and the rows are written in plan order.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dinoray.config import ExtractJob
from dinoray.errors import ItemError
from dinoray.io.feature_maps import DenseWriter
from dinoray.io.images import DecodedImage, Limits, load_item
from dinoray.io.items import Item
from dinoray.io.object_names import plate_folder
from dinoray.io.tables import as_vector_dtype, dense_columns, feature_schema, write_table
from dinoray.ledger import Ledger, Receipt
from dinoray.runners.base import Finish, Loaded, UnitRunner
from dinoray.runners.compute import ComputePool
from dinoray.runners.gathering import Gathering
from dinoray.runners.numerics import used_numerics
from dinoray.runners.quarantining import quarantine
from dinoray.units import Plan, Unit
from dinoray.vision import intensity
from dinoray.vision.backbone import Backbone
from dinoray.vision.extractor import Crop, Extractor, column_names
from dinoray.vision.quality import check_pixels, quality
from dinoray.vision.tiling import windows

PUTS_IN_FLIGHT = 3
"""Dense shards that may wait to be stored, per unit."""


@dataclass
class PreparedRow:
    """One row before its features: the fixed columns' values and the crop they are computed from."""

    values: dict[str, Any]
    crop: Crop | None


@dataclass
class Prepared:
    """One image after the decode threads. `rows` may be made while they are read (and then raise ItemError);
    `prepare_s` is complete after the last one."""

    rows: Iterable[PreparedRow]
    read_s: float
    decode_s: float
    prepare_s: float
    num_bytes: int


@dataclass
class _UnitState:
    """What a unit gathers while its items pass."""

    rows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Item position -> its rows, features filled in as batches finish."""
    bad: dict[int, ItemError] = field(default_factory=dict)


@dataclass(frozen=True)
class ChannelView:
    """One channel row of an image: raw pixels `chosen` [C, Y, X], and what is to be scaled, `seen` with `low`, `high`."""

    row: intensity.ChannelRow
    uri: str
    chosen: np.ndarray
    seen: np.ndarray
    low: np.ndarray
    high: np.ndarray


class ImageFeatureRunner(UnitRunner):
    """Unit of images -> receipt. Holds one backbone for the life of the actor."""

    objects = False
    """Whether rows are objects of an image, with an `object_id`."""

    def __init__(self, job: ExtractJob, plan: Plan, ledger: Ledger, backbone: Backbone, *,
                 scaling: intensity.Scaling | None, decode_threads: int, compute_threads: int):
        super().__init__(plan, ledger, decode_threads=decode_threads, prefetch_bytes=job.prefetch_bytes)
        self.job, self.scaling = job, scaling
        self.limits = Limits(max_pixels=job.max_pixels, max_bytes=job.max_file_bytes, max_file_bytes=job.max_file_bytes)
        self.numerics = plan.facts["numerics"]
        self.extractor = Extractor(backbone, features=job.features, layers=job.layers,
                                   token_budget=self.numerics["token_budget"],
                                   resize_px=self.resized_to(job))
        self._compute = ComputePool(self.extractor.device, compute_threads)
        self.on_cuda, self.compute_threads = self._compute.on_cuda, self._compute.threads
        self.columns = column_names(job.features, job.layers)
        self.vector_columns = [name for name, feature, _ in self.columns if feature != "patches"]
        self.dense_columns = {name: layer for name, feature, layer in self.columns if feature == "patches"}
        self.schema = feature_schema(
            vectors=dict.fromkeys(self.vector_columns, backbone.config.dim), vector_dtype=job.vector_dtype,
            dense=list(self.dense_columns), metadata_columns=plan.facts["metadata_columns"],
            facts=plan.facts["described"], objects=self.objects)

    @staticmethod
    def resized_to(job: ExtractJob) -> int | None:
        """Side in px that every crop gets on the device; None leaves crops as they are."""
        return job.resize_px if job.size == "resize" else None

    def close(self) -> None:
        super().close()
        self._compute.close()

    # ---------------------------------------------------------------- decode threads

    def load(self, item: Item) -> Prepared:
        loaded = load_item(item, self.limits, z_projection=self.job.z_projection)
        began = time.monotonic()
        rows = self._rows(item, loaded.image)
        return Prepared(rows, loaded.read_s, loaded.decode_s, time.monotonic() - began, loaded.num_bytes)

    def _rows(self, item: Item, image: DecodedImage) -> list[PreparedRow]:
        job, pixels = self.job, image.pixels
        height, width = pixels.shape[1:]
        boxes = windows(height, width, size=job.size, tile_px=job.tile_px,
                        patch=self.extractor.backbone.config.patch_size)
        check_pixels(pixels)
        rows = []
        for view in self._views(item, image):
            for box in boxes:
                part = np.s_[:, box.y0:box.y1, box.x0:box.x1]
                values = self._values(item, image, view) | {
                    "tile": box.tile, "y0": box.y0, "x0": box.x0, "y1": box.y1, "x1": box.x1, **quality(view.chosen[part])}
                rows.append(PreparedRow(values, Crop(for_torch(view.seen[part]), view.low, view.high, view.row.mode)))
        return rows

    def _views(self, item: Item, image: DecodedImage) -> Iterator[ChannelView]:
        """The rows that the channel policy makes of an image, contrast applied. Raises ItemError."""
        job, pixels = self.job, image.pixels
        names = intensity.channel_names(image.channel_names, len(pixels), image.is_rgb8)
        percents = (job.scaling_low_percent, job.scaling_high_percent)
        for row in intensity.channel_rows(job.channels, names, image.is_rgb8):
            chosen = pixels[list(row.indices)]
            low, high = intensity.limits(pixels, names, row, rule=job.scaling, group=item.group,
                                         table=self.scaling, percents=percents)
            seen = chosen
            if job.contrast == "clahe" or not intensity.exact_in_float32(pixels.dtype):
                seen = np.stack([intensity.scale(plane, a, b) for plane, a, b in zip(chosen, low, high, strict=True)])
                low, high = np.zeros(len(low), np.float32), np.ones(len(low), np.float32)
            if job.contrast == "clahe":
                tile = intensity.clahe_tile(job.clahe_tile_px, job.clahe_tile_um, self._pixel_size(image))
                seen = np.stack([intensity.clahe(plane, tile=tile, clip=job.clahe_clip) for plane in seen])
            uri = item.files[0 if len(item.files) == 1 or row.mode != "repeat" else row.indices[0]].uri
            yield ChannelView(row, uri, chosen, seen, low, high)

    def _values(self, item: Item, image: DecodedImage, view: ChannelView) -> dict[str, Any]:
        """The columns that all rows of one image and channel share."""
        height, width = image.pixels.shape[1:]
        return {"item_id": item.item_id, "uri": view.uri, "channel": view.row.name, "height": height, "width": width,
                "pixel_size_um": self._pixel_size(image), **{k: item.metadata.get(k) for k in self._metadata_columns}}

    def _pixel_size(self, image: DecodedImage) -> float | None:
        return image.pixel_size_um or self.job.pixel_size_um

    @property
    def _metadata_columns(self) -> list[str]:
        return self.plan.facts["metadata_columns"]

    # ---------------------------------------------------------------- one unit

    def process(self, unit: Unit, loaded: Iterable[Loaded], receipt: Receipt) -> Finish:
        state = _UnitState()
        split_before = self.extractor.split_batches
        seconds = dict.fromkeys(("read", "decode", "prepare", "wait_decode", "compute", "wait_compute", "wait_write", "write"), 0.0)
        receipt.seconds = seconds
        receipt.worker |= {"decode_threads": self.decode_threads, "compute_threads": self.compute_threads}
        part = f"dense/{plate_folder(unit.plate)}part-{unit.id}{self.plan.suffix}.zarr"
        puts: list[Future] = []

        def put(key: str, data: bytes | memoryview) -> None:
            began = time.monotonic()
            if len(puts) >= PUTS_IN_FLIGHT:  # bounds the shards held in memory
                puts[-PUTS_IN_FLIGHT].result()
            puts.append(self.put_later(key, data))
            seconds["wait_write"] += time.monotonic() - began

        dense = DenseWriter(part, put, dtype=self.job.dense_dtype if self.dense_columns else "float16",
                            attributes={"dinoray": self.plan.facts["described"]})
        batches = Gathering(
            self._compute, self.extractor.extract, full=lambda crop: self.extractor.micro_batch(*crop.pixels.shape[1:]),
            take=lambda owners, result: self._fill(state, owners, result, dense, part), seconds=seconds)
        entries = iter(loaded)
        for position in range(len(unit.items)):
            began = time.monotonic()
            entry = next(entries)
            seconds["wait_decode"] += time.monotonic() - began
            if entry.error is not None:
                state.bad[position] = entry.error
                continue
            prepared: Prepared = entry.value
            receipt.bytes_read += prepared.num_bytes
            rows = state.rows[position] = []
            try:
                for number, row in enumerate(prepared.rows):
                    rows.append(row.values)
                    batches.add((position, number), row.crop)
                    row.crop = None
            except ItemError as error:  # of rows that are made as they are read
                state.bad[position] = error
            for stage in ("read", "decode", "prepare"):
                seconds[stage] += getattr(prepared, f"{stage}_s")
        batches.finish()
        receipt.numerics = used_numerics(self.extractor.device, self.numerics, degraded=self.extractor.split_batches > split_before)
        if self.on_cuda:
            receipt.memory["device_peak"] = torch.cuda.max_memory_allocated()

        def finish() -> None:
            began = time.monotonic()
            dense.close()
            self._finish(unit, state, put, receipt)
            receipt.objects[:0] = [future.result() for future in puts]
            seconds["write"] = time.monotonic() - began

        return finish

    def _fill(self, state: _UnitState, owners: Sequence[tuple[int, int]], result: dict[str, np.ndarray] | ItemError,
              dense: DenseWriter, part: str) -> None:
        """Put a batch's features into its rows."""
        self.beats += 1
        for i, (position, number) in enumerate(owners):
            if isinstance(result, ItemError):
                state.bad[position] = result
            if position in state.bad:
                continue
            row = state.rows[position][number]
            try:
                for name in self.vector_columns:
                    row[name] = as_vector_dtype(result[name][i], self.job.vector_dtype)
                for name, layer in self.dense_columns.items():
                    array, index = dense.add(as_vector_dtype(result[name][i], self.job.dense_dtype), layer)
                    column, index_column = dense_columns(name)
                    row[column], row[index_column] = f"{part}/{array}", index
            except ItemError as error:
                state.bad[position] = error

    def _finish(self, unit: Unit, state: _UnitState, put: Any, receipt: Receipt) -> None:
        good = [position for position in sorted(state.rows) if position not in state.bad]
        rows = [row for position in good for row in state.rows[position]]
        if rows:
            columns = {f.name: ([row[f.name] for row in rows] if not pa.types.is_fixed_size_list(f.type)
                                else np.stack([row[f.name] for row in rows])) for f in self.schema}
            put(f"features/{plate_folder(unit.plate)}part-{unit.id}{self.plan.suffix}.parquet", write_table(columns, self.schema))
        receipt.without_objects = [unit.items[position].item_id for position in good if not state.rows[position]]
        receipt.rows, receipt.row_items = len(rows), len(good) - len(receipt.without_objects)
        quarantine(self.ledger, unit, state.bad, receipt)


def for_torch(pixels: np.ndarray) -> np.ndarray:
    """Contiguous pixels in a dtype that torch takes; whatever float32 cannot hold was scaled before."""
    if pixels.dtype in (np.uint8, np.uint16, np.float32):
        return np.ascontiguousarray(pixels)
    return np.ascontiguousarray(pixels.astype(np.float32))
