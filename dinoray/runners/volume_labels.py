"""Units of a segmented volume: probabilities from the model, and instances made of them block by block.

A window goes through the model by itself, on one thread, and the sums over windows are in the order of the lattice: outputs are
equal byte for byte however the volume is cut into units. A shard is written whole by the one unit that covers it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch

from dinoray.config.volume_segmentation import SegmentVolumeJob
from dinoray.errors import ItemError, OutputDamaged, SystemicError
from dinoray.generations import generations, quarantined_now
from dinoray.io.items import Item
from dinoray.io.prediction_grid import EDGES, FRAGMENTS, LABELS, MERGE, PROBABILITIES, PredictionGrid
from dinoray.io.volume_arrays import encode_shard, shard_key, shards_of
from dinoray.io.volume_grid import ArraySpec, Shape
from dinoray.io.zarr_reading import open_array
from dinoray.label_units import COUNTS, MERGE_KEY, OFFSETS_KEY, object_keys, table_key
from dinoray.ledger import Ledger, Receipt, StoredObject
from dinoray.memory.allocator import give_back, share_arenas
from dinoray.memory.meter import reset_rss_peak, rss, rss_peak
from dinoray.runners.base import Finish, Loaded, UnitRunner
from dinoray.runners.compute import ComputePool
from dinoray.runners.numerics import device_kind
from dinoray.runners.volume_blocks import block_edges, encoded, fragments_of, merge_blocks, relabelled, table, voxel_counts
from dinoray.runners.volume_windows import Layer, WindowReader
from dinoray.slabs import Slab
from dinoray.units import Plan, Unit
from dinoray.vision.fusion_checkpoint import FusionConfig
from dinoray.vision.fusion_model import FusionModel, VolumeCrop
from dinoray.vision.volume_blend import BlendedBox

SHARDS_IN_FLIGHT = 4
Objects = Iterator[tuple[str, bytes]]


class VolumeLabelRunner(UnitRunner):
    """Unit of one box -> receipt. Holds one model and one opened volume for the life of the actor."""

    point = "volume"

    def __init__(self, job: SegmentVolumeJob, plan: Plan, ledger: Ledger, model: FusionModel, config: FusionConfig, *,
                 reader: WindowReader, decode_threads: int, compute_threads: int):
        share_arenas()  # before any thread begins
        self.grid, self.job, self.model, self.config = PredictionGrid.read(plan.facts["grid"]), job, model, config
        self.reader, self.threshold = reader, plan.facts["threshold"]
        super().__init__(plan, ledger, decode_threads=decode_threads, prefetch_bytes=job.memory_bytes // 2)
        self.numerics = plan.facts["numerics"]
        self.device = next(model.unet.parameters()).device
        self._compute = ComputePool(self.device, compute_threads)
        self.compute_threads = self._compute.threads
        forecast = plan.facts["forecast"]
        self._component_bytes = forecast["component_bytes"]
        fit = (job.memory_bytes - forecast["unit_bytes"]) // max(1, forecast["window_bytes"]) + 1
        self._at_once = max(1, min(self.compute_threads + 1, fit))
        """Windows in work: one is ready behind each running one, as far as they fit."""
        self._layers = ThreadPoolExecutor(1, thread_name_prefix="layer")
        self._halved = False
        """Whether slices went through the backbone in smaller batches than planned: their low bits may differ."""
        give_back()  # what loading left free would be counted as the model's
        self._model_bytes = rss()
        reset_rss_peak()

    def close(self) -> None:
        super().close()
        self._layers.shutdown(wait=True, cancel_futures=True)
        self._compute.close()
        self.reader.close()

    def cost(self, item: Item) -> int:
        box = Slab.read(item.item_id)
        if box.array in (PROBABILITIES, MERGE):
            return self.prefetch_bytes  # nothing is read here, and the unit after the next must not be begun
        return int(np.prod(box.shape)) * (self._component_bytes if box.array == FRAGMENTS else 24)

    # ---------------------------------------------------------------- decode threads

    def load(self, item: Item) -> Any:
        """Fragments and edges are made here, several blocks at once. Raises OutputDamaged."""
        box = Slab.read(item.item_id)
        self._check_stored(box)
        if box.array == FRAGMENTS:
            before = [min(1, a) for a in box.start]
            low = [a - b for a, b in zip(box.start, before, strict=True)]
            values = self._affinities(*(n for pair in zip(low, box.stop, strict=True) for n in pair))
            after = [b < n for b, n in zip(box.stop, self.grid.shape, strict=True)]
            return fragments_of(values, before, after, self.threshold, self.config.offsets, self.job.instances)
        if box.array == EDGES:
            return block_edges(self.grid, box.start, box.stop, self._fragments, self._affinities,
                               self.threshold, self.job.instances)
        return None

    def _check_stored(self, box: Slab) -> None:
        """An absent shard reads as 0. Raises OutputDamaged for one that is absent though its unit is done."""
        wanted = {FRAGMENTS: self.grid.probabilities, EDGES: self.grid.fragments, LABELS: self.grid.fragments}.get(box.array)
        if wanted is None:
            return
        for place, _, _ in shards_of(wanted, box.start, box.stop):
            key = shard_key(wanted, place)
            if not self.ledger.store.exists(key) and key not in self._excused:
                raise OutputDamaged("a shard that a finished unit has written is gone", where=f"{self.ledger.store.url}/{key}",
                                    todo="delete the receipt of its unit and run the same command again: it is made anew")

    @cached_property
    def _excused(self) -> set[str]:
        """Shards of quarantined boxes: those that could not even be begun are absent."""
        rows = quarantined_now(generations(self.ledger.store)).to_pylist()
        facts = self.plan.facts
        return {key for row in rows for key in object_keys(self.grid, Slab.read(row["item_id"]), instances=facts["instances"],
                                                           probabilities=facts["probabilities"])}

    @cached_property
    def _fragments(self) -> Any:
        return open_array(self.ledger.store, self.grid.fragments).read

    def _affinities(self, *box: int) -> np.ndarray:
        values = self._stored_probabilities.read(*box)
        return values.astype(np.float32) / np.float32(255) if values.dtype == np.uint8 else values.astype(np.float32)

    @cached_property
    def _stored_probabilities(self) -> Any:
        return open_array(self.ledger.store, self.grid.probabilities)

    # ---------------------------------------------------------------- one unit

    def process(self, unit: Unit, loaded: Iterable[Loaded], receipt: Receipt) -> Finish:
        seconds = dict.fromkeys(("read", "compute", "wait_compute", "wait_decode", "wait_write", "write"), 0.0)
        receipt.seconds = seconds
        receipt.worker |= {"decode_threads": self.decode_threads, "compute_threads": self.compute_threads}
        receipt.numerics = {"device_kind": device_kind(self.device), "precision": self.numerics["precision"],
                            "degraded": self.numerics["device_kind"] not in (device_kind(self.device), "cuda")}
        putting: deque[Future[StoredObject]] = deque()
        stored: list[StoredObject] = []
        bad: dict[int, ItemError] = {}
        for position, entry in enumerate(loaded):
            box = Slab.read(entry.item.item_id)
            if entry.error is not None:
                if box.array != PROBABILITIES:  # labels everywhere depend on it: nothing to be set aside
                    raise SystemicError(f"{entry.item.item_id}: {entry.error.what}", where=entry.error.where,
                                        todo=entry.error.todo or "use smaller --block-voxels in a new --out, "
                                        "or a machine with more memory")
                bad[position] = entry.error
                continue
            value, entry.value = entry.value, None
            try:
                for key, data in self._made(box, value, receipt, seconds):
                    began = time.monotonic()
                    while len(putting) >= SHARDS_IN_FLIGHT:
                        stored.append(putting.popleft().result())
                    putting.append(self._putter.submit(copy_context().run, self.ledger.put_object, key, data))
                    seconds["wait_write"] += time.monotonic() - began
                    self.beats += 1
                receipt.row_items += 1
            except ItemError as error:
                bad[position] = error  # what it has is stored
        receipt.numerics["degraded"] |= self._halved
        receipt.memory = {"model": self._model_bytes}
        if self._compute.on_cuda:
            receipt.memory["device_peak"] = torch.cuda.max_memory_allocated()

        def finish() -> None:
            stored.extend(future.result() for future in putting)
            receipt.objects, receipt.quarantined = stored, len(bad)
            if bad:
                rows = []
                for position, error in sorted(bad.items()):
                    receipt.reasons[error.reason] = receipt.reasons.get(error.reason, 0) + 1
                    rows.append({"item_id": unit.items[position].item_id, "uri": self.reader.volume.ref.uri, "reason": error.reason,
                                 "message": str(error)})
                receipt.objects.append(self.ledger.put_quarantine(unit.id, rows))
            receipt.memory["above_model"] = max(0, rss_peak() - self._model_bytes)
            give_back()

        return finish

    def _made(self, box: Slab, value: Any, receipt: Receipt, seconds: dict[str, float]) -> Objects:
        """The objects of an item. Raises ItemError after those that could be made."""
        grid, store = self.grid, self.ledger.store
        if box.array == PROBABILITIES:
            yield from self._predicted(box, receipt, seconds)
        elif box.array == FRAGMENTS:
            yield from _shards(grid.fragments, box.start, box.stop, value[None])
            yield table_key(COUNTS, box.start), encoded(voxel_counts(value))
        elif box.array == EDGES:
            yield table_key(EDGES, box.start), encoded(value)
        elif box.array == MERGE:
            offsets, ids = merge_blocks(grid, store, self.job.min_voxels, self._beat)
            yield OFFSETS_KEY, encoded(offsets)
            yield MERGE_KEY, encoded(ids)
        else:
            fragments = self._fragments(*(n for pair in zip(box.start, box.stop, strict=True) for n in pair))[0]
            offsets, ids = self._merge
            block = self._block_number(box.start)
            labels = relabelled(fragments, ids[offsets[block]:offsets[block + 1]])
            receipt.rows += int(np.count_nonzero(labels))
            yield from _shards(grid.labels, box.start, box.stop, labels)

    @cached_property
    def _merge(self) -> tuple[np.ndarray, np.ndarray]:
        store = self.ledger.store
        return table(store, OFFSETS_KEY), table(store, MERGE_KEY)

    def _block_number(self, start: Shape) -> int:
        counts = [-(-n // b) for n, b in zip(self.grid.shape, self.grid.block, strict=True)]
        z, y, x = (a // b for a, b in zip(start, self.grid.block, strict=True))
        return (z * counts[1] + y) * counts[2] + x

    # ---------------------------------------------------------------- predictions

    def _predicted(self, box: Slab, receipt: Receipt, seconds: dict[str, float]) -> Objects:
        """Shards of a unit, row of shards by row of shards. Raises ItemError at the end when windows could not be read."""
        grid, blended = self.grid, BlendedBox(self.grid, box.start, box.stop)
        layers, rows, columns = (blended.places(axis) for axis in range(3))
        lost: list[ItemError] = []
        count = 0

        def read(z: int) -> tuple[Layer, float]:
            began = time.monotonic()
            return self.reader.layer(z, rows, columns), time.monotonic() - began

        ahead = self._layers.submit(copy_context().run, read, layers[0])
        for z in layers:
            began = time.monotonic()
            layer, read_s = ahead.result()
            seconds["wait_decode"] += time.monotonic() - began
            seconds["read"] += read_s
            receipt.bytes_read += 0 if layer.piece is None else layer.piece.values.nbytes
            if z + 1 in layers:
                ahead = self._layers.submit(copy_context().run, read, z + 1)
            for place, values in self._windows([(z, y, x) for y, x in product(rows, columns)], layer, seconds):
                count += 1
                if isinstance(values, ItemError):
                    lost.append(values)
                blended.add(place, None if isinstance(values, ItemError) else values)
            done = blended.complete_until(z)
            while blended.first < done:
                until = min(done, (blended.first // grid.shards[0] + 1) * grid.shards[0])
                if until % grid.shards[0] and until != box.stop[0]:
                    break
                first = blended.first
                probabilities, gone = blended.take(until)
                yield from self._emitted((first, *box.start[1:]), (until, *box.stop[1:]), probabilities, gone, receipt)
        if lost:
            raise ItemError(lost[0].reason, f"{len(lost)} of {count} windows could not be predicted: {lost[0].what}",
                            where=lost[0].where, todo=lost[0].todo)

    def _windows(self, places: list[Shape], layer: Layer,
                 seconds: dict[str, float]) -> Iterator[tuple[Shape, np.ndarray | ItemError]]:
        """Predictions in the order of `places`, several at once."""
        running: deque[tuple[Shape, Future[tuple[np.ndarray | ItemError, float]]]] = deque()

        def collect() -> tuple[Shape, np.ndarray | ItemError]:
            place, future = running.popleft()
            began = time.monotonic()
            values, compute_s = future.result()
            seconds["wait_compute"] += time.monotonic() - began
            seconds["compute"] += compute_s
            self.beats += 1
            return place, values

        try:
            for place in places:
                if len(running) >= self._at_once:
                    yield collect()
                running.append((place, self._compute.submit(copy_context().run, self._predict, place, layer)))
            while running:
                yield collect()
        finally:
            for _, future in running:
                future.cancel()

    def _predict(self, place: Shape, layer: Layer) -> tuple[np.ndarray | ItemError, float]:
        """Probabilities float32 [outputs, z, y, x] of the voxels that the lattice gives to a window."""
        began = time.monotonic()
        try:
            crop = self.reader.crop(place, layer)
        except ItemError as error:
            return error, time.monotonic() - began
        with torch.inference_mode():
            logits = self._logits(crop)
            found = torch.sigmoid(logits) if self.config.target == "affinities" else torch.softmax(logits, dim=1)
        values = found[0].float().cpu().numpy()
        seen = self.grid.seen(place)[0]
        own = []
        for axis, w in enumerate(place):
            lattice = self.grid.lattice(axis)
            low, high = max(0, lattice.start(w)), min(lattice.tokens, lattice.start(w) + lattice.window)
            own.append(slice(low - seen[axis], high - seen[axis]))
        return values[(slice(None), *own)], time.monotonic() - began

    def _logits(self, crop: VolumeCrop) -> torch.Tensor:
        """The model's on one window. Where the device is full, fewer slices go through the backbone at once; raises SystemicError
        where that does not help."""
        while True:
            slices, problem = self.model.slice_batch, ""
            try:
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.numerics["precision"] == "bfloat16"):
                    return self.model([crop])
            except torch.OutOfMemoryError as error:
                problem = str(error).splitlines()[0]
            # outside of the except frame: the tensors of what failed are gone by now
            if self.model.backbone is None or slices == 1:
                raise SystemicError(f"the device is too small for one window: {problem}",
                                    todo="smaller --window-voxels in a new --out, or a larger device")
            self.model.slice_batch = min(self.model.slice_batch, slices // 2)
            self._halved = True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _emitted(self, start: Shape, stop: Shape, values: np.ndarray, lost: np.ndarray, receipt: Receipt) -> Objects:
        """The shards of a box of probabilities: of the probabilities, where they are stored, and of classes."""
        grid = self.grid
        values[:, lost] = 0
        if self.config.target == "affinities" or self.job.probabilities:
            if grid.dtype == "uint8":
                cast = np.rint(np.clip(values, 0, 1) * np.float32(255)).astype(np.uint8)
            else:
                cast = values.astype(grid.dtype)
            yield from _shards(grid.probabilities, start, stop, cast)
        if self.config.target == "classes":
            labels = values.argmax(axis=0).astype(grid.labels_dtype)
            receipt.rows += labels.size - int(np.count_nonzero(lost))
            yield from _shards(grid.labels, start, stop, labels)


def _shards(spec: ArraySpec, start: Shape, stop: Shape, values: np.ndarray) -> Objects:
    """(key, bytes) of the shards of the box [start, stop), of `values` of it."""
    for place, low, high in shards_of(spec, start, stop):
        part = values[(..., *(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True)))]
        yield shard_key(spec, place), encode_shard(spec, np.ascontiguousarray(part))
