"""Weights where every worker finds them: a folder below the output (or `staging`), named by their digest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from dinoray.io.stores import open_store

MARKER = "STAGED"
"""Written last: a folder without it is not whole."""


def staged(base: str, digest: str, write: Callable[[Path], object]) -> str:
    """URL of the folder `_dinoray/weights/<digest>` of `base`; `write` fills a local folder where it is not there yet."""
    prefix = f"_dinoray/weights/{digest}"
    store = open_store(base)
    if not store.exists(f"{prefix}/{MARKER}"):
        with tempfile.TemporaryDirectory(prefix="dinoray-stage-") as folder:
            write(Path(folder))
            for file in sorted(Path(folder).iterdir()):
                store.put(f"{prefix}/{file.name}", file.read_bytes())
        store.put(f"{prefix}/{MARKER}", b"all files are here\n")
    return f"{store.url}/{prefix}"
