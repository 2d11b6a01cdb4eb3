"""What a training can be taken up from: the newest state, and the best one, beside the output.

`OUT/_dinoray/states/last-<step>-<digest>.pt` is written whole first, then `last.json` points at it; older ones go last. Bytes
that were written once are never written over, so a run killed anywhere finds a whole state. The best one
(`best-<step>-<digest>.pt`) belongs to the newest: that one's progress names it, and what it does not name is of steps that
were lost. Read with torch's weights-only loader: a state runs no code.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import torch

from dinoray.errors import OutputDamaged
from dinoray.failpoints import reach
from dinoray.io.stores import LocalStore, Store

PREFIX = "_dinoray/states"
POINTER = f"{PREFIX}/last.json"
_TODO = "restore it from a copy, or delete the output's _dinoray/states to begin anew"


def save_best(store: Store, step: int, state: dict[str, Any]) -> dict[str, str]:
    """Store a state of tensors and plain values; returns what finds it again (`key`, `sha256`), for the progress."""
    return _put(store, "best", step, state)[0]


def save_last(store: Store, step: int, state: dict[str, Any], best: dict[str, str]) -> None:
    """Store the newest state, point at it, then drop older ones and every best state but `best`."""
    found, size = _put(store, "last", step, state)
    store.put(POINTER, json.dumps({"step": step, "bytes": size, **found}, indent=1).encode())
    for old, _ in list(store.list(PREFIX)):
        if old not in (POINTER, found["key"], best.get("key")):
            store.delete(old)


def _put(store: Store, kind: str, step: int, state: dict[str, Any]) -> tuple[dict[str, str], int]:
    sink = io.BytesIO()
    torch.save(state, sink)
    data = sink.getbuffer()
    digest = hashlib.sha256(data).hexdigest()
    key = f"{PREFIX}/{kind}-{step:09d}-{digest[:12]}.pt"
    store.put(key, data)
    reach("train.state")
    return {"key": key, "sha256": digest}, len(data)


def load_last(store: Store, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The state that `last.json` points at, or None. Raises OutputDamaged when it is not what was written."""
    before = None
    while True:
        found = _pointer(store)
        if found is None:
            return None
        try:
            return _read(store, found, device)
        except FileNotFoundError as error:
            if found["key"] == before:
                raise OutputDamaged("a saved state is missing", where=f"{store.url}/{found['key']}", todo=_TODO) from error
            before = found["key"]  # a newer one may have replaced it since the pointer was read: look once more


def load_best(store: Store, progress: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """The best state of the newest one's `progress`. Raises OutputDamaged where it is missing or not what was written."""
    found = progress.get("best_state")
    if not found:
        raise OutputDamaged("the best state of the training is missing", where=f"{store.url}/{PREFIX}", todo=_TODO)
    try:
        return _read(store, found, device)
    except FileNotFoundError as error:
        raise OutputDamaged("the best state of the training is missing", where=f"{store.url}/{found['key']}", todo=_TODO) from error


def _read(store: Store, found: dict[str, str], device: torch.device | str) -> dict[str, Any]:
    """Raises FileNotFoundError, OutputDamaged."""
    # a local file is read twice, never held whole beside the tensors that come out of it
    with store.open(found["key"]) if isinstance(store, LocalStore) else io.BytesIO(store.get(found["key"])) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != found["sha256"]:
            raise OutputDamaged("a saved state is not what was written", where=f"{store.url}/{found['key']}", todo=_TODO)
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)


def _pointer(store: Store) -> dict[str, str] | None:
    """What `last.json` points at, or None."""
    try:
        pointer = json.loads(store.get(POINTER))
        return {"key": pointer["key"], "sha256": pointer["sha256"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputDamaged(f"what points at the last state cannot be read: {error!r}", where=f"{store.url}/{POINTER}",
                            todo=_TODO) from error
