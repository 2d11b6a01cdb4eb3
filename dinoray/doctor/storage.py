"""Checks of what a run reads and writes: the guarantees of the store behind --out, and one image of --source."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from dinoray.doctor.findings import Finding, size
from dinoray.doctor.machine import GOOD_DISK, LEAST_DISK
from dinoray.errors import DinorayError

SLOW_S = 1.0
"""A put or get of a small object that takes longer makes small units wait for the store."""


def check_output(url: str, probe: Callable[[str], Any] | None = None) -> Iterator[Finding]:
    """What the store behind `url` guarantees, by trying it (`dinoray.io.probe`: writes and removes scratch objects)."""
    if probe is None:
        from dinoray.io.probe import probe_storage as probe
    try:
        facts = probe(url)
    except DinorayError as error:
        yield _failed("output", error)
        return
    if not facts.atomic_put:
        yield Finding("fail", "output", "a reader can see half of an object that is being written",
                      "write to a local disk or an object store, then copy")
    if not facts.read_after_write:
        yield Finding("fail", "output", "what was written cannot be read back at once",
                      "use a store that is consistent: receipts are looked up right after they are written")
    if not facts.list_after_write:
        yield Finding("warn", "output", "a listing lags behind what was written",
                      "wait a minute between a stop and its resume; units may be computed twice otherwise")
    if not facts.put_if_absent:
        yield Finding("warn", "output", "no put-if-absent: two drivers on one output cannot be kept apart",
                      "make sure that only one job at a time runs on an --out")
    if facts.network_file_system:
        yield Finding("warn", "output", f"a network file system ({facts.file_system})", "expect slow small writes; where you "
                      "can, use the file server's object store or a local disk")
    if facts.free_bytes is not None and facts.free_bytes < GOOD_DISK:
        yield Finding("fail" if facts.free_bytes < LEAST_DISK else "warn", "output", f"{size(facts.free_bytes)} free",
                      "make room, or choose another --out")
    if max(facts.put_s, facts.get_s) > SLOW_S:
        yield Finding("warn", "output", f"slow: put {facts.put_s:.2f} s, get {facts.get_s:.2f} s",
                      "run in the region of the bucket, or use larger units (--unit-items)")
    free = "" if facts.free_bytes is None else f", {size(facts.free_bytes)} free"
    yield Finding("ok", "output", f"written, read back, listed and removed at {url}: put {facts.put_s * 1e3:.0f} ms, "
                  f"get {facts.get_s * 1e3:.0f} ms{free}")


def check_source(url: str) -> Finding:
    """List `url` as a job would, and read and decode its first image."""
    from dinoray.io.images import load_item
    from dinoray.io.sources import list_items

    try:
        began = time.perf_counter()
        item = next(iter(list_items([url], limit=1).items))
        listed = time.perf_counter() - began
        loaded = load_item(item)
    except DinorayError as error:
        return _failed("source", error)
    c, y, x = loaded.image.pixels.shape
    return Finding("ok", "source", f"{item.item_id}: {c} channels of {y} x {x} {loaded.image.pixels.dtype}, "
                   f"{size(loaded.num_bytes)}; listed in {listed:.2f} s, read in {loaded.read_s:.2f} s, "
                   f"decoded in {loaded.decode_s:.2f} s")


def _failed(subject: str, error: DinorayError) -> Finding:
    where = f" [{error.where}]" if error.where else ""
    return Finding("fail", subject, f"{error.what}{where}", error.todo or "mend this, then try again")
