"""Units of a volume -> tokens of planes, or the fused features made of them. One slab at a time in memory, one being read.

A batch is always the same windows of the same target planes, whatever the unit (dinoray.io.volume_grid), and a shard
is written whole by the one slab that covers it: outputs are equal byte for byte however the volume is cut into units.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch

from dinoray.config import ExtractVolumeJob
from dinoray.errors import ItemError, OutputDamaged
from dinoray.generations import generations, quarantined_now
from dinoray.io.fusion import fuse_box
from dinoray.io.items import Item
from dinoray.io.tables import as_vector_dtype
from dinoray.io.volume_arrays import encode_shard, shard_key, shards_of
from dinoray.io.volume_grid import ArraySpec, Shape, VolumeGrid
from dinoray.io.volumes import Volume
from dinoray.io.windows import TokenGrid
from dinoray.io.zarr_reading import open_array
from dinoray.ledger import Ledger, Receipt, StoredObject
from dinoray.memory.allocator import give_back, share_arenas
from dinoray.memory.meter import reset_rss_peak, rss, rss_peak
from dinoray.runners.base import READ_AHEAD_PER_THREAD, Finish, Loaded, UnitRunner
from dinoray.runners.compute import ComputePool
from dinoray.runners.numerics import device_kind
from dinoray.runners.volume_slabs import PreparedSlab, above, inside, read_slab
from dinoray.slabs import Slab, UnitSizes, array_of, shard_keys, tokens_needed
from dinoray.units import Plan, Unit
from dinoray.vision.backbone import Backbone
from dinoray.vision.extractor import Crop, Extractor, column_names
from dinoray.volume_inputs import open_mask, threshold
from dinoray.volume_planning import stages_of

MOST_READERS = 4
"""Threads that read slabs, at most: each holds one."""
SHARDS_IN_FLIGHT = 3
"""Shards that are being encoded or stored while the next ones are cut."""


@dataclass
class FusedSlab:
    """`values` float32 [D, z, y, x], NaN where `missing` (bool [1, z, y, x]); `error`: why, when it is not background."""

    values: np.ndarray
    missing: np.ndarray
    error: ItemError | None = None


class VolumeFeatureRunner(UnitRunner):
    """Unit of slabs -> receipt. Holds one backbone and one opened volume for the life of the actor."""

    point = "volume"

    def __init__(self, job: ExtractVolumeJob, plan: Plan, ledger: Ledger, backbone: Backbone, *, volume: Volume,
                 decode_threads: int, compute_threads: int):
        self.grid = VolumeGrid.read(plan.facts["grid"])
        self.job, self.volume, self.mask = job, volume, open_mask(job, volume)
        share_arenas()  # before any thread begins
        # the slabs ahead get what a slab in work leaves of the budget
        self._found: set[str] = set()
        """Shards of tokens that are there, or left out."""
        self._stages = stages_of(job, self.grid, UnitSizes(**plan.facts["unit_sizes"]), volume, self.mask,
                                 threads=compute_threads)
        super().__init__(plan, ledger, decode_threads=min(decode_threads, MOST_READERS),
                         prefetch_bytes=max(1, job.memory_bytes - self._stages.smallest))
        self.numerics = plan.facts["numerics"]
        layers = None if job.layer is None else (job.layer,)
        self.column = column_names(("patches",), layers)[0][0]
        self.extractor = Extractor(backbone, features=("patches",), layers=layers, token_budget=self.numerics["token_budget"])
        low, high = plan.facts["limits"]
        self.low, self.high = np.array([low], np.float32), np.array([high], np.float32)
        self._compute = ComputePool(self.extractor.device, compute_threads)
        self.on_cuda, self.compute_threads = self._compute.on_cuda, self._compute.threads
        give_back()  # what loading left free would be counted as the model's
        self._model_bytes = rss()
        reset_rss_peak()

    def close(self) -> None:
        super().close()
        self._compute.close()
        self.volume.close()

    def cost(self, item: Item) -> int:
        return self._stages.of(Slab.read(item.item_id).array).read

    # ---------------------------------------------------------------- decode threads

    def load(self, item: Item) -> PreparedSlab | FusedSlab:
        slab = Slab.read(item.item_id)
        if slab.array == "fused":
            return self._fuse(slab)
        level = threshold(self.job)
        foreground = above(level, self.grid.micro_batch) if level is not None else \
            inside(self.mask, self.grid, slab) if self.mask is not None else None
        return read_slab(self.volume, self.grid, slab, self.job.slice_sampling, per_slice=self.job.scaling == "slice",
                         foreground=foreground)

    def _fuse(self, slab: Slab) -> FusedSlab:
        """Fused features of a slab. Raises ItemError `missing_tokens` when there is none, OutputDamaged."""
        error = None
        for name in self.grid.planes:
            start, stop = tokens_needed(self.grid.plane(name), slab)
            for bad in self._quarantined:
                if bad.array == name and all(a < d and c < b for a, b, c, d in zip(start, stop, bad.start, bad.stop, strict=True)):
                    error = ItemError("missing_tokens", f"tokens of {bad.id} are needed, which is quarantined",
                                      where=self.ledger.store.url, todo="`dinoray retry` tries both again")
            self._check_stored(array_of(self.grid, name), start, stop)
        values = fuse_box(self._readers, self.grid, slab.start, slab.stop)
        missing = np.isnan(values[:1])  # all features or none
        if error is not None and missing.all():
            raise error
        return FusedSlab(values, missing, error if missing.any() else None)

    def _check_stored(self, spec: ArraySpec, start: Shape, stop: Shape) -> None:
        """An absent shard reads as NaN. Raises OutputDamaged for one that is absent though its receipt says it is stored."""
        store = self.ledger.store
        for place in product(*(range(a // s, -(-b // s)) for a, b, s in zip(start, stop, spec.shards, strict=True))):
            key = shard_key(spec, place)  # type: ignore[arg-type]
            if key in self._found:
                continue
            if not store.exists(key) and key not in self._absent:
                raise OutputDamaged("a shard of tokens is gone", where=f"{store.url}/{key}",
                                    todo="delete the receipt of its unit and run the same command again: it is made anew")
            self._found.add(key)

    @cached_property
    def _absent(self) -> set[str]:
        """Shards that need not be there: background, by the receipts, and those of slabs that are quarantined."""
        found = {key for slab in self._quarantined for key in shard_keys(self.grid, slab)}
        for part in generations(self.ledger.store):
            for receipt in part.ledger.receipts(sorted(part.ledger.done() & set(part.plan.unit_ids))):
                found.update(receipt.empty)
        return found

    @cached_property
    def _quarantined(self) -> list[Slab]:
        """The slabs of planes that lack tokens: all planes are done when the first fused slab is read."""
        rows = quarantined_now(generations(self.ledger.store)).to_pylist()
        return [slab for row in rows if (slab := Slab.read(row["item_id"])).array != "fused"]

    @cached_property
    def _readers(self) -> dict[str, Any]:
        return {name: open_array(self.ledger.store, self.grid.plane(name).array).read for name in self.grid.planes}

    # ---------------------------------------------------------------- one unit

    def process(self, unit: Unit, loaded: Iterable[Loaded], receipt: Receipt) -> Finish:
        split_before = self.extractor.split_batches
        seconds = dict.fromkeys(("read", "prepare", "wait_decode", "compute", "wait_compute", "wait_write", "write"), 0.0)
        receipt.seconds = seconds
        receipt.worker |= {"decode_threads": self.decode_threads, "compute_threads": self.compute_threads}
        shards: deque[Future[StoredObject]] = deque()
        stored: list[StoredObject] = []
        bad: dict[int, ItemError] = {}
        entries = iter(loaded)
        for position, item in enumerate(unit.items):
            began = time.monotonic()
            entry = next(entries)
            seconds["wait_decode"] += time.monotonic() - began
            if entry.error is not None:
                bad[position] = entry.error
                continue
            slab, value = Slab.read(item.item_id), entry.value
            entry.value = None  # the pixels are the largest thing here
            try:
                if isinstance(value, PreparedSlab):
                    receipt.bytes_read += value.num_bytes
                    seconds["read"] += value.read_s
                    seconds["prepare"] += value.prepare_s
                    tokens = self._tokens(value, seconds)
                else:
                    tokens = _cast(value.values, value.missing, self.job.dense_dtype)
                lacking = value.error
            except ItemError as error:
                bad[position] = error
                continue
            finally:
                del value
            if lacking is not None:  # quarantined, but what it has is stored
                bad[position] = lacking
            receipt.row_items += lacking is None
            self._put_slab(slab, tokens, receipt if lacking is None else None, shards, stored, seconds)
            del tokens
        receipt.numerics = self._used_numerics(degraded=self.extractor.split_batches > split_before)
        most_ahead = READ_AHEAD_PER_THREAD * self.decode_threads
        stage = self._stages.of(Slab.read(unit.items[0].item_id).array)
        receipt.memory = {"predicted": stage.predicted(self.job.memory_bytes, self.decode_threads, most_ahead),
                          "model": self._model_bytes}
        if self.on_cuda:
            receipt.memory["device_peak"] = torch.cuda.max_memory_allocated()

        def finish() -> None:
            began = time.monotonic()
            stored.extend(future.result() for future in shards)
            receipt.objects = stored
            receipt.quarantined = len(bad)
            if bad:
                table = []
                for position, error in sorted(bad.items()):
                    receipt.reasons[error.reason] = receipt.reasons.get(error.reason, 0) + 1
                    table.append({"item_id": unit.items[position].item_id, "uri": self.volume.ref.uri, "reason": error.reason,
                                  "message": str(error)})
                receipt.objects.append(self.ledger.put_quarantine(unit.id, table))
            receipt.memory["above_model"] = max(0, rss_peak() - self._model_bytes)
            give_back()
            seconds["write"] += time.monotonic() - began

        return finish

    def _tokens(self, slab: PreparedSlab, seconds: dict[str, float]) -> np.ndarray:
        """The tokens [D, z, y, x] of a slab in the stored dtype, NaN where they were skipped."""
        found = TokenGrid(slab.windows, slab.num_planes, self.grid.dim)
        for window, first in (*slab.skipped, *slab.lost):
            found.skip(window, first, self.grid.micro_batch)
        running: deque[tuple[Any, int, Future]] = deque()

        def collect() -> None:
            self.beats += 1
            window, first, future = running.popleft()
            began = time.monotonic()
            maps, compute_s = future.result()
            seconds["wait_compute"] += time.monotonic() - began
            seconds["compute"] += compute_s
            if isinstance(maps, ItemError):
                raise maps
            found.add(window, first, maps[:slab.num_planes - first])

        try:
            for window, first in slab.batches:
                while len(running) > self.compute_threads:  # one batch ready behind each running one
                    collect()
                running.append((window, first, self._compute.submit(self._timed_extract, self._crops(slab, window, first))))
            while running:
                collect()
        finally:
            for *_, future in running:
                future.cancel()
        return found.finished(lambda tokens, missing: _cast(tokens, missing[..., None], self.job.dense_dtype))

    def _crops(self, slab: PreparedSlab, window: Any, first: int) -> list[Crop]:
        """The window on `micro_batch` target planes; behind the volume's last plane that one again."""
        height, width = slab.windows.size_px
        part = slab.pixels[:, window.y:window.y + height, window.x:window.x + width]
        planes = (min(first + i, slab.num_planes - 1) for i in range(self.grid.micro_batch))
        return [Crop(part[k][None], self.low, self.high, "repeat") for k in planes]

    def _timed_extract(self, crops: list[Crop]) -> tuple[np.ndarray | ItemError, float]:
        began = time.monotonic()
        try:
            return self.extractor.extract(crops)[self.column], time.monotonic() - began
        except ItemError as error:  # one window is too large for the device: the slab is at fault, not the run
            return error, time.monotonic() - began

    def _put_slab(self, slab: Slab, tokens: np.ndarray, receipt: Receipt | None, shards: deque[Future[StoredObject]],
                  stored: list[StoredObject], seconds: dict[str, float]) -> None:
        """Hand the slab's shards to the writers; those without a single value are not stored. `receipt` counts the
        tokens; None for a slab that is quarantined: a retry will count them."""
        spec = array_of(self.grid, slab.array)
        for place, start, stop in shards_of(spec, slab.start, slab.stop):
            values = tokens[(slice(None), *(slice(a - o, b - o) for a, b, o in zip(start, stop, slab.start, strict=True)))]
            known = int(np.count_nonzero(~np.isnan(values[0])))
            if receipt is not None:
                receipt.rows += known
                receipt.empty += [] if known else [shard_key(spec, place)]
            if not known:
                continue
            began = time.monotonic()
            while len(shards) >= SHARDS_IN_FLIGHT:
                stored.append(shards.popleft().result())
                self.beats += 1
            shards.append(self._putter.submit(copy_context().run, self._put_shard, spec, place, values))
            seconds["wait_write"] += time.monotonic() - began

    def _put_shard(self, spec: ArraySpec, place: tuple[int, int, int], values: np.ndarray) -> StoredObject:
        return self.ledger.put_object(shard_key(spec, place), encode_shard(spec, values))

    def _used_numerics(self, *, degraded: bool) -> dict[str, Any]:
        used = device_kind(self.extractor.device)
        return {"device_kind": used, "precision": self.numerics["precision"], "micro_batch": self.grid.micro_batch,
                "degraded": degraded or self.numerics["device_kind"] not in (used, "cuda")}


def _cast(tokens: np.ndarray, missing: np.ndarray, dtype: str) -> np.ndarray:
    """Features in the stored dtype, checked; NaN where `missing` (which has 1 on the feature axis). `tokens` is changed: a
    copy would be as large as all that a slab holds.

    Raises ItemError `nonfinite`, `overflow`.
    """
    if not missing.any():
        return as_vector_dtype(tokens, dtype)
    np.copyto(tokens, np.float32(0), where=missing)
    cast = as_vector_dtype(tokens, dtype)
    np.copyto(cast, np.array(np.nan, cast.dtype), where=missing)
    return cast
