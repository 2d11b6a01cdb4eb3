"""Helpers of the tests: run jobs in this process or by the real command, and compare outputs byte for byte."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq
import pytest

from dinoray.config import ExtractCellsJob, ExtractImagesJob
from dinoray.extraction import extract_images
from dinoray.io.items import FileRef, Item
from dinoray.io.stores import Store, open_store
from dinoray.session import Outcome
from dinoray.units import Plan, PlanWriter, item_digest, item_row
from dinoray.verification import DATA_FOLDERS, TABLES, open_run, verify_deep
from dinoray.vision.backbone import Backbone
from dinoray.vision.variants import BackboneConfig

ALL_FEATURES = ("cls", "patch_mean", "patches")


def run(sources: Path | str | list[str], out: Path, **fields: object) -> Outcome:
    """Run a job in this process (without Ray unless no_ray=False) with the small random model."""
    values = {"model": "vitt16", "weights": "random", "no_ray": True, **fields}
    sources = [str(sources)] if isinstance(sources, str | Path) else sources
    return extract_images(ExtractImagesJob(sources=tuple(sources), out=str(out), **values), say=lambda line: None)


def command(sources: Path, out: Path, *flags: str) -> list[str]:
    """The real command line of the same job."""
    return [sys.executable, "-m", "dinoray.cli", "extract", "images", str(sources), "--out", str(out),
            "--model", "vitt16", "--weights", "random", *flags]


def environment() -> dict[str, str]:
    """The environment of a command that may start Ray."""
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def data_objects(out: Path | str) -> dict[str, bytes]:
    """Every object below the folders of data (features/, masks/, ...), temporary ones included."""
    store = open_store(str(out))
    return {key: store.get(key) for folder in DATA_FOLDERS for key, _ in store.list(folder)}


def check_whole(out: Path) -> None:
    """Everything that must hold of a finished output, from its files alone."""
    store, plan, ledger = open_run(str(out))
    verify_deep(store)  # checksums, rows, planned = rows + quarantined, disjoint
    receipts = list(ledger.receipts(plan.unit_ids))
    named = {stored.key for receipt in receipts for stored in receipt.objects}
    assert set(data_objects(out)) == {key for key in named if key.startswith(tuple(f"{folder}/" for folder in DATA_FOLDERS))}
    assert not list(store.list("_dinoray/tmp"))
    planned = Counter(item.item_id for unit in plan.units() for item in unit.items)
    rows = {item for key in named if key.startswith(TABLES)
            for item in pq.read_table(io.BytesIO(store.get(key)), columns=["item_id"])["item_id"].to_pylist()}
    bad = Counter(ledger.quarantine(receipts)["item_id"].to_pylist())
    empty = Counter(item for receipt in receipts for item in receipt.without_objects)
    assert Counter(rows) + bad + empty == planned
    assert not rows & set(bad)
    assert json.loads(store.get("_SUCCESS"))["units"] == len(plan)


def start_and_kill(argv: list[str], when: Callable[[], bool], *, timeout_s: float = 120) -> None:
    """Start a command and kill -9 it (and only it) as soon as `when()` holds; fails if it ends before."""
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + timeout_s
    try:
        while not when():
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def complete(argv: list[str], *, code: int = 0, timeout_s: float = 240) -> str:
    """Run a command to its end, check its exit code, return what it printed."""
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def count(folder: Path) -> int:
    """Files in a folder (0 when it is not there)."""
    return len(list(folder.iterdir())) if folder.is_dir() else 0


# ---------------------------------------------------------------- small parts for tests of single modules

TINY = BackboneConfig("tiny16", patch_size=16, dim=16, depth=3, heads=2, ffn="mlp", ffn_hidden=32)


@lru_cache(maxsize=4)
def tiny_backbone(config: BackboneConfig = TINY, weights: str = "random:0") -> Backbone:
    """A real backbone of 3 layers and width 16: milliseconds to load and to run."""
    from dinoray.vision.weights import load_backbone

    return load_backbone(config, weights)


def use_tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs in this process compute with `tiny_backbone`, whatever model they name."""
    backbone = tiny_backbone()
    monkeypatch.setattr("dinoray.vision.weights.load_backbone", lambda *args, **kwargs: backbone)


class DictStore(Store):
    """Objects in a dictionary, thread-safe; `order` is the keys in the order they were put."""

    def __init__(self, objects: dict[str, bytes] | None = None):
        self.url, self.objects, self.order = "dict://", dict(objects or {}), []
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        """The object's bytes."""
        try:
            return self.objects[key]
        except KeyError:
            raise FileNotFoundError(key) from None

    def open(self, key: str) -> BinaryIO:
        """The object as a file."""
        return io.BytesIO(self.get(key))

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Create or replace."""
        with self._lock:
            self.objects[key] = bytes(data)
            self.order.append(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create, or False."""
        with self._lock:
            if key in self.objects:
                return False
            self.objects[key] = bytes(data)
            self.order.append(key)
            return True

    def exists(self, key: str) -> bool:
        """Whether it is there."""
        return key in self.objects

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) below a folder."""
        found = [(key, len(data)) for key, data in list(self.objects.items())
                 if not prefix or key.startswith(prefix + "/")]
        return iter(found)

    def delete(self, key: str) -> None:
        """Remove."""
        self.objects.pop(key, None)


def make_item(name: str, *, size: int = 10, version: str = "1", **fields: object) -> Item:
    """An item of one file that need not exist."""
    return Item(name, (FileRef(f"/in/{name}", size, version),), **fields)  # type: ignore[arg-type]


def item_of_file(path: Path, **fields: object) -> Item:
    """An item of one real file."""
    info = path.stat()
    return Item(str(fields.pop("item_id", path.name)),
                (FileRef(str(path), info.st_size, str(info.st_mtime_ns)),), **fields)  # type: ignore[arg-type]


def make_plan(store: Store, items: Iterable[Item], *, prefix: str = "_dinoray", fingerprint: str = "f" * 16,
              max_items: int = 3, max_bytes: int = 10**9, **facts: object) -> Plan:
    """Seal a plan of these items in `store` and read it back."""
    writer = PlanWriter(store, prefix, fingerprint, max_items=max_items, max_bytes=max_bytes)
    for item in items:
        writer.add(item_row(item), item_digest(item))
    writer.seal(**facts)
    return Plan(store, prefix)


def run_cells(sources: Path | str, out: Path, **fields: object) -> Outcome:
    """As `run`, for a job of cells (30 µm crops of 32 px at 1 µm per px unless said otherwise)."""
    values = {"model": "vitt16", "weights": "random", "no_ray": True, "crop_um": 30.0, "crop_px": 32, "pixel_size_um": 1.0,
              **fields}
    return extract_images(ExtractCellsJob(sources=(str(sources),), out=str(out), **values), say=lambda line: None)
