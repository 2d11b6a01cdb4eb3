"""Weights where every worker finds them: a folder below the output (or `staging`), named by what is in it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinoray.io.stores import Store, open_store

MARKER = "STAGED"
"""Written last: a folder without it is not whole."""


def staged(base: str, name: str, write: Callable[[Store, str], None]) -> str:
    """URL of the folder `_dinoray/weights/<name>` of `base`; `write` fills that prefix of the store where it is not there yet.

    `name` must be the digests of all that `write` writes: a folder that is there is taken as it is.
    """
    prefix = f"_dinoray/weights/{name}"
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
