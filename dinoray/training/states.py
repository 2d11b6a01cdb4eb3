"""What a training can be taken up from: the newest state, and the best one, beside the output.

`OUT/_dinoray/states/<kind>-<step>.pt` is written whole first, then `<kind>.json` points at it; older ones go last. A run
killed anywhere finds a whole state. Read with torch's weights-only loader: a state runs no code.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any, Literal

import torch

from dinoray.errors import OutputDamaged
from dinoray.failpoints import reach
from dinoray.io.stores import LocalStore, Store

PREFIX = "_dinoray/states"
Kind = Literal["last", "best"]
_TODO = "restore it from a copy, or delete the output's _dinoray/states to begin anew"


def save_state(store: Store, kind: Kind, step: int, state: dict[str, Any]) -> None:
    """Store a state of tensors and plain values, then point at it."""
    sink = io.BytesIO()
    torch.save(state, sink)
    data = sink.getbuffer()
    key = f"{PREFIX}/{kind}-{step:09d}.pt"
    store.put(key, data)
    reach("train.state")
    pointer = {"step": step, "key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    store.put(f"{PREFIX}/{kind}.json", json.dumps(pointer, indent=1).encode())
    for old, _ in list(store.list(PREFIX)):
        if old.startswith(f"{PREFIX}/{kind}-") and old != key:
            store.delete(old)


def load_state(store: Store, kind: Kind, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The state that `<kind>.json` points at, or None. Raises OutputDamaged when it is not what was written."""
    before = None
    while True:
        found = _pointer(store, kind)
        if found is None:
            return None
        key, digest = found
        where = f"{store.url}/{key}"
        try:
            # a local file is read twice, never held whole beside the tensors that come out of it
            with store.open(key) if isinstance(store, LocalStore) else io.BytesIO(store.get(key)) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise OutputDamaged("a saved state is not what was written", where=where, todo=_TODO)
                file.seek(0)
                return torch.load(file, map_location=device, weights_only=True)
        except FileNotFoundError as error:
            if key == before:
                raise OutputDamaged("a saved state is missing", where=where, todo=_TODO) from error
            before = key  # a newer one may have replaced it since the pointer was read: look once more


def _pointer(store: Store, kind: Kind) -> tuple[str, str] | None:
    """(key, sha256) of the state that `<kind>.json` points at, or None."""
    try:
        pointer = json.loads(store.get(f"{PREFIX}/{kind}.json"))
        return pointer["key"], pointer["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputDamaged(f"what points at the {kind} state cannot be read: {error!r}", where=f"{store.url}/{PREFIX}/{kind}.json",
                            todo=_TODO) from error
