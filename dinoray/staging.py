"""Weights where every worker finds them: a folder below the output (or `staging`), named by their digest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinoray.io.stores import Store, open_store

MARKER = "STAGED"
"""Written last: a folder without it is not whole."""


def staged(base: str, digest: str, write: Callable[[Store, str], None]) -> str:
    """URL of the folder `_dinoray/weights/<digest>` of `base`; `write` fills that prefix of the store where it is not there yet."""
    prefix = f"_dinoray/weights/{digest}"
    store = open_store(base)
    if not store.exists(f"{prefix}/{MARKER}"):
        write(store, prefix)
        store.put(f"{prefix}/{MARKER}", b"all files are here\n")
    return f"{store.url}/{prefix}"


def store_backbone(backbone: Any, store: Store, prefix: str) -> None:
    """Write a backbone's weights below a prefix of a store, as `load_backbone` reads them."""
    from dinoray.vision.weights import save_backbone

    with tempfile.TemporaryDirectory(prefix="dinoray-stage-") as folder:
        save_backbone(backbone, folder)
        for file in sorted(Path(folder).iterdir()):
            store.put(f"{prefix}/{file.name}", file.read_bytes())
