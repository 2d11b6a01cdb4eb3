"""Helpers of the tests: run jobs in this process or by the real command, and compare outputs byte for byte."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from dinoray.config import ExtractImagesJob
from dinoray.extraction import Outcome, extract_images
from dinoray.io.stores import open_store
from dinoray.verification import open_run, verify_deep

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
    """Every object below features/ and dense/, temporary ones included."""
    store = open_store(str(out))
    return {key: store.get(key) for folder in ("features", "dense") for key, _ in store.list(folder)}


def check_whole(out: Path) -> None:
    """Everything that must hold of a finished output, from its files alone."""
    store, plan, ledger = open_run(str(out))
    verify_deep(store, plan, ledger)  # checksums, rows, planned = rows + quarantined, disjoint
    receipts = list(ledger.receipts(plan.unit_ids))
    named = {stored.key for receipt in receipts for stored in receipt.objects}
    assert set(data_objects(out)) == {key for key in named if key.startswith(("features/", "dense/"))}
    assert not list(store.list("_dinoray/tmp"))
    planned = Counter(item.item_id for unit in plan.units() for item in unit.items)
    rows = {item for key in named if key.startswith("features/")
            for item in pq.read_table(io.BytesIO(store.get(key)), columns=["item_id"])["item_id"].to_pylist()}
    bad = Counter(ledger.quarantine(receipts)["item_id"].to_pylist())
    assert Counter(rows) + bad == planned
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
