"""Cell instances of images: one unit of images -> a mask per image, a table of cells, a table of images.

The decode threads read, choose the channel, scale intensities, resample and cut windows. Windows of all images of a unit
are gathered in plan order into micro-batches (dinoray.runners.gathering). When an image has all its maps, threads of
their own blend, flood, measure and store it, while the next images are computed; rows stand in plan order.

An image whose cells' size nobody tells is segmented once more before, to estimate it: in the compute threads, while
images before it in the plan are still on their way, so that its windows take their place in the plan's order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from dinoray.config import SegmentCellsJob
from dinoray.errors import ItemError
from dinoray.generations import generations
from dinoray.io.cell_tables import image_table, join_cells
from dinoray.io.images import Limits, load_item
from dinoray.io.items import Item
from dinoray.io.mask_files import SUFFIXES, mask_key
from dinoray.io.object_names import item_path, plate_folder
from dinoray.io.tables import encode_table
from dinoray.ledger import Ledger, Receipt, StoredObject
from dinoray.runners.base import Finish, Loaded, UnitRunner
from dinoray.runners.compute import ComputePool
from dinoray.runners.fields import Field, Segmented, choose, measure
from dinoray.runners.gathering import Gathering
from dinoray.runners.large_fields import middle, segment_large
from dinoray.runners.numerics import used_numerics
from dinoray.runners.quarantining import quarantine
from dinoray.units import Plan, Unit
from dinoray.vision import intensity
from dinoray.vision.cell_scale import SEEN_PX, Scale, cell_scale
from dinoray.vision.distance_model import DistanceMapModel, SegmenterConfig
from dinoray.vision.quality import check_pixels
from dinoray.vision.resampling2d import resample, scaled_shape
from dinoray.vision.segmenter import Segmenter

ESTIMATED_AHEAD = 2
"""Images per compute thread that wait, in plan order, for the estimate of a scale."""
FINISHING = 2
"""Images per thread that wait for, or are in, their watershed."""

PLANES_PER_DECODED = 3
"""Bytes that an image read ahead holds as windows (three float32 planes), and itself, per byte decoded."""


@dataclass(frozen=True)
class Window:
    """One window float32 [3, wy, wx] on its way to a micro-batch."""

    pixels: np.ndarray

    @property
    def key(self) -> tuple:
        return self.pixels.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes


@dataclass
class _State:
    """What a unit gathers while its items pass."""

    unit: Unit
    ledger: Ledger
    seconds: dict[str, float]
    bad: dict[int, ItemError] = field(default_factory=dict)
    arriving: deque[tuple[int, Field, Future[float] | None]] = field(default_factory=deque)
    """Images whose windows are not in the gathering yet, in plan order, with the estimate that they wait for."""
    finishing: deque[tuple[int, Future[Segmented]]] = field(default_factory=deque)
    done: dict[int, Segmented] = field(default_factory=dict)


class CellMaskRunner(UnitRunner):
    """Unit of images -> receipt. Holds one model for the life of the actor."""

    finishes_items = True

    def __init__(self, job: SegmentCellsJob, plan: Plan, ledger: Ledger, model: DistanceMapModel, config: SegmenterConfig, *,
                 scaling: intensity.Scaling | None, decode_threads: int, compute_threads: int):
        super().__init__(plan, ledger, decode_threads=decode_threads, prefetch_bytes=job.prefetch_bytes)
        self.job, self.config, self.scaling = job, config, scaling
        self.limits = Limits(max_pixels=job.max_pixels, max_bytes=job.max_file_bytes, max_file_bytes=job.max_file_bytes)
        self.numerics, self.facts = plan.facts["numerics"], plan.facts["described"]
        self.segmenter = Segmenter(model, config, token_budget=self.numerics["token_budget"], overlap_px=job.overlap_px,
                                   peak=job.peak, fill=job.fill, markers=job.markers,
                                   marker_height=job.marker_height, min_area_px=job.min_area_px)
        self._compute = ComputePool(self.segmenter.device, compute_threads)
        self._cell_threads = max(compute_threads, decode_threads)
        self._cells = ThreadPoolExecutor(self._cell_threads, thread_name_prefix="cells")

    def close(self) -> None:
        super().close()
        self._cells.shutdown(wait=True, cancel_futures=True)
        self._compute.close()

    # ---------------------------------------------------------------- decode threads

    def cost(self, item: Item) -> int:
        return PLANES_PER_DECODED * super().cost(item)

    def load(self, item: Item) -> Field:
        loaded = load_item(item, self.limits, z_projection=self.job.z_projection)
        began = time.monotonic()
        check_pixels(loaded.image.pixels)
        found = choose(item, loaded, self.job, self.config.scaling_percents, self.scaling)
        if self._must_estimate(found):
            if not self._fits(found.shape):
                found.fix_limits()
            found.planes = found.seen(None if self._fits(found.shape) else middle(found.shape, SEEN_PX))
        else:
            found.scale = self._scale(found, np.empty((3, 0, 0), np.float32))
            self._cut(found)
        found.seconds["prepare"] = time.monotonic() - began
        return found

    def _must_estimate(self, found: Field) -> bool:
        """Whether neither the user nor the file tells how large the cells are for the model."""
        known = self.job.diameter_px is not None or found.pixel_size_um is not None and self.config.pixel_size_um is not None
        return not known and self.config.median_diameter_px is not None

    def _scale(self, found: Field, seen: np.ndarray) -> Scale:
        return cell_scale(seen, self.config, self.segmenter.look, pixel_size_um=found.pixel_size_um,
                          diameter_px=self.job.diameter_px)

    def _fits(self, shape: tuple[int, int]) -> bool:
        """Whether an image of (Y, X) px, as it is or at the model's scale, is computed as one map."""
        return shape[0] * shape[1] <= self.job.block_px**2

    def _cut(self, found: Field) -> None:
        """Resample to the model's scale, and plan the windows, unless the image must be segmented in blocks."""
        if self._fits(found.shape) and self._fits(scaled_shape(found.shape, found.scale.factor)):
            seen = found.seen() if found.planes is None else found.planes
            found.windowed = self.segmenter.plan_image(resample(seen, found.scale.factor))
        found.planes = None

    # ---------------------------------------------------------------- one unit

    def process(self, unit: Unit, loaded: Iterable[Loaded], receipt: Receipt) -> Finish:
        seconds = dict.fromkeys(("read", "decode", "prepare", "wait_decode", "compute", "wait_compute", "cells", "wait_cells",
                                 "write"), 0.0)
        state = _State(unit, self.ledger, seconds)
        split_before = self.segmenter.split_batches
        receipt.seconds = seconds
        receipt.worker |= {"decode_threads": self.decode_threads, "compute_threads": self._compute.threads}
        windows = Gathering(self._compute, self._predict, full=lambda window: self.segmenter.micro_batch(*window.key),
                            take=partial(self._take, state), seconds=seconds)
        entries = iter(loaded)
        for position in range(len(unit.items)):
            began = time.monotonic()
            entry = next(entries)
            seconds["wait_decode"] += time.monotonic() - began
            if entry.error is not None:
                state.bad[position] = entry.error
                continue
            found: Field = entry.value
            receipt.bytes_read += found.num_bytes
            estimate = self._compute.submit(self._estimate, found) if found.scale is None else None
            state.arriving.append((position, found, estimate))
            self._admit(state, windows, ahead=ESTIMATED_AHEAD * self._compute.threads)
        self._admit(state, windows, ahead=0)
        windows.finish()
        receipt.numerics = used_numerics(self.segmenter.device, self.numerics,
                                         degraded=self.segmenter.split_batches > split_before)
        if self._compute.on_cuda:
            receipt.memory["device_peak"] = torch.cuda.max_memory_allocated()
        return partial(self._finish, state, receipt)

    def _admit(self, state: _State, windows: Gathering, *, ahead: int) -> None:
        """Give the windows of arrived images to the gathering, in plan order; `ahead` images may wait for their estimate."""
        while state.arriving and (state.arriving[0][2] is None or len(state.arriving) > ahead):
            position, found, estimate = state.arriving.popleft()
            try:
                if estimate is not None:
                    began = time.monotonic()
                    state.seconds["compute"] += estimate.result()
                    state.seconds["wait_compute"] += time.monotonic() - began
            except ItemError as error:
                state.bad[position] = error
                continue
            for stage, spent in found.seconds.items():
                state.seconds[stage] += spent
            if found.windowed is None:  # too large for one map: in blocks, and nothing beside it, for the memory's sake
                segment = partial(segment_large, found, self.segmenter, self._compute, self.job, self._beat)
                self._submit_cells(state, position, segment)
                while state.finishing:
                    self._collect(state)
                continue
            cut, found.windowed.windows[:] = list(found.windowed.windows), []  # windows live until they are computed
            found.expect(len(cut))
            for number, pixels in enumerate(cut):
                windows.add((position, found, number), Window(pixels))

    def _estimate(self, found: Field) -> float:
        """Estimate the scale of an image and cut it (compute threads); seconds. Raises ItemError."""
        began = time.monotonic()
        found.scale = self._scale(found, found.planes)
        self._cut(found)
        return time.monotonic() - began

    def _predict(self, windows: list[Window]) -> tuple[np.ndarray, np.ndarray | None]:
        return self.segmenter.predict([window.pixels for window in windows], tokens=self.job.cell_features)

    def _take(self, state: _State, owners: Sequence[tuple[int, Field, int]], result: Any) -> None:
        """Give a batch's maps to their images; an image that has all of them goes on to its cells."""
        self.beats += 1
        for i, (position, found, number) in enumerate(owners):
            if isinstance(result, ItemError):
                state.bad[position] = result
            if position in state.bad:
                continue
            maps, tokens = result
            # copies: a view would keep the whole batch alive as long as one window of it
            if found.put(number, maps[i].copy(), None if tokens is None else tokens[i].copy()):
                self._submit_cells(state, position, partial(self._segment, found))

    # ---------------------------------------------------------------- threads of the cells

    def _submit_cells(self, state: _State, position: int, segment: Callable[[], Segmented]) -> None:
        began = time.monotonic()
        while len(state.finishing) >= FINISHING * self._cell_threads:
            self._collect(state)
        state.seconds["wait_cells"] += time.monotonic() - began
        task = partial(self._segment_and_store, state, position, segment)
        state.finishing.append((position, self._cells.submit(copy_context().run, task)))  # retries count for the unit

    def _collect(self, state: _State) -> None:
        self.beats += 1
        position, future = state.finishing.popleft()
        try:
            state.done[position] = found = future.result()
        except ItemError as error:
            state.bad[position] = error
            return
        state.seconds["cells"] += found.seconds

    def _segment(self, found: Field) -> Segmented:
        """Blend, flood, measure one image."""
        distance = found.windowed.merge(found.maps)
        labels = self.segmenter.cells(distance, found.image.pixels.shape[1:])
        tokens = found.windowed.merge_tokens(found.tokens) if self.job.cell_features else None
        found.maps = found.tokens = None
        features = None if tokens is None else \
            lambda ids: self.segmenter.cell_features(tokens, labels, found.scale.factor, ids)
        return measure(found, labels, features, self.job)

    def _segment_and_store(self, state: _State, position: int, segment: Callable[[], Segmented]) -> Segmented:
        began = time.monotonic()
        item = state.unit.items[position]
        result = segment()
        key = mask_key(item_path(item.item_id), self.job.masks)
        result.image_row |= {"item_id": item.item_id, "mask": key, **self._metadata(item)}
        result.objects = [state.ledger.put_object(name, data) for name, data in result.mask_objects(key)]
        result.shared |= {"item_id": item.item_id, **self._metadata(item)}
        result.seconds = time.monotonic() - began
        return result

    def _metadata(self, item: Item) -> dict[str, str | None]:
        return {name: item.metadata.get(name) for name in self.plan.facts["metadata_columns"]}

    # ---------------------------------------------------------------- writer thread

    def _finish(self, state: _State, receipt: Receipt) -> None:
        while state.finishing:
            self._collect(state)
        began = time.monotonic()
        unit, done = state.unit, [state.done[position] for position in sorted(state.done) if position not in state.bad]
        if receipt.attempt > 1:
            self._remove_masks(state)
        objects: list[StoredObject] = [stored for each in done for stored in each.objects]
        if done:
            name = f"{plate_folder(unit.plate)}part-{unit.id}{self.plan.suffix}.parquet"
            cells = join_cells([each.cells() for each in done], self.facts)
            images = image_table([each.image_row for each in done], self.plan.facts["metadata_columns"], self.facts)
            for folder, table in (("cells", cells), ("images", images)):
                objects.append(state.ledger.put_object(f"{folder}/{name}", encode_table(table)))
            receipt.rows = cells.num_rows
        receipt.objects[:0] = objects
        counts = {each.shared["item_id"]: each.image_row["num_cells"] for each in done}
        receipt.without_objects = [item_id for item_id, count in counts.items() if not count]
        receipt.row_items = len(counts) - len(receipt.without_objects)
        self._note_scales(state, receipt)
        quarantine(state.ledger, unit, state.bad, receipt)
        state.seconds["write"] += time.monotonic() - began

    def _remove_masks(self, state: _State) -> None:
        """Remove what an earlier attempt stored for images that this one quarantines (they changed in between): no receipt
        would name it. What a later retry has committed for them stays."""
        masks = [mask_key(item_path(state.unit.items[position].item_id), self.job.masks) for position in state.bad]
        committed = self._committed_later(state.ledger) if masks else set()
        for key in masks:
            keys = [key] if key.endswith(SUFFIXES["tiff"]) else [name for name, _ in state.ledger.store.list(key)]
            for name in set(keys) - committed:
                state.ledger.store.delete(name)

    @staticmethod
    def _committed_later(ledger: Ledger) -> set[str]:
        """Keys of the objects that receipts of later generations name; earlier ones have no mask of an item retried here."""
        parts = generations(ledger.store)
        later = parts[[part.prefix for part in parts].index(ledger.prefix) + 1:]
        return {stored.key for part in later for receipt in part.ledger.receipts(sorted(part.ledger.done()))
                for stored in receipt.objects}

    def _note_scales(self, state: _State, receipt: Receipt) -> None:
        """The estimated factors, by scaling group, go into the receipt (null: too few cells for an estimate): the driver
        tells of them."""
        factors: dict[str, list[float | None]] = {}
        for position, result in sorted(state.done.items()):
            source, factor = result.image_row["scale_source"], result.image_row["scale"]
            tried = source == "estimated" or source == "unknown" and self.config.median_diameter_px is not None
            if tried and position not in state.bad:
                told = round(factor, 4) if source == "estimated" else None
                factors.setdefault(state.unit.items[position].group, []).append(told)
        if factors:
            receipt.numerics["estimated_scales"] = factors


